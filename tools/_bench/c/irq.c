/*
 * An interrupt's way as short as it can be: a store to the device's doorbell (or VFIO's own trigger), then a wait for
 * the eventfd.
 *
 * Compiled when tools/bench needs it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
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

/* Somebody else who rings, some time after it was told to: then who waits is asleep. */
struct ringer {
    struct bell bell;
    int32_t told; /* an eventfd */
    uint32_t delay; /* in ns */
    _Atomic int64_t rung; /* when */
    atomic_int end;
    pthread_t thread;
};

static void *ring_when_told(void *argument)
{
    struct ringer *ringer = argument;
    const struct timespec delay = {.tv_nsec = ringer->delay};
    uint64_t count;

    while (read(ringer->told, &count, sizeof(count)) == sizeof(count) && !ringer->end) {
        nanosleep(&delay, NULL);
        ringer->rung = now();
        if (ring(&ringer->bell) < 0)
            break;
    }
    return NULL;
}

/* On another CPU than the caller, if there is one. */
int bench_ringer_start(struct ringer *ringer)
{
    int error = pthread_create(&ringer->thread, NULL, ring_when_told, ringer), here = sched_getcpu();
    cpu_set_t others;

    if (error)
        return -error;
    CPU_ZERO(&others);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (cpu != here)
            CPU_SET(cpu, &others);
    }
    pthread_setaffinity_np(ringer->thread, sizeof(others), &others); /* fails where there is no other */
    return 0;
}

void bench_ringer_stop(struct ringer *ringer)
{
    const uint64_t one = 1;

    ringer->end = 1;
    if (write(ringer->told, &one, sizeof(one)) == sizeof(one))
        pthread_join(ringer->thread, NULL);
}

/* As bench_irq, asleep when it rings. */
int64_t bench_irq_asleep(struct ringer *ringer, uint32_t rounds)
{
    const struct bell *bell = &ringer->bell;
    const uint64_t one = 1;
    int64_t sum = 0;

    for (uint32_t round = 0; round < rounds; round++) {
        if (write(ringer->told, &one, sizeof(one)) < 0 || hear(bell) < 0)
            return errno ? -errno : -ETIMEDOUT;
        sum += now() - ringer->rung;
        if (bell->acknowledge)
            *bell->acknowledge = bell->acknowledge_value;
    }
    return sum;
}
