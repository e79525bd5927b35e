/* Windows, checks and single accesses of a region. See region.h. */
#include "region/region.h"

#include <pthread.h>
#include <stdlib.h>

/*
 * All regions of this process, so that a forked child finds them marked: it shares the device with its parent and must
 * not touch it. That costs nothing per access, unlike a look at the process id.
 */
static struct vfiopy_region *all_regions;
static pthread_mutex_t all_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t all_once = PTHREAD_ONCE_INIT;

static void before_fork(void)
{
    pthread_mutex_lock(&all_lock);
}

static void after_fork_in_parent(void)
{
    pthread_mutex_unlock(&all_lock);
}

static void after_fork_in_child(void)
{
    for (struct vfiopy_region *region = all_regions; region; region = region->next) {
        /* Threads that were in the middle of an access exist in the parent only. */
        atomic_store_explicit(&region->users, 0, memory_order_relaxed);
        vfiopy_region_set_flags(region, VFIOPY_REGION_FORKED, 0);
    }
    pthread_mutex_unlock(&all_lock);
}

static void watch_forks(void)
{
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
}

static bool is_usable(const struct vfiopy_region *region)
{
    return vfiopy_region_flags(region) == 0 && !region->swap && region->window_count > 0;
}

static void refresh_fast_path(struct vfiopy_region *region)
{
    const struct vfiopy_window *window;
    uint64_t span;

    region->read_span = 0;
    region->write_span = 0;
    if (!is_usable(region))
        return;
    window = &region->windows[region->current];
    span = window->length & ~(uint64_t)7;
    region->base = window->address - (uintptr_t)window->offset;
    region->start = window->offset;
    if (region->directions & VFIOPY_READ)
        region->read_span = span;
    if (region->directions & VFIOPY_WRITE)
        region->write_span = span;
}

static const char *find_wrong_window(uint64_t size, const struct vfiopy_window *windows, size_t count, size_t *which)
{
    uint64_t end = 0;

    for (size_t i = 0; i < count; i++) {
        const struct vfiopy_window *window = &windows[i];

        *which = i;
        if (window->length == 0)
            return "is empty";
        if (window->address == 0)
            return "has address 0";
        if (window->offset < end)
            return "overlaps the one before it, or they are not sorted by offset";
        if (window->offset > size || window->length > size - window->offset)
            return "reaches past the end of the region";
        if (window->address > UINTPTR_MAX - window->length)
            return "wraps around the end of the address space";
        if ((window->address ^ window->offset) & 7)
            return "is mapped at an address that is not congruent to its offset modulo 8";
        end = window->offset + window->length;
    }
    return NULL;
}

const char *vfiopy_region_init(struct vfiopy_region *region, uint64_t size, unsigned directions, bool swap,
                               struct vfiopy_window *windows, size_t window_count, size_t *which)
{
    const char *wrong = find_wrong_window(size, windows, window_count, which);

    if (wrong)
        return wrong;

    region->size = size;
    region->directions = directions;
    region->swap = swap;
    region->windows = windows;
    region->window_count = window_count;
    region->current = 0;
    atomic_init(&region->flags, 0);
    atomic_init(&region->users, 0);
    refresh_fast_path(region);

    pthread_once(&all_once, watch_forks);
    pthread_mutex_lock(&all_lock);
    region->next = all_regions;
    region->previous = &all_regions;
    if (region->next)
        region->next->previous = &region->next;
    all_regions = region;
    pthread_mutex_unlock(&all_lock);
    return NULL;
}

void vfiopy_region_destroy(struct vfiopy_region *region)
{
    /* a neighbour that leaves the list writes our previous: even looking at it needs the lock */
    pthread_mutex_lock(&all_lock);
    bool listed = region->previous != NULL;
    if (listed) {
        *region->previous = region->next;
        if (region->next)
            region->next->previous = region->previous;
        region->previous = NULL;
    }
    pthread_mutex_unlock(&all_lock);
    if (!listed)
        return;
    free(region->windows);
    region->windows = NULL;
    region->window_count = 0;
    region->read_span = 0;
    region->write_span = 0;
}

void vfiopy_region_set_flags(struct vfiopy_region *region, unsigned set, unsigned clear)
{
    atomic_fetch_and_explicit(&region->flags, ~clear, memory_order_acq_rel);
    atomic_fetch_or_explicit(&region->flags, set, memory_order_acq_rel);
    refresh_fast_path(region);
}

enum vfiopy_verdict vfiopy_region_check(const struct vfiopy_region *region, uint64_t offset, uint64_t count,
                                        unsigned width, enum vfiopy_direction direction)
{
    unsigned flags = vfiopy_region_flags(region);

    if (flags & VFIOPY_REGION_CLOSED)
        return VFIOPY_IS_CLOSED;
    if (flags & VFIOPY_REGION_FORKED)
        return VFIOPY_IS_FORKED;
    if (flags & VFIOPY_REGION_GONE)
        return VFIOPY_IS_GONE;
    if (offset > region->size || count > (region->size - offset) / width)
        return VFIOPY_OUT_OF_RANGE;
    if (offset & (width - 1))
        return VFIOPY_MISALIGNED;
    if (!(region->directions & direction))
        return VFIOPY_WRONG_DIRECTION;
    return VFIOPY_ALLOWED;
}

struct vfiopy_place vfiopy_region_locate(struct vfiopy_region *region, uint64_t offset, unsigned width)
{
    struct vfiopy_place place = {0, region->size - offset};

    for (size_t i = 0; i < region->window_count; i++) {
        const struct vfiopy_window *window = &region->windows[i];

        if (offset >= window->offset && offset - window->offset < window->length) {
            place.room = window->offset + window->length - offset;
            if (place.room < width) /* half in, half out: not by the mapping */
                return (struct vfiopy_place){0, width};
            place.address = window->address + (uintptr_t)(offset - window->offset);
            if (region->current != i) {
                region->current = i;
                refresh_fast_path(region);
            }
            return place;
        }
        if (window->offset > offset) {
            place.room = window->offset - offset;
            if (place.room < width)
                place.room = width;
            return place;
        }
    }
    return place;
}

uint64_t vfiopy_swap(uint64_t value, unsigned width)
{
    return __builtin_bswap64(value) >> (64 - 8 * width);
}

uint64_t vfiopy_load_any(uintptr_t address, unsigned width, bool swap, bool relaxed, int *faulted)
{
    const volatile void *at = (const volatile void *)address;
    uint64_t value;

    switch (width) {
    case 1:
        value = vfiopy_load8(at, faulted);
        break;
    case 2:
        value = vfiopy_load16(at, faulted);
        break;
    case 4:
        value = vfiopy_load32(at, faulted);
        break;
    default:
        value = vfiopy_load64(at, faulted);
        break;
    }
    if (!relaxed)
        vfiopy_order_after_read(value);
    return swap ? vfiopy_swap(value, width) : value;
}

void vfiopy_store_any(uintptr_t address, unsigned width, bool swap, bool relaxed, uint64_t value, int *faulted)
{
    volatile void *at = (volatile void *)address;

    if (swap)
        value = vfiopy_swap(value, width);
    if (!relaxed)
        vfiopy_order_before_write();
    switch (width) {
    case 1:
        vfiopy_store8(at, (uint8_t)value, faulted);
        break;
    case 2:
        vfiopy_store16(at, (uint16_t)value, faulted);
        break;
    case 4:
        vfiopy_store32(at, (uint32_t)value, faulted);
        break;
    default:
        vfiopy_store64(at, value, faulted);
        break;
    }
}
