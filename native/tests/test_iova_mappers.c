/*
 * Three mappers, and a kernel call that fails: every operation, every call in turn, alone or with all that follow.
 * Whatever happens, the book must be sound, say the same as the kernel, and be able to clean up afterwards.
 */
#include <errno.h>

#include "check.h"
#include "fake_kernel.inc.c"
#include "iova/space.h"

enum { PAGE = 4096, MAPPERS = 3, BEFORE = 4 };

static int held; /* references to memory that the book holds */

static void drop(struct vfiopy_gone *gone)
{
    void *memory;

    while (vfiopy_gone_pop(gone, &memory)) {
        CHECK(memory == &held);
        held--;
    }
}

static struct vfiopy_request request_of(uint64_t iova, uint64_t size)
{
    return (struct vfiopy_request){
        .iova = iova,
        .size = size,
        .limit = UINT64_MAX,
        .address = UINT64_C(0x7f0000000000) + iova % (UINT64_C(1) << 30),
        .fd = -1,
        .prot = VFIOPY_PROT_ALL,
        .memory = &held,
    };
}

static int map(struct vfiopy_space *space, uint64_t iova, uint64_t size, struct vfiopy_failure *failure)
{
    struct vfiopy_request request = request_of(iova, size);
    uint64_t at;
    int result = vfiopy_space_map(space, &request, &at, NULL, failure);

    held += !result || failure->kept;
    return result;
}

static int unmap(struct vfiopy_space *space, struct vfiopy_range range, uint64_t *bytes,
                 struct vfiopy_failure *failure)
{
    struct vfiopy_unmap unmap = {.range = range};
    int result;

    if (vfiopy_unmap_step(space, &unmap, failure) != VFIOPY_STEP_READY)
        return failure->result;
    result = vfiopy_unmap_finish(space, &unmap, failure);
    *bytes = unmap.bytes;
    drop(&unmap.gone);
    return result;
}

static void verify(struct vfiopy_space *space)
{
    const char *wrong = vfiopy_space_verify(space);

    if (wrong)
        fprintf(stderr, "%s\n", wrong);
    CHECK(!wrong);
}

/* What is live is in every mapper; what is unknown may be; nothing else is. */
static void agree(struct vfiopy_space *space, int mappers)
{
    struct vfiopy_views views = {0};
    int known = 0, unknown = 0;

    verify(space);
    CHECK_EQUAL(vfiopy_space_overlapping(space, (struct vfiopy_range){0, UINT64_MAX}, &views), VFIOPY_OK);
    for (size_t i = 0; i < views.count; i++) {
        const struct vfiopy_view *view = &views.items[i];

        CHECK(view->state == VFIOPY_LIVE || view->state == VFIOPY_UNKNOWN);
        known += view->state == VFIOPY_LIVE;
        unknown += view->state == VFIOPY_UNKNOWN;
        for (int fd = 0; fd < mappers && view->state == VFIOPY_LIVE; fd++)
            CHECK(fake_has(fd, view->iova.first, view->iova.last - view->iova.first + 1));
    }
    for (int fd = 0; fd < mappers; fd++)
        CHECK(fake_tables[fd].count >= known && fake_tables[fd].count <= known + unknown);
    CHECK_EQUAL(views.count, (size_t)held);
    free(views.items);
}

static struct vfiopy_space *make(uint32_t *tokens, int mappers)
{
    static const enum vfiopy_mapper_kind kinds[] = {VFIOPY_MAPPER_TYPE1, VFIOPY_MAPPER_IOAS, VFIOPY_MAPPER_TYPE1};
    struct vfiopy_space *space = vfiopy_space_create(PAGE, NULL);
    struct vfiopy_failure failure = {0};

    CHECK(space);
    fake_reset();
    held = 0;
    for (int i = 0; i < mappers; i++) {
        tokens[i] = vfiopy_space_add_mapper(space, kinds[i % 3], i, 7, fake_ioctl);
        CHECK(tokens[i]);
    }
    for (int i = 0; i < BEFORE; i++)
        CHECK_EQUAL(map(space, (uint64_t)(2 * i + 1) * PAGE, PAGE, &failure), VFIOPY_OK);
    agree(space, mappers);
    fake_calls = 0;
    return space;
}

