/* The lock of a book, and who waits for a change in it. */
#include <unistd.h>

#include "internal.h"

void vfiopy_wait(struct vfiopy_space *space)
{
    space->waiters++;
    pthread_cond_wait(&space->changed, &space->lock);
    space->waiters--;
}

void vfiopy_space_set_stepwise(struct vfiopy_space *space, bool stepwise)
{
    vfiopy_lock(space);
    space->stepwise = stepwise;
    while (space->stepwise && space->at_once)
        vfiopy_wait(space);
    vfiopy_unlock(space);
}

bool vfiopy_space_is_stepwise(struct vfiopy_space *space)
{
    bool stepwise;

    vfiopy_lock(space);
    stepwise = space->stepwise;
    vfiopy_unlock(space);
    return stepwise;
}

void vfiopy_pins_gone(struct vfiopy_space *space, const struct vfiopy_mapping *mapping)
{
    const uint64_t one = 1;

    vfiopy_changed(space);
    for (const struct vfiopy_unmap *unmap = space->watched; unmap; unmap = unmap->next_watched) {
        /* It does not block, and a counter that is full says the same as one that is not. */
        if (unmap->id == mapping->unmap_id && write(unmap->eventfd, &one, sizeof(one)) < 0)
            continue;
    }
}
