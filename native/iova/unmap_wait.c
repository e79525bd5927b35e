/* Waiting for pins to go, with a condition or with an eventfd. */
#include <time.h>

#include "internal.h"

static const struct vfiopy_mapping *still_pinned(const struct vfiopy_space *space, const struct vfiopy_unmap *unmap)
{
    const struct vfiopy_mapping *mapping = vfiopy_mapping_in(space, unmap->range);

    while (mapping && !(mapping->unmap_id == unmap->id && vfiopy_pins_of(mapping)))
        mapping = vfiopy_mapping_next_in(mapping, unmap->range);
    return mapping;
}

void vfiopy_unmap_wait(struct vfiopy_space *space, struct vfiopy_unmap *unmap, uint64_t nanoseconds)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += (time_t)(nanoseconds / 1000000000);
    until.tv_nsec += (long)(nanoseconds % 1000000000);
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    vfiopy_lock(space);
    space->waiters++;
    while (still_pinned(space, unmap)) {
        if (pthread_cond_timedwait(&space->changed, &space->lock, &until))
            break;
    }
    space->waiters--;
    vfiopy_unlock(space);
}

void vfiopy_unmap_wait_idle(struct vfiopy_space *space, const struct vfiopy_unmap *unmap)
{
    struct vfiopy_mapping *mapping;

    vfiopy_lock(space);
    do {
        mapping = vfiopy_mapping_in(space, unmap->range);
        while (mapping && !(mapping->busy && vfiopy_state_is_mapped(mapping->state)))
            mapping = vfiopy_mapping_next_in(mapping, unmap->range);
        if (mapping)
            vfiopy_wait(space);
    } while (mapping);
    vfiopy_unlock(space);
}

void vfiopy_unmap_watch(struct vfiopy_space *space, struct vfiopy_unmap *unmap, int eventfd)
{
    vfiopy_lock(space);
    unmap->eventfd = eventfd;
    unmap->next_watched = space->watched;
    space->watched = unmap;
    vfiopy_unlock(space);
}

void vfiopy_unmap_unwatch(struct vfiopy_space *space, struct vfiopy_unmap *unmap)
{
    struct vfiopy_unmap **at;

    vfiopy_lock(space);
    for (at = &space->watched; *at && *at != unmap; at = &(*at)->next_watched)
        ;
    if (*at)
        *at = unmap->next_watched;
    vfiopy_unlock(space);
}
