/* Block copies, FIFO bursts and waiting for a bit. See runs.h. */
#define _GNU_SOURCE
#include "region/runs.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#include "region/access.h"
#include "region/region.h"

/* Ordered against each other by their being register accesses; against memory once, around the run. */
#define DEFINE_READ_RUN(bits)                                                                                          \
    static size_t read_run##bits(uintptr_t address, size_t step, unsigned char *out, size_t count)                     \
    {                                                                                                                  \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        for (size_t i = 0; i < count; i++) {                                                                           \
            uint##bits##_t value = vfiopy_load##bits((const volatile void *)(address + i * step), &faulted);           \
                                                                                                                       \
            if (faulted)                                                                                               \
                return i;                                                                                              \
            memcpy(out + i * sizeof(value), &value, sizeof(value));                                                    \
        }                                                                                                              \
        return count;                                                                                                  \
    }

#define DEFINE_WRITE_RUN(bits)                                                                                         \
    static size_t write_run##bits(uintptr_t address, size_t step, const unsigned char *data, size_t count)             \
    {                                                                                                                  \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        for (size_t i = 0; i < count; i++) {                                                                           \
            uint##bits##_t value;                                                                                      \
                                                                                                                       \
            memcpy(&value, data + i * sizeof(value), sizeof(value));                                                   \
            vfiopy_store##bits((volatile void *)(address + i * step), value, &faulted);                                \
            if (faulted)                                                                                               \
                return i;                                                                                              \
        }                                                                                                              \
        return count;                                                                                                  \
    }

DEFINE_READ_RUN(8)
DEFINE_READ_RUN(16)
DEFINE_READ_RUN(32)
DEFINE_READ_RUN(64)
DEFINE_WRITE_RUN(8)
DEFINE_WRITE_RUN(16)
DEFINE_WRITE_RUN(32)
DEFINE_WRITE_RUN(64)

size_t vfiopy_read_run(uintptr_t address, size_t step, void *out, size_t count, unsigned width)
{
    size_t done;

    switch (width) {
    case 1:
        done = read_run8(address, step, out, count);
        break;
    case 2:
        done = read_run16(address, step, out, count);
        break;
    case 4:
        done = read_run32(address, step, out, count);
        break;
    default:
        done = read_run64(address, step, out, count);
        break;
    }
    vfiopy_order_after_read(done);
    return done;
}

size_t vfiopy_write_run(uintptr_t address, size_t step, const void *data, size_t count, unsigned width)
{
    vfiopy_order_before_write();
    switch (width) {
    case 1:
        return write_run8(address, step, data, count);
    case 2:
        return write_run16(address, step, data, count);
    case 4:
        return write_run32(address, step, data, count);
    default:
        return write_run64(address, step, data, count);
    }
}

uint64_t vfiopy_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A closing thread waits for a poll to notice: do not sleep for longer than this at a time. */
#define LONGEST_SLEEP 20000000u

/* Sleep towards `wake`; false when a signal came. */
static bool sleep_towards(uint64_t now, uint64_t wake)
{
    uint64_t left = wake - now < LONGEST_SLEEP ? wake - now : LONGEST_SLEEP;
    struct timespec length = {0, (long)left};

    return nanosleep(&length, NULL) == 0 || errno != EINTR;
}

enum vfiopy_poll_result vfiopy_poll_run(struct vfiopy_poll *poll)
{
    uint64_t now = vfiopy_now();

    for (;;) {
        int faulted = 0;

        if (atomic_load_explicit(poll->flags, memory_order_acquire) != poll->expected)
            return VFIOPY_POLL_STATE;
        if (poll->interval) {
            uint64_t wake = poll->next < poll->deadline ? poll->next : poll->deadline;

            if (now < wake) {
                bool signalled = !sleep_towards(now, wake);

                now = vfiopy_now();
                if (signalled || now >= poll->check_at)
                    return VFIOPY_POLL_CHECK;
                continue;
            }
            poll->next = now + poll->interval;
        }

        poll->seen = vfiopy_load_any(poll->address, poll->width, poll->swap, false, &faulted);
        if (faulted)
            return VFIOPY_POLL_FAULT;
        if ((poll->seen & poll->mask) == poll->value)
            return VFIOPY_POLL_MATCH;
        if (now >= poll->deadline) /* before the read, not only after it */
            return VFIOPY_POLL_TIME;

        now = vfiopy_now();
        if (now >= poll->check_at)
            return VFIOPY_POLL_CHECK;
        if (!poll->interval)
            vfiopy_cpu_relax();
    }
}
