#include "pin_pages.h"

#include <malloc.h>
#include <stdlib.h>

#define SMALLEST 4 /* slots */

static uint64_t chunk_number(uint64_t page)
{
    return page >> VFIOPY_CHUNK_SHIFT;
}

/* Eight neighbours stay together, for dense pins; the rest is spread. */
static uint32_t home_of(const struct vfiopy_pin_pages *pages, uint64_t number)
{
    uint64_t spread = (number >> 3) * UINT64_C(0x9e3779b97f4a7c15);

    return (uint32_t)((spread >> 29 << 3) | (number & 7)) & pages->mask;
}

static struct vfiopy_pin_slot *find_slot(const struct vfiopy_pin_pages *pages, uint64_t number)
{
    uint32_t at;

    if (!pages->slots)
        return NULL;
    for (at = home_of(pages, number); pages->slots[at].chunk; at = (at + 1) & pages->mask) {
        if (pages->slots[at].number == number)
            return &pages->slots[at];
    }
    return NULL;
}

static vfiopy_chunk chunk_at(const struct vfiopy_pin_pages *pages, uint64_t number)
{
    const struct vfiopy_pin_slot *slot;

    if (pages->small)
        return pages->only;
    slot = find_slot(pages, number);
    return slot ? slot->chunk : 0;
}

/* The free slot for a number that is not there; there is room. */
static struct vfiopy_pin_slot *free_slot(struct vfiopy_pin_pages *pages, uint64_t number)
{
    uint32_t at = home_of(pages, number);

    while (pages->slots[at].chunk)
        at = (at + 1) & pages->mask;
    pages->slots[at].number = number;
    return &pages->slots[at];
}

static uint64_t table_bytes(const struct vfiopy_pin_slot *slots)
{
    return slots ? malloc_usable_size((void *)slots) + sizeof(size_t) : 0;
}

static bool resize(struct vfiopy_pin_pages *pages, uint64_t size, struct vfiopy_pin_sums *sums)
{
    struct vfiopy_pin_pages now = *pages;

    if (size > UINT32_MAX)
        return false;
    now.slots = calloc(size, sizeof(*now.slots));
    if (!now.slots)
        return false;
    now.mask = (uint32_t)size - 1;
    for (uint64_t at = 0; pages->slots && at <= pages->mask; at++) {
        if (pages->slots[at].chunk)
            free_slot(&now, pages->slots[at].number)->chunk = pages->slots[at].chunk;
    }
    sums->bytes += table_bytes(now.slots) - table_bytes(pages->slots);
    free(pages->slots);
    *pages = now;
    return true;
}

/* Have room for so many more chunks with a load of at most 11/16. */
static bool make_room(struct vfiopy_pin_pages *pages, uint64_t more, struct vfiopy_pin_sums *sums)
{
    uint64_t size = pages->slots ? (uint64_t)pages->mask + 1 : SMALLEST;
    uint64_t wanted = pages->used + more;

    while (size / 16 * 11 + size % 16 * 11 / 16 < wanted)
        size *= 2;
    return (pages->slots && size == (uint64_t)pages->mask + 1) || resize(pages, size, sums);
}

/* Close the gap: what was put further on because this slot was taken moves up. */
static void erase_slot(struct vfiopy_pin_pages *pages, struct vfiopy_pin_slot *slot)
{
    uint32_t hole = (uint32_t)(slot - pages->slots);

    for (uint32_t at = (hole + 1) & pages->mask; pages->slots[at].chunk; at = (at + 1) & pages->mask) {
        uint32_t home = home_of(pages, pages->slots[at].number);

        if (((at - home) & pages->mask) >= ((at - hole) & pages->mask)) {
            pages->slots[hole] = pages->slots[at];
            hole = at;
        }
    }
    pages->slots[hole].chunk = 0;
    pages->used--;
}

void vfiopy_pages_init(struct vfiopy_pin_pages *pages, uint64_t page_count)
{
    *pages = (struct vfiopy_pin_pages){.small = page_count <= VFIOPY_CHUNK_PAGES};
}

