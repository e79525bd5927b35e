/*
 * A region of a device without Python: windows, checks, runs of accesses, waiting for a bit.
 *
 * A region is `size` bytes of which some pieces, the windows, are mapped into this process. What lies between them
 * (the pages of an MSI-X table) or is not mapped at all has to be reached another way; this code only says so.
 *
 * Threads: nothing in here locks. The caller keeps functions that take a `struct vfiopy_region *` from running at the
 * same time (the GIL, or the object's critical section); `flags` and `users` alone may be touched from anywhere.
 */
#ifndef VFIOPY_REGION_REGION_H
#define VFIOPY_REGION_REGION_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "region/access.h"

/* Bits of the state word; none set is "open". */
enum {
    VFIOPY_REGION_CLOSED = 1, /* for good */
    VFIOPY_REGION_FORKED = 2, /* this is a child of the process that made it; for good */
    VFIOPY_REGION_GONE = 4,   /* the device does not answer */
    VFIOPY_REGION_SLOW = 8,   /* the windows must not be touched */
    VFIOPY_REGION_TRACED = 16 /* each access is reported */
};

#define VFIOPY_REGION_NO_ACCESS (VFIOPY_REGION_CLOSED | VFIOPY_REGION_FORKED | VFIOPY_REGION_GONE)
#define VFIOPY_REGION_NO_WINDOW (VFIOPY_REGION_NO_ACCESS | VFIOPY_REGION_SLOW)

enum vfiopy_direction { VFIOPY_READ = 1, VFIOPY_WRITE = 2 };

enum vfiopy_verdict {
    VFIOPY_ALLOWED,
    VFIOPY_IS_CLOSED,
    VFIOPY_IS_FORKED,
    VFIOPY_IS_GONE,
    VFIOPY_OUT_OF_RANGE,
    VFIOPY_MISALIGNED,
    VFIOPY_WRONG_DIRECTION
};

struct vfiopy_window {
    uint64_t offset; /* in the region */
    uint64_t length;
    uintptr_t address; /* where the first byte is mapped */
};

struct vfiopy_region {
    /*
     * The fast path: the window that was used last. An access whose offset is aligned and less than a span away from
     * `start` is allowed and lies at `base` + offset. The spans are multiples of 8, so that every width fits; they are 0
     * whenever anything has to be looked at first (state, direction, byte order).
     */
    uintptr_t base;
    uint64_t start;
    uint64_t read_span;
    uint64_t write_span;

    atomic_uint flags;
    atomic_uint users; /* accesses under way without the GIL */
    uint64_t size;
    unsigned directions; /* enum vfiopy_direction, or'ed */
    bool swap;           /* byte order of the region is not that of the CPU */
    size_t window_count;
    size_t current; /* index of the window of the fast path */
    struct vfiopy_window *windows;

    struct vfiopy_region *next, **previous; /* for the fork handler */
};

/* Where an access may go. */
struct vfiopy_place {
    uintptr_t address; /* 0: not mapped */
    uint64_t room;     /* bytes from there for which that stays so */
};

/*
 * Check windows (sorted, disjoint, inside, address congruent to offset modulo 8) and make a region of them; takes the
 * windows over, malloc'ed. Returns NULL or what is wrong, with the index of the window in *which.
 */
const char *vfiopy_region_init(struct vfiopy_region *region, uint64_t size, unsigned directions, bool swap,
                               struct vfiopy_window *windows, size_t window_count, size_t *which);
void vfiopy_region_destroy(struct vfiopy_region *region);

/* Change bits of the state word. */
void vfiopy_region_set_flags(struct vfiopy_region *region, unsigned set, unsigned clear);

/* May `count` elements of `width` bytes be accessed from `offset`? For a FIFO count is 1. Looks at state, too. */
enum vfiopy_verdict vfiopy_region_check(const struct vfiopy_region *region, uint64_t offset, uint64_t count,
                                        unsigned width, enum vfiopy_direction direction);

/* Find where an offset is mapped; the window becomes that of the fast path. */
struct vfiopy_place vfiopy_region_locate(struct vfiopy_region *region, uint64_t offset, unsigned width);

static inline unsigned vfiopy_region_flags(const struct vfiopy_region *region)
{
    return atomic_load_explicit(&region->flags, memory_order_acquire);
}

/* One access of any width at an address that vfiopy_region_locate gave; `swap` exchanges the bytes of the value. */
uint64_t vfiopy_load_any(uintptr_t address, unsigned width, bool swap, bool relaxed, int *faulted);
void vfiopy_store_any(uintptr_t address, unsigned width, bool swap, bool relaxed, uint64_t value, int *faulted);
uint64_t vfiopy_swap(uint64_t value, unsigned width);

#endif
