/* Unmapping what is ready for it, many mappings under one lock; and what is idle, in one go. */
#include "internal.h"

void vfiopy_stays(struct vfiopy_space *space, struct vfiopy_mapping *mapping, uint8_t state)
{
    mapping->busy = false;
    mapping->unmap_id = 0;
    vfiopy_set_state(space, mapping, state);
}

/* Cut a list after as many as are worked on together; the rest of it. */
static struct vfiopy_mapping *cut(struct vfiopy_mapping *list)
{
    struct vfiopy_mapping *rest;

    for (int count = 1; count < VFIOPY_BATCH && list->next; count++)
        list = list->next;
    rest = list->next;
    list->next = NULL;
    return rest;
}

/* Erase a list up to `end`; what follows each other is given back in one piece. */
static void erase_list(struct vfiopy_space *space, struct vfiopy_mapping *list, const struct vfiopy_mapping *end,
                       struct vfiopy_tally *tally, struct vfiopy_gone *gone)
{
    while (list != end) {
        uint64_t first = list->iova.first, last;
        const struct vfiopy_cell *cell = vfiopy_cell_of(&space->geometry, first);

        do {
            struct vfiopy_mapping *next = list->next;

            last = list->iova.last;
            vfiopy_take_out(space, list, gone);
            tally->mappings++;
            list = next;
        } while (list != end && last < cell->last && list->iova.first == last + 1);
        tally->bytes += last - first + 1;
        vfiopy_free_give(&space->free, cell, first, last);
    }
}

int vfiopy_unmap_list(struct vfiopy_space *space, struct vfiopy_mapping *list, struct vfiopy_tally *tally,
                      struct vfiopy_gone *gone, struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *failed = NULL, *next;
    int result = VFIOPY_OK;

    while (list && !failed) {
        struct vfiopy_mapping *rest = cut(list);

        failed = vfiopy_mappers_unmap(space, list, failure);
        erase_list(space, list, failed, tally, gone);
        for (list = failed; list; list = next) {
            next = list->next;
            vfiopy_stays(space, list, list == failed ? (uint8_t)failure->clash.state : VFIOPY_LIVE);
        }
        list = rest;
    }
    if (failed)
        result = failure->result;
    for (; list; list = next) {
        next = list->next;
        vfiopy_stays(space, list, VFIOPY_LIVE);
    }
    vfiopy_changed(space);
    return result;
}

/* Mark one for unmapping, if that is simple; with the lock. `before`: one that may be next to it, below, or NULL. */
static struct vfiopy_mapping *mark_idle(struct vfiopy_space *space, const struct vfiopy_handle *handle,
                                        const struct vfiopy_mapping *before)
{
    struct vfiopy_mapping *mapping = before && before->iova.last == handle->iova - 1
                                         ? vfiopy_mapping_after(before)
                                         : vfiopy_mapping_at(space, handle->iova);

    if (space->stepwise || !mapping || mapping->iova.first != handle->iova || mapping->state != VFIOPY_LIVE ||
        mapping->busy || (mapping->pins && vfiopy_pins_of(mapping)) ||
        (handle->serial && handle->serial != mapping->serial))
        return NULL;
    vfiopy_set_state(space, mapping, VFIOPY_UNMAPPING);
    mapping->busy = true;
    mapping->next = NULL;
    return mapping;
}

int vfiopy_space_unmap_idle(struct vfiopy_space *space, const struct vfiopy_handle *handle, uint64_t *bytes,
                            void **memory, struct vfiopy_failure *failure)
{
    struct vfiopy_gone gone = {0};
    struct vfiopy_tally tally = {0};
    struct vfiopy_mapping *mapping;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    mapping = mark_idle(space, handle, NULL);
    if (mapping) {
        vfiopy_enter_at_once(space, failure);
        result = vfiopy_unmap_list(space, mapping, &tally, &gone, failure);
        vfiopy_leave_at_once(space);
    }
    if (gone.head)
        *memory = vfiopy_gone_free(&gone);
    vfiopy_unlock(space);
    *bytes = tally.bytes;
    return result;
}

int vfiopy_space_unmap_idle_many(struct vfiopy_space *space, const struct vfiopy_handle *handles, size_t count,
                                 size_t *done, struct vfiopy_gone *gone, struct vfiopy_failure *failure)
{
    struct vfiopy_tally tally = {0};
    bool idle = true;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    while (idle && !result && tally.mappings < count) {
        struct vfiopy_mapping *list = NULL, **end = &list, *before = NULL;

        for (size_t i = 0; idle && i < VFIOPY_BATCH && tally.mappings + i < count; i++) {
            *end = before = mark_idle(space, &handles[tally.mappings + i], before);
            idle = before != NULL;
            if (idle)
                end = &before->next;
        }
        if (list) {
            vfiopy_enter_at_once(space, failure);
            result = vfiopy_unmap_list(space, list, &tally, gone, failure);
            vfiopy_leave_at_once(space);
        }
    }
    vfiopy_unlock(space);
    *done = tally.mappings;
    return result;
}
