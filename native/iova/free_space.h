/*
 * The free ranges of a space, by address and by size.
 *
 * Nodes come from a pool that is filled before anything changes, so that neither taking a range
 * nor giving one back can fail.
 */
#ifndef VFIOPY_IOVA_FREE_SPACE_H
#define VFIOPY_IOVA_FREE_SPACE_H

#include "interval.h"
#include "pool.h"

enum vfiopy_zone { VFIOPY_ZONE_NORMAL, VFIOPY_ZONE_TRANSIENT, VFIOPY_ZONES };

/* A cache line for searches by IOVA and one for searches by size, which has copies of what it needs. */
struct vfiopy_free {
    struct vfiopy_interval where;
    uint8_t zone;

    _Alignas(64) struct vfiopy_rb by_size; /* order: size, then first */
    uint64_t span, first;                  /* size less one */
    uint64_t lowest;                       /* the lowest `first` of the subtree in by_size */
};

/* Usable IOVAs that belong together: free ranges never reach from one cell into another. */
struct vfiopy_cell {
    uint64_t first, last;
    uint8_t zone;
};

struct vfiopy_free_space {
    struct vfiopy_rb_tree by_iova;
    struct vfiopy_rb_tree by_size[VFIOPY_ZONES];
    struct vfiopy_pool pool; /* what is in use is in the trees */
    uint64_t spans;          /* sum of (size - 1) */

    /* What was given back last is in no tree yet: the next one of its size takes it as it is. */
    struct vfiopy_free last;
    struct vfiopy_cell last_cell;
    bool has_last;
};

struct vfiopy_wish {
    uint64_t span;    /* size less one: the whole 64-bit space has no size */
    uint64_t limit;   /* the highest IOVA allowed */
    uint64_t modulus; /* a power of two: IOVA = offset modulo modulus */
    uint64_t offset;
    uint8_t zone;
    bool thorough; /* look at every range rather than give up early */
};

void vfiopy_free_init(struct vfiopy_free_space *space);
void vfiopy_free_destroy(struct vfiopy_free_space *space);

/* Be ready for so many ranges; false without memory. */
static inline bool vfiopy_free_reserve(struct vfiopy_free_space *space, size_t ranges)
{
    return vfiopy_pool_reserve(&space->pool, ranges);
}

/* Put what was given back last to the others. The trees and sums say all there is only after that. */
void vfiopy_free_settle(struct vfiopy_free_space *space);

/* The free range that holds all of [first, last], or NULL. */
struct vfiopy_free *vfiopy_free_holding(struct vfiopy_free_space *space, uint64_t first, uint64_t last);

/* What was given back last, if it is just right; else best fit: the smallest range in which the wish can be had, at its
 * lowest place. Never IOVA 0. */
struct vfiopy_free *vfiopy_free_find(struct vfiopy_free_space *space, const struct vfiopy_wish *wish,
                                     uint64_t *iova);

/* What was given back last, if it is just right and so aligned. */
static inline struct vfiopy_free *vfiopy_free_again(struct vfiopy_free_space *space, const struct vfiopy_wish *wish,
                                                    uint64_t alignment)
{
    struct vfiopy_free *last = &space->last;
    bool right = space->has_last && last->span == wish->span && last->zone == wish->zone && last->first &&
                 !(last->first & (alignment - 1)) && last->where.last <= wish->limit;

    return right ? last : NULL;
}

void vfiopy_free_take(struct vfiopy_free_space *space, struct vfiopy_free *from, uint64_t first, uint64_t last);
void vfiopy_free_give(struct vfiopy_free_space *space, const struct vfiopy_cell *cell, uint64_t first, uint64_t last);

/* No range is free any more. */
void vfiopy_free_clear(struct vfiopy_free_space *space);

uint64_t vfiopy_free_largest_span(struct vfiopy_free_space *space);

/* Settled. */
const char *vfiopy_free_verify(const struct vfiopy_free_space *space);

#endif
