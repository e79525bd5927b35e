/* The life of a book: made, emptied, freed. */
#include <stdlib.h>
#include <time.h>

#include "internal.h"

struct vfiopy_space *vfiopy_space_create(uint64_t page_size, void (*retain)(void *memory))
{
    struct vfiopy_space *space = calloc(1, sizeof(*space));
    pthread_condattr_t clock;

    if (!space)
        return NULL;
    space->by_iova = (struct vfiopy_rb_tree)VFIOPY_DISJOINT_TREE;
    space->by_address = (struct vfiopy_rb_tree)VFIOPY_INTERVAL_TREE;
    space->retain = retain;
    space->owners = calloc(1, sizeof(*space->owners)); /* owner 0 */
    space->owner_count = 1;
    while ((UINT64_C(1) << space->page_shift) < page_size)
        space->page_shift++;
    vfiopy_free_init(&space->free);
    vfiopy_pool_init(&space->pool, sizeof(struct vfiopy_mapping));
    if (!space->owners || vfiopy_geometry_init(space, page_size)) {
        vfiopy_geometry_destroy(space);
        vfiopy_free_destroy(&space->free);
        free(space->owners);
        free(space);
        return NULL;
    }
    pthread_mutex_init(&space->lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&space->changed, &clock);
    pthread_condattr_destroy(&clock);
    return space;
}

void vfiopy_space_forget(struct vfiopy_space *space, struct vfiopy_gone *gone, struct vfiopy_gone *reachable)
{
    struct vfiopy_rb *top;

    vfiopy_lock(space);
    while ((top = space->by_iova.top)) {
        struct vfiopy_mapping *mapping = (struct vfiopy_mapping *)top;

        vfiopy_erase(space, mapping, mapping->mapped_in ? reachable : gone);
    }
    vfiopy_unlock(space);
}

void vfiopy_space_destroy(struct vfiopy_space *space)
{
    for (size_t owner = 0; owner < space->owner_count; owner++)
        free(space->owners[owner].name);
    free(space->owners);
    vfiopy_geometry_destroy(space);
    vfiopy_free_destroy(&space->free);
    vfiopy_pool_destroy(&space->pool);
    pthread_cond_destroy(&space->changed);
    pthread_mutex_destroy(&space->lock);
    free(space);
}
