/* The debug walk: every link, order, sum and state of the book. */
#include "pins.h"

static const char *verify_mapping(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping)
{
    const struct vfiopy_cell *cell = vfiopy_cell_of(&space->geometry, mapping->iova.first);
    uint64_t page = space->geometry.page_sizes & -space->geometry.page_sizes;
    uint64_t size = mapping->iova.last - mapping->iova.first;

    if (!cell || cell->last < mapping->iova.last)
        return "a mapping lies outside of the usable ranges";
    if ((mapping->iova.first | (mapping->iova.last + 1)) & (page - 1))
        return "a mapping is misaligned";
    if (mapping->address_known && mapping->address.last - mapping->address.first != size)
        return "a mapping's memory has another size than its IOVA range";
    if (!mapping->prot || (mapping->prot & ~VFIOPY_PROT_ALL))
        return "a mapping's prot is wrong";
    if (vfiopy_pins_of(mapping) && !vfiopy_state_is_mapped(mapping->state))
        return "a mapping that is not live has pins";
    if (mapping->state == VFIOPY_RESERVED && !mapping->busy && !mapping->handed_out)
        return "a reserved mapping belongs to nobody";
    if (mapping->state == VFIOPY_UNMAPPING && !(mapping->handed_out || mapping->busy))
        return "nobody is unmapping a mapping that is being unmapped";
    for (int slot = 0; slot < VFIOPY_MAX_MAPPERS; slot++) {
        if ((mapping->mapped_in >> slot & 1) && !space->mappers[slot].token)
            return "a mapping is in a mapper that is gone";
    }
    return NULL;
}

/* Free ranges and mappings, side by side, must fill each cell. */
static const char *verify_cells(const struct vfiopy_space *space)
{
    const struct vfiopy_interval *mapping = (struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0);
    const struct vfiopy_interval *range = (struct vfiopy_interval *)vfiopy_rb_end(&space->free.by_iova, 0);
    bool free_before = false;

    for (size_t i = 0; i < space->geometry.cell_count; i++) {
        const struct vfiopy_cell *cell = &space->geometry.cells[i];
        uint64_t at = cell->first;

        for (free_before = false;; at++) {
            if (range && range->first == at) {
                if (free_before)
                    return "two free ranges should be one";
                if (((const struct vfiopy_free *)range)->zone != cell->zone)
                    return "a free range is in the wrong zone";
                at = range->last;
                range = vfiopy_interval_step(range, 1);
                free_before = true;
            } else if (mapping && mapping->first == at) {
                at = mapping->last;
                mapping = vfiopy_interval_step(mapping, 1);
                free_before = false;
            } else {
                return "an IOVA is neither mapped nor free";
            }
            if (at >= cell->last)
                break;
        }
        if (at != cell->last)
            return "a range reaches out of its cell";
    }
    return mapping || range ? "a range lies outside of all cells" : NULL;
}

static const char *verify_sums(const struct vfiopy_space *space)
{
    uint64_t pins = 0, pages = 0, bytes = 0, mapped = 0, states[VFIOPY_UNKNOWN + 1] = {0}, owned = 0;
    struct vfiopy_mapping *mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));
    uint64_t lost = space->lost_addresses;
    uint32_t present = 0;
    const char *wrong;

    for (; mapping; mapping = vfiopy_mapping_after(mapping)) {
        wrong = verify_mapping(space, mapping);
        if (!wrong)
            wrong = vfiopy_pins_verify(space, mapping, &pins, &pages, &bytes);
        if (wrong)
            return wrong;
        states[mapping->state]++;
        lost -= mapping->address_lost;
        if (mapping->state != VFIOPY_RESERVED)
            mapped += mapping->iova.last - mapping->iova.first + 1;
    }
    for (int state = 0; state <= VFIOPY_UNKNOWN; state++) {
        if (states[state] != space->states[state])
            return "the number of mappings by state is wrong";
    }
    for (size_t owner = 0; owner < space->owner_count; owner++)
        owned += space->owners[owner].pins;
    for (int slot = 0; slot < VFIOPY_MAX_MAPPERS; slot++)
        present += space->mappers[slot].token != 0;
    if (mapped != space->mapped_bytes)
        return "the number of mapped bytes is wrong";
    if (pins != space->pins || pages != space->pinned_pages || bytes != space->pin_bytes || owned != pins)
        return "the sums of pins are wrong";
    if (lost)
        return "the number of mappings without an address is wrong";
    return present == space->present ? NULL : "the number of mappers is wrong";
}

static const char *verify_locked(const struct vfiopy_space *space)
{
    size_t mappings, addresses = 0, known = 0;
    const char *wrong = vfiopy_interval_verify(&space->by_iova, true, NULL, &mappings);
    struct vfiopy_mapping *mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));

    if (!wrong)
        wrong = vfiopy_interval_verify(&space->by_address, false, NULL, &addresses);
    if (!wrong)
        wrong = vfiopy_free_verify(&space->free);
    if (!wrong)
        wrong = verify_cells(space);
    if (!wrong)
        wrong = verify_sums(space);
    if (wrong)
        return wrong;
    for (; mapping; mapping = vfiopy_mapping_after(mapping))
        known += space->addresses_listed && mapping->address_known && mapping->state != VFIOPY_RESERVED;
    if (mappings != space->mappings || mappings > space->pool.used || addresses != known)
        return "the number of mappings is wrong";
    if (space->free.pool.capacity < space->mappings + space->geometry.cell_count)
        return "the pool of free ranges is too small";
    return NULL;
}

const char *vfiopy_space_verify(struct vfiopy_space *space)
{
    const char *wrong;

    vfiopy_lock(space);
    vfiopy_free_settle(&space->free);
    wrong = verify_locked(space);
    vfiopy_unlock(space);
    return wrong;
}
