/*
 * Many accesses in a row: block copies, FIFO bursts and waiting for a bit. No locks and no Python; may be called without
 * the GIL as long as the mapping stays.
 */
#ifndef VFIOPY_REGION_RUNS_H
#define VFIOPY_REGION_RUNS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * `count` loads of `width` bytes (1, 2, 4, 8) in ascending order; `step` is the distance between their addresses: the
 * width for a block, 0 for a FIFO. Bytes are kept as they lie on the bus. The run as a whole is ordered like one read.
 * `out` needs no alignment. Returns how many were done; fewer than `count` means SIGBUS at the next.
 */
size_t vfiopy_read_run(uintptr_t address, size_t step, void *out, size_t count, unsigned width);

/* The same for stores; the run as a whole is ordered like one write. */
size_t vfiopy_write_run(uintptr_t address, size_t step, const void *data, size_t count, unsigned width);

enum vfiopy_poll_result {
    VFIOPY_POLL_MATCH,
    VFIOPY_POLL_TIME,  /* `deadline` has passed */
    VFIOPY_POLL_STATE, /* *flags is not what it was */
    VFIOPY_POLL_CHECK, /* `check_at` has passed, or a signal came: nothing is decided yet, call again */
    VFIOPY_POLL_FAULT  /* SIGBUS */
};

struct vfiopy_poll {
    uintptr_t address;
    unsigned width;
    bool swap;
    uint64_t mask;
    uint64_t value;
    uint64_t interval; /* ns from one read to the next, at least; 0: spin */
    uint64_t deadline; /* ns as vfiopy_now(), UINT64_MAX for none */
    uint64_t check_at; /* likewise */
    atomic_uint *flags;
    unsigned expected; /* value of *flags for which to go on */

    uint64_t seen; /* out: value of the last read */
    uint64_t next; /* kept between calls, start with 0: when the next read is due */
};

/*
 * Read until (seen & mask) == value or something else ends it. The last read is always later than the deadline, so
 * that a thread which did not get the CPU in time does not report a timeout for what has happened meanwhile.
 */
enum vfiopy_poll_result vfiopy_poll_run(struct vfiopy_poll *poll);

/* CLOCK_MONOTONIC in nanoseconds. */
uint64_t vfiopy_now(void);

#endif
