/*
 * Many threads on one book: map, unmap, pin, look up, and mappers that come and go, all at once. ThreadSanitizer looks
 * for races; the walk afterwards for what they would have left.
 */
#include <pthread.h>
#include <string.h>

#include "check.h"
#include "fake_kernel.inc.c"
#include "iova/space.h"
#include "random.h"

enum { PAGE = 4096, THREADS = 4, OPERATIONS = 4000, PLACES = 24, LONGEST = 4 };

struct worker {
    struct vfiopy_space *space;
    pthread_t thread;
    uint64_t seed;
    uint32_t owner;
    unsigned done[8], refused;
};

static _Atomic int held; /* references to memory: taken by map and views, dropped when gone */

static void retain(void *memory)
{
    CHECK(memory == (void *)&held);
    held++;
}

static void drop(struct vfiopy_gone *gone)
{
    void *memory;

    while (vfiopy_gone_pop(gone, &memory))
        held--;
}

static uint64_t place(struct worker *worker)
{
    return (1 + random_below(&worker->seed, PLACES)) * LONGEST * PAGE;
}

static void map_one(struct worker *worker)
{
    uint64_t iova, size = (1 + random_below(&worker->seed, LONGEST)) * PAGE;
    struct vfiopy_failure failure = {0};
    struct vfiopy_request request = {
        .iova = random_below(&worker->seed, 2) ? place(worker) : VFIOPY_NO_FIXED_IOVA,
        .size = size,
        .limit = 64 * LONGEST * PAGE,
        .address = UINT64_C(0x7f0000000000) + random_below(&worker->seed, 100) * PAGE,
        .fd = -1,
        .prot = VFIOPY_PROT_ALL,
        .memory = (void *)&held,
    };

    held++;
    if (vfiopy_space_map(worker->space, &request, &iova, NULL, &failure)) {
        /* excluded: a window that another thread keeps for a moment */
        CHECK(failure.result == VFIOPY_OVERLAP || failure.result == VFIOPY_BUSY ||
              failure.result == VFIOPY_EXCLUDED || failure.result == VFIOPY_NO_SPACE);
        held--;
        worker->refused++;
    } else {
        worker->done[0]++;
    }
}

/* Several at once, and down again what nobody else has taken down or pinned. */
static void map_and_unmap_many(struct worker *worker)
{
    struct vfiopy_request like = {
        .iova = VFIOPY_NO_FIXED_IOVA, .limit = 64 * LONGEST * PAGE, .fd = -1, .prot = VFIOPY_PROT_ALL};
    struct vfiopy_piece pieces[12];
    struct vfiopy_handle handles[12];
    size_t count = 1 + random_below(&worker->seed, 12), live = 0, done;
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};

    for (size_t i = 0; i < count; i++) {
        uint64_t size = (1 + random_below(&worker->seed, 2)) * PAGE;

        pieces[i] = (struct vfiopy_piece){(void *)&held, UINT64_C(0x7f0000000000) + i * PAGE, size, 0, 0, false};
        held++;
    }
    if (vfiopy_space_map_many(worker->space, &like, pieces, count, &failure)) {
        CHECK_EQUAL(failure.result, VFIOPY_NO_SPACE);
        worker->refused++;
    } else {
        worker->done[0]++;
    }
    for (size_t i = 0; i < count; i++) {
        CHECK_EQUAL(pieces[i].kept, pieces[i].serial != 0);
        held -= !pieces[i].kept;
        if (pieces[i].serial)
            handles[live++] = (struct vfiopy_handle){pieces[i].iova, pieces[i].serial};
    }
    CHECK(live == 0 || live == count);
    failure = (struct vfiopy_failure){0};
    for (size_t at = 0; at < live; at += done + 1) { /* one that is not simple is left to the others */
        CHECK_EQUAL(vfiopy_space_unmap_idle_many(worker->space, handles + at, live - at, &done, &gone, &failure),
                    VFIOPY_OK);
        worker->done[1] += done != 0;
    }
    drop(&gone);
}

