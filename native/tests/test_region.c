/* Regions without Python: accessors, checks, windows, runs, polls, forks. */
#define _GNU_SOURCE
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "region/region.h"
#include "region/runs.h"

#define SIZE 8192u
#define MILLISECOND 1000000u

static unsigned char memory[SIZE] __attribute__((aligned(4096)));

static struct vfiopy_window *make_windows(const struct vfiopy_window *windows, size_t count)
{
    struct vfiopy_window *copy = calloc(count ? count : 1, sizeof(*copy));

    CHECK(copy);
    if (count)
        memcpy(copy, windows, count * sizeof(*copy));
    return copy;
}

static struct vfiopy_region make_region_storage;

static struct vfiopy_region *make_region(unsigned directions, bool swap)
{
    const struct vfiopy_window window = {.offset = 0, .length = SIZE, .address = (uintptr_t)memory};
    size_t which;

    memset(memory, 0, sizeof(memory));
    memset(&make_region_storage, 0, sizeof(make_region_storage));
    CHECK(!vfiopy_region_init(&make_region_storage, SIZE, directions, swap, make_windows(&window, 1), 1, &which));
    return &make_region_storage;
}

/* --- accessors --- */

#define TEST_ACCESSORS(bits, pattern)                                                                                  \
    static void accessors##bits(void)                                                                                  \
    {                                                                                                                  \
        unsigned char around[32];                                                                                      \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        memset(memory, 0x11, 64);                                                                                      \
        vfiopy_write##bits(memory + 16, (uint##bits##_t)(pattern), &faulted);                                          \
        CHECK_EQUAL(vfiopy_read##bits(memory + 16, &faulted), (uint##bits##_t)(pattern));                              \
        CHECK_EQUAL(vfiopy_load##bits(memory + 16, &faulted), (uint##bits##_t)(pattern));                              \
        vfiopy_store##bits(memory + 24, (uint##bits##_t)(pattern), &faulted);                                          \
        CHECK_EQUAL(vfiopy_load##bits(memory + 24, &faulted), (uint##bits##_t)(pattern));                              \
        memset(around, 0x11, sizeof(around));                                                                          \
        CHECK(memcmp(memory, around, 16) == 0);                                                                        \
        CHECK(memcmp(memory + 16 + bits / 8, around, 8 - bits / 8) == 0);                                              \
        CHECK(memcmp(memory + 24 + bits / 8, around, 32 - bits / 8) == 0);                                             \
        for (unsigned i = 0; i < bits / 8; i++)                                                                        \
            CHECK_EQUAL(memory[16 + i], (pattern) >> (8 * i) & 0xff);                                                  \
        CHECK_EQUAL(faulted, 0);                                                                                       \
    }

TEST_ACCESSORS(8, 0x8171615141312111ull)
TEST_ACCESSORS(16, 0x8171615141312111ull)
TEST_ACCESSORS(32, 0x8171615141312111ull)
TEST_ACCESSORS(64, 0x8171615141312111ull)

static void any_width_and_byte_order(void)
{
    const uint64_t value = 0x8877665544332211ull;

    for (unsigned width = 1; width <= 8; width *= 2) {
        uint64_t mask = UINT64_MAX >> (64 - 8 * width);

        for (int relaxed = 0; relaxed < 2; relaxed++) {
            int faulted = 0;

            memset(memory, 0, 64);
            vfiopy_store_any((uintptr_t)memory, width, false, relaxed, value & mask, &faulted);
            vfiopy_store_any((uintptr_t)memory + 8, width, true, relaxed, value & mask, &faulted);
            for (unsigned i = 0; i < width; i++) {
                CHECK_EQUAL(memory[i], value >> (8 * i) & 0xff);
                CHECK_EQUAL(memory[8 + i], value >> (8 * (width - 1 - i)) & 0xff);
            }
            CHECK_EQUAL(vfiopy_load_any((uintptr_t)memory, width, false, relaxed, &faulted), value & mask);
            CHECK_EQUAL(vfiopy_load_any((uintptr_t)memory + 8, width, true, relaxed, &faulted), value & mask);
            CHECK_EQUAL(vfiopy_load_any((uintptr_t)memory + 8, width, false, relaxed, &faulted),
                        vfiopy_swap(value & mask, width));
            CHECK_EQUAL(faulted, 0);
        }
    }
}

static void barriers(void)
{
    vfiopy_barrier();
    vfiopy_read_barrier();
    vfiopy_write_barrier();
    vfiopy_dma_read_barrier();
    vfiopy_dma_write_barrier();
    vfiopy_cpu_relax();
}

/* --- checks and windows --- */

static void verdicts(void)
{
    struct vfiopy_region *region = make_region(VFIOPY_READ, false);

    CHECK_EQUAL(vfiopy_region_check(region, 0, 1, 4, VFIOPY_READ), VFIOPY_ALLOWED);
    CHECK_EQUAL(vfiopy_region_check(region, SIZE - 4, 1, 4, VFIOPY_READ), VFIOPY_ALLOWED);
    CHECK_EQUAL(vfiopy_region_check(region, SIZE, 0, 4, VFIOPY_READ), VFIOPY_ALLOWED);
    CHECK_EQUAL(vfiopy_region_check(region, SIZE, 1, 1, VFIOPY_READ), VFIOPY_OUT_OF_RANGE);
    CHECK_EQUAL(vfiopy_region_check(region, SIZE - 2, 1, 4, VFIOPY_READ), VFIOPY_OUT_OF_RANGE);
    CHECK_EQUAL(vfiopy_region_check(region, UINT64_MAX, 1, 1, VFIOPY_READ), VFIOPY_OUT_OF_RANGE);
    CHECK_EQUAL(vfiopy_region_check(region, 0, UINT64_MAX, 8, VFIOPY_READ), VFIOPY_OUT_OF_RANGE);
    CHECK_EQUAL(vfiopy_region_check(region, 8, SIZE / 8, 8, VFIOPY_READ), VFIOPY_OUT_OF_RANGE);
    CHECK_EQUAL(vfiopy_region_check(region, 8, SIZE / 8 - 1, 8, VFIOPY_READ), VFIOPY_ALLOWED);
    CHECK_EQUAL(vfiopy_region_check(region, 2, 1, 4, VFIOPY_READ), VFIOPY_MISALIGNED);
    CHECK_EQUAL(vfiopy_region_check(region, 0, 1, 4, VFIOPY_WRITE), VFIOPY_WRONG_DIRECTION);
    vfiopy_region_set_flags(region, VFIOPY_REGION_SLOW | VFIOPY_REGION_TRACED, 0);
    CHECK_EQUAL(vfiopy_region_check(region, 0, 1, 4, VFIOPY_READ), VFIOPY_ALLOWED);
    vfiopy_region_set_flags(region, VFIOPY_REGION_GONE, VFIOPY_REGION_SLOW);
    CHECK_EQUAL(vfiopy_region_check(region, 0, 1, 4, VFIOPY_READ), VFIOPY_IS_GONE);
    vfiopy_region_set_flags(region, VFIOPY_REGION_CLOSED, 0);
    CHECK_EQUAL(vfiopy_region_check(region, 0, 1, 4, VFIOPY_READ), VFIOPY_IS_CLOSED);
    vfiopy_region_destroy(region);
    vfiopy_region_destroy(region);
}

static void fast_path_is_open_only_when_nothing_is_to_be_looked_at(void)
{
    const unsigned states[] = {VFIOPY_REGION_CLOSED, VFIOPY_REGION_FORKED, VFIOPY_REGION_GONE, VFIOPY_REGION_SLOW,
                               VFIOPY_REGION_TRACED};
    struct vfiopy_region *region = make_region(VFIOPY_READ | VFIOPY_WRITE, false);

    CHECK_EQUAL(region->read_span, SIZE);
    CHECK_EQUAL(region->write_span, SIZE);
    CHECK_EQUAL(region->base, (uintptr_t)memory);
    for (size_t i = 0; i < sizeof(states) / sizeof(states[0]); i++) {
        vfiopy_region_set_flags(region, states[i], 0);
        CHECK_EQUAL(region->read_span, 0);
        CHECK_EQUAL(region->write_span, 0);
        vfiopy_region_set_flags(region, 0, states[i]);
        CHECK_EQUAL(region->read_span, SIZE);
    }
    vfiopy_region_destroy(region);
    CHECK_EQUAL(region->read_span, 0);

    region = make_region(VFIOPY_WRITE, false);
    CHECK_EQUAL(region->read_span, 0);
    CHECK_EQUAL(region->write_span, SIZE);
    vfiopy_region_destroy(region);

    region = make_region(VFIOPY_READ | VFIOPY_WRITE, true);
    CHECK_EQUAL(region->read_span, 0);
    CHECK_EQUAL(region->write_span, 0);
    vfiopy_region_destroy(region);
}

static void places(void)
{
    const uintptr_t address = (uintptr_t)memory;
    const struct vfiopy_window windows[] = {
        {.offset = 64, .length = 20, .address = address + 64},
        {.offset = 128, .length = 64, .address = address + 128},
    };
    const struct {
        uint64_t offset;
        unsigned width;
        bool mapped;
        uint64_t room;
    } cases[] = {
        {0, 8, false, 64},  {56, 8, false, 8}, {64, 4, true, 20},   {80, 4, true, 4},    {80, 8, false, 8},
        {84, 4, false, 44}, {88, 8, false, 40}, {128, 1, true, 64}, {184, 8, true, 8},   {191, 1, true, 1},
        {192, 8, false, 64},
    };
    struct vfiopy_region region = {0};
    size_t which;

    CHECK(!vfiopy_region_init(&region, 256, VFIOPY_READ, false, make_windows(windows, 2), 2, &which));
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct vfiopy_place place = vfiopy_region_locate(&region, cases[i].offset, cases[i].width);

        CHECK_EQUAL(place.address, cases[i].mapped ? address + cases[i].offset : 0);
        CHECK_EQUAL(place.room, cases[i].room);
        if (cases[i].mapped) {
            /* The window is that of the fast path now, in multiples of 8 bytes. */
            CHECK_EQUAL(region.base, address);
            CHECK_EQUAL(region.start, cases[i].offset < 128 ? 64 : 128);
            CHECK_EQUAL(region.read_span, cases[i].offset < 128 ? 16 : 64);
        }
    }
    vfiopy_region_destroy(&region);
}

static void wrong_windows(void)
{
    const uintptr_t address = (uintptr_t)memory;
    const struct {
        struct vfiopy_window windows[2];
        size_t count, which;
        const char *text;
    } cases[] = {
        {{{0, 0, address}}, 1, 0, "is empty"},
        {{{0, 8, 0}}, 1, 0, "has address 0"},
        {{{0, 16, address}, {8, 8, address + 8}}, 2, 1, "overlaps"},
        {{{64, 16, address}, {0, 8, address + 8}}, 2, 1, "overlaps"},
        {{{0, 257, address}}, 1, 0, "reaches past"},
        {{{256, 8, address}}, 1, 0, "reaches past"},
        {{{UINT64_MAX - 7, 8, address}}, 1, 0, "reaches past"},
        {{{8, UINT64_MAX, address}}, 1, 0, "reaches past"},
        {{{0, 256, UINTPTR_MAX - 7}}, 1, 0, "wraps around"},
        {{{0, 8, address + 1}}, 1, 0, "not congruent"},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct vfiopy_window *windows = make_windows(cases[i].windows, cases[i].count);
        struct vfiopy_region region = {0};
        size_t which = 99;
        const char *text = vfiopy_region_init(&region, 256, VFIOPY_READ, false, windows, cases[i].count, &which);

        CHECK(text && strstr(text, cases[i].text));
        CHECK_EQUAL(which, cases[i].which);
        vfiopy_region_destroy(&region);
        free(windows);
    }
}

/* --- runs --- */

static void runs_keep_every_byte(void)
{
    static unsigned char data[1024 + 1], out[1024 + 1];

    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (unsigned char)(i * 7 + 3);
    for (unsigned width = 1; width <= 8; width *= 2) {
        for (size_t count = 0; count <= 1024 / width; count += 1 + count / 2) {
            memset(memory, 0xee, 4096);
            memset(out, 0, sizeof(out));
            /* Unaligned on our side: only the device's side has to be. */
            CHECK_EQUAL(vfiopy_write_run((uintptr_t)memory + 8, width, data + 1, count, width), count);
            CHECK(memcmp(memory + 8, data + 1, count * width) == 0);
            CHECK_EQUAL(memory[7], 0xee);
            CHECK_EQUAL(memory[8 + count * width], 0xee);
            CHECK_EQUAL(vfiopy_read_run((uintptr_t)memory + 8, width, out + 1, count, width), count);
            CHECK(memcmp(out + 1, data + 1, count * width) == 0);
            if (!count)
                continue;
            CHECK_EQUAL(vfiopy_write_run((uintptr_t)memory + 2048, 0, data + 1, count, width), count);
            CHECK(memcmp(memory + 2048, data + 1 + (count - 1) * width, width) == 0);
            CHECK_EQUAL(memory[2048 + width], 0xee);
            CHECK_EQUAL(vfiopy_read_run((uintptr_t)memory + 2048, 0, out + 1, count, width), count);
            for (size_t i = 0; i < count; i++)
                CHECK(memcmp(out + 1 + i * width, memory + 2048, width) == 0);
        }
    }
}

/* --- polls --- */

static atomic_uint flags;

static struct vfiopy_poll make_poll(unsigned width, uint64_t mask, uint64_t value, uint64_t ms)
{
    memset(memory, 0, 64);
    atomic_store(&flags, 0);
    return (struct vfiopy_poll){
        .address = (uintptr_t)memory,
        .width = width,
        .mask = mask,
        .value = value,
        .deadline = vfiopy_now() + ms * MILLISECOND,
        .check_at = UINT64_MAX,
        .flags = &flags,
    };
}

static void *change_memory(void *argument)
{
    struct vfiopy_poll *poll = argument;
    int faulted = 0;

    usleep(20000);
    vfiopy_write32((void *)poll->address, 0x80, &faulted);
    return NULL;
}

static void *change_flags(void *argument)
{
    (void)argument;
    usleep(20000);
    atomic_store(&flags, VFIOPY_REGION_GONE);
    return NULL;
}

static void polls_end_as_they_should(void)
{
    for (uint64_t interval = 0; interval <= 5 * MILLISECOND; interval += 5 * MILLISECOND) {
        struct vfiopy_poll poll = make_poll(4, 0x80, 0x80, 20000);
        uint64_t start;
        pthread_t thread;

        poll.interval = interval;
        CHECK_EQUAL(pthread_create(&thread, NULL, change_memory, &poll), 0);
        CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_MATCH);
        CHECK_EQUAL(poll.seen, 0x80);
        pthread_join(thread, NULL);

        poll = make_poll(4, 0x80, 0x80, 20000);
        poll.interval = interval;
        CHECK_EQUAL(pthread_create(&thread, NULL, change_flags, NULL), 0);
        CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_STATE);
        pthread_join(thread, NULL);

        poll = make_poll(8, 1, 1, 20);
        poll.interval = interval;
        start = vfiopy_now();
        CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_TIME);
        CHECK(vfiopy_now() >= poll.deadline && vfiopy_now() - start < 10000ull * MILLISECOND);

        poll = make_poll(4, 1, 1, 20000);
        poll.interval = interval;
        poll.check_at = vfiopy_now() + 10 * MILLISECOND;
        CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_CHECK);
        CHECK(vfiopy_now() >= poll.check_at);
    }
}

