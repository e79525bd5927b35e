/* Mapping: reserve an IOVA, call the mappers without the lock, commit or abort. */
#include "internal.h"

static bool power_of_two(uint64_t value)
{
    return value && !(value & (value - 1));
}

static int misaligned(struct vfiopy_failure *failure, const char *argument, uint64_t value, uint64_t needed)
{
    failure->call = argument;
    failure->value = needed;
    return vfiopy_fail_range(failure, VFIOPY_BAD_ALIGNMENT, (struct vfiopy_range){value, value});
}

static int check_request(const struct vfiopy_request *request, uint64_t page, struct vfiopy_failure *failure)
{
    uint64_t needed = request->alignment > page ? request->alignment : page;
    bool fixed = request->iova != VFIOPY_NO_FIXED_IOVA;

    if (!request->size || (fixed && request->size - 1 > UINT64_MAX - request->iova))
        return vfiopy_fail(failure, VFIOPY_BAD_SIZE);
    if (!request->prot || (request->prot & ~VFIOPY_PROT_ALL))
        return vfiopy_fail(failure, VFIOPY_BAD_PROT);
    if (request->kind >= VFIOPY_KINDS)
        return vfiopy_fail(failure, VFIOPY_BAD_KIND);
    if (request->alignment && !power_of_two(request->alignment))
        return misaligned(failure, "alignment", request->alignment, page);
    if (fixed && (request->iova & (needed - 1)))
        return misaligned(failure, "iova", request->iova, needed);
    if ((request->size | request->address | request->fd_offset) & (page - 1)) {
        if (request->size & (page - 1))
            return misaligned(failure, "size", request->size, page);
        if (request->address & (page - 1))
            return misaligned(failure, "address", request->address, page);
        return misaligned(failure, "fd_offset", request->fd_offset, page);
    }
    if (request->size - 1 > request->limit || (fixed && request->iova > request->limit - (request->size - 1))) {
        failure->value = request->limit;
        return vfiopy_fail(failure, VFIOPY_OVER_LIMIT);
    }
    return VFIOPY_OK;
}

/* Does the memory contain a whole page of this size where the page must begin? Then the IOMMU can use one. */
static bool contains_page(uint64_t address, uint64_t size, uint64_t page)
{
    uint64_t begin = (address + page - 1) & ~(page - 1);
    uint64_t skipped = begin - address;

    return begin >= address && size >= page && skipped <= size - page;
}

/* Choose a place: congruent to the memory for the largest page that it could use, else for the next one. */
static struct vfiopy_free *choose(struct vfiopy_space *space, const struct vfiopy_request *request,
                                  uint8_t zone, uint64_t *iova)
{
    uint64_t sizes = space->geometry.page_sizes, smallest = sizes & -sizes;
    uint64_t alignment = request->alignment > smallest ? request->alignment : smallest;
    /* Without an address the file offset says how the memory lies in large pages. */
    uint64_t address = request->address ? request->address : request->fd_offset;
    struct vfiopy_wish wish = {.span = request->size - 1, .limit = request->limit, .zone = zone};

    if (!vfiopy_takes_large_page(space, request->size)) {
        struct vfiopy_free *again = vfiopy_free_again(&space->free, &wish, alignment);

        if (again) {
            *iova = again->first;
            return again;
        }
        sizes = smallest;
    }
    while (sizes != smallest) {
        uint64_t page = UINT64_C(1) << (63 - __builtin_clzll(sizes));
        uint64_t shared = page < alignment ? page : alignment;
        struct vfiopy_free *range;

        sizes &= ~page;
        if (!contains_page(address, request->size, page) || (address & (shared - 1)))
            continue;
        wish.modulus = page > alignment ? page : alignment;
        wish.offset = page > alignment ? address & (page - 1) : 0;
        range = vfiopy_free_find(&space->free, &wish, iova);
        if (range)
            return range;
    }
    wish.modulus = alignment;
    wish.offset = 0;
    wish.thorough = true;
    return vfiopy_free_find(&space->free, &wish, iova);
}

/* Why is a fixed place not free? */
static int fail_taken(const struct vfiopy_space *space, struct vfiopy_range range, struct vfiopy_failure *failure)
{
    const struct vfiopy_mapping *mapping = vfiopy_mapping_in(space, range);

    if (!mapping)
        return vfiopy_fail_outside(&space->geometry, range, failure);
    return vfiopy_fail_at(failure, vfiopy_state_is_mapped(mapping->state) ? VFIOPY_OVERLAP : VFIOPY_BUSY, mapping);
}