void vfiopy_pages_free(struct vfiopy_pin_pages *pages, struct vfiopy_pin_sums *sums)
{
    struct vfiopy_pin_delta delta = {0};

    vfiopy_chunk_free(&pages->only, &delta);
    for (uint64_t at = 0; pages->slots && at <= pages->mask; at++)
        vfiopy_chunk_free(&pages->slots[at].chunk, &delta);
    sums->bytes += delta.bytes - table_bytes(pages->slots);
    free(pages->slots);
    pages->slots = NULL;
}

/* The part of pages first .. last that lies in the chunk of `first`. */
static uint32_t part_of(uint64_t first, uint64_t last, uint32_t *in_chunk)
{
    uint64_t rest = last - first;
    uint32_t room;

    *in_chunk = (uint32_t)(first & (VFIOPY_CHUNK_PAGES - 1));
    room = VFIOPY_CHUNK_PAGES - *in_chunk;
    return rest < room ? (uint32_t)rest + 1 : room;
}

static int add_part(struct vfiopy_pin_pages *pages, uint64_t first, uint32_t in_chunk, uint32_t count, uint64_t *bad,
                    struct vfiopy_pin_delta *delta)
{
    uint64_t number = chunk_number(first);
    struct vfiopy_pin_slot *slot;
    uint32_t bad_in_chunk = 0;
    int result;

    if (pages->small) {
        result = vfiopy_chunk_add(&pages->only, in_chunk, count, &bad_in_chunk, delta);
    } else {
        slot = find_slot(pages, number);
        if (!slot) {
            slot = free_slot(pages, number);
            pages->used++;
        }
        result = vfiopy_chunk_add(&slot->chunk, in_chunk, count, &bad_in_chunk, delta); /* an empty one takes all */
    }
    if (result == VFIOPY_TOO_MANY_PINS)
        *bad = (number << VFIOPY_CHUNK_SHIFT) + bad_in_chunk;
    return result;
}

int vfiopy_pages_add(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, uint64_t *bad,
                     struct vfiopy_pin_sums *sums)
{
    uint64_t pinned = 0, at = first;

    if (!pages->small && !make_room(pages, chunk_number(last) - chunk_number(first) + 1, sums))
        return VFIOPY_NO_MEMORY;
    for (;;) {
        struct vfiopy_pin_delta delta = {0};
        uint32_t in_chunk, count = part_of(at, last, &in_chunk);
        int result = add_part(pages, at, in_chunk, count, bad, &delta);

        sums->bytes += delta.bytes;
        if (result) {
            struct vfiopy_pin_sums undone = {0};

            if (at > first)
                vfiopy_pages_remove(pages, first, at - 1, &undone);
            sums->bytes += undone.bytes;
            return result;
        }
        pinned += delta.pages;
        if (count > last - at)
            break;
        at += count;
    }
    sums->pages += pinned;
    return VFIOPY_OK;
}

int vfiopy_pages_prepare_remove(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, uint64_t *bad,
                                struct vfiopy_pin_sums *sums)
{
    uint64_t at = first;

    for (;;) {
        struct vfiopy_pin_delta delta = {0};
        uint32_t in_chunk, bad_in_chunk, count = part_of(at, last, &in_chunk);
        struct vfiopy_pin_slot *slot = pages->small ? NULL : find_slot(pages, chunk_number(at));
        vfiopy_chunk *chunk = pages->small ? &pages->only : slot ? &slot->chunk : NULL;

        if (!chunk || !*chunk) {
            *bad = at;
            return VFIOPY_NOT_PINNED;
        }
        if (!vfiopy_chunk_all_pinned(*chunk, in_chunk, count, &bad_in_chunk)) {
            *bad = at - in_chunk + bad_in_chunk;
            return VFIOPY_NOT_PINNED;
        }
        if (!vfiopy_chunk_prepare_remove(chunk, in_chunk, count, &delta))
            return VFIOPY_NO_MEMORY;
        sums->bytes += delta.bytes;
        if (count > last - at)
            return VFIOPY_OK;
        at += count;
    }
}

