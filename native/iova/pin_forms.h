/* How a chunk of pins is stored: for pin_chunk.c and pin_forms.c only. */
#ifndef VFIOPY_IOVA_PIN_FORMS_H
#define VFIOPY_IOVA_PIN_FORMS_H

#include "pin_chunk.h"

/*
 * The four forms, by the low two bits of the word:
 *   run     pages first .. first + length - 1 have `count` pins each, no pfn is known
 *   few     a sorted list of (page, word)
 *   window  a word for each page of a window
 * A page's word is its pfn above its count.
 */
enum form { EMPTY, RUN, FEW, WINDOW };

#define MAX_FEW 96 /* where the list gets slow */
#define COUNT_BITS 24
#define COUNT_MASK ((uint64_t)VFIOPY_MAX_PINS)

struct few {
    uint16_t count, room;
    uint64_t words[]; /* room of them, then room page numbers of 16 bits */
};

struct window {
    uint16_t base, length;
    uint16_t used;    /* words with a count */
    uint32_t highest; /* no count is higher; may be too high */
    uint64_t words[];
};

static inline enum form form_of(vfiopy_chunk chunk)
{
    return (enum form)(chunk & 3);
}

static inline vfiopy_chunk make_run(uint32_t first, uint32_t length, uint32_t count)
{
    return RUN | (uint64_t)first << 2 | (uint64_t)length << 12 | (uint64_t)count << 24;
}

static inline uint32_t run_first(vfiopy_chunk chunk)
{
    return (chunk >> 2) & 0x3ff;
}

static inline uint32_t run_length(vfiopy_chunk chunk)
{
    return (chunk >> 12) & 0x3ff;
}

static inline uint32_t run_count(vfiopy_chunk chunk)
{
    return (uint32_t)(chunk >> 24);
}

static inline struct few *few_of(vfiopy_chunk chunk)
{
    return (struct few *)(uintptr_t)(chunk & ~(vfiopy_chunk)3);
}

static inline struct window *window_of(vfiopy_chunk chunk)
{
    return (struct window *)(uintptr_t)(chunk & ~(vfiopy_chunk)3);
}

static inline uint16_t *few_pages(struct few *few)
{
    return (uint16_t *)&few->words[few->room];
}

/* Index of the first listed page that is not below `page`. */
uint32_t vfiopy_few_find(struct few *few, uint32_t page);
/* The word of a page in a list or window; NULL: there is none. */
uint64_t *vfiopy_word_at(vfiopy_chunk chunk, uint32_t page);
/* In any form; 0: no pins. */
uint64_t vfiopy_word_of(vfiopy_chunk chunk, uint32_t page);
/* Change to a window over [low, high], which holds every pin; or to a list with room for `room` pages. */
bool vfiopy_to_window(vfiopy_chunk *chunk, uint32_t low, uint32_t high, struct vfiopy_pin_delta *delta);
bool vfiopy_to_few(vfiopy_chunk *chunk, uint32_t room, struct vfiopy_pin_delta *delta);
/* Have a word for each of these pages: the form is a list or a window afterwards. */
bool vfiopy_make_words(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta);

#endif
