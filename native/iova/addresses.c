/*
 * Memory that moves while devices use it: type1's VADDR update, and its counterpart under iommufd.
 *
 * First the addresses are lost: the kernel keeps pages and IOVAs, but must not be asked to pin by address. Then, in
 * this process or (by taking the mappings over) in another one, each mapping gets an address again.
 */
#include "mappers.h"

/* Do `how` in every mapper that has the mapping, or undo it with `back`. With the lock, which is let go meanwhile. */
static int in_all(struct vfiopy_space *space, struct vfiopy_mapping *mapping, vfiopy_mapper_call how,
                  vfiopy_mapper_call back, struct vfiopy_failure *failure)
{
    uint32_t slots = mapping->mapped_in, done = 0;
    int result = VFIOPY_OK;

    mapping->busy = true;
    vfiopy_mappers_enter(space, slots);
    vfiopy_unlock(space);
    for (uint32_t left = slots; left && !result; left = vfiopy_without_lowest(left)) {
        result = how(vfiopy_lowest(space, left), mapping, failure);
        if (!result)
            done |= left & -left;
    }
    if (result)
        vfiopy_mappers_undo(space, mapping, done, back);
    vfiopy_lock(space);
    vfiopy_mappers_leave(space, slots);
    mapping->busy = false;
    return result;
}

static int lose(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_failure *failure)
{
    int result = in_all(space, mapping, vfiopy_lose_address_in, vfiopy_set_address_in, failure);

    if (result)
        return result;
    vfiopy_unlist_address(space, mapping);
    mapping->address_known = false;
    mapping->address_lost = true;
    space->lost_addresses++;
    return VFIOPY_OK;
}

static void found(struct vfiopy_space *space, struct vfiopy_mapping *mapping)
{
    uint64_t first = mapping->address.first, last = first + (mapping->iova.last - mapping->iova.first);

    mapping->address.last = last;
    mapping->address_known = first && last >= first;
    vfiopy_list_address(space, mapping);
    mapping->address_lost = false;
    space->lost_addresses--;
}

/* Whole mappings, live, idle, and with an address if so asked. VFIOPY_BUSY also while somebody works on one. */
static int check_range(struct vfiopy_space *space, struct vfiopy_range range, bool with_address,
                       struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping = vfiopy_mapping_in(space, range);

    for (; mapping; mapping = vfiopy_mapping_next_in(mapping, range)) {
        if (mapping->iova.first < range.first || mapping->iova.last > range.last)
            return vfiopy_fail_at(failure, VFIOPY_CUTS, mapping);
        if (mapping->state == VFIOPY_CLOSING || mapping->state == VFIOPY_UNMAPPING)
            return vfiopy_fail_at(failure, VFIOPY_IS_UNMAPPING, mapping);
        if (mapping->state != VFIOPY_LIVE || mapping->busy)
            return vfiopy_fail_at(failure, VFIOPY_BUSY, mapping);
        if (mapping->address_lost == with_address)
            return vfiopy_fail_at(failure, with_address ? VFIOPY_NO_ADDRESS : VFIOPY_HAS_ADDRESS, mapping);
    }
    return VFIOPY_OK;
}

int vfiopy_space_lose_addresses(struct vfiopy_space *space, struct vfiopy_range range, uint64_t *bytes,
                                struct vfiopy_failure *failure)
{
    struct vfiopy_range rest = range;
    struct vfiopy_mapping *mapping;
    int result;

    *bytes = 0;
    vfiopy_lock(space);
    result = check_range(space, range, true, failure);
    while (!result && (mapping = vfiopy_mapping_in(space, rest))) {
        /* The lock was let go for the mapping before: this one may not be as it was checked. */
        result = check_range(space, (struct vfiopy_range){mapping->iova.first, mapping->iova.last}, true, failure);
        if (!result)
            result = lose(space, mapping, failure);
        if (result)
            break;
        *bytes += mapping->iova.last - mapping->iova.first + 1;
        if (mapping->iova.last >= range.last)
            break;
        rest.first = mapping->iova.last + 1;
    }
    /* All or nothing: give back what was lost before the failure. */
    for (uint64_t end = rest.first; result && range.first < end; range.first = mapping->iova.last + 1) {
        struct vfiopy_failure second = {0};

        mapping = vfiopy_mapping_in(space, (struct vfiopy_range){range.first, end - 1});
        if (!mapping)
            break;
        if (mapping->address_lost && !mapping->busy &&
            !in_all(space, mapping, vfiopy_set_address_in, vfiopy_lose_address_in, &second))
            found(space, mapping);
    }
    vfiopy_unlock(space);
    return result;
}

int vfiopy_space_set_address(struct vfiopy_space *space, struct vfiopy_range range, uint64_t address, void **memory,
                             struct vfiopy_failure *failure)
{
    uint64_t page, before;
    struct vfiopy_mapping *mapping;
    int result;

    vfiopy_lock(space);
    page = space->geometry.page_sizes & -space->geometry.page_sizes;
    mapping = vfiopy_mapping_at(space, range.first);
    if (!mapping)
        result = vfiopy_fail_range(failure, VFIOPY_NOT_MAPPED, range);
    else if (mapping->iova.first != range.first || mapping->iova.last != range.last)
        result = vfiopy_fail_at(failure, VFIOPY_CUTS, mapping);
    else
        result = check_range(space, range, false, failure);
    if (!result && (address & (page - 1))) {
        failure->call = "address";
        failure->value = page;
        result = vfiopy_fail_range(failure, VFIOPY_BAD_ALIGNMENT, (struct vfiopy_range){address, address});
    }
    if (!result) {
        before = mapping->address.first;
        mapping->address.first = address;
        result = in_all(space, mapping, vfiopy_set_address_in, vfiopy_lose_address_in, failure);
        if (result) {
            mapping->address.first = before;
        } else {
            void *old = mapping->memory;

            mapping->memory = *memory;
            *memory = old;
            found(space, mapping);
        }
    }
    vfiopy_unlock(space);
    return result;
}