void vfiopy_pages_remove(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, struct vfiopy_pin_sums *sums)
{
    uint64_t at = first;

    for (;;) {
        struct vfiopy_pin_delta delta = {0};
        uint32_t in_chunk, count = part_of(at, last, &in_chunk);
        struct vfiopy_pin_slot *slot = pages->small ? NULL : find_slot(pages, chunk_number(at));

        vfiopy_chunk_remove(slot ? &slot->chunk : &pages->only, in_chunk, count, &delta);
        if (slot && !slot->chunk)
            erase_slot(pages, slot);
        sums->bytes += delta.bytes;
        sums->pages -= delta.pages;
        if (count > last - at)
            break;
        at += count;
    }
    if (pages->slots && pages->mask >= SMALLEST && pages->used < (pages->mask + 1) / 4)
        resize(pages, (pages->mask + 1) / 2, sums); /* to save memory: no harm if it fails */
}

uint32_t vfiopy_pages_count(const struct vfiopy_pin_pages *pages, uint64_t page)
{
    return vfiopy_chunk_count(chunk_at(pages, chunk_number(page)), page & (VFIOPY_CHUNK_PAGES - 1));
}

void vfiopy_pages_pfns(const struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, uint64_t *pfns)
{
    for (uint64_t at = first;;) {
        uint32_t in_chunk, count = part_of(at, last, &in_chunk);

        vfiopy_chunk_pfns(chunk_at(pages, chunk_number(at)), in_chunk, count, pfns + (at - first));
        if (count > last - at)
            return;
        at += count;
    }
}

void vfiopy_pages_set_pfns(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, const uint64_t *pfns,
                           struct vfiopy_pin_sums *sums)
{
    for (uint64_t at = first;;) {
        struct vfiopy_pin_delta delta = {0};
        uint32_t in_chunk, count = part_of(at, last, &in_chunk);
        struct vfiopy_pin_slot *slot = pages->small ? NULL : find_slot(pages, chunk_number(at));

        if (pages->small || slot)
            vfiopy_chunk_set_pfns(slot ? &slot->chunk : &pages->only, in_chunk, count, pfns + (at - first), &delta);
        sums->bytes += delta.bytes;
        if (count > last - at)
            return;
        at += count;
    }
}

bool vfiopy_pages_next_run(const struct vfiopy_pin_pages *pages, uint64_t from, uint64_t last,
                           struct vfiopy_range *run)
{
    bool in_run = false;

    for (uint64_t at = from;;) {
        uint32_t in_chunk, count = part_of(at, last, &in_chunk);
        vfiopy_chunk chunk = chunk_at(pages, chunk_number(at));

        for (uint32_t i = 0; i < count; i++) {
            bool pinned = chunk && vfiopy_chunk_count(chunk, in_chunk + i);

            if (in_run && !pinned)
                return true;
            if (pinned && !in_run)
                run->first = at + i;
            if (pinned)
                run->last = at + i;
            in_run = pinned;
            if (!chunk)
                break;
        }
        if (count > last - at)
            return in_run;
        at += count;
    }
}

const char *vfiopy_pages_verify(const struct vfiopy_pin_pages *pages, uint64_t page_count, uint64_t *pins,
                                uint64_t *pinned, uint64_t *bytes)
{
    uint64_t chunks = (page_count - 1) / VFIOPY_CHUNK_PAGES + 1;
    uint32_t used = 0;

    *bytes += table_bytes(pages->slots);
    if (pages->small)
        return vfiopy_chunk_verify(pages->only, pins, pinned, bytes);
    for (uint64_t at = 0; pages->slots && at <= pages->mask; at++) {
        const char *wrong;

        if (!pages->slots[at].chunk)
            continue;
        used++;
        if (pages->slots[at].number >= chunks)
            return "a chunk of pins lies outside of its mapping";
        if (find_slot(pages, pages->slots[at].number) != &pages->slots[at])
            return "a chunk of pins cannot be found";
        wrong = vfiopy_chunk_verify(pages->slots[at].chunk, pins, pinned, bytes);
        if (wrong)
            return wrong;
    }
    return used == pages->used ? NULL : "the number of chunks of pins is wrong";
}
