/* Which page frames are pinned, as far as this process may know; and which pages are, for a picture. */
#include <stdlib.h>
#include <unistd.h>

#include "pins.h"

#define BATCH 4096 /* pages a read: a system call for each 512 would cost a tenth more */
#define PAGEMAP_PRESENT (UINT64_C(1) << 63)
#define PAGEMAP_PFN ((UINT64_C(1) << 55) - 1) /* Documentation/admin-guide/mm/pagemap.rst */

size_t vfiopy_space_page_count(const struct vfiopy_space *space, struct vfiopy_range range)
{
    return (size_t)((range.last >> space->page_shift) - (range.first >> space->page_shift) + 1);
}

/* The part of a request that lies in one mapping, with what is needed of it without the lock. */
struct part {
    uint64_t address, physical, offset; /* offset: of the first page from the mapping's first, in bytes */
    size_t count;
    bool held; /* the kernel keeps the pages in their places */
};

static void read_pagemap(const struct vfiopy_space *space, const struct part *part, int pagemap, uint64_t *pfns)
{
    uint64_t page = (part->address + part->offset) >> space->page_shift;
    size_t batch = part->count < BATCH ? part->count : BATCH;
    uint64_t *entries = malloc(batch * sizeof(*entries));

    for (size_t done = 0; done < part->count && entries;) {
        size_t wanted = part->count - done < batch ? part->count - done : batch;
        ssize_t got = pread(pagemap, entries, wanted * sizeof(*entries), (off_t)((page + done) * sizeof(*entries)));

        if (got <= 0)
            break;
        for (size_t i = 0; i < (size_t)got / sizeof(*entries); i++) {
            if (!pfns[done + i] && (entries[i] & PAGEMAP_PRESENT))
                pfns[done + i] = entries[i] & PAGEMAP_PFN; /* 0 without CAP_SYS_ADMIN */
        }
        done += (size_t)got / sizeof(*entries);
    }
    free(entries);
}

static void fill(const struct vfiopy_space *space, const struct part *part, int pagemap, uint64_t *pfns)
{
    if (part->physical) {
        for (size_t i = 0; i < part->count; i++)
            pfns[i] = (part->physical + part->offset + ((uint64_t)i << space->page_shift)) >> space->page_shift;
    } else if (part->held && part->address && pagemap >= 0) {
        read_pagemap(space, part, pagemap, pfns);
    }
}

static struct part part_of(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                           struct vfiopy_range pages)
{
    uint64_t in_page = (UINT64_C(1) << space->page_shift) - 1;
    bool aligned = !((mapping->iova.first ^ mapping->address.first) & in_page);

    return (struct part){
        .address = mapping->address_known && aligned ? mapping->address.first & ~in_page : 0,
        .physical = mapping->physical & ~in_page,
        .offset = pages.first << space->page_shift,
        .count = (size_t)(pages.last - pages.first + 1),
        .held = mapping->mapped_in,
    };
}

/*
 * With IOMMU pages smaller than the CPU's, mappings share a page of the answer. It has one frame only where all of
 * them say the same.
 */
int vfiopy_space_pfns(struct vfiopy_space *space, struct vfiopy_range range, int pagemap, uint64_t *pfns,
                      struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping = NULL;
    uint64_t *end = pfns; /* of what is filled */
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    do {
        struct vfiopy_pin_sums sums = {0};
        struct vfiopy_range pages;
        struct part part;
        uint64_t serial, last, *at, before;
        bool shared;

        mapping = vfiopy_next_without_hole(space, mapping, range, failure);
        if (!mapping || !mapping->pins) {
            result = mapping ? vfiopy_fail_range(failure, VFIOPY_NOT_PINNED, range) : (int)failure->result;
            break;
        }
        pages = vfiopy_pages_in(space, mapping, range);
        part = part_of(space, mapping, pages);
        serial = mapping->serial;
        last = mapping->iova.last;
        at = pfns + (size_t)((mapping->iova.first >> space->page_shift) + pages.first -
                             (range.first >> space->page_shift));
        shared = at < end;
        before = shared ? *at : 0;
        vfiopy_pages_pfns(&mapping->pins->pages, pages.first, pages.last, at);

        vfiopy_unlock(space);
        fill(space, &part, pagemap, at);
        vfiopy_lock(space);
        /* The pins should have kept the mapping; not where somebody took them off meanwhile. */
        mapping = vfiopy_mapping_at(space, last);
        if (!mapping || mapping->serial != serial || !mapping->pins) {
            result = vfiopy_fail_range(failure, VFIOPY_NOT_PINNED, range);
            break;
        }
        vfiopy_pages_set_pfns(&mapping->pins->pages, pages.first, pages.last, at, &sums);
        space->pin_bytes += sums.bytes;
        if (shared && *at != before)
            *at = 0;
        end = at + part.count;
    } while (mapping->iova.last < range.last);
    vfiopy_unlock(space);
    return result;
}

static bool add_run(struct vfiopy_range **runs, size_t *count, struct vfiopy_range run)
{
    if (!(*count & (*count - 1))) {
        struct vfiopy_range *more = realloc(*runs, (*count ? 2 * *count : 1) * sizeof(*more));

        if (!more)
            return false;
        *runs = more;
    }
    (*runs)[(*count)++] = run;
    return true;
}

struct vfiopy_range *vfiopy_space_pinned(struct vfiopy_space *space, struct vfiopy_range range, size_t *count)
{
    struct vfiopy_range *runs = calloc(1, sizeof(*runs));
    struct vfiopy_mapping *mapping;
    bool enough = runs;

    *count = 0;
    vfiopy_lock(space);
    for (mapping = vfiopy_mapping_in(space, range); mapping && enough;
         mapping = vfiopy_mapping_next_in(mapping, range)) {
        struct vfiopy_range pages = vfiopy_pages_in(space, mapping, range), run;

        while (vfiopy_pins_of(mapping) && enough &&
               vfiopy_pages_next_run(&mapping->pins->pages, pages.first, pages.last, &run)) {
            uint64_t first = vfiopy_iova_of_page(space, mapping, run.first);
            uint64_t last = vfiopy_iova_of_page(space, mapping, run.last) + ((UINT64_C(1) << space->page_shift) - 1);

            enough = add_run(&runs, count, (struct vfiopy_range){first, last});
            if (run.last == pages.last)
                break;
            pages.first = run.last + 1;
        }
    }
    vfiopy_unlock(space);
    if (enough)
        return runs;
    free(runs);
    *count = SIZE_MAX;
    return NULL;
}
