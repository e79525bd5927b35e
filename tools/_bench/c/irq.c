/*
 * An interrupt's way as short as it can be: a store to the device's doorbell (or VFIO's own trigger), then a wait for
 * the eventfd.
 *
 * Compiled when tools/bench needs it.
 */
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "uapi/vfiopy_uapi.h"

struct bell {
    volatile uint32_t *ring, *acknowledge; /* NULL: neither; then the interrupt is VFIO's */
    uint32_t ring_value, acknowledge_value;
    int32_t eventfd; /* non-blocking where `polls` */
    int32_t device, index, vector;
    int32_t polls;
};

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static int ring(const struct bell *bell)
{
    struct vfiopy_vfio_irq_set set = {
        .argsz = sizeof(set),
        .flags = VFIOPY_VFIO_IRQ_SET_DATA_NONE | VFIOPY_VFIO_IRQ_SET_ACTION_TRIGGER,
        .index = (uint32_t)bell->index,
        .start = (uint32_t)bell->vector,
        .count = 1,
    };

    if (!bell->ring)
        return ioctl(bell->device, VFIOPY_VFIO_DEVICE_SET_IRQS, &set);
    *bell->ring = bell->ring_value;
    return 0;
}

static int hear(const struct bell *bell)
{
    struct pollfd waited = {.fd = bell->eventfd, .events = POLLIN};
    uint64_t count;

    if (bell->polls && poll(&waited, 1, 1000) != 1)
        return -1;
    return read(bell->eventfd, &count, sizeof(count)) == sizeof(count) ? 0 : -1;
}

/* Nanoseconds from doorbell to wake-up, summed up over `rounds`; or -errno. */
int64_t bench_irq(const struct bell *bell, uint32_t rounds)
{
    int64_t sum = 0;

    for (uint32_t round = 0; round < rounds; round++) {
        int64_t begin = now();

        if (ring(bell) < 0 || hear(bell) < 0)
            return errno ? -errno : -ETIMEDOUT;
        sum += now() - begin;
        if (bell->acknowledge)
            *bell->acknowledge = bell->acknowledge_value;
    }
    return sum;
}
