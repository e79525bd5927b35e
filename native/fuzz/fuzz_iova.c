/*
 * Sequences of operations on the book, read from bytes, against an array of pages. For libFuzzer, AFL (persistent mode)
 * or the driver beside this file: they all call LLVMFuzzerTestOneInput.
 *
 * The world is 192 pages in three usable ranges, with two mappers whose calls fail when the input says so.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "../tests/check.h"
#include "../tests/fake_kernel.inc.c"
#include "iova/space.h"

enum { PAGE = 4096, PAGES = 192, OWNERS = 3 };

/* What should be: for each page the serial number of its mapping (0: none), and its pins by owner. */
struct world {
    struct vfiopy_space *space;
    uint64_t mapped[PAGES];
    uint16_t pins[PAGES][OWNERS];
    uint64_t hot; /* the first page of what was mapped last */
    uint32_t late;  /* token of a mapper that comes and goes */
    bool failing;   /* the next calls of the kernel fail: outcomes are not predicted, only that all agrees after */
    const uint8_t *data, *end;
};

static uint8_t byte(struct world *world)
{
    return world->data < world->end ? *world->data++ : 0;
}

/* Often near what was mapped last, and often short: operations that never meet find nothing. */
static struct vfiopy_range some_range(struct world *world, unsigned longest)
{
    uint8_t where = byte(world), length = byte(world);
    uint64_t first = where < PAGES ? where : world->hot + where % 8;
    uint64_t count = 1 + ((length & 63) % longest >> 2 * (length >> 6));

    return (struct vfiopy_range){first * PAGE, (first + count) * PAGE - 1};
}

static void drop(struct vfiopy_gone *gone)
{
    void *memory;

    while (vfiopy_gone_pop(gone, &memory))
        ;
}

/* Take the book's word for what failing calls of the kernel left; it must agree with the kernel all the same. */
static void look_again(struct world *world)
{
    struct vfiopy_views views = {0};

    memset(world->mapped, 0, sizeof(world->mapped));
    CHECK_EQUAL(vfiopy_space_overlapping(world->space, (struct vfiopy_range){0, UINT64_MAX}, &views), VFIOPY_OK);
    for (size_t i = 0; i < views.count; i++) {
        for (uint64_t page = views.items[i].iova.first / PAGE; page <= views.items[i].iova.last / PAGE; page++)
            world->mapped[page] = views.items[i].serial;
        if (views.items[i].state == VFIOPY_LIVE)
            CHECK(fake_has(0, views.items[i].iova.first, views.items[i].iova.last - views.items[i].iova.first + 1));
    }
    free(views.items);
}

static void map(struct world *world)
{
    struct vfiopy_range range = some_range(world, 24);
    uint8_t how = byte(world);
    struct vfiopy_request request = {
        .iova = how & 1 ? range.first : VFIOPY_NO_FIXED_IOVA,
        .size = range.last - range.first + 1,
        .limit = how & 2 ? UINT64_MAX : PAGES / 2 * PAGE - 1,
        .alignment = how & 4 ? (uint64_t)PAGE << (how >> 5) : 0,
        .address = how & 8 ? UINT64_C(0x7f0000000000) + range.first : 0,
        .fd = -1,
        .prot = how & 16 ? VFIOPY_PROT_ALL : VFIOPY_PROT_READ,
    };
    struct vfiopy_failure failure = {0};
    bool free_before = true;
    uint64_t iova, serial;

    for (uint64_t page = range.first / PAGE; page <= range.last / PAGE && page < PAGES; page++)
        free_before = free_before && !world->mapped[page];
    if (vfiopy_space_map(world->space, &request, &iova, &serial, &failure)) {
        CHECK(failure.result == VFIOPY_OVERLAP || failure.result == VFIOPY_BUSY || failure.result == VFIOPY_OUTSIDE ||
              failure.result == VFIOPY_EXCLUDED || failure.result == VFIOPY_OVER_LIMIT ||
              failure.result == VFIOPY_NO_SPACE || failure.result == VFIOPY_BAD_ALIGNMENT ||
              failure.result == VFIOPY_TOO_MANY || (world->failing && failure.result == VFIOPY_KERNEL) ||
              (!request.address && failure.result == VFIOPY_BAD_KIND)); /* type1 */
        CHECK(failure.result != VFIOPY_OVERLAP || !free_before);
        if (failure.kept)
            look_again(world);
        return;
    }
    CHECK(!(how & 1) || (free_before && iova == range.first));
    CHECK(iova + (request.size - 1) <= request.limit);
    CHECK(!request.alignment || iova % request.alignment == 0);
    for (uint64_t page = iova / PAGE; page < iova / PAGE + request.size / PAGE; page++) {
        CHECK(page < PAGES && !world->mapped[page]);
        world->mapped[page] = serial;
    }
    world->hot = iova / PAGE;
}

