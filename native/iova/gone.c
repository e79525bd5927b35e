/* Mappings that leave the book, and what they kept alive. */
#include "internal.h"

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
