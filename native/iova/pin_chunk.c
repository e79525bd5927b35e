#include "pin_chunk.h"

#include <string.h>

#include "pin_forms.h"

static int add_to_few(struct few *few, uint32_t first, uint32_t count, uint32_t *bad,
                      struct vfiopy_pin_delta *delta)
{
    uint16_t *pages = few_pages(few);
    uint32_t begin = vfiopy_few_find(few, first), end = vfiopy_few_find(few, first + count);
    uint32_t fresh = count - (end - begin), from, to, page;

    for (uint32_t i = begin; i < end; i++) {
        if ((few->words[i] & COUNT_MASK) == COUNT_MASK) {
            *bad = pages[i];
            return VFIOPY_TOO_MANY_PINS;
        }
    }
    memmove(&few->words[end + fresh], &few->words[end], (few->count - end) * sizeof(*few->words));
    memmove(&pages[end + fresh], &pages[end], (few->count - end) * sizeof(*pages));
    /* Merge from the end, where the room is. */
    from = end;
    to = begin + count;
    for (page = first + count; page-- > first;) {
        to--;
        if (from > begin && pages[from - 1] == page) {
            from--;
            few->words[to] = few->words[from] + 1;
        } else {
            few->words[to] = 1;
        }
        pages[to] = (uint16_t)page;
    }
    few->count += (uint16_t)fresh;
    delta->pages += fresh;
    return VFIOPY_OK;
}

static int add_to_window(struct window *window, uint32_t first, uint32_t count, uint32_t *bad,
                         struct vfiopy_pin_delta *delta)
{
    uint64_t *words = &window->words[first - window->base];
    uint32_t fresh = 0;

    if (window->highest >= VFIOPY_MAX_PINS) {
        for (uint32_t i = 0; i < count; i++) {
            if ((words[i] & COUNT_MASK) == COUNT_MASK) {
                *bad = first + i;
                return VFIOPY_TOO_MANY_PINS;
            }
        }
    } else {
        window->highest++;
    }
    for (uint32_t i = 0; i < count; i++) {
        fresh += words[i] == 0;
        words[i]++;
    }
    window->used += (uint16_t)fresh;
    delta->pages += fresh;
    return VFIOPY_OK;
}

/* Can the pins stay, or become, one run? */
static bool add_to_run(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta)
{
    uint32_t low, length;

    if (!*chunk) {
        *chunk = make_run(first, count, 1);
        delta->pages += count;
        return true;
    }
    if (form_of(*chunk) != RUN)
        return false;
    low = run_first(*chunk);
    length = run_length(*chunk);
    if (first == low && count == length && run_count(*chunk) < VFIOPY_MAX_PINS) {
        *chunk = make_run(low, length, run_count(*chunk) + 1);
        return true;
    }
    if (run_count(*chunk) == 1 && (first == low + length || first + count == low)) {
        *chunk = make_run(first < low ? first : low, length + count, 1);
        delta->pages += count;
        return true;
    }
    return false;
}

int vfiopy_chunk_add(vfiopy_chunk *chunk, uint32_t first, uint32_t count, uint32_t *bad,
                     struct vfiopy_pin_delta *delta)
{
    if (add_to_run(chunk, first, count, delta))
        return VFIOPY_OK;
    if (!vfiopy_make_words(chunk, first, count, delta))
        return VFIOPY_NO_MEMORY;
    if (form_of(*chunk) == FEW)
        return add_to_few(few_of(*chunk), first, count, bad, delta);
    return add_to_window(window_of(*chunk), first, count, bad, delta);
}

bool vfiopy_chunk_all_pinned(vfiopy_chunk chunk, uint32_t first, uint32_t count, uint32_t *bad)
{
    if (form_of(chunk) == RUN) {
        uint32_t low = run_first(chunk), length = run_length(chunk);

        if (first >= low && first + count <= low + length)
            return true;
        *bad = first < low ? first : first < low + length ? low + length : first;
        return false;
    }
    for (uint32_t page = first; page < first + count; page++) {
        const uint64_t *word = vfiopy_word_at(chunk, page);

        if (!word || !*word) {
            *bad = page;
            return false;
        }
        /* The pages that follow have neighbouring words in a window. */
        while (form_of(chunk) == WINDOW && page + 1 < first + count &&
               page + 1 < (uint32_t)window_of(chunk)->base + window_of(chunk)->length && word[1]) {
            word++;
            page++;
        }
    }
    return true;
}

bool vfiopy_chunk_prepare_remove(vfiopy_chunk *chunk, uint32_t first, uint32_t count,
                                 struct vfiopy_pin_delta *delta)
{
    uint32_t low, length;

    if (form_of(*chunk) != RUN)
        return true;
    low = run_first(*chunk);
    length = run_length(*chunk);
    if (first == low && count == length)
        return true;
    if (run_count(*chunk) == 1 && (first == low || first + count == low + length))
        return true;
    return vfiopy_to_window(chunk, low, low + length - 1, delta);
}