static bool pinned_in(const struct world *world, uint64_t serial)
{
    for (int page = 0; page < PAGES; page++) {
        for (int owner = 0; owner < OWNERS && world->mapped[page] == serial; owner++) {
            if (world->pins[page][owner])
                return true;
        }
    }
    return false;
}

static void unmap(struct world *world)
{
    struct vfiopy_unmap unmap = {.range = some_range(world, 64), .exact = byte(world) & 1};
    struct vfiopy_failure failure = {0};
    enum vfiopy_step step;
    uint64_t expected = 0;
    bool done = false;
    int result;

    if (unmap.exact) {
        struct vfiopy_handle handle = {.iova = unmap.range.first};
        void *memory;

        CHECK(!vfiopy_space_unmap_idle(world->space, &handle, &unmap.bytes, &memory, &failure) || world->failing);
        done = unmap.bytes;
        if (done)
            unmap.range.last = unmap.range.first + (unmap.bytes - 1);
    }
    step = done || failure.result ? VFIOPY_STEP_FAILED : vfiopy_unmap_step(world->space, &unmap, &failure);
    if (step == VFIOPY_STEP_NOTIFY) {
        CHECK_EQUAL(unmap.notice_count, 0); /* no owner has a callback */
        free(unmap.notices);
        step = vfiopy_unmap_step(world->space, &unmap, &failure);
        CHECK_EQUAL(step, VFIOPY_STEP_WAIT);
        vfiopy_unmap_give_up(world->space, &unmap);
        return;
    }
    if (step == VFIOPY_STEP_FAILED && !done)
        CHECK(failure.result == VFIOPY_NOT_MAPPED || failure.result == VFIOPY_CUTS ||
              failure.result == VFIOPY_BUSY || world->failing);
    if (step == VFIOPY_STEP_READY) {
        result = vfiopy_unmap_finish(world->space, &unmap, &failure);
        CHECK(!result || world->failing);
        done = !result;
    }
    drop(&unmap.gone);
    if (!done) {
        if (world->failing)
            look_again(world);
        return;
    }
    for (uint64_t page = unmap.range.first / PAGE; page <= unmap.range.last / PAGE && page < PAGES; page++) {
        expected += world->mapped[page] ? PAGE : 0;
        CHECK(!world->mapped[page] || !pinned_in(world, world->mapped[page]));
    }
    CHECK_EQUAL(unmap.bytes, expected);
    for (uint64_t page = unmap.range.first / PAGE; page <= unmap.range.last / PAGE && page < PAGES; page++)
        world->mapped[page] = 0;
}

static void pin(struct world *world)
{
    struct vfiopy_range range = some_range(world, 48);
    uint32_t owner = byte(world) % OWNERS;
    struct vfiopy_failure failure = {0};

    if (vfiopy_space_pin(world->space, range, VFIOPY_PROT_READ, owner, false, &failure)) {
        CHECK(failure.result == VFIOPY_NOT_MAPPED || failure.result == VFIOPY_BUSY);
        return;
    }
    for (uint64_t page = range.first / PAGE; page <= range.last / PAGE; page++) {
        CHECK(page < PAGES && world->mapped[page]);
        world->pins[page][owner]++;
    }
}

/* The owner's pins of a mapping and the counts of its pages decide, not who pinned which page. */
static void unpin(struct world *world)
{
    struct vfiopy_range range = some_range(world, 48);
    uint32_t owner = byte(world) % OWNERS;
    struct vfiopy_failure failure = {0};
    bool has_all = true;

    for (uint64_t page = range.first / PAGE; page <= range.last / PAGE; page++)
        has_all = has_all && page < PAGES && world->pins[page][owner];
    /* Only what certainly succeeds is followed page by page. */
    if (!has_all)
        return;
    CHECK_EQUAL(vfiopy_space_unpin(world->space, range, owner, &failure), VFIOPY_OK);
    for (uint64_t page = range.first / PAGE; page <= range.last / PAGE; page++)
        world->pins[page][owner]--;
}