static int place(struct vfiopy_space *space, const struct vfiopy_request *request, struct vfiopy_free **from,
                 uint64_t *iova, struct vfiopy_failure *failure)
{
    uint64_t largest;

    if (request->iova != VFIOPY_NO_FIXED_IOVA) {
        struct vfiopy_range range = {request->iova, request->iova + (request->size - 1)};

        *iova = request->iova;
        *from = vfiopy_free_holding(&space->free, range.first, range.last);
        return *from ? VFIOPY_OK : fail_taken(space, range, failure);
    }
    *from = NULL;
    if (request->transient)
        *from = choose(space, request, VFIOPY_ZONE_TRANSIENT, iova);
    if (!*from)
        *from = choose(space, request, VFIOPY_ZONE_NORMAL, iova);
    if (*from)
        return VFIOPY_OK;
    largest = vfiopy_free_largest_span(&space->free);
    failure->value = largest;
    vfiopy_fail(failure, VFIOPY_NO_SPACE);
    failure->clash.state = space->free.pool.used ? 0 : -1;
    return VFIOPY_NO_SPACE;
}

/* Field by field: zeroing all of it first would take longer. */
static struct vfiopy_mapping *new_mapping(struct vfiopy_space *space, const struct vfiopy_request *request,
                                          uint64_t iova)
{
    struct vfiopy_mapping *mapping = vfiopy_pool_take(&space->pool);
    uint64_t span = request->size - 1;

    mapping->iova.first = iova;
    mapping->iova.last = iova + span;
    mapping->memory = request->memory;
    mapping->prot = request->prot;
    mapping->kind = request->kind;
    mapping->state = VFIOPY_RESERVED;
    mapping->address_known = request->address && request->address + span >= request->address;
    mapping->has_fd = request->fd >= 0;
    mapping->busy = false;
    mapping->handed_out = false;
    mapping->told = false;
    mapping->address.first = request->address;
    mapping->address.last = request->address + span;
    mapping->pins = NULL;
    mapping->serial = ++space->last_serial;
    mapping->mapped_in = 0;
    mapping->fd = request->fd;
    mapping->fd_offset = request->fd_offset;
    mapping->next = NULL;
    mapping->physical = request->physical;
    mapping->unmap_id = 0;
    mapping->taken_over = request->take_over;
    mapping->address_lost = false;
    mapping->revoked = false;
    return mapping;
}

int vfiopy_find_place(struct vfiopy_space *space, const struct vfiopy_request *request, struct vfiopy_free **from,
                      uint64_t *iova, struct vfiopy_failure *failure)
{
    const struct vfiopy_geometry *geometry = &space->geometry;
    int result = check_request(request, geometry->page_sizes & -geometry->page_sizes, failure);

    if (result)
        return result;
    if (geometry->max_mappings && space->mappings >= geometry->max_mappings) {
        failure->value = geometry->max_mappings;
        return vfiopy_fail(failure, VFIOPY_TOO_MANY);
    }
    if (!vfiopy_free_reserve(&space->free, space->mappings + 1 + geometry->cell_count) ||
        !vfiopy_pool_reserve(&space->pool, space->pool.used + 1))
        return vfiopy_fail(failure, VFIOPY_NO_MEMORY);
    return place(space, request, from, iova, failure);
}

struct vfiopy_mapping *vfiopy_put(struct vfiopy_space *space, const struct vfiopy_request *request, uint64_t iova,
                                  struct vfiopy_mapping *before)
{
    struct vfiopy_mapping *mapping = new_mapping(space, request, iova);

    if (before && before->iova.last == iova - 1)
        vfiopy_interval_insert_above(&space->by_iova, &before->iova, &mapping->iova);
    else
        vfiopy_interval_insert(&space->by_iova, &mapping->iova);
    space->mappings++;
    space->states[VFIOPY_RESERVED]++;
    return mapping;
}

/* On success the range is taken and the mapping is in the book, reserved; with the lock. */
static int reserve_locked(struct vfiopy_space *space, const struct vfiopy_request *request,
                          struct vfiopy_mapping **mapping, struct vfiopy_failure *failure)
{
    struct vfiopy_free *from;
    uint64_t iova;
    int result = vfiopy_find_place(space, request, &from, &iova, failure);

    if (result)
        return result;
    vfiopy_free_take(&space->free, from, iova, iova + (request->size - 1));
    *mapping = vfiopy_put(space, request, iova, NULL);
    return VFIOPY_OK;
}

