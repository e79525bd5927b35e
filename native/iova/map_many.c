/* Mapping several pieces at once: the lock is taken twice for many of them, not twice for each. */
#include "internal.h"

static struct vfiopy_range asked_of(const struct vfiopy_request *like, uint64_t size)
{
    return (struct vfiopy_range){like->iova, like->iova + (size - 1)};
}

static void like_piece(struct vfiopy_request *request, const struct vfiopy_piece *piece)
{
    request->memory = piece->memory;
    request->address = piece->address;
    request->size = piece->size;
}

/*
 * How many pieces of one size, from the first on, would come to lie one behind the other from `iova` on, if the best
 * place were looked for each time: the range that was best for one is the best for the next as long as it has room.
 */
static size_t run_length(const struct vfiopy_space *space, const struct vfiopy_request *like,
                         const struct vfiopy_piece *pieces, size_t count, const struct vfiopy_free *from,
                         uint64_t iova)
{
    uint64_t page = space->geometry.page_sizes & -space->geometry.page_sizes, size = pieces->size, room;
    uint64_t last = from->where.last < like->limit ? from->where.last : like->limit;
    size_t most = count, length = 1;

    if (like->alignment || like->transient || vfiopy_takes_large_page(space, size))
        return 1;
    room = (last - iova) / size + ((last - iova) % size == size - 1);
    most = most > room ? (size_t)room : most;
    if (space->geometry.max_mappings && most > space->geometry.max_mappings - space->mappings)
        most = (size_t)(space->geometry.max_mappings - space->mappings);
    while (length < most && pieces[length].size == size && !(pieces[length].address & (page - 1)))
        length++;
    return length;
}

/* Reserve some pieces of one size. How many; 0: failure. Puts them at the list's end, which is after `before`. */
static size_t reserve_run(struct vfiopy_space *space, const struct vfiopy_request *like,
                          const struct vfiopy_piece *pieces, size_t count, struct vfiopy_mapping ***end,
                          struct vfiopy_mapping *before, struct vfiopy_failure *failure)
{
    struct vfiopy_request request = *like;
    struct vfiopy_free *from;
    uint64_t iova, size = pieces->size;
    size_t length;

    like_piece(&request, pieces);
    if (vfiopy_find_place(space, &request, &from, &iova, failure))
        return 0;
    length = run_length(space, like, pieces, count, from, iova);
    if (!vfiopy_free_reserve(&space->free, space->mappings + length + space->geometry.cell_count) ||
        !vfiopy_pool_reserve(&space->pool, space->pool.used + length))
        length = 1; /* there is room for one */
    vfiopy_free_take(&space->free, from, iova, iova + (length * size - 1));
    for (size_t i = 0; i < length; i++, iova += size) {
        like_piece(&request, &pieces[i]);
        before = vfiopy_put(space, &request, iova, before);
        before->busy = true;
        **end = before;
        *end = &before->next;
    }
    return length;
}

/* Reserve all of a batch, or none; with the lock. */
static int reserve_batch(struct vfiopy_space *space, const struct vfiopy_request *like,
                         const struct vfiopy_piece *pieces, size_t count, struct vfiopy_mapping **list,
                         struct vfiopy_failure *failure)
{
    struct vfiopy_mapping **end = list, *last = NULL;
    int result = VFIOPY_OK;
    size_t length;

    *list = NULL;
    for (size_t at = 0; at < count; at += length) {
        length = reserve_run(space, like, pieces + at, count - at, &end, last, failure);
        if (!length) {
            failure->asked = asked_of(like, pieces[at].size);
            result = failure->result;
            break;
        }
        last = VFIOPY_ENTRY(end, struct vfiopy_mapping, next);
    }
    while (result && *list) {
        struct vfiopy_mapping *mapping = *list;
        struct vfiopy_gone gone = {0};

        *list = mapping->next;
        vfiopy_erase(space, mapping, &gone);
        vfiopy_gone_free(&gone);
    }
    return result;
}

/* Map a reserved batch, up to the first failure. What is behind that one is given back. With the lock. */
static int commit_batch(struct vfiopy_space *space, const struct vfiopy_request *like, struct vfiopy_mapping *list,
                        struct vfiopy_piece *piece, struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *failed = space->active ? vfiopy_mappers_map(space, list, failure) : NULL, *next;
    const int first = failed ? (int)failure->result : VFIOPY_OK;
    struct vfiopy_failure second;
    bool reached = false;
    int result = first;

    for (; list; list = next, piece++) {
        struct vfiopy_failure *mine = failure;
        struct vfiopy_gone gone = {0};
        int outcome;

        next = list->next;
        if (result && list != failed) { /* the first one is reported */
            second = (struct vfiopy_failure){0};
            mine = &second;
        }
        reached = reached || list == failed;
        piece->iova = list->iova.first;
        piece->serial = list->serial;
        outcome = vfiopy_settle(space, list, reached ? first : VFIOPY_OK, &gone, mine);
        piece->kept = !outcome || mine->kept;
        if (outcome) {
            mine->asked = asked_of(like, piece->size);
            piece->serial = 0;
        }
        if (gone.head)
            vfiopy_gone_free(&gone);
        if (!result)
            result = outcome;
    }
    vfiopy_changed(space);
    return result;
}

int vfiopy_space_map_many(struct vfiopy_space *space, const struct vfiopy_request *like, struct vfiopy_piece *pieces,
                          size_t count, struct vfiopy_failure *failure)
{
    int result;

    for (size_t i = 0; i < count; i++) {
        pieces[i].serial = 0;
        pieces[i].kept = false;
    }
    vfiopy_lock(space);
    result = vfiopy_enter_at_once(space, failure);
    if (result) {
        vfiopy_unlock(space);
        return result;
    }
    while (count && !result) {
        size_t batch = count < VFIOPY_BATCH ? count : VFIOPY_BATCH;
        struct vfiopy_mapping *list;

        result = reserve_batch(space, like, pieces, batch, &list, failure);
        if (!result)
            result = commit_batch(space, like, list, pieces, failure);
        pieces += batch;
        count -= batch;
    }
    vfiopy_leave_at_once(space);
    vfiopy_unlock(space);
    return result;
}
