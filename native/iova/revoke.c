/*
 * Device memory that its exporter took away, and gave back.
 *
 * The kernel empties the page tables of every importer by itself and says so to nobody: the IOVA stays taken, nothing
 * is behind it any more, also after the memory is there again. So the book is told by who did it. A revoked mapping
 * cannot be pinned or reached, is not replayed into mappers that come, and can be unmapped or restored.
 */
#include "mappers.h"

#include <errno.h>

/* With the lock. NULL where it is not mapped any more, or something else is. */
static struct vfiopy_mapping *same(const struct vfiopy_space *space, uint64_t iova, uint64_t serial)
{
    struct vfiopy_mapping *mapping = vfiopy_mapping_at(space, iova);

    return mapping && mapping->serial == serial && mapping->state != VFIOPY_RESERVED ? mapping : NULL;
}

bool vfiopy_space_set_revoked(struct vfiopy_space *space, uint64_t iova, uint64_t serial, bool revoked)
{
    struct vfiopy_mapping *mapping;

    vfiopy_lock(space);
    mapping = same(space, iova, serial);
    if (mapping)
        mapping->revoked = revoked;
    vfiopy_unlock(space);
    return mapping;
}

/*
 * Without the lock: take what is stale out of each mapper, then map it anew in all that are active.
 *
 * A mapper that says that it does not have it may be right (an unmap before could not be answered) or not; mapping it
 * tells. Then it is still there for the next try.
 */
static int map_anew(struct vfiopy_space *space, const struct vfiopy_mapping *mapping, uint32_t *there, uint32_t active,
                    struct vfiopy_failure *failure)
{
    uint32_t done = 0, denied = 0;
    int result = VFIOPY_OK;

    for (uint32_t left = *there; left && !result; left = vfiopy_without_lowest(left)) {
        result = vfiopy_unmap_in(vfiopy_lowest(space, left), mapping, failure);
        if (result && vfiopy_not_there(failure)) {
            denied |= left & -left;
            result = VFIOPY_OK;
        }
        if (!result)
            *there &= ~(left & -left);
    }
    for (uint32_t left = active; left && !result; left = vfiopy_without_lowest(left)) {
        result = vfiopy_map_in(vfiopy_lowest(space, left), mapping, failure);
        if (!result)
            done |= left & -left;
        else if (failure->error == EEXIST)
            *there |= denied & left & -left;
    }
    if (result)
        done = vfiopy_mappers_undo(space, mapping, done, vfiopy_unmap_in);
    *there |= done;
    return result;
}

int vfiopy_space_restore(struct vfiopy_space *space, uint64_t iova, uint64_t serial, struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping;
    uint32_t there, active, entered;
    int result;

    vfiopy_lock(space);
    while ((mapping = same(space, iova, serial)) && mapping->busy)
        vfiopy_wait(space);
    if (!mapping) {
        vfiopy_fail_range(failure, VFIOPY_NOT_MAPPED, (struct vfiopy_range){iova, iova});
    } else if (mapping->state == VFIOPY_CLOSING || mapping->state == VFIOPY_UNMAPPING) {
        vfiopy_fail_at(failure, VFIOPY_IS_UNMAPPING, mapping);
        mapping = NULL;
    } else if (mapping->state != VFIOPY_LIVE) {
        vfiopy_fail_at(failure, VFIOPY_BUSY, mapping);
        mapping = NULL;
    }
    if (!mapping) {
        vfiopy_unlock(space);
        return (int)failure->result;
    }
    there = mapping->mapped_in;
    active = space->active;
    entered = there | active;
    mapping->busy = true;
    vfiopy_mappers_enter(space, entered);
    vfiopy_unlock(space);
    result = map_anew(space, mapping, &there, active, failure);
    vfiopy_lock(space);
    vfiopy_set_mapped_in(mapping, there);
    vfiopy_mappers_leave(space, entered);
    mapping->revoked = result != VFIOPY_OK;
    mapping->busy = false;
    vfiopy_changed(space);
    vfiopy_unlock(space);
    return result;
}