static void remove_from_run(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta)
{
    uint32_t low = run_first(*chunk), length = run_length(*chunk), pins = run_count(*chunk);

    if (pins > 1) {
        *chunk = make_run(low, length, pins - 1);
        return;
    }
    delta->pages += count;
    if (count == length)
        *chunk = EMPTY;
    else
        *chunk = make_run(first == low ? low + count : low, length - count, 1);
}

static void remove_from_few(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta)
{
    struct few *few = few_of(*chunk);
    uint16_t *pages = few_pages(few);
    uint32_t begin = vfiopy_few_find(few, first), end = begin + count, to = begin;

    for (uint32_t i = begin; i < end; i++) {
        if ((few->words[i] & COUNT_MASK) == 1)
            continue;
        few->words[to] = few->words[i] - 1;
        pages[to++] = pages[i];
    }
    memmove(&few->words[to], &few->words[end], (few->count - end) * sizeof(*few->words));
    memmove(&pages[to], &pages[end], (few->count - end) * sizeof(*pages));
    few->count -= (uint16_t)(end - to);
    delta->pages += end - to;
    if (!few->count)
        vfiopy_chunk_free(chunk, delta);
    else if (few->count < few->room / 4)
        vfiopy_to_few(chunk, few->count, delta); /* to save memory: no harm if it fails */
}

static bool all_equal(const uint64_t *words, uint32_t count)
{
    uint64_t different = 0;

    for (uint32_t i = 1; i < count; i++)
        different |= words[i] ^ words[0];
    return !different;
}

static void remove_from_window(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta)
{
    struct window *window = window_of(*chunk);
    uint64_t *words = &window->words[first - window->base];
    uint32_t gone = 0;

    for (uint32_t i = 0; i < count; i++) {
        uint64_t word = words[i] - 1;

        words[i] = word & COUNT_MASK ? word : 0; /* the pfn goes with the last pin */
        gone += words[i] == 0;
    }
    window->used -= (uint16_t)gone;
    delta->pages += gone;
    if (!window->used) {
        vfiopy_chunk_free(chunk, delta);
    } else if (window->used == count && words[0] && !(words[0] >> COUNT_BITS) && all_equal(words, count)) {
        uint32_t pins = (uint32_t)words[0];

        vfiopy_chunk_free(chunk, delta);
        *chunk = make_run(first, count, pins);
    } else if (window->used <= MAX_FEW && window->used < window->length / 8) {
        vfiopy_to_few(chunk, window->used, delta); /* to save memory: no harm if it fails */
    }
}

void vfiopy_chunk_remove(vfiopy_chunk *chunk, uint32_t first, uint32_t count, struct vfiopy_pin_delta *delta)
{
    if (form_of(*chunk) == RUN)
        remove_from_run(chunk, first, count, delta);
    else if (form_of(*chunk) == FEW)
        remove_from_few(chunk, first, count, delta);
    else
        remove_from_window(chunk, first, count, delta);
}

void vfiopy_chunk_pfns(vfiopy_chunk chunk, uint32_t first, uint32_t count, uint64_t *pfns)
{
    if (form_of(chunk) != FEW && form_of(chunk) != WINDOW) {
        memset(pfns, 0, count * sizeof(*pfns));
        return;
    }
    for (uint32_t i = 0; i < count; i++)
        pfns[i] = vfiopy_word_of(chunk, first + i) >> COUNT_BITS;
}

static void set_pfn(uint64_t *word, uint64_t pfn)
{
    if (*word && pfn && pfn <= VFIOPY_MAX_PFN)
        *word = (*word & COUNT_MASK) | pfn << COUNT_BITS;
}

void vfiopy_chunk_set_pfns(vfiopy_chunk *chunk, uint32_t first, uint32_t count, const uint64_t *pfns,
                           struct vfiopy_pin_delta *delta)
{
    uint64_t any = 0;

    for (uint32_t i = 0; i < count; i++)
        any |= pfns[i];
    /* A run stays one word as long as no number is known. */
    if (!any || (form_of(*chunk) == RUN &&
                 !vfiopy_to_window(chunk, run_first(*chunk), run_first(*chunk) + run_length(*chunk) - 1, delta)))
        return;
    if (form_of(*chunk) == WINDOW) {
        struct window *window = window_of(*chunk);
        uint32_t end = (uint32_t)window->base + window->length;

        for (uint32_t page = first > window->base ? first : window->base; page < end && page < first + count; page++)
            set_pfn(&window->words[page - window->base], pfns[page - first]);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint64_t *word = vfiopy_word_at(*chunk, first + i);

        if (word)
            set_pfn(word, pfns[i]);
    }
}
