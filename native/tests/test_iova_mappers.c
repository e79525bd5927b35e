/* Three mappers that come and go, and a kernel call that fails for one mapping. */
#include "failing_kernel.inc.c"

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
    }
    joins();
    stepwise();
    lost(VFIOPY_MAPPER_TYPE1);
    lost(VFIOPY_MAPPER_IOAS);
    return 0;
}
