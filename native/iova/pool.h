/*
 * Objects of one size, aligned to a cache line, from blocks that grow up to a huge page: a look-up among a million
 * of them should miss neither twice in the cache nor once in the TLB for every node. Not locked.
 */
#ifndef VFIOPY_IOVA_POOL_H
#define VFIOPY_IOVA_POOL_H

#include <stdbool.h>
#include <stddef.h>

struct vfiopy_pool {
    size_t object_size; /* a multiple of 64 */
    size_t used, capacity;
    void *returned;                               /* linked by their first word */
    struct vfiopy_pool_block *oldest, *newest;
    struct vfiopy_pool_block *filling; /* what never was in use comes from here: it was not even touched */
    size_t bytes;
};

void vfiopy_pool_init(struct vfiopy_pool *pool, size_t object_size);
void vfiopy_pool_destroy(struct vfiopy_pool *pool);

bool vfiopy_pool_grow(struct vfiopy_pool *pool, size_t objects);

/* Have room for so many objects in all, those in use included; false without memory. */
static inline bool vfiopy_pool_reserve(struct vfiopy_pool *pool, size_t objects)
{
    return pool->capacity >= objects || vfiopy_pool_grow(pool, objects);
}

/* There is room. The content is whatever was there. */
void *vfiopy_pool_take(struct vfiopy_pool *pool);
void vfiopy_pool_give(struct vfiopy_pool *pool, void *object);

/* Nothing is in use: give memory back, but not the little that the next objects would need at once. */
void vfiopy_pool_shrink(struct vfiopy_pool *pool);

#endif