static void finish(struct vfiopy_space *space, int mappers)
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};
    uint64_t bytes = 0;

    fail_from = fail_to = 0;
    CHECK_EQUAL(vfiopy_space_resync(space, &gone, &bytes, &failure), VFIOPY_OK);
    drop(&gone);
    agree(space, mappers);
    CHECK_EQUAL(unmap(space, (struct vfiopy_range){0, UINT64_MAX}, &bytes, &failure), VFIOPY_OK);
    CHECK_EQUAL(held, 0);
    for (int fd = 0; fd < mappers; fd++)
        CHECK_EQUAL(fake_tables[fd].count, 0);
    verify(space);
    vfiopy_space_destroy(space);
}

static int map_once(struct vfiopy_space *space, const uint32_t *tokens, struct vfiopy_failure *failure)
{
    (void)tokens;
    return map(space, 0x100000, 4 * PAGE, failure);
}

static int unmap_two(struct vfiopy_space *space, const uint32_t *tokens, struct vfiopy_failure *failure)
{
    uint64_t bytes = 0;
    int result = unmap(space, (struct vfiopy_range){0, 4 * PAGE - 1}, &bytes, failure);

    (void)tokens;
    CHECK(result || bytes == 2 * PAGE);
    return result;
}

static int commit(struct vfiopy_space *space, const uint32_t *tokens, struct vfiopy_failure *failure)
{
    struct vfiopy_request request = request_of(0x200000, PAGE);
    struct vfiopy_gone gone = {0};
    uint64_t iova, serial;
    int result;

    (void)tokens;
    CHECK_EQUAL(vfiopy_space_begin_map(space, &request, &iova, failure), VFIOPY_OK);
    held++;
    result = vfiopy_space_commit_map(space, iova, &serial, &gone, failure);
    drop(&gone);
    return result;
}

/* Pieces of these numbers of pages; what is live afterwards goes to `handles`. */
static int map_pieces(struct vfiopy_space *space, const unsigned *pages, size_t count, struct vfiopy_handle *handles,
                      size_t *live, struct vfiopy_failure *failure)
{
    struct vfiopy_request like = request_of(VFIOPY_NO_FIXED_IOVA, PAGE);
    struct vfiopy_piece *pieces = calloc(count, sizeof(*pieces));
    int result;

    for (size_t i = 0; i < count; i++)
        pieces[i] = (struct vfiopy_piece){.memory = &held, .address = (i + 1) * 0x10000, .size = pages[i] * PAGE};
    result = vfiopy_space_map_many(space, &like, pieces, count, failure);
    *live = 0;
    for (size_t i = 0; i < count; i++) {
        CHECK(pieces[i].kept || !pieces[i].serial);
        held += pieces[i].kept;
        if (pieces[i].serial)
            handles[(*live)++] = (struct vfiopy_handle){pieces[i].iova, pieces[i].serial};
    }
    free(pieces);
    CHECK(result || *live == count);
    return result;
}

static const unsigned several[] = {1, 1, 1, 2, 1, 3, 3, 1};
enum { SEVERAL = sizeof(several) / sizeof(*several) };

static int map_several(struct vfiopy_space *space, const uint32_t *tokens, struct vfiopy_failure *failure)
{
    struct vfiopy_handle handles[SEVERAL];
    int result, reported;
    size_t live, done;
    struct vfiopy_gone gone = {0};
    struct vfiopy_failure second = {0};

    (void)tokens;
    result = map_pieces(space, several, SEVERAL, handles, &live, failure);
    reported = failure->result;
    CHECK_EQUAL(result, reported);
    if (!result)
        return result;
    /* What is live is in front of what failed: as many as came through all mappers. */
    CHECK_EQUAL(live, (fail_from - 1) / MAPPERS);
    CHECK_EQUAL(failure->asked.last - failure->asked.first + 1, several[live] * PAGE);
    fail_from = fail_to = 0;
    CHECK_EQUAL(vfiopy_space_unmap_idle_many(space, handles, live, &done, &gone, &second), VFIOPY_OK);
    CHECK_EQUAL(done, live);
    drop(&gone);
    return result;
}