static void go_live(struct vfiopy_space *space, struct vfiopy_mapping *mapping)
{
    uint64_t size = mapping->iova.last - mapping->iova.first + 1;

    vfiopy_list_address(space, mapping);
    space->kind_mappings[mapping->kind]++;
    space->kind_bytes[mapping->kind] += size;
    space->mapped_bytes += size;
    mapping->taken_over = false; /* from here on it is like any other */
    vfiopy_set_state(space, mapping, VFIOPY_LIVE);
}

int vfiopy_settle(struct vfiopy_space *space, struct vfiopy_mapping *mapping, int result, struct vfiopy_gone *gone,
                  struct vfiopy_failure *failure)
{
    mapping->next = NULL;
    while (!result && (space->active & ~mapping->mapped_in)) {
        if (vfiopy_mappers_map(space, mapping, failure))
            result = failure->result;
    }
    mapping->busy = false;
    if (!result) {
        go_live(space, mapping);
    } else if (!mapping->mapped_in) {
        failure->clash.first = mapping->iova.first;
        failure->clash.last = mapping->iova.last;
        failure->clash.state = -1;
        vfiopy_erase(space, mapping, gone);
    } else {
        go_live(space, mapping); /* it counts as mapped from here on */
        vfiopy_set_state(space, mapping, VFIOPY_UNKNOWN);
        vfiopy_fail_at(failure, result, mapping);
        failure->kept = true;
    }
    return result;
}

static int commit_locked(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_gone *gone,
                         struct vfiopy_failure *failure)
{
    int result;

    mapping->busy = true;
    result = vfiopy_settle(space, mapping, VFIOPY_OK, gone, failure);
    vfiopy_changed(space);
    return result;
}

int vfiopy_space_map(struct vfiopy_space *space, const struct vfiopy_request *request, uint64_t *iova,
                     uint64_t *serial, struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping;
    struct vfiopy_gone gone = {0};
    int result;

    vfiopy_lock(space);
    result = vfiopy_enter_at_once(space, failure);
    if (!result) {
        result = reserve_locked(space, request, &mapping, failure);
        if (!result) {
            *iova = mapping->iova.first;
            if (serial)
                *serial = mapping->serial;
            result = commit_locked(space, mapping, &gone, failure);
        }
        vfiopy_leave_at_once(space);
    }
    if (gone.head)
        vfiopy_gone_free(&gone);
    vfiopy_unlock(space);
    return result;
}

int vfiopy_space_begin_map(struct vfiopy_space *space, const struct vfiopy_request *request, uint64_t *iova,
                           struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping;
    int result;

    vfiopy_lock(space);
    result = reserve_locked(space, request, &mapping, failure);
    if (!result) {
        *iova = mapping->iova.first;
        mapping->handed_out = true;
    }
    vfiopy_unlock(space);
    return result;
}

/* The mapping that begin_map reserved at `iova`, taken back from the caller; with the lock. */
static struct vfiopy_mapping *take_back(struct vfiopy_space *space, uint64_t iova, struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping = vfiopy_mapping_at(space, iova);

    if (mapping && mapping->iova.first == iova && mapping->state == VFIOPY_RESERVED && mapping->handed_out) {
        mapping->handed_out = false;
        return mapping;
    }
    if (mapping)
        vfiopy_fail_at(failure, VFIOPY_BUSY, mapping);
    else
        vfiopy_fail_range(failure, VFIOPY_NOT_MAPPED, (struct vfiopy_range){iova, iova});
    return NULL;
}

int vfiopy_space_commit_map(struct vfiopy_space *space, uint64_t iova, uint64_t *serial, struct vfiopy_gone *gone,
                            struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping;
    int result;

    vfiopy_lock(space);
    mapping = take_back(space, iova, failure);
    if (mapping)
        *serial = mapping->serial;
    result = mapping ? commit_locked(space, mapping, gone, failure) : (int)failure->result;
    vfiopy_unlock(space);
    return result;
}

int vfiopy_space_abort_map(struct vfiopy_space *space, uint64_t iova, struct vfiopy_gone *gone,
                           struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping;

    vfiopy_lock(space);
    mapping = take_back(space, iova, failure);
    if (mapping)
        vfiopy_erase(space, mapping, gone);
    vfiopy_unlock(space);
    return mapping ? VFIOPY_OK : (int)failure->result;
}