static void windows(struct world *world)
{
    struct vfiopy_range window = some_range(world, 16);
    struct vfiopy_failure failure = {0};

    switch (byte(world) % 3) {
    case 0:
        vfiopy_space_exclude(world->space, window, &failure);
        break;
    case 1:
        vfiopy_space_include(world->space, window, &failure);
        break;
    default:
        vfiopy_space_set_transient(world->space, window, &failure);
    }
}

static void mappers(struct world *world)
{
    struct vfiopy_failure failure = {0};

    if (!world->late) {
        world->late = vfiopy_space_add_mapper(world->space, VFIOPY_MAPPER_IOAS, 1, 1, fake_ioctl);
        CHECK(!vfiopy_space_replay(world->space, world->late, &failure) || world->failing);
    } else if (byte(world) & 1) {
        CHECK(!vfiopy_space_drop(world->space, world->late, &failure) || world->failing);
    } else {
        CHECK_EQUAL(vfiopy_space_remove_mapper(world->space, world->late, &failure), VFIOPY_OK);
        fake_tables[1].count = 0;
        world->late = 0;
    }
}

static void fail_calls(struct world *world)
{
    static const int errors[] = {ENOMEM, EBUSY, EINVAL, ENOENT};
    uint8_t how = byte(world);

    fail_errno = errors[how & 3];
    fail_from = fake_calls + 1 + (how >> 2) % 4;
    fail_to = fail_from + (how >> 4) % 4;
    world->failing = true;
}

static void resync(struct world *world)
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};
    uint64_t bytes = 0;
    int result;

    fail_from = fail_to = 0;
    world->failing = false;
    result = vfiopy_space_resync(world->space, &gone, &bytes, &failure);
    CHECK_EQUAL(result, VFIOPY_OK);
    drop(&gone);
    look_again(world);
}

static void compare(struct world *world)
{
    const char *wrong = vfiopy_space_verify(world->space);
    struct vfiopy_stats stats;
    uint64_t pins = 0;

    if (wrong)
        fprintf(stderr, "%s\n", wrong);
    CHECK(!wrong);
    for (uint64_t page = 0; page < PAGES; page++) {
        struct vfiopy_view view;
        bool found = vfiopy_space_find(world->space, page * PAGE, &view);

        CHECK_EQUAL(found ? view.serial : 0, world->mapped[page]);
        for (int owner = 0; owner < OWNERS; owner++)
            pins += world->pins[page][owner];
    }
    vfiopy_space_stats(world->space, &stats);
    CHECK_EQUAL(stats.pins, pins);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct vfiopy_range usable[] = {{0, 64 * PAGE - 1}, {70 * PAGE, 128 * PAGE - 1},
                                                 {128 * PAGE, PAGES * PAGE - 1}};
    static void (*const operations[])(struct world *) = {map, map, map, unmap, unmap, pin, pin, unpin,
                                                         windows, mappers, fail_calls, resync};
    struct world world = {.space = vfiopy_space_create(PAGE, NULL), .data = data, .end = data + size};
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};

    CHECK(world.space);
    fake_reset();
    CHECK_EQUAL(vfiopy_space_set_usable(world.space, usable, 3, 0x11000, 0, &failure), VFIOPY_OK);
    CHECK(vfiopy_space_add_mapper(world.space, VFIOPY_MAPPER_TYPE1, 0, 0, fake_ioctl));
    for (int owner = 1; owner < OWNERS; owner++)
        CHECK_EQUAL(vfiopy_space_add_owner(world.space, "owner", NULL), (uint32_t)owner);
    while (world.data < world.end) {
        operations[byte(&world) % (sizeof(operations) / sizeof(*operations))](&world);
        compare(&world);
    }
    vfiopy_space_forget(world.space, &gone, &gone);
    drop(&gone);
    vfiopy_space_destroy(world.space);
    return 0;
}