static int unmap_several(struct vfiopy_space *space, const uint32_t *tokens, struct vfiopy_failure *failure)
{
    unsigned from = fail_from, to = fail_to;
    struct vfiopy_handle handles[SEVERAL + 1];
    struct vfiopy_gone gone = {0};
    size_t live, done;
    int result;

    (void)tokens;
    fail_from = fail_to = 0;
    CHECK_EQUAL(map_pieces(space, several, SEVERAL, handles, &live, failure), VFIOPY_OK);
    fake_calls = 0;
    fail_from = from;
    fail_to = to;
    handles[SEVERAL] = handles[0]; /* twice in the list: the second time it is not there */
    result = vfiopy_space_unmap_idle_many(space, handles, SEVERAL + 1, &done, &gone, failure);
    drop(&gone);
    CHECK_EQUAL(done, result ? (from - 1) / MAPPERS : SEVERAL);
    return result;
}

static int replay(struct vfiopy_space *space, const uint32_t *tokens, struct vfiopy_failure *failure)
{
    return vfiopy_space_replay(space, tokens[MAPPERS], failure);
}

/* Fail call n, or every call from n on, until the operation gets through without meeting the failure. */
static void sweep(const char *name, bool rest, int error,
                  int (*operation)(struct vfiopy_space *, const uint32_t *, struct vfiopy_failure *))
{
    unsigned failures = 0, unknown = 0;

    for (unsigned n = 1;; n++) {
        struct vfiopy_failure failure = {0};
        uint32_t tokens[MAPPERS + 1];
        struct vfiopy_space *space = make(tokens, MAPPERS);
        struct vfiopy_stats stats;
        int result;

        if (operation == replay)
            tokens[MAPPERS] = vfiopy_space_add_mapper(space, VFIOPY_MAPPER_IOAS, MAPPERS, 1, fake_ioctl);
        fail_errno = error;
        fail_from = n;
        fail_to = rest ? UINT32_MAX : n;
        result = operation(space, tokens, &failure);
        if (result) {
            failures++;
            CHECK_EQUAL(failure.result, result);
            if (result == VFIOPY_KERNEL)
                CHECK_EQUAL(failure.error, error);
            CHECK(failure.call);
        }
        vfiopy_space_stats(space, &stats);
        unknown += stats.states[VFIOPY_UNKNOWN] != 0;
        fail_from = fail_to = 0;
        if (operation == replay && result) {
            CHECK_EQUAL(rest || fake_tables[MAPPERS].count == 0, 1);
            CHECK_EQUAL(vfiopy_space_remove_mapper(space, tokens[MAPPERS], &failure), VFIOPY_OK);
        }
        agree(space, operation == replay && !result ? MAPPERS + 1 : MAPPERS);
        finish(space, operation == replay && !result ? MAPPERS + 1 : MAPPERS);
        if (!result && n > fake_calls)
            break;
        CHECK(n < 100);
    }
    printf("%-12s %-4s errno %-3d: failed at %u calls, unknown %u times\n", name, rest ? "rest" : "one", error,
           failures, unknown);
    CHECK(failures);
    /* One failure alone can be undone; when nothing works any more, what was done before stays unknown. */
    if (!rest && error != ENOENT)
        CHECK_EQUAL(unknown, 0);
    if (rest && operation != replay)
        CHECK(unknown);
}

static struct vfiopy_space *joined;
static unsigned joining_call; /* at which call of the first mapper the second one joins */

static int joining_ioctl(int fd, unsigned long request, void *argument)
{
    if (joining_call && --joining_call == 0)
        CHECK(vfiopy_space_add_mapper(joined, VFIOPY_MAPPER_IOAS, 1, 1, fake_ioctl));
    return fake_ioctl(fd, request, argument);
}

