/* Mappings that leave the book, and what they kept alive. */
#include "internal.h"

void vfiopy_take_out(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_gone *gone)
{
    uint64_t size = mapping->iova.last - mapping->iova.first + 1;

    if (mapping->pins)
        vfiopy_pins_free(space, mapping);
    vfiopy_rb_erase(&space->by_iova, &mapping->iova.rb);
    if (mapping->state != VFIOPY_RESERVED)
        vfiopy_unlist_address(space, mapping);
    if (mapping->state != VFIOPY_RESERVED) {
        space->kind_mappings[mapping->kind]--;
        space->kind_bytes[mapping->kind] -= size;
        space->mapped_bytes -= size;
    }
    space->states[mapping->state]--;
    space->mappings--;
    space->lost_addresses -= mapping->address_lost;
    mapping->next = gone->head;
    gone->head = mapping;
    gone->space = space;
    vfiopy_changed(space);
}

void vfiopy_erase(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_gone *gone)
{
    uint64_t first = mapping->iova.first, last = mapping->iova.last;

    vfiopy_take_out(space, mapping, gone);
    vfiopy_free_give(&space->free, vfiopy_cell_of(&space->geometry, first), first, last);
}

void *vfiopy_gone_free(struct vfiopy_gone *gone)
{
    struct vfiopy_mapping *mapping = gone->head;
    struct vfiopy_pool *pool = &gone->space->pool;
    void *memory = mapping->memory;

    gone->head = mapping->next;
    vfiopy_pool_give(pool, mapping);
    if (!pool->used)
        vfiopy_pool_shrink(pool);
    return memory;
}

size_t vfiopy_gone_take(struct vfiopy_gone *gone, void **memories, size_t room)
{
    size_t count = 0;

    if (!gone->head)
        return 0;
    vfiopy_lock(gone->space);
    while (gone->head && count < room)
        memories[count++] = vfiopy_gone_free(gone);
    vfiopy_unlock(gone->space);
    return count;
}

bool vfiopy_gone_pop(struct vfiopy_gone *gone, void **memory)
{
    return vfiopy_gone_take(gone, memory, 1) == 1;
}
