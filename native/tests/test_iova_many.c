/* Many mappings at once: what fails in the middle, who joins in the middle, and more than are worked on together. */
#include "failing_kernel.inc.c"

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

/* More than are worked on together; and no room for all: what was mapped is told, the rest was not called for. */
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

int main(void)
{
    for (int rest = 0; rest < 2; rest++) {
        sweep("unmap many", rest, EBUSY, unmap_several);
        sweep("unmap many", rest, ENOENT, unmap_several);
    }
    sweep("map many", false, ENOMEM, map_several);
    joins_a_batch();
    long_batches();
    return 0;
}
