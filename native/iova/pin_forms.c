#include "pin_forms.h"

#include <malloc.h>
#include <stdlib.h>
#include <string.h>

static uint64_t heap_bytes(const void *block)
{
    return malloc_usable_size((void *)block) + sizeof(size_t); /* and the allocator's own word */
}

static void *allocate(size_t size, struct vfiopy_pin_delta *delta)
{
    void *block = calloc(1, size);

    if (block)
        delta->bytes += heap_bytes(block);
    return block;
}

static void release(void *block, struct vfiopy_pin_delta *delta)
{
    delta->bytes -= heap_bytes(block);
    free(block);
}

static struct few *new_few(uint32_t room, struct vfiopy_pin_delta *delta)
{
    struct few *few = allocate(sizeof(*few) + room * (sizeof(uint64_t) + sizeof(uint16_t)), delta);

    if (few)
        few->room = (uint16_t)room;
    return few;
}

static struct window *new_window(uint32_t base, uint32_t length, struct vfiopy_pin_delta *delta)
{
    struct window *window = allocate(sizeof(*window) + length * sizeof(uint64_t), delta);

    if (window) {
        window->base = (uint16_t)base;
        window->length = (uint16_t)length;
    }
    return window;
}

uint32_t vfiopy_few_find(struct few *few, uint32_t page)
{
    const uint16_t *pages = few_pages(few);
    uint32_t low = 0, high = few->count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (pages[middle] < page)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

uint64_t *vfiopy_word_at(vfiopy_chunk chunk, uint32_t page)
{
    if (form_of(chunk) == FEW) {
        struct few *few = few_of(chunk);
        uint32_t at = vfiopy_few_find(few, page);

        return at < few->count && few_pages(few)[at] == page ? &few->words[at] : NULL;
    }
    if (form_of(chunk) == WINDOW) {
        struct window *window = window_of(chunk);

        if (page >= window->base && page < (uint32_t)window->base + window->length)
            return &window->words[page - window->base];
    }
    return NULL;
}

uint64_t vfiopy_word_of(vfiopy_chunk chunk, uint32_t page)
{
    const uint64_t *word;

    if (form_of(chunk) == RUN)
        return page - run_first(chunk) < run_length(chunk) ? run_count(chunk) : 0;
    word = vfiopy_word_at(chunk, page);
    return word ? *word : 0;
}

uint32_t vfiopy_chunk_count(vfiopy_chunk chunk, uint32_t page)
{
    return (uint32_t)(vfiopy_word_of(chunk, page) & COUNT_MASK);
}

/* First and last page with a pin, and how many there are; the chunk is not empty. */
static void extent(vfiopy_chunk chunk, uint32_t *low, uint32_t *high, uint32_t *pages)
{
    if (form_of(chunk) == RUN) {
        *low = run_first(chunk);
        *high = *low + run_length(chunk) - 1;
        *pages = run_length(chunk);
    } else if (form_of(chunk) == FEW) {
        struct few *few = few_of(chunk);

        *low = few_pages(few)[0];
        *high = few_pages(few)[few->count - 1];
        *pages = few->count;
    } else {
        struct window *window = window_of(chunk);

        *low = window->base; /* the window may be wider than its pins: good enough */
        *high = *low + window->length - 1;
        *pages = window->used;
    }
}

void vfiopy_chunk_free(vfiopy_chunk *chunk, struct vfiopy_pin_delta *delta)
{
    if (form_of(*chunk) == FEW || form_of(*chunk) == WINDOW)
        release(few_of(*chunk), delta);
    *chunk = EMPTY;
}

bool vfiopy_to_window(vfiopy_chunk *chunk, uint32_t low, uint32_t high, struct vfiopy_pin_delta *delta)
{
    struct window *window = new_window(low, high - low + 1, delta);

    if (!window)
        return false;
    if (form_of(*chunk) == RUN) {
        for (uint32_t i = 0; i < run_length(*chunk); i++)
            window->words[run_first(*chunk) + i - low] = run_count(*chunk);
        window->used = (uint16_t)run_length(*chunk);
        window->highest = run_count(*chunk);
    } else if (form_of(*chunk) == FEW) {
        struct few *few = few_of(*chunk);

        for (uint32_t i = 0; i < few->count; i++) {
            uint32_t count = (uint32_t)(few->words[i] & COUNT_MASK);

            window->words[few_pages(few)[i] - low] = few->words[i];
            if (count > window->highest)
                window->highest = count;
        }
        window->used = few->count;
    } else if (form_of(*chunk) == WINDOW) {
        struct window *old = window_of(*chunk);

        memcpy(&window->words[old->base - low], old->words, old->length * sizeof(uint64_t));
        window->used = old->used;
        window->highest = old->highest;
    }
    vfiopy_chunk_free(chunk, delta);
    *chunk = (uintptr_t)window | WINDOW;
    return true;
}

bool vfiopy_to_few(vfiopy_chunk *chunk, uint32_t room, struct vfiopy_pin_delta *delta)
{
    struct few *few = new_few(room, delta);
    uint32_t low, high, pages;

    if (!few)
        return false;
    if (*chunk) {
        extent(*chunk, &low, &high, &pages);
        for (uint32_t page = low; page <= high; page++) {
            uint64_t word = vfiopy_word_of(*chunk, page);

            if (!word)
                continue;
            few->words[few->count] = word;
            few_pages(few)[few->count++] = (uint16_t)page;
        }
    }
    vfiopy_chunk_free(chunk, delta);
    *chunk = (uintptr_t)few | FEW;
    return true;
}

/* A list is better than a window while it is short and takes less memory. */
static bool list_is_better(uint32_t pages, uint32_t window)
{
    return pages <= MAX_FEW && pages * 10 < window * 8;
}

bool vfiopy_make_words(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta)
{
    uint32_t low = first, high = first + count - 1, pages = 0;

    if (*chunk) {
        uint32_t old_low, old_high;

        extent(*chunk, &old_low, &old_high, &pages);
        low = old_low < low ? old_low : low;
        high = old_high > high ? old_high : high;
        if (form_of(*chunk) == WINDOW && low == old_low && high == old_high)
            return true;
        /* Pins that come one by one should not copy the window each time. */
        if (form_of(*chunk) == WINDOW && !list_is_better(pages + count, high - low + 1)) {
            uint32_t slack = (high - low + 1) / 8;

            if (high > old_high)
                high = high + slack < VFIOPY_CHUNK_PAGES ? high + slack : VFIOPY_CHUNK_PAGES - 1;
            else
                low = low > slack ? low - slack : 0;
        }
    }
    if (!list_is_better(pages + count, high - low + 1))
        return vfiopy_to_window(chunk, low, high, delta);
    if (form_of(*chunk) == FEW && few_of(*chunk)->room >= pages + count)
        return true;
    return vfiopy_to_few(chunk, pages + count + pages / 4, delta);
}

const char *vfiopy_chunk_verify(vfiopy_chunk chunk, uint64_t *pins, uint64_t *pages, uint64_t *bytes)
{
    uint32_t here = 0;

    if (form_of(chunk) == RUN && (!run_length(chunk) || !run_count(chunk) ||
                                  run_first(chunk) + run_length(chunk) > VFIOPY_CHUNK_PAGES))
        return "a run of pins is empty or too long";
    if (form_of(chunk) == FEW) {
        struct few *few = few_of(chunk);

        for (uint32_t i = 1; i < few->count; i++) {
            if (few_pages(few)[i - 1] >= few_pages(few)[i])
                return "a list of pins is out of order";
        }
        if (!few->count || few->count > few->room)
            return "a list of pins has a wrong length";
        here = few->count;
    }
    if (form_of(chunk) == FEW || form_of(chunk) == WINDOW)
        *bytes += heap_bytes(few_of(chunk));
    for (uint32_t page = 0; page < VFIOPY_CHUNK_PAGES; page++) {
        uint64_t word = vfiopy_word_of(chunk, page);

        if (word && !(word & COUNT_MASK))
            return "a page without pins has a pfn";
        if (form_of(chunk) == WINDOW && (word & COUNT_MASK) > window_of(chunk)->highest)
            return "a count is higher than its window knows";
        *pins += word & COUNT_MASK;
        *pages += word != 0;
        if (form_of(chunk) == WINDOW)
            here += word != 0;
    }
    if (form_of(chunk) == WINDOW && here != window_of(chunk)->used)
        return "a window's number of pinned pages is wrong";
    return NULL;
}
