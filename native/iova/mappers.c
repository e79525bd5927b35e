/* The kernel mappers of a space: one map or unmap fans out to all of them, and rolls back everywhere or nowhere. */
#include "mappers.h"

#include <errno.h>

void vfiopy_set_mapped_in(struct vfiopy_mapping *mapping, uint32_t slots)
{
    if (mapping->mapped_in != slots) /* who has called its mappers may be reading it */
        mapping->mapped_in = slots;
}

static struct vfiopy_range range_of(const struct vfiopy_mapping *mapping)
{
    return (struct vfiopy_range){mapping->iova.first, mapping->iova.last};
}

int vfiopy_lose_address_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                           struct vfiopy_failure *failure)
{
    failure->error = mapper->ops->lose_address(mapper, mapping, &failure->call);
    failure->mapper = mapper->token;
    return failure->error ? vfiopy_fail_at(failure, VFIOPY_KERNEL, mapping) : VFIOPY_OK;
}

int vfiopy_set_address_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                          struct vfiopy_failure *failure)
{
    failure->error = mapper->ops->set_address(mapper, mapping, &failure->call);
    failure->mapper = mapper->token;
    return failure->error ? vfiopy_fail_at(failure, VFIOPY_KERNEL, mapping) : VFIOPY_OK;
}

int vfiopy_map_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                  struct vfiopy_failure *failure)
{
    if (mapping->kind == VFIOPY_REMOTE) {
        failure->mapper = mapper->token;
        return vfiopy_fail_at(failure, VFIOPY_BAD_KIND, mapping);
    }
    if (mapping->address_lost)
        return vfiopy_fail_at(failure, VFIOPY_NO_ADDRESS, mapping);
    if (mapper->kind == VFIOPY_MAPPER_TYPE1 && !mapping->address_known) {
        failure->mapper = mapper->token;
        return vfiopy_fail_at(failure, VFIOPY_BAD_KIND, mapping); /* type1 knows memory by its address only */
    }
    if (mapping->taken_over)
        return vfiopy_set_address_in(mapper, mapping, failure);
    failure->error = mapper->ops->map(mapper, mapping, &failure->call);
    if (!failure->error)
        return VFIOPY_OK;
    failure->mapper = mapper->token;
    return vfiopy_fail_at(failure, VFIOPY_KERNEL, mapping);
}

int vfiopy_unmap_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                    struct vfiopy_failure *failure)
{
    struct vfiopy_range range = range_of(mapping);
    uint64_t unmapped;

    if (mapping->taken_over)
        return vfiopy_lose_address_in(mapper, mapping, failure);
    failure->error = mapper->ops->unmap(mapper, range, &unmapped, &failure->call);
    failure->mapper = mapper->token;
    if (failure->error)
        return vfiopy_fail_at(failure, VFIOPY_KERNEL, mapping);
    if (unmapped == range.last - range.first + 1)
        return VFIOPY_OK;
    failure->value = unmapped;
    return vfiopy_fail_at(failure, VFIOPY_SHORT, mapping);
}

uint32_t vfiopy_mappers_undo(struct vfiopy_space *space, const struct vfiopy_mapping *mapping, uint32_t slots,
                             vfiopy_mapper_call how)
{
    struct vfiopy_failure second = {0}; /* the first one is reported */
    uint32_t stuck = slots;

    for (; slots; slots = vfiopy_without_lowest(slots)) {
        if (!how(vfiopy_lowest(space, slots), mapping, &second))
            stuck &= ~(slots & -slots);
    }
    return stuck;
}

static uint32_t slots_of(const struct vfiopy_mapping *list)
{
    uint32_t slots = 0;

    for (; list; list = list->next)
        slots |= list->mapped_in;
    return slots;
}

