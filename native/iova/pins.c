#include "pins.h"

#include <stdlib.h>

uint64_t vfiopy_pins_of(const struct vfiopy_mapping *mapping)
{
    return mapping->pins ? mapping->pins->pins : 0;
}

/* --- who holds how many ------------------------------------------------------------------------------------- */

static struct vfiopy_held *held_by(const struct vfiopy_pins *pins, uint32_t owner)
{
    for (uint32_t i = 0; i < pins->held_count; i++) {
        if (pins->held[i].owner == owner)
            return &pins->held[i];
    }
    return NULL;
}

/* Have an entry for this owner, which may stay at 0 if the pin fails. */
static struct vfiopy_held *hold(struct vfiopy_pins *pins, uint32_t owner)
{
    struct vfiopy_held *held = held_by(pins, owner);

    if (held)
        return held;
    if (pins->held_count == pins->held_room) {
        bool first = pins->held == &pins->one;
        uint32_t room = 2 * pins->held_room;
        struct vfiopy_held *more = realloc(first ? NULL : pins->held, room * sizeof(*more));

        if (!more)
            return NULL;
        if (first)
            more[0] = pins->one;
        pins->held = more;
        pins->held_room = room;
    }
    held = &pins->held[pins->held_count++];
    *held = (struct vfiopy_held){.owner = owner};
    return held;
}

static void let_go_if_empty(struct vfiopy_pins *pins, struct vfiopy_held *held)
{
    if (!held->pins)
        *held = pins->held[--pins->held_count];
}

size_t vfiopy_pins_owners(const struct vfiopy_mapping *mapping)
{
    return mapping->pins ? mapping->pins->held_count : 0;
}

size_t vfiopy_pins_notices(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                           struct vfiopy_notice *notices)
{
    const struct vfiopy_pins *pins = mapping->pins;
    size_t count = 0;

    for (uint32_t i = 0; i < pins->held_count; i++) {
        uint32_t owner = pins->held[i].owner;
        void *callback = space->owners[owner].callback;

        if (!callback)
            continue;
        if (space->retain)
            space->retain(callback);
        notices[count++] = (struct vfiopy_notice){
            .iova = mapping->iova.first,
            .size = mapping->iova.last - mapping->iova.first + 1,
            .owner = owner,
            .callback = callback,
        };
    }
    return count;
}

/* --- pin and unpin ------------------------------------------------------------------------------------------- */

static struct vfiopy_pins *pins_for(struct vfiopy_space *space, struct vfiopy_mapping *mapping)
{
    struct vfiopy_pins *pins = mapping->pins;

    if (pins)
        return pins;
    pins = calloc(1, sizeof(*pins));
    if (!pins)
        return NULL;
    vfiopy_pages_init(&pins->pages, vfiopy_page_count(space, mapping));
    pins->held = &pins->one;
    pins->held_room = 1;
    space->pin_bytes += sizeof(*pins);
    return mapping->pins = pins;
}

void vfiopy_pins_free(struct vfiopy_space *space, struct vfiopy_mapping *mapping)
{
    struct vfiopy_pins *pins = mapping->pins;
    struct vfiopy_pin_sums sums = {0};

    if (!pins)
        return;
    vfiopy_pages_free(&pins->pages, &sums);
    space->pins -= pins->pins;
    space->pinned_pages -= pins->pinned;
    space->pin_bytes += sums.bytes - sizeof(*pins);
    for (uint32_t i = 0; i < pins->held_count; i++)
        space->owners[pins->held[i].owner].pins -= pins->held[i].pins;
    if (pins->held != &pins->one)
        free(pins->held);
    free(pins);
    mapping->pins = NULL;
}

static int check_owner(const struct vfiopy_space *space, uint32_t owner, struct vfiopy_failure *failure)
{
    if (owner == 0 || (owner < space->owner_count && space->owners[owner].here))
        return VFIOPY_OK;
    failure->value = owner;
    return vfiopy_fail(failure, VFIOPY_NO_OWNER);
}

static int check_pinnable(const struct vfiopy_mapping *mapping, uint8_t prot, bool peer,
                          struct vfiopy_failure *failure)
{
    failure->value = mapping->prot;
    if (mapping->state == VFIOPY_CLOSING || mapping->state == VFIOPY_UNMAPPING)
        return vfiopy_fail_at(failure, VFIOPY_IS_UNMAPPING, mapping);
    if (mapping->state != VFIOPY_LIVE)
        return vfiopy_fail_at(failure, VFIOPY_BUSY, mapping);
    if ((mapping->prot & prot) != prot)
        return vfiopy_fail_at(failure, VFIOPY_NO_ACCESS, mapping);
    if (mapping->kind == VFIOPY_MMIO && !peer)
        return vfiopy_fail_at(failure, VFIOPY_BAD_KIND, mapping);
    if (mapping->kind == VFIOPY_MMIO && mapping->revoked)
        return vfiopy_fail_at(failure, VFIOPY_REVOKED, mapping);
    return VFIOPY_OK;
}

static void add_sums(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_held *held,
                     uint64_t pins, const struct vfiopy_pin_sums *sums)
{
    mapping->pins->pins += pins;
    mapping->pins->pinned += sums->pages;
    held->pins += pins;
    space->owners[held->owner].pins += pins;
    space->pins += pins;
    space->pinned_pages += sums->pages;
    space->pin_bytes += sums->bytes;
}

