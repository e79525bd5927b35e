/* Looking things up, and the figures of a book. */
#include <stdlib.h>

#include "internal.h"

void vfiopy_fill_view(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                      struct vfiopy_view *view)
{
    *view = (struct vfiopy_view){
        .iova = {mapping->iova.first, mapping->iova.last},
        .serial = mapping->serial,
        .address = mapping->address_known ? mapping->address.first : 0,
        .fd_offset = mapping->has_fd ? mapping->fd_offset : 0, /* else that cache line need not be read */
        .pins = vfiopy_pins_of(mapping),
        .memory = mapping->memory,
        .fd = mapping->has_fd ? mapping->fd : -1,
        .prot = mapping->prot,
        .kind = mapping->kind,
        .state = mapping->state,
        .revoked = mapping->revoked,
    };
    if (space->retain)
        space->retain(view->memory);
}

bool vfiopy_space_find(struct vfiopy_space *space, uint64_t iova, struct vfiopy_view *view)
{
    struct vfiopy_mapping *mapping;
    bool found;

    vfiopy_lock(space);
    mapping = vfiopy_mapping_at(space, iova);
    if (mapping) { /* both are needed, and are misses among many mappings: have them come at the same time */
        __builtin_prefetch(mapping->memory);
        __builtin_prefetch(&mapping->address);
    }
    found = mapping && mapping->state != VFIOPY_RESERVED;
    if (found)
        vfiopy_fill_view(space, mapping, view);
    vfiopy_unlock(space);
    return found;
}

bool vfiopy_space_has(struct vfiopy_space *space, uint64_t iova)
{
    const struct vfiopy_mapping *mapping;
    bool found;

    vfiopy_lock(space);
    mapping = vfiopy_mapping_at(space, iova);
    found = mapping && mapping->state != VFIOPY_RESERVED;
    vfiopy_unlock(space);
    return found;
}

/* Make room for one more; the array doubles. */
static struct vfiopy_view *one_more(struct vfiopy_views *views)
{
    if ((views->count & (views->count - 1)) == 0) {
        size_t room = views->count ? 2 * views->count : 1;
        struct vfiopy_view *items = realloc(views->items, room * sizeof(*items));

        if (!items)
            return NULL;
        views->items = items;
    }
    return &views->items[views->count++];
}

int vfiopy_views_add(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                     struct vfiopy_views *views)
{
    struct vfiopy_view *view = one_more(views);

    if (!view)
        return VFIOPY_NO_MEMORY;
    vfiopy_fill_view(space, mapping, view);
    return VFIOPY_OK;
}

int vfiopy_space_overlapping(struct vfiopy_space *space, struct vfiopy_range range, struct vfiopy_views *views)
{
    struct vfiopy_mapping *mapping;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    for (mapping = vfiopy_mapping_in(space, range); mapping && !result;
         mapping = vfiopy_mapping_next_in(mapping, range)) {
        if (mapping->state != VFIOPY_RESERVED)
            result = vfiopy_views_add(space, mapping, views);
    }
    vfiopy_unlock(space);
    return result;
}

/* Most books are never asked, and then need not keep the order. */
static void list_addresses(struct vfiopy_space *space)
{
    struct vfiopy_mapping *mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));

    space->addresses_listed = true;
    for (; mapping; mapping = vfiopy_mapping_after(mapping)) {
        if (mapping->state != VFIOPY_RESERVED)
            vfiopy_list_address(space, mapping);
    }
}

int vfiopy_space_by_address(struct vfiopy_space *space, struct vfiopy_range range, struct vfiopy_views *views)
{
    struct vfiopy_interval *address;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    if (!space->addresses_listed)
        list_addresses(space);
    for (address = vfiopy_interval_overlap(&space->by_address, range.first, range.last); address && !result;
         address = vfiopy_interval_next_overlap(address, range.first, range.last))
        result = vfiopy_views_add(space, VFIOPY_ENTRY(address, struct vfiopy_mapping, address), views);
    vfiopy_unlock(space);
    return result;
}

int vfiopy_space_check(struct vfiopy_space *space, struct vfiopy_range range, uint8_t prot,
                       struct vfiopy_views *views, struct vfiopy_failure *failure)
{
    uint64_t at = range.first;
    struct vfiopy_mapping *mapping;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    for (mapping = vfiopy_mapping_at(space, at);; mapping = vfiopy_mapping_after(mapping)) {
        struct vfiopy_view *view;
        uint64_t skipped;

        if (!mapping || mapping->iova.first > at || !vfiopy_state_is_mapped(mapping->state)) {
            result = vfiopy_fail_range(failure, VFIOPY_NOT_MAPPED, (struct vfiopy_range){at, at});
            break;
        }
        if ((mapping->prot & prot) != prot) {
            failure->value = mapping->prot;
            result = vfiopy_fail_at(failure, VFIOPY_NO_ACCESS, mapping);
            break;
        }
        if (mapping->kind == VFIOPY_MMIO && mapping->revoked) {
            result = vfiopy_fail_at(failure, VFIOPY_REVOKED, mapping);
            break;
        }
        if (space->lost_addresses && mapping->address_lost) {
            result = vfiopy_fail_at(failure, VFIOPY_NO_ADDRESS, mapping);
            break;
        }
        if (vfiopy_views_add(space, mapping, views)) {
            result = vfiopy_fail(failure, VFIOPY_NO_MEMORY);
            break;
        }
        view = &views->items[views->count - 1];
        skipped = at - view->iova.first;
        view->iova.first = at;
        view->address += skipped;
        view->fd_offset += skipped;
        if (mapping->iova.last >= range.last) {
            view->iova.last = range.last;
            break;
        }
        at = mapping->iova.last + 1;
    }
    vfiopy_unlock(space);
    return result;
}

void vfiopy_space_stats(struct vfiopy_space *space, struct vfiopy_stats *stats)
{
    *stats = (struct vfiopy_stats){0};
    vfiopy_lock(space);
    stats->mappings = space->mappings;
    stats->mapped_bytes = space->mapped_bytes;
    stats->max_mappings = space->geometry.max_mappings;
    stats->page_sizes = space->geometry.page_sizes;
    for (int kind = 0; kind < VFIOPY_KINDS; kind++) {
        stats->kind_mappings[kind] = space->kind_mappings[kind];
        stats->kind_bytes[kind] = space->kind_bytes[kind];
    }
    for (int state = 0; state <= VFIOPY_UNKNOWN; state++)
        stats->states[state] = space->states[state];
    vfiopy_free_settle(&space->free);
    stats->free_ranges = space->free.pool.used;
    stats->free_spans = space->free.spans;
    stats->largest_free_span = vfiopy_free_largest_span(&space->free);
    stats->pins = space->pins;
    stats->pinned_pages = space->pinned_pages;
    stats->pin_bytes = space->pin_bytes;
    stats->book_bytes = sizeof(*space) + space->pool.bytes + space->free.pool.bytes + space->pin_bytes;
    for (int slot = 0; slot < VFIOPY_MAX_MAPPERS; slot++)
        stats->mappers += space->mappers[slot].token != 0;
    for (size_t owner = 1; owner < space->owner_count; owner++)
        stats->owners += space->owners[owner].here;
    vfiopy_unlock(space);
}
