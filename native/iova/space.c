#include "internal.h"

#include <stdlib.h>
#include <time.h>

void vfiopy_lock(struct vfiopy_space *space)
{
    pthread_mutex_lock(&space->lock);
}

void vfiopy_unlock(struct vfiopy_space *space)
{
    pthread_mutex_unlock(&space->lock);
}

void vfiopy_wait(struct vfiopy_space *space)
{
    space->waiters++;
    pthread_cond_wait(&space->changed, &space->lock);
    space->waiters--;
}

int vfiopy_fail(struct vfiopy_failure *failure, enum vfiopy_result result)
{
    failure->result = result;
    failure->clash.state = -1;
    return result;
}

int vfiopy_fail_at(struct vfiopy_failure *failure, enum vfiopy_result result, const struct vfiopy_mapping *clash)
{
    failure->result = result;
    failure->clash.first = clash->iova.first;
    failure->clash.last = clash->iova.last;
    failure->clash.state = clash->state;
    return result;
}

int vfiopy_fail_range(struct vfiopy_failure *failure, enum vfiopy_result result, struct vfiopy_range clash)
{
    failure->result = result;
    failure->clash.first = clash.first;
    failure->clash.last = clash.last;
    failure->clash.state = -1;
    return result;
}

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

void vfiopy_space_forget(struct vfiopy_space *space, struct vfiopy_gone *gone)
{
    struct vfiopy_rb *top;

    vfiopy_lock(space);
    while ((top = space->by_iova.top))
        vfiopy_erase(space, (struct vfiopy_mapping *)top, gone);
    vfiopy_unlock(space);
}

void vfiopy_space_destroy(struct vfiopy_space *space)
{
    for (size_t owner = 0; owner < space->owner_count; owner++)
        free(space->owners[owner].name);
    free(space->owners);
    for (struct vfiopy_handed_out *next, *it = space->handed_out; it; it = next) {
        next = it->next;
        free(it);
    }
    vfiopy_geometry_destroy(space);
    vfiopy_free_destroy(&space->free);
    vfiopy_pool_destroy(&space->pool);
    pthread_cond_destroy(&space->changed);
    pthread_mutex_destroy(&space->lock);
    free(space);
}

void vfiopy_erase(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_gone *gone)
{
    uint64_t first = mapping->iova.first, last = mapping->iova.last;

    vfiopy_pins_free(space, mapping);
    vfiopy_rb_erase(&space->by_iova, &mapping->iova.rb);
    if (mapping->address_known && mapping->state != VFIOPY_RESERVED)
        vfiopy_rb_erase(&space->by_address, &mapping->address.rb);
    vfiopy_free_give(&space->free, vfiopy_cell_of(&space->geometry, first), first, last);
    if (mapping->state != VFIOPY_RESERVED) {
        space->kind_mappings[mapping->kind]--;
        space->kind_bytes[mapping->kind] -= last - first + 1;
        space->mapped_bytes -= last - first + 1;
    }
    space->states[mapping->state]--;
    space->mappings--;
    space->lost_addresses -= mapping->address_lost;
    mapping->next = gone->head;
    gone->head = mapping;
    gone->space = space;
    vfiopy_changed(space);
}

bool vfiopy_gone_pop(struct vfiopy_gone *gone, void **memory)
{
    struct vfiopy_mapping *mapping = gone->head;
    struct vfiopy_space *space = gone->space;

    if (!mapping)
        return false;
    gone->head = mapping->next;
    *memory = mapping->memory;
    vfiopy_lock(space);
    vfiopy_pool_give(&space->pool, mapping);
    if (!space->pool.used)
        vfiopy_pool_shrink(&space->pool);
    vfiopy_unlock(space);
    return true;
}

/* --- looking ------------------------------------------------------------------------------------------------- */

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

int vfiopy_space_by_address(struct vfiopy_space *space, struct vfiopy_range range, struct vfiopy_views *views)
{
    struct vfiopy_interval *address;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
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
