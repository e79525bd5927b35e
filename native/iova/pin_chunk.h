/*
 * The pins of up to 512 neighbouring pages: a count for each, and a page frame number (pfn) where one is known.
 *
 * A chunk is one 64-bit word. As long as its pins are one run of equal counts without pfns, that word is all there
 * is; else it points to the few pages that are pinned, or to 8 bytes for each page of a window.
 */
#ifndef VFIOPY_IOVA_PIN_CHUNK_H
#define VFIOPY_IOVA_PIN_CHUNK_H

#include <stdbool.h>
#include <stdint.h>

#include "space.h"

#define VFIOPY_CHUNK_SHIFT 9
#define VFIOPY_CHUNK_PAGES (1u << VFIOPY_CHUNK_SHIFT)
#define VFIOPY_MAX_PINS ((UINT32_C(1) << 24) - 1)   /* of one page */
#define VFIOPY_MAX_PFN ((UINT64_C(1) << 40) - 1)    /* 52 address bits, 4 KiB pages */

typedef uint64_t vfiopy_chunk; /* 0: no pins */

/* What an operation did to the sums that the caller keeps. */
struct vfiopy_pin_delta {
    uint32_t pages; /* whose count left or reached 0 */
    uint64_t bytes; /* of the heap; modulo 2**64 */
};

/* One more pin on `count` pages from `first`. On failure (no memory; *bad has VFIOPY_MAX_PINS) nothing changed. */
int vfiopy_chunk_add(vfiopy_chunk *chunk, uint32_t first, uint32_t count, uint32_t *bad,
                     struct vfiopy_pin_delta *delta);

/* Do all these pages have a pin? Else *bad is one that has not. */
bool vfiopy_chunk_all_pinned(vfiopy_chunk chunk, uint32_t first, uint32_t count, uint32_t *bad);

/* Get ready to take a pin off these pages, which all have one; false without memory. */
bool vfiopy_chunk_prepare_remove(vfiopy_chunk *chunk, uint32_t first, uint32_t count,
                                 struct vfiopy_pin_delta *delta);

/* One pin less on pages that all have one, after prepare_remove or undoing an add: cannot fail. */
void vfiopy_chunk_remove(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta);

uint32_t vfiopy_chunk_count(vfiopy_chunk chunk, uint32_t page);

/* 0: not known. Storing is best effort: only for pinned pages, and not without memory. */
void vfiopy_chunk_pfns(vfiopy_chunk chunk, uint32_t first, uint32_t count, uint64_t *pfns);
void vfiopy_chunk_set_pfns(vfiopy_chunk *chunk, uint32_t first, uint32_t count, const uint64_t *pfns,
                           struct vfiopy_pin_delta *delta);

void vfiopy_chunk_free(vfiopy_chunk *chunk, struct vfiopy_pin_delta *delta);
const char *vfiopy_chunk_verify(vfiopy_chunk chunk, uint64_t *pins, uint64_t *pages, uint64_t *bytes);

#endif
