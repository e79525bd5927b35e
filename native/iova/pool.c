#include "pool.h"

#include <assert.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define CACHE_LINE 64
#define FIRST_BLOCK (size_t)4096
#define HUGE_PAGE (size_t)(2 << 20)
#define KEPT (size_t)(64 << 10) /* bytes */

struct vfiopy_pool_block {
    struct vfiopy_pool_block *next;
    size_t size;
    char *fresh, *end;
};

static_assert(sizeof(struct vfiopy_pool_block) <= CACHE_LINE, "the block's head takes one line");

void vfiopy_pool_init(struct vfiopy_pool *pool, size_t object_size)
{
    *pool = (struct vfiopy_pool){.object_size = (object_size + CACHE_LINE - 1) & ~(size_t)(CACHE_LINE - 1)};
}

static void free_blocks(struct vfiopy_pool_block *block)
{
    while (block) {
        struct vfiopy_pool_block *next = block->next;

        ASAN_UNPOISON_MEMORY_REGION(block, block->size);
        free(block);
        block = next;
    }
}

void vfiopy_pool_destroy(struct vfiopy_pool *pool)
{
    free_blocks(pool->oldest);
    vfiopy_pool_init(pool, pool->object_size);
}

static void fill(struct vfiopy_pool_block *block, size_t objects, size_t object_size)
{
    block->fresh = (char *)block + CACHE_LINE;
    block->end = block->fresh + objects * object_size;
    ASAN_POISON_MEMORY_REGION(block->fresh, objects * object_size);
}

void vfiopy_pool_shrink(struct vfiopy_pool *pool)
{
    struct vfiopy_pool_block *first = pool->oldest;

    if (pool->bytes <= KEPT)
        return;
    free_blocks(first->next);
    first->next = NULL;
    pool->newest = pool->filling = first;
    pool->returned = NULL;
    pool->bytes = first->size;
    pool->capacity = (first->size - CACHE_LINE) / pool->object_size;
    fill(first, pool->capacity, pool->object_size);
}

static bool add_block(struct vfiopy_pool *pool)
{
    size_t size = pool->newest ? 2 * pool->newest->size : FIRST_BLOCK, objects;
    struct vfiopy_pool_block *block;

    if (size > HUGE_PAGE)
        size = HUGE_PAGE;
    block = aligned_alloc(size == HUGE_PAGE ? HUGE_PAGE : CACHE_LINE, size);
    if (!block)
        return false;
    if (size == HUGE_PAGE)
        madvise(block, size, MADV_HUGEPAGE); /* a wish */
    objects = (size - CACHE_LINE) / pool->object_size;
    *block = (struct vfiopy_pool_block){.size = size};
    fill(block, objects, pool->object_size);
    if (pool->newest)
        pool->newest->next = block;
    else
        pool->oldest = pool->filling = block;
    pool->newest = block;
    pool->capacity += objects;
    pool->bytes += size;
    return true;
}

bool vfiopy_pool_grow(struct vfiopy_pool *pool, size_t objects)
{
    while (pool->capacity < objects) {
        if (!add_block(pool))
            return false;
    }
    return true;
}

void *vfiopy_pool_take(struct vfiopy_pool *pool)
{
    void *object = pool->returned;

    if (object) {
        ASAN_UNPOISON_MEMORY_REGION(object, pool->object_size);
        pool->returned = *(void **)object;
    } else {
        while (pool->filling->fresh == pool->filling->end)
            pool->filling = pool->filling->next;
        object = pool->filling->fresh;
        ASAN_UNPOISON_MEMORY_REGION(object, pool->object_size);
        pool->filling->fresh += pool->object_size;
    }
    pool->used++;
    return object;
}

void vfiopy_pool_give(struct vfiopy_pool *pool, void *object)
{
    *(void **)object = pool->returned;
    pool->returned = object;
    ASAN_POISON_MEMORY_REGION(object, pool->object_size);
    pool->used--;
}
