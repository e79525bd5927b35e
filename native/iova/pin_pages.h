/* The pins of one mapping's pages: chunks by number, in a hash table where there can be more than one. */
#ifndef VFIOPY_IOVA_PIN_PAGES_H
#define VFIOPY_IOVA_PIN_PAGES_H

#include "pin_chunk.h"

struct vfiopy_pin_slot {
    uint64_t number;
    vfiopy_chunk chunk; /* 0: the slot is free */
};

struct vfiopy_pin_pages {
    struct vfiopy_pin_slot *slots; /* NULL: none, or `only` */
    vfiopy_chunk only;             /* chunk 0 of a mapping that has no other */
    uint32_t used, mask;
    bool small;
};

/* What happened to the sums of the mapping. */
struct vfiopy_pin_sums {
    uint64_t pages, bytes; /* modulo 2**64 */
};

void vfiopy_pages_init(struct vfiopy_pin_pages *pages, uint64_t page_count);
void vfiopy_pages_free(struct vfiopy_pin_pages *pages, struct vfiopy_pin_sums *sums);

/* One more pin on pages first .. last: all or nothing. On VFIOPY_TOO_MANY_PINS *bad is the page. */
int vfiopy_pages_add(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, uint64_t *bad,
                     struct vfiopy_pin_sums *sums);

/* Make sure that all these pages have a pin (else VFIOPY_NOT_PINNED, *bad) and that remove cannot fail. */
int vfiopy_pages_prepare_remove(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, uint64_t *bad,
                                struct vfiopy_pin_sums *sums);
void vfiopy_pages_remove(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, struct vfiopy_pin_sums *sums);

uint32_t vfiopy_pages_count(const struct vfiopy_pin_pages *pages, uint64_t page);
void vfiopy_pages_pfns(const struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, uint64_t *pfns);
void vfiopy_pages_set_pfns(struct vfiopy_pin_pages *pages, uint64_t first, uint64_t last, const uint64_t *pfns,
                           struct vfiopy_pin_sums *sums);

/* The first run of pages at `from` or later, up to `last`, that are pinned; false when there is none. */
bool vfiopy_pages_next_run(const struct vfiopy_pin_pages *pages, uint64_t from, uint64_t last,
                           struct vfiopy_range *run);

const char *vfiopy_pages_verify(const struct vfiopy_pin_pages *pages, uint64_t page_count, uint64_t *pins,
                                uint64_t *pinned, uint64_t *bytes);

#endif
