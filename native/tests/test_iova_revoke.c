/* Device memory that is taken away: no pins, no replay, and restored in every mapper or in none. */
#include <errno.h>

#include "check.h"
#include "fake_kernel.inc.c"
#include "iova/space.h"

enum { PAGE = 4096, MAPPERS = 3 };
static const struct vfiopy_range window = {0x100000, 0x103fff};

static void verify(struct vfiopy_space *space)
{
    const char *wrong = vfiopy_space_verify(space);

    if (wrong)
        fprintf(stderr, "%s\n", wrong);
    CHECK(!wrong);
}

static uint64_t map(struct vfiopy_space *space)
{
    struct vfiopy_request request = {
        .iova = window.first,
        .size = window.last - window.first + 1,
        .limit = UINT64_MAX,
        .fd = 5,
        .physical = 0xfe000000,
        .prot = VFIOPY_PROT_ALL,
        .kind = VFIOPY_MMIO,
    };
    struct vfiopy_failure failure = {0};
    uint64_t iova, serial;

    CHECK_EQUAL(vfiopy_space_map(space, &request, &iova, &serial, &failure), VFIOPY_OK);
    return serial;
}

static struct vfiopy_space *make(void)
{
    struct vfiopy_space *space = vfiopy_space_create(PAGE, NULL);

    fake_reset();
    for (int fd = 0; fd < MAPPERS; fd++)
        CHECK(vfiopy_space_add_mapper(space, VFIOPY_MAPPER_IOAS, fd, 1, fake_ioctl));
    return space;
}

static void finish(struct vfiopy_space *space)
{
    struct vfiopy_gone gone = {0};
    void *memory;

    verify(space);
    vfiopy_space_forget(space, &gone, &gone);
    while (vfiopy_gone_pop(&gone, &memory))
        ;
    vfiopy_space_destroy(space);
}

static int in_mappers(void)
{
    int count = 0;

    for (int fd = 0; fd < FAKE_FDS; fd++)
        count += fake_has(fd, window.first, window.last - window.first + 1);
    return count;
}

static bool revoked(struct vfiopy_space *space)
{
    struct vfiopy_view view;

    CHECK(vfiopy_space_find(space, window.first, &view));
    return view.revoked;
}

static void pins_and_reach(void)
{
    struct vfiopy_space *space = make();
    struct vfiopy_failure failure = {0};
    struct vfiopy_views views = {0};
    uint64_t serial = map(space), pfn = 0;
    struct vfiopy_range page = {window.first, window.first + PAGE - 1};

    CHECK_EQUAL(vfiopy_space_pin(space, page, VFIOPY_PROT_READ, 0, true, &failure), VFIOPY_OK);
    CHECK_EQUAL(vfiopy_space_pfns(space, page, -1, &pfn, &failure), VFIOPY_OK);
    CHECK_EQUAL(pfn, 0xfe000);
    CHECK(!vfiopy_space_set_revoked(space, window.first, serial + 1, true));
    CHECK(!revoked(space));
    CHECK(vfiopy_space_set_revoked(space, window.first, serial, true));
    CHECK(revoked(space));
    CHECK_EQUAL(vfiopy_space_pin(space, page, VFIOPY_PROT_READ, 0, true, &failure), VFIOPY_REVOKED);
    CHECK_EQUAL(vfiopy_space_check(space, page, VFIOPY_PROT_READ, &views, &failure), VFIOPY_REVOKED);
    CHECK_EQUAL(views.count, 0);
    CHECK_EQUAL(vfiopy_space_unpin(space, page, 0, &failure), VFIOPY_OK); /* what was pinned before can be let go */
    CHECK_EQUAL(vfiopy_space_restore(space, window.first, serial, &failure), VFIOPY_OK);
    CHECK(!revoked(space));
    CHECK_EQUAL(in_mappers(), MAPPERS);
    CHECK_EQUAL(vfiopy_space_pin(space, page, VFIOPY_PROT_READ, 0, true, &failure), VFIOPY_OK);
    CHECK_EQUAL(vfiopy_space_unpin(space, page, 0, &failure), VFIOPY_OK);
    finish(space);
}

/* A mapper that comes while the memory is away gets it when it is back. */
static void joins(void)
{
    struct vfiopy_space *space = make();
    struct vfiopy_failure failure = {0};
    uint64_t serial = map(space);
    uint32_t late = vfiopy_space_add_mapper(space, VFIOPY_MAPPER_IOAS, MAPPERS, 1, fake_ioctl);

    CHECK(vfiopy_space_set_revoked(space, window.first, serial, true));
    CHECK_EQUAL(vfiopy_space_replay(space, late, &failure), VFIOPY_OK);
    CHECK_EQUAL(in_mappers(), MAPPERS);
    CHECK_EQUAL(vfiopy_space_restore(space, window.first, serial, &failure), VFIOPY_OK);
    CHECK_EQUAL(in_mappers(), MAPPERS + 1);
    finish(space);
}

/* Every call of a restore fails in turn: it stays revoked, the book is sound, and a second try succeeds. */
static void fails(int error)
{
    for (unsigned n = 1;; n++) {
        struct vfiopy_space *space = make();
        struct vfiopy_failure failure = {0};
        uint64_t serial = map(space);
        unsigned before = fake_calls;
        int result;

        CHECK(vfiopy_space_set_revoked(space, window.first, serial, true));
        fail_from = fail_to = before + n;
        fail_errno = error;
        result = vfiopy_space_restore(space, window.first, serial, &failure);
        fail_from = fail_to = 0;
        verify(space);
        if (fake_calls < before + n) {
            CHECK_EQUAL(result, VFIOPY_OK);
            finish(space);
            break;
        }
        CHECK(n <= 2 * MAPPERS);
        CHECK_EQUAL(result, VFIOPY_KERNEL);
        CHECK(revoked(space));
        CHECK_EQUAL(vfiopy_space_restore(space, window.first, serial, &failure), VFIOPY_OK);
        CHECK_EQUAL(in_mappers(), MAPPERS);
        CHECK(!revoked(space));
        finish(space);
    }
}

static void each_call_fails(void)
{
    fails(ENODEV);
    fails(EBUSY);
    fails(ENOENT); /* it says that it is not there, but it is */
}

int main(void)
{
    RUN(pins_and_reach);
    RUN(joins);
    RUN(each_call_fails);
    return 0;
}