static void unmap_some(struct worker *worker)
{
    uint64_t first = place(worker);
    struct vfiopy_unmap unmap = {.range = {first, first}, .exact = true};
    struct vfiopy_failure failure = {0};
    enum vfiopy_step step;
    unsigned waits = 0;

    if (random_below(&worker->seed, 8) == 0) {
        unmap.exact = false;
        unmap.range.last = first + 4 * LONGEST * PAGE - 1;
    }
    while ((step = vfiopy_unmap_step(worker->space, &unmap, &failure)) != VFIOPY_STEP_READY) {
        if (step == VFIOPY_STEP_BUSY)
            vfiopy_unmap_wait_idle(worker->space, &unmap);
        if (step == VFIOPY_STEP_NOTIFY) {
            for (size_t i = 0; i < unmap.notice_count; i++)
                held--; /* the callback's reference; nobody is called here */
            free(unmap.notices);
            unmap.notices = NULL;
        }
        if (step == VFIOPY_STEP_FAILED) {
            CHECK(failure.result == VFIOPY_NOT_MAPPED || failure.result == VFIOPY_CUTS ||
                  failure.result == VFIOPY_BUSY || failure.result == VFIOPY_IS_UNMAPPING);
            worker->refused++;
            return;
        }
        if (step == VFIOPY_STEP_WAIT && waits++ == 3) {
            vfiopy_unmap_give_up(worker->space, &unmap);
            worker->refused++;
            return;
        }
        if (step == VFIOPY_STEP_WAIT)
            vfiopy_unmap_wait(worker->space, &unmap, 200000);
    }
    CHECK_EQUAL(vfiopy_unmap_finish(worker->space, &unmap, &failure), VFIOPY_OK);
    drop(&unmap.gone);
    worker->done[1]++;
}

static void pin_and_unpin(struct worker *worker)
{
    uint64_t first = place(worker);
    struct vfiopy_range range = {first, first + (1 + random_below(&worker->seed, LONGEST)) * PAGE - 1};
    struct vfiopy_failure failure = {0};
    struct vfiopy_views views = {0};

    if (vfiopy_space_pin(worker->space, range, VFIOPY_PROT_READ, worker->owner, false, &failure)) {
        CHECK(failure.result == VFIOPY_NOT_MAPPED || failure.result == VFIOPY_BUSY ||
              failure.result == VFIOPY_IS_UNMAPPING);
        worker->refused++;
        return;
    }
    /* Under a pin nothing can go: what a device would find is there. */
    CHECK_EQUAL(vfiopy_space_check(worker->space, range, VFIOPY_PROT_READ, &views, &failure), VFIOPY_OK);
    held -= (int)views.count;
    free(views.items);
    CHECK_EQUAL(vfiopy_space_unpin(worker->space, range, worker->owner, &failure), VFIOPY_OK);
    worker->done[2]++;
}

static void look(struct worker *worker)
{
    uint64_t first = place(worker);
    struct vfiopy_views views = {0};
    struct vfiopy_stats stats;
    struct vfiopy_view view;
    size_t count;

    if (vfiopy_space_find(worker->space, first, &view)) {
        CHECK(view.iova.first <= first && view.iova.last >= first);
        held--;
    }
    CHECK_EQUAL(vfiopy_space_overlapping(worker->space, (struct vfiopy_range){first, UINT64_MAX}, &views), VFIOPY_OK);
    held -= (int)views.count;
    free(views.items);
    views = (struct vfiopy_views){0};
    CHECK_EQUAL(vfiopy_space_by_address(worker->space, (struct vfiopy_range){0, UINT64_MAX}, &views), VFIOPY_OK);
    held -= (int)views.count;
    free(views.items);
    free(vfiopy_space_ranges(worker->space, VFIOPY_FREE, &count));
    vfiopy_space_stats(worker->space, &stats);
    CHECK(stats.pins >= stats.pinned_pages);
    worker->done[3]++;
}