/* Map it in the slots of `wanted` where it is not yet, or in none at all. Changes `*slots`, where it is. */
static int map_in_all(struct vfiopy_space *space, const struct vfiopy_mapping *mapping, uint32_t wanted,
                      uint32_t *slots, struct vfiopy_failure *failure)
{
    uint32_t missing = wanted & ~*slots;
    int result;

    for (; missing; missing = vfiopy_without_lowest(missing)) {
        result = vfiopy_map_in(vfiopy_lowest(space, missing), mapping, failure);
        if (result) {
            *slots = vfiopy_mappers_undo(space, mapping, *slots, vfiopy_unmap_in);
            return result;
        }
        *slots |= missing & -missing;
    }
    return VFIOPY_OK;
}

struct vfiopy_mapping *vfiopy_mappers_map(struct vfiopy_space *space, struct vfiopy_mapping *list,
                                          struct vfiopy_failure *failure)
{
    uint32_t wanted = space->active, slots = wanted | slots_of(list), stuck = 0;
    struct vfiopy_mapping *failed;

    vfiopy_mappers_enter(space, slots);
    vfiopy_unlock(space);
    for (failed = list; failed; failed = failed->next) {
        stuck = failed->mapped_in;
        if (map_in_all(space, failed, wanted, &stuck, failure))
            break;
    }
    vfiopy_lock(space);
    for (; list != failed; list = list->next)
        vfiopy_set_mapped_in(list, list->mapped_in | wanted);
    if (failed)
        vfiopy_set_mapped_in(failed, stuck);
    vfiopy_mappers_leave(space, slots);
    return failed;
}

bool vfiopy_not_there(const struct vfiopy_failure *failure)
{
    return failure->result == VFIOPY_SHORT || failure->error == ENOENT;
}

/* Unmap it everywhere; or map it again where it was lost. `*lost`: where it is not, after a failure. */
static int unmap_in_all(struct vfiopy_space *space, const struct vfiopy_mapping *mapping, uint32_t *lost,
                        struct vfiopy_failure *failure)
{
    uint32_t slots = mapping->mapped_in, done = 0;
    int result;

    for (; slots; slots = vfiopy_without_lowest(slots)) {
        result = vfiopy_unmap_in(vfiopy_lowest(space, slots), mapping, failure);
        if (result) {
            *lost = vfiopy_mappers_undo(space, mapping, done, vfiopy_map_in);
            return result;
        }
        done |= slots & -slots;
    }
    return VFIOPY_OK;
}

struct vfiopy_mapping *vfiopy_mappers_unmap(struct vfiopy_space *space, struct vfiopy_mapping *list,
                                            struct vfiopy_failure *failure)
{
    uint32_t slots = slots_of(list), lost = 0;
    struct vfiopy_mapping *failed = list;

    if (!slots)
        return NULL;
    vfiopy_mappers_enter(space, slots);
    vfiopy_unlock(space);
    while (failed && !unmap_in_all(space, failed, &lost, failure))
        failed = failed->next;
    vfiopy_lock(space);
    for (; list != failed; list = list->next)
        vfiopy_set_mapped_in(list, 0);
    if (failed) {
        vfiopy_set_mapped_in(failed, failed->mapped_in & ~lost);
        failure->clash.state = lost || vfiopy_not_there(failure) ? VFIOPY_UNKNOWN : VFIOPY_LIVE;
    }
    vfiopy_mappers_leave(space, slots);
    return failed;
}

int vfiopy_mappers_resync(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_failure *failure)
{
    uint32_t slots = mapping->mapped_in, gone = 0;

    vfiopy_mappers_enter(space, slots);
    vfiopy_unlock(space);
    for (uint32_t left = slots; left; left = vfiopy_without_lowest(left)) {
        struct vfiopy_failure mine = {0};

        if (!vfiopy_unmap_in(vfiopy_lowest(space, left), mapping, &mine) || vfiopy_not_there(&mine))
            gone |= left & -left;
        else if (!failure->result)
            *failure = mine;
    }
    vfiopy_lock(space);
    vfiopy_set_mapped_in(mapping, mapping->mapped_in & ~gone);
    vfiopy_mappers_leave(space, slots);
    return gone == slots ? VFIOPY_OK : (int)failure->result;
}