static int pin_one(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_range range,
                   uint32_t owner, struct vfiopy_failure *failure)
{
    struct vfiopy_range pages = vfiopy_pages_in(space, mapping, range);
    struct vfiopy_pins *pins = pins_for(space, mapping);
    struct vfiopy_held *held = pins ? hold(pins, owner) : NULL;
    struct vfiopy_pin_sums sums = {0};
    uint64_t bad = 0;
    int result;

    if (!held)
        return vfiopy_fail(failure, VFIOPY_NO_MEMORY);
    result = vfiopy_pages_add(&pins->pages, pages.first, pages.last, &bad, &sums);
    add_sums(space, mapping, held, result ? 0 : pages.last - pages.first + 1, &sums);
    let_go_if_empty(pins, held);
    if (result) {
        uint64_t at = vfiopy_iova_of_page(space, mapping, bad);

        failure->value = VFIOPY_MAX_PINS;
        vfiopy_fail_range(failure, result, (struct vfiopy_range){at, at});
    }
    return result;
}

static void unpin_one(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_range range,
                      uint32_t owner)
{
    struct vfiopy_range pages = vfiopy_pages_in(space, mapping, range);
    struct vfiopy_held *held = held_by(mapping->pins, owner);
    struct vfiopy_pin_sums sums = {0};

    vfiopy_pages_remove(&mapping->pins->pages, pages.first, pages.last, &sums);
    add_sums(space, mapping, held, -(pages.last - pages.first + 1), &sums);
    let_go_if_empty(mapping->pins, held);
    if (!mapping->pins->pins && mapping->state == VFIOPY_CLOSING)
        vfiopy_pins_gone(space, mapping);
}

int vfiopy_space_pin(struct vfiopy_space *space, struct vfiopy_range range, uint8_t prot, uint32_t owner, bool peer,
                     struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping = NULL, *first;
    int result;

    vfiopy_lock(space);
    result = check_owner(space, owner, failure);
    if (!result && space->lost_addresses) /* in any mapping: as in the kernel */
        result = vfiopy_fail(failure, VFIOPY_NO_ADDRESS);
    do {
        if (result || !(mapping = vfiopy_next_without_hole(space, mapping, range, failure)))
            goto out;
        result = check_pinnable(mapping, prot, peer, failure);
    } while (mapping->iova.last < range.last);
    if (result)
        goto out;
    for (mapping = first = vfiopy_mapping_at(space, range.first);; mapping = vfiopy_mapping_after(mapping)) {
        result = pin_one(space, mapping, range, owner, failure);
        if (result || mapping->iova.last >= range.last)
            break;
    }
    for (; result && first != mapping; first = vfiopy_mapping_after(first))
        unpin_one(space, first, range, owner);
out:
    vfiopy_unlock(space);
    return mapping ? result : (int)failure->result;
}

static int check_unpin(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_range range,
                       uint32_t owner, struct vfiopy_failure *failure)
{
    struct vfiopy_range pages = vfiopy_pages_in(space, mapping, range);
    struct vfiopy_held *held = mapping->pins ? held_by(mapping->pins, owner) : NULL;
    struct vfiopy_pin_sums sums = {0};
    uint64_t bad = pages.first;
    int result = VFIOPY_NOT_PINNED;

    if (held)
        result = vfiopy_pages_prepare_remove(&mapping->pins->pages, pages.first, pages.last, &bad, &sums);
    space->pin_bytes += sums.bytes;
    if (!result && held->pins < pages.last - pages.first + 1)
        result = VFIOPY_NOT_PINNED;
    if (result) {
        uint64_t at = vfiopy_iova_of_page(space, mapping, bad);

        failure->value = owner;
        vfiopy_fail_range(failure, result, (struct vfiopy_range){at, at});
    }
    return result;
}

int vfiopy_space_unpin(struct vfiopy_space *space, struct vfiopy_range range, uint32_t owner,
                       struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping = NULL;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    do {
        mapping = vfiopy_next_without_hole(space, mapping, range, failure);
        if (mapping)
            result = check_unpin(space, mapping, range, owner, failure);
    } while (mapping && !result && mapping->iova.last < range.last);
    if (!mapping || result) {
        vfiopy_unlock(space);
        return failure->result;
    }
    for (mapping = vfiopy_mapping_at(space, range.first);; mapping = vfiopy_mapping_after(mapping)) {
        unpin_one(space, mapping, range, owner);
        if (mapping->iova.last >= range.last)
            break;
    }
    vfiopy_unlock(space);
    return VFIOPY_OK;
}

const char *vfiopy_pins_verify(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                               uint64_t *pins, uint64_t *pages, uint64_t *bytes)
{
    const struct vfiopy_pins *here = mapping->pins;
    uint64_t counts = 0, pinned = 0, held = 0;
    const char *wrong;

    if (!here)
        return NULL;
    *bytes += sizeof(*here);
    wrong = vfiopy_pages_verify(&here->pages, vfiopy_page_count(space, mapping), &counts, &pinned, bytes);
    if (wrong)
        return wrong;
    for (uint32_t i = 0; i < here->held_count; i++) {
        if (!here->held[i].pins || held_by(here, here->held[i].owner) != &here->held[i])
            return "an owner is listed twice, or without pins";
        held += here->held[i].pins;
    }
    if (here->pins != counts || here->pinned != pinned || held != counts)
        return "the sums of a mapping's pins are wrong";
    *pins += counts;
    *pages += pinned;
    return NULL;
}
