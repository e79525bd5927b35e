/* Unmapping in steps, where the book changes between them. */
#include <stdbool.h>

#include "check.h"
#include "iova/space.h"

enum { PAGE = 4096 };

static void map(struct vfiopy_space *space, uint64_t iova, uint64_t size)
{
    struct vfiopy_request request = {
        .iova = iova,
        .size = size,
        .limit = UINT64_MAX,
        .fd = -1,
        .address = UINT64_C(0x7f0000000000) + iova,
        .prot = VFIOPY_PROT_ALL,
    };
    struct vfiopy_failure failure = {0};

    CHECK_EQUAL(vfiopy_space_map(space, &request, &iova, NULL, &failure), VFIOPY_OK);
}

static void drop(struct vfiopy_gone *gone)
{
    void *memory;

    while (vfiopy_gone_pop(gone, &memory))
        ;
}

static void destroy(struct vfiopy_space *space)
{
    struct vfiopy_gone gone = {0};

    CHECK(!vfiopy_space_verify(space));
    vfiopy_space_forget(space, &gone, &gone);
    drop(&gone);
    vfiopy_space_destroy(space);
}

/* A step found a long mapping and had to wait; meanwhile it went, and a short one came inside of where it was. */
static void exact_is_where_it_was_asked(void)
{
    struct vfiopy_space *space = vfiopy_space_create(PAGE, NULL);
    struct vfiopy_unmap slow = {.range = {0x10000, 0x10000}, .exact = true};
    struct vfiopy_unmap fast = {.range = {0x10000, 0x10000}, .exact = true};
    struct vfiopy_failure failure = {0};

    map(space, 0x10000, 16 * PAGE);
    CHECK_EQUAL(vfiopy_space_pin(space, (struct vfiopy_range){0x10000, 0x10fff}, VFIOPY_PROT_READ, 0, false, &failure),
                VFIOPY_OK);
    CHECK_EQUAL(vfiopy_unmap_step(space, &slow, &failure), VFIOPY_STEP_NOTIFY);
    free(slow.notices);
    CHECK_EQUAL(slow.range.last, 0x1ffff);
    CHECK_EQUAL(vfiopy_space_unpin(space, (struct vfiopy_range){0x10000, 0x10fff}, 0, &failure), VFIOPY_OK);
    vfiopy_unmap_give_up(space, &slow); /* as where a mapper was at work: nothing of it is marked */
    CHECK_EQUAL(vfiopy_unmap_step(space, &fast, &failure), VFIOPY_STEP_READY);
    CHECK_EQUAL(vfiopy_unmap_finish(space, &fast, &failure), VFIOPY_OK);
    drop(&fast.gone);
    map(space, 0x14000, PAGE);

    CHECK_EQUAL(vfiopy_unmap_step(space, &slow, &failure), VFIOPY_STEP_FAILED);
    CHECK_EQUAL(failure.result, VFIOPY_NOT_MAPPED);
    CHECK_EQUAL(failure.clash.first, 0x10000);
    CHECK(vfiopy_space_has(space, 0x14000));

    /* One that begins there is the one, however long it is. */
    map(space, 0x10000, PAGE);
    CHECK_EQUAL(vfiopy_unmap_step(space, &slow, &failure), VFIOPY_STEP_READY);
    CHECK_EQUAL(vfiopy_unmap_finish(space, &slow, &failure), VFIOPY_OK);
    CHECK_EQUAL(slow.bytes, PAGE);
    drop(&slow.gone);
    CHECK(vfiopy_space_has(space, 0x14000));
    destroy(space);
}

int main(void)
{
    RUN(exact_is_where_it_was_asked);
    return 0;
}
