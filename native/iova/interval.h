/* Intervals with both ends included, in a tree that knows the largest end below each node. They may overlap. */
#ifndef VFIOPY_IOVA_INTERVAL_H
#define VFIOPY_IOVA_INTERVAL_H

#include "rbtree.h"

struct vfiopy_interval {
    struct vfiopy_rb rb;
    uint64_t first, last; /* the two that look-ups read share a cache line with the links */
    uint64_t max_last;    /* of the whole subtree */
};

bool vfiopy_interval_refresh(struct vfiopy_rb *node);
/* Where nothing overlaps, the larger side ends last: the other need not be looked at. */
bool vfiopy_interval_refresh_disjoint(struct vfiopy_rb *node);

#define VFIOPY_INTERVAL_TREE {NULL, vfiopy_interval_refresh}
#define VFIOPY_DISJOINT_TREE {NULL, vfiopy_interval_refresh_disjoint}

void vfiopy_interval_insert(struct vfiopy_rb_tree *tree, struct vfiopy_interval *interval);

/* An interval that contains `point`, or NULL. Only for trees whose intervals are disjoint. */
static inline struct vfiopy_interval *vfiopy_interval_at(const struct vfiopy_rb_tree *tree, uint64_t point)
{
    struct vfiopy_interval *interval = (struct vfiopy_interval *)tree->top;

    while (interval) {
        if (point < interval->first)
            interval = (struct vfiopy_interval *)interval->rb.kid[0];
        else if (point > interval->last)
            interval = (struct vfiopy_interval *)interval->rb.kid[1];
        else
            break;
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

/* The lowest interval that shares a value with [first, last], or NULL; and the next one after that. */
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