static void mapper_comes_and_goes(struct worker *worker)
{
    struct vfiopy_failure failure = {0};
    int fd = 1 + (int)worker->owner;
    uint32_t token = vfiopy_space_add_mapper(worker->space, VFIOPY_MAPPER_IOAS, fd, 1, fake_ioctl);

    CHECK(token);
    CHECK_EQUAL(vfiopy_space_replay(worker->space, token, &failure), VFIOPY_OK);
    if (random_below(&worker->seed, 2)) {
        CHECK_EQUAL(vfiopy_space_drop(worker->space, token, &failure), VFIOPY_OK);
        CHECK_EQUAL(fake_tables[fd].count, 0);
    }
    CHECK_EQUAL(vfiopy_space_remove_mapper(worker->space, token, &failure), VFIOPY_OK);
    fake_tables[fd].count = 0; /* as if its fd were closed */
    worker->done[4]++;
}

static void windows(struct worker *worker)
{
    uint64_t first = place(worker);
    struct vfiopy_range window = {first, first + PAGE - 1};
    struct vfiopy_failure failure = {0};

    if (!vfiopy_space_exclude(worker->space, window, &failure)) {
        CHECK_EQUAL(vfiopy_space_include(worker->space, window, &failure), VFIOPY_OK);
        worker->done[5]++;
    }
}

static void *work(void *argument)
{
    struct worker *worker = argument;

    for (int i = 0; i < OPERATIONS; i++) {
        switch (random_below(&worker->seed, 32)) {
        case 0:
            mapper_comes_and_goes(worker);
            break;
        case 1:
            windows(worker);
            break;
        case 2:
            CHECK(!vfiopy_space_verify(worker->space));
            break;
        case 3 ... 5:
            look(worker);
            break;
        case 6 ... 13:
            unmap_some(worker);
            break;
        case 14 ... 21:
            map_one(worker);
            break;
        case 22 ... 23:
            map_and_unmap_many(worker);
            break;
        default:
            pin_and_unpin(worker);
        }
    }
    return NULL;
}

int main(void)
{
    struct vfiopy_space *space = vfiopy_space_create(PAGE, retain);
    struct vfiopy_failure failure = {0};
    struct worker workers[THREADS];
    struct vfiopy_gone gone = {0};
    const char *wrong;

    CHECK(space);
    CHECK(vfiopy_space_add_mapper(space, VFIOPY_MAPPER_TYPE1, 0, 0, fake_ioctl));
    for (int i = 0; i < THREADS; i++) {
        char name[] = "worker 0";

        name[7] += (char)i;
        workers[i] = (struct worker){.space = space, .seed = (uint64_t)i + 1};
        workers[i].owner = vfiopy_space_add_owner(space, name, NULL);
        CHECK_EQUAL(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        void *callback = NULL;

        CHECK_EQUAL(pthread_join(workers[i].thread, NULL), 0);
        CHECK_EQUAL(vfiopy_space_remove_owner(space, workers[i].owner, &callback, &failure), VFIOPY_OK);
        printf("  thread %d: %u maps, %u unmaps, %u pins, %u looks, %u mappers, %u windows, %u refusals\n", i,
               workers[i].done[0], workers[i].done[1], workers[i].done[2], workers[i].done[3], workers[i].done[4],
               workers[i].done[5], workers[i].refused);
    }
    wrong = vfiopy_space_verify(space);
    if (wrong)
        fprintf(stderr, "%s\n", wrong);
    CHECK(!wrong);
    CHECK_EQUAL(held, fake_tables[0].count);
    vfiopy_space_forget(space, &gone, &gone);
    drop(&gone);
    CHECK_EQUAL(held, 0);
    vfiopy_space_destroy(space);
    return 0;
}