static void a_poll_looks_once_more_after_its_deadline(void)
{
    struct vfiopy_poll poll = make_poll(4, 1, 1, 0);

    memory[0] = 1;
    poll.deadline = 0; /* long ago */
    CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_MATCH);
    memory[0] = 0;
    CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_TIME);
}

static void a_poll_swaps_bytes(void)
{
    struct vfiopy_poll poll = make_poll(2, 0xff00, 0x1200, 0);

    memory[0] = 0x12;
    memory[1] = 0x34;
    poll.swap = true;
    CHECK_EQUAL(vfiopy_poll_run(&poll), VFIOPY_POLL_MATCH);
    CHECK_EQUAL(poll.seen, 0x1234);
}

/* --- forks --- */

static void a_forked_child_finds_its_regions_marked(void)
{
    const struct vfiopy_window window = {.offset = 0, .length = SIZE, .address = (uintptr_t)memory};
    struct vfiopy_region regions[3];
    size_t which;
    int status;
    pid_t child;

    memset(regions, 0, sizeof(regions));
    for (int i = 0; i < 3; i++)
        CHECK(!vfiopy_region_init(&regions[i], SIZE, VFIOPY_READ, false, make_windows(&window, 1), 1, &which));
    vfiopy_region_destroy(&regions[1]);
    atomic_store(&regions[0].users, 3);
    child = fork();
    if (child == 0) {
        bool good = vfiopy_region_check(&regions[0], 0, 1, 4, VFIOPY_READ) == VFIOPY_IS_FORKED
                    && vfiopy_region_check(&regions[2], 0, 1, 4, VFIOPY_READ) == VFIOPY_IS_FORKED
                    && regions[0].read_span == 0 && atomic_load(&regions[0].users) == 0;

        /* The lock of the list must be free in the child. */
        vfiopy_region_destroy(&regions[0]);
        _exit(good ? 0 : 1);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK_EQUAL(status, 0);
    CHECK_EQUAL(vfiopy_region_check(&regions[0], 0, 1, 4, VFIOPY_READ), VFIOPY_ALLOWED);
    CHECK_EQUAL(regions[0].read_span, SIZE);
    vfiopy_region_destroy(&regions[0]);
    vfiopy_region_destroy(&regions[2]);
}

static void *make_and_destroy(void *argument)
{
    const struct vfiopy_window window = {.offset = 0, .length = SIZE, .address = (uintptr_t)memory};

    (void)argument;
    for (int i = 0; i < 2000; i++) {
        struct vfiopy_region region = {0};
        size_t which;

        CHECK(!vfiopy_region_init(&region, SIZE, VFIOPY_READ, false, make_windows(&window, 1), 1, &which));
        vfiopy_region_destroy(&region);
    }
    return NULL;
}

static void regions_come_and_go_in_many_threads(void)
{
    pthread_t threads[4];

    for (int i = 0; i < 4; i++)
        CHECK_EQUAL(pthread_create(&threads[i], NULL, make_and_destroy, NULL), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

int main(void)
{
    RUN(accessors8);
    RUN(accessors16);
    RUN(accessors32);
    RUN(accessors64);
    RUN(any_width_and_byte_order);
    RUN(barriers);
    RUN(verdicts);
    RUN(fast_path_is_open_only_when_nothing_is_to_be_looked_at);
    RUN(places);
    RUN(wrong_windows);
    RUN(runs_keep_every_byte);
    RUN(polls_end_as_they_should);
    RUN(a_poll_looks_once_more_after_its_deadline);
    RUN(a_poll_swaps_bytes);
    RUN(a_forked_child_finds_its_regions_marked);
    RUN(regions_come_and_go_in_many_threads);
    return 0;
}