/* In the middle of a batch: all of it must get there, or none stays, wherever it fails. */
static void joins_a_batch(void)
{
    for (unsigned call = 1; call <= SEVERAL; call++) {
        for (unsigned fail = 0; fail <= 2 * SEVERAL; fail++) {
            struct vfiopy_failure failure = {0}, second = {0};
            struct vfiopy_handle handles[SEVERAL];
            struct vfiopy_gone gone = {0};
            size_t live, done;
            int result;

            joined = vfiopy_space_create(PAGE, NULL);
            fake_reset();
            held = 0;
            CHECK(vfiopy_space_add_mapper(joined, VFIOPY_MAPPER_TYPE1, 0, 1, joining_ioctl));
            joining_call = call;
            fail_errno = ENOMEM;
            fake_calls = 0;
            fail_from = fail_to = fail;
            result = map_pieces(joined, several, SEVERAL, handles, &live, &failure);
            fail_from = fail_to = joining_call = 0;
            CHECK_EQUAL(result, fail ? VFIOPY_KERNEL : VFIOPY_OK);
            agree(joined, fail && fail < call ? 1 : 2);
            CHECK_EQUAL((size_t)held, live);
            CHECK_EQUAL(vfiopy_space_unmap_idle_many(joined, handles, live, &done, &gone, &second), VFIOPY_OK);
            CHECK_EQUAL(done, live);
            drop(&gone);
            finish(joined, 2);
        }
    }
}

/* More than are worked on together; and no room for all of them: what was mapped is told, the rest was not called for. */
static void long_batches(void)
{
    enum { COUNT = 300, ROOM = 200 };
    struct vfiopy_space *space = vfiopy_space_create(PAGE, NULL);
    struct vfiopy_range usable = {PAGE, (ROOM + 1) * PAGE - 1};
    struct vfiopy_failure failure = {0};
    struct vfiopy_handle handles[COUNT];
    struct vfiopy_gone gone = {0};
    unsigned pages[COUNT];
    size_t live, done;

    for (int i = 0; i < COUNT; i++)
        pages[i] = 1;
    fake_reset();
    held = 0;
    CHECK(vfiopy_space_add_mapper(space, VFIOPY_MAPPER_IOAS, 0, 1, fake_ioctl));
    CHECK_EQUAL(map_pieces(space, pages, COUNT, handles, &live, &failure), VFIOPY_OK);
    for (int i = 1; i < COUNT; i++)
        CHECK_EQUAL(handles[i].iova, handles[0].iova + (uint64_t)i * PAGE); /* the lowest place, each time */
    agree(space, 1);
    CHECK_EQUAL(vfiopy_space_unmap_idle_many(space, handles, COUNT, &done, &gone, &failure), VFIOPY_OK);
    CHECK_EQUAL(done, COUNT);
    drop(&gone);
    CHECK_EQUAL(vfiopy_space_set_usable(space, &usable, 1, PAGE, 0, &failure), VFIOPY_OK);
    CHECK_EQUAL(map_pieces(space, pages, COUNT, handles, &live, &failure), VFIOPY_NO_SPACE);
    CHECK(live < ROOM && live > 0);
    agree(space, 1);
    CHECK_EQUAL(vfiopy_space_unmap_idle_many(space, handles, live, &done, &gone, &failure), VFIOPY_OK);
    drop(&gone);
    CHECK_EQUAL(held, 0);
    CHECK_EQUAL(map_pieces(space, pages, ROOM, handles, &live, &failure), VFIOPY_OK); /* every page of it */
    CHECK_EQUAL(vfiopy_space_set_usable(space, &usable, 1, PAGE, ROOM, &failure), VFIOPY_OK);
    finish(space, 1);
}

/* A mapper that joins while another thread maps must get that mapping too, by replay or by the map itself. */
static void joins(void)
{
    uint32_t tokens[2];
    struct vfiopy_space *space = make(tokens, 1);
    struct vfiopy_failure failure = {0};
    uint32_t late = vfiopy_space_add_mapper(space, VFIOPY_MAPPER_IOAS, 1, 1, fake_ioctl);

    CHECK_EQUAL(map(space, 0x300000, PAGE, &failure), VFIOPY_OK);
    CHECK_EQUAL(fake_tables[1].count, 1);
    CHECK_EQUAL(vfiopy_space_replay(space, late, &failure), VFIOPY_OK);
    CHECK_EQUAL(fake_tables[1].count, BEFORE + 1);
    CHECK_EQUAL(vfiopy_space_replay(space, late, &failure), VFIOPY_OK); /* nothing is missing */
    agree(space, 2);
    CHECK_EQUAL(vfiopy_space_drop(space, late, &failure), VFIOPY_OK);
    CHECK_EQUAL(fake_tables[1].count, 0);
    CHECK_EQUAL(map(space, 0x400000, PAGE, &failure), VFIOPY_OK);
    CHECK_EQUAL(fake_tables[1].count, 0);
    CHECK_EQUAL(vfiopy_space_replay(space, late, &failure), VFIOPY_OK);
    agree(space, 2);
    CHECK_EQUAL(vfiopy_space_remove_mapper(space, late, &failure), VFIOPY_OK);
    CHECK_EQUAL(vfiopy_space_remove_mapper(space, late, &failure), VFIOPY_NO_MAPPER);
    CHECK_EQUAL(fake_tables[1].count, BEFORE + 2); /* removing makes no call */
    finish(space, 1);
}

