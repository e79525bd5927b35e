/* The kernel mappers of a space: one map or unmap fans out to all of them, and rolls back everywhere or nowhere. */
#include "mappers.h"

#include <errno.h>

/* Keep the mappers of these slots from leaving. With the lock, as is vfiopy_mappers_leave(). */
void vfiopy_mappers_enter(struct vfiopy_space *space, uint32_t slots)
{
    for (; slots; slots = vfiopy_without_lowest(slots))
        vfiopy_lowest(space, slots)->calls++;
}

void vfiopy_mappers_leave(struct vfiopy_space *space, uint32_t slots)
{
    for (; slots; slots = vfiopy_without_lowest(slots))
        vfiopy_lowest(space, slots)->calls--;
    vfiopy_changed(space);
}

static uint64_t charged_bytes(const struct vfiopy_mapping *mapping)
{
    bool memory = mapping->kind == VFIOPY_HOST || mapping->kind == VFIOPY_FILE;

    return memory ? mapping->iova.last - mapping->iova.first + 1 : 0;
}

void vfiopy_set_mapped_in(struct vfiopy_space *space, struct vfiopy_mapping *mapping, uint32_t slots)
{
    uint32_t changed = mapping->mapped_in ^ slots;

    for (; changed; changed = vfiopy_without_lowest(changed)) {
        struct vfiopy_mapper *mapper = vfiopy_lowest(space, changed);
        bool more = slots & changed & -changed;

        mapper->mappings += more ? 1 : -1;
        mapper->charged += more ? charged_bytes(mapping) : -charged_bytes(mapping);
    }
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

int vfiopy_mappers_map(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_failure *failure)
{
    uint32_t missing = space->active & ~mapping->mapped_in, slots = missing | mapping->mapped_in;
    uint32_t done = mapping->mapped_in;
    int result = VFIOPY_OK;

    vfiopy_mappers_enter(space, slots);
    vfiopy_unlock(space);
    for (; missing && !result; missing = vfiopy_without_lowest(missing)) {
        result = vfiopy_map_in(vfiopy_lowest(space, missing), mapping, failure);
        if (!result)
            done |= missing & -missing;
    }
    if (result)
        done = vfiopy_mappers_undo(space, mapping, done, vfiopy_unmap_in);
    vfiopy_lock(space);
    vfiopy_set_mapped_in(space, mapping, done);
    vfiopy_mappers_leave(space, slots);
    return result;
}

bool vfiopy_not_there(const struct vfiopy_failure *failure)
{
    return failure->result == VFIOPY_SHORT || failure->error == ENOENT;
}

int vfiopy_mappers_unmap(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_failure *failure)
{
    uint32_t slots = mapping->mapped_in, lost = 0;
    int result = VFIOPY_OK;

    vfiopy_mappers_enter(space, slots);
    vfiopy_unlock(space);
    for (uint32_t left = slots; left && !result; left = vfiopy_without_lowest(left)) {
        result = vfiopy_unmap_in(vfiopy_lowest(space, left), mapping, failure);
        if (!result)
            lost |= left & -left;
    }
    if (result)
        lost = vfiopy_mappers_undo(space, mapping, lost, vfiopy_map_in);
    vfiopy_lock(space);
    vfiopy_set_mapped_in(space, mapping, mapping->mapped_in & ~lost);
    vfiopy_mappers_leave(space, slots);
    if (result)
        failure->clash.state = lost || vfiopy_not_there(failure) ? VFIOPY_UNKNOWN : VFIOPY_LIVE;
    return result;
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
    vfiopy_set_mapped_in(space, mapping, mapping->mapped_in & ~gone);
    vfiopy_mappers_leave(space, slots);
    return gone == slots ? VFIOPY_OK : (int)failure->result;
}
