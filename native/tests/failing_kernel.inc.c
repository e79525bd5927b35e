/*
 * Included by the tests that need it: a book with three mappers, and a kernel call that fails: each of an operation
 * in turn, alone or with all that follow. Whatever happens, the book must be sound, say the same as the kernel, and be
 * able to clean up afterwards.
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
