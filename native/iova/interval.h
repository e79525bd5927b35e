/*
 * Intervals with both ends included, in a tree. Where they may overlap the tree knows the largest end below each node;
 * where they are disjoint their order says it all.
 */
#ifndef VFIOPY_IOVA_INTERVAL_H
#define VFIOPY_IOVA_INTERVAL_H

#include "rbtree.h"

struct vfiopy_interval {
    struct vfiopy_rb rb;
    uint64_t first, last; /* the two that look-ups read share a cache line with the links */
    uint64_t max_last;    /* of the whole subtree; not kept where nothing overlaps */
};

bool vfiopy_interval_refresh(struct vfiopy_rb *node);

#define VFIOPY_INTERVAL_TREE {NULL, vfiopy_interval_refresh}
#define VFIOPY_DISJOINT_TREE {NULL, NULL}

void vfiopy_interval_insert(struct vfiopy_rb_tree *tree, struct vfiopy_interval *interval);

/* The same without a search, where `before` is the one that will be next to it, below. */
static inline void vfiopy_interval_insert_above(struct vfiopy_rb_tree *tree, struct vfiopy_interval *before,
                                                struct vfiopy_interval *interval)
{
    struct vfiopy_rb *parent = &before->rb, *down = parent->kid[1];

    for (; down; down = down->kid[0])
        parent = down;
    vfiopy_rb_insert(tree, &interval->rb, parent, parent == &before->rb);
}

/* An interval that contains `point`, or NULL. Only for trees whose intervals are disjoint. */
static inline struct vfiopy_interval *vfiopy_interval_at(const struct vfiopy_rb_tree *tree, uint64_t point)
{
    struct vfiopy_interval *interval = (struct vfiopy_interval *)tree->top;

    /* Among many mappings a step is a cache miss: both ways are asked for, before the side is known. */
    while (interval && point - interval->first > interval->last - interval->first) {
        __builtin_prefetch(interval->rb.kid[0]);
        __builtin_prefetch(interval->rb.kid[1]);
        interval = (struct vfiopy_interval *)interval->rb.kid[point > interval->last];
    }
    return interval;
}

/* The neighbours of a point that no interval contains, each NULL if there is none. Only for disjoint ones. */
static inline void vfiopy_interval_around(const struct vfiopy_rb_tree *tree, uint64_t point,
                                          struct vfiopy_interval **below, struct vfiopy_interval **above)
{
    struct vfiopy_interval *interval = (struct vfiopy_interval *)tree->top;

    *below = *above = NULL;
    while (interval) {
        struct vfiopy_interval **side = interval->first > point ? above : below;

        *side = interval;
        interval = (struct vfiopy_interval *)interval->rb.kid[side == below];
    }
}

/* The lowest interval that shares a value with [first, last], or NULL. Only for disjoint ones. */
static inline struct vfiopy_interval *vfiopy_interval_in(const struct vfiopy_rb_tree *tree, uint64_t first,
                                                         uint64_t last)
{
    struct vfiopy_interval *interval = (struct vfiopy_interval *)tree->top, *lowest = NULL;

    while (interval) {
        bool reaches = interval->last >= first;

        if (reaches)
            lowest = interval;
        interval = (struct vfiopy_interval *)interval->rb.kid[!reaches];
    }
    return lowest && lowest->first <= last ? lowest : NULL;
}

/* The same where they may overlap; and the next one after that. */
struct vfiopy_interval *vfiopy_interval_overlap(const struct vfiopy_rb_tree *tree, uint64_t first, uint64_t last);
struct vfiopy_interval *vfiopy_interval_next_overlap(const struct vfiopy_interval *interval, uint64_t first,
                                                     uint64_t last);

static inline struct vfiopy_interval *vfiopy_interval_step(const struct vfiopy_interval *interval, int side)
{
    return (struct vfiopy_interval *)vfiopy_rb_step(&interval->rb, side);
}

/* As vfiopy_rb_verify, and order and the largest ends; `disjoint` asks that nothing overlaps. */
const char *vfiopy_interval_verify(const struct vfiopy_rb_tree *tree, bool disjoint, unsigned *height, size_t *count);

#endif