/* The kernel lost a mapping behind the book's back: it says 0 bytes (type1) or ENOENT (iommufd). */
static void lost(enum vfiopy_mapper_kind kind)
{
    struct vfiopy_space *space = vfiopy_space_create(PAGE, NULL);
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};
    uint64_t bytes = 0;

    fake_reset();
    held = 0;
    CHECK(vfiopy_space_add_mapper(space, kind, 0, 1, fake_ioctl));
    CHECK_EQUAL(map(space, PAGE, PAGE, &failure), VFIOPY_OK);
    fake_tables[0].count = 0;
    CHECK(unmap(space, (struct vfiopy_range){PAGE, 2 * PAGE - 1}, &bytes, &failure) != VFIOPY_OK);
    CHECK_EQUAL(failure.clash.state, VFIOPY_UNKNOWN);
    CHECK_EQUAL(map(space, PAGE, PAGE, &failure), VFIOPY_BUSY); /* not reused */
    CHECK_EQUAL(vfiopy_space_resync(space, &gone, &bytes, &failure), VFIOPY_OK);
    CHECK_EQUAL(bytes, PAGE);
    drop(&gone);
    CHECK_EQUAL(map(space, PAGE, PAGE, &failure), VFIOPY_OK);
    finish(space, 1);
}

/* With mappers of the caller's own nothing goes past them; their steps do what at once would have done. */
static void stepwise(void)
{
    uint32_t tokens[1];
    struct vfiopy_space *space = make(tokens, 1);
    struct vfiopy_failure failure = {0};
    struct vfiopy_range range = {PAGE, 2 * PAGE - 1};
    struct vfiopy_unmap late = {.range = range}, steps = {.range = range, .stepwise = true};
    uint64_t bytes = 0;

    CHECK_EQUAL(vfiopy_unmap_step(space, &late, &failure), VFIOPY_STEP_READY);
    vfiopy_space_set_stepwise(space, true);
    CHECK_EQUAL(vfiopy_unmap_finish(space, &late, &failure), VFIOPY_IN_STEPS);
    CHECK_EQUAL(map(space, 0x100000, PAGE, &failure), VFIOPY_IN_STEPS);
    CHECK_EQUAL(unmap(space, range, &bytes, &failure), VFIOPY_IN_STEPS);
    agree(space, 1);
    CHECK_EQUAL(vfiopy_unmap_step(space, &steps, &failure), VFIOPY_STEP_READY);
    vfiopy_unmap_hand_out(space, &steps);
    verify(space);
    vfiopy_unmap_adopt(space, &steps);
    CHECK_EQUAL(vfiopy_unmap_finish(space, &steps, &failure), VFIOPY_OK);
    CHECK_EQUAL(steps.bytes, PAGE);
    drop(&steps.gone);
    CHECK_EQUAL(commit(space, tokens, &failure), VFIOPY_OK);
    vfiopy_space_set_stepwise(space, false);
    finish(space, 1);
}

int main(void)
{
    for (int rest = 0; rest < 2; rest++) {
        sweep("map", rest, ENOMEM, map_once);
        sweep("commit", rest, EFAULT, commit);
        sweep("unmap", rest, EBUSY, unmap_two);
        sweep("unmap", rest, ENOENT, unmap_two);
        sweep("replay", rest, ENOSPC, replay);
        sweep("unmap many", rest, EBUSY, unmap_several);
        sweep("unmap many", rest, ENOENT, unmap_several);
    }
    sweep("map many", false, ENOMEM, map_several);
    joins();
    joins_a_batch();
    long_batches();
    stepwise();
    lost(VFIOPY_MAPPER_TYPE1);
    lost(VFIOPY_MAPPER_IOAS);
    return 0;
}
