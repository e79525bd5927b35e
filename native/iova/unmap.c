/*
 * Unmapping. The caller drives it, because owners of pins are told by the caller, with no lock held:
 *
 *     do step = vfiopy_unmap_step() until READY or FAILED
 *         NOTIFY: tell the owners in `notices`, then step again
 *         WAIT:   vfiopy_unmap_wait(), then step again; or vfiopy_unmap_give_up()
 *         BUSY:   vfiopy_unmap_wait_idle(), then step again
 *     READY: vfiopy_unmap_finish()
 *
 * Most unmaps need none of that: vfiopy_space_unmap_idle() does the two ends of it under one lock.
 *
 * Each step looks again from scratch: anything may have changed since the last one. Mappings under pins are
 * closing meanwhile, so that no new pin can keep the unmap from ever getting through.
 */
#include "internal.h"

#include <stdlib.h>

/*
 * The range must hold whole mappings only; only its two ends can cut one. The lowest mapping of the range goes to
 * *start.
 */
static int check_ends(const struct vfiopy_space *space, struct vfiopy_unmap *unmap, struct vfiopy_mapping **start,
                      struct vfiopy_failure *failure)
{
    struct vfiopy_mapping *mapping;

    /* A step before may have found a longer one: what begins further on now is not what was asked for. */
    if (unmap->exact)
        unmap->range.last = unmap->range.first;
    *start = mapping = vfiopy_mapping_in(space, unmap->range);
    if (unmap->exact && (!mapping || (unmap->serial && mapping->serial != unmap->serial)))
        return vfiopy_fail_range(failure, VFIOPY_NOT_MAPPED, unmap->range);
    if (mapping && mapping->iova.first < unmap->range.first)
        return vfiopy_fail_at(failure, VFIOPY_CUTS, mapping);
    if (unmap->exact)
        unmap->range.last = mapping->iova.last;
    if (!mapping || mapping->iova.last == unmap->range.last)
        return VFIOPY_OK;
    mapping = vfiopy_mapping_at(space, unmap->range.last);
    if (mapping && mapping->iova.last != unmap->range.last)
        return vfiopy_fail_at(failure, VFIOPY_CUTS, mapping);
    return VFIOPY_OK;
}

static int check_state(const struct vfiopy_mapping *mapping, uint32_t id, struct vfiopy_failure *failure)
{
    switch (mapping->state) {
    case VFIOPY_LIVE:
        return VFIOPY_OK;
    case VFIOPY_CLOSING:
        if (mapping->unmap_id == id)
            return VFIOPY_OK;
        return vfiopy_fail_at(failure, VFIOPY_IS_UNMAPPING, mapping);
    case VFIOPY_UNMAPPING:
        return vfiopy_fail_at(failure, VFIOPY_IS_UNMAPPING, mapping);
    default:
        return vfiopy_fail_at(failure, VFIOPY_BUSY, mapping);
    }
}

static void give_up(struct vfiopy_space *space, struct vfiopy_unmap *unmap)
{
    struct vfiopy_mapping *mapping = unmap->id ? vfiopy_mapping_in(space, unmap->range) : NULL;

    for (; mapping; mapping = vfiopy_mapping_next_in(mapping, unmap->range)) {
        if (mapping->state == VFIOPY_CLOSING && mapping->unmap_id == unmap->id)
            vfiopy_set_state(space, mapping, VFIOPY_LIVE);
    }
}

void vfiopy_unmap_give_up(struct vfiopy_space *space, struct vfiopy_unmap *unmap)
{
    vfiopy_lock(space);
    give_up(space, unmap);
    vfiopy_unlock(space);
}

static void mark_unmapping(struct vfiopy_space *space, struct vfiopy_unmap *unmap, struct vfiopy_mapping *mapping)
{
    struct vfiopy_mapping **end = &unmap->ready;

    for (; mapping; mapping = vfiopy_mapping_next_in(mapping, unmap->range)) {
        vfiopy_set_state(space, mapping, VFIOPY_UNMAPPING);
        mapping->unmap_id = unmap->id;
        mapping->busy = true;
        *end = mapping;
        end = &mapping->next;
    }
    *end = NULL;
}

/* Close the range and list who must be told: each owner once for each mapping that it was not told of yet. */
static bool mark_closing(struct vfiopy_space *space, struct vfiopy_unmap *unmap, size_t room)
{
    struct vfiopy_notice *notices = calloc(room ? room : 1, sizeof(*notices));
    struct vfiopy_mapping *mapping;
    size_t count = 0;

    if (!notices)
        return false;
    for (mapping = vfiopy_mapping_in(space, unmap->range); mapping; mapping = vfiopy_mapping_next_in(mapping, unmap->range)) {
        if (mapping->state == VFIOPY_LIVE) {
            vfiopy_set_state(space, mapping, VFIOPY_CLOSING);
            mapping->unmap_id = unmap->id;
            mapping->told = false;
        }
        if (!mapping->told && vfiopy_pins_of(mapping)) {
            count += vfiopy_pins_notices(space, mapping, notices + count);
            mapping->told = true;
        }
    }
    unmap->notices = notices;
    unmap->notice_count = count;
    return true;
}

enum vfiopy_step vfiopy_unmap_step(struct vfiopy_space *space, struct vfiopy_unmap *unmap,
                                   struct vfiopy_failure *failure)
{
    enum vfiopy_step step = VFIOPY_STEP_READY;
    struct vfiopy_mapping *mapping, *start = NULL;
    size_t owners = 0;
    int result;

    vfiopy_lock(space);
    while (!unmap->id)
        unmap->id = ++space->last_unmap;
    if (space->stepwise && !unmap->stepwise)
        result = vfiopy_fail(failure, VFIOPY_IN_STEPS);
    else
        result = check_ends(space, unmap, &start, failure);
    for (mapping = start; mapping && !result && step != VFIOPY_STEP_BUSY; mapping = vfiopy_mapping_next_in(mapping, unmap->range)) {
        result = check_state(mapping, unmap->id, failure);
        if (!result && mapping->busy) {
            step = VFIOPY_STEP_BUSY;
        } else if (!result && vfiopy_pins_of(mapping)) {
            if (mapping->state == VFIOPY_LIVE || !mapping->told) {
                step = VFIOPY_STEP_NOTIFY;
                owners += vfiopy_pins_owners(mapping);
            } else if (step == VFIOPY_STEP_READY) {
                step = VFIOPY_STEP_WAIT;
            }
        }
    }
    if (!result && step == VFIOPY_STEP_READY)
        mark_unmapping(space, unmap, start);
    if (!result && step == VFIOPY_STEP_NOTIFY && !mark_closing(space, unmap, owners))
        result = vfiopy_fail(failure, VFIOPY_NO_MEMORY);
    if (result) {
        give_up(space, unmap);
        step = VFIOPY_STEP_FAILED;
    }
    vfiopy_unlock(space);
    return step;
}

int vfiopy_unmap_views(struct vfiopy_space *space, const struct vfiopy_unmap *unmap, struct vfiopy_views *views)
{
    struct vfiopy_mapping *mapping;
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    for (mapping = unmap->ready; mapping && !result; mapping = mapping->next)
        result = vfiopy_views_add(space, mapping, views);
    vfiopy_unlock(space);
    return result;
}

/* What is ready is live again; with the lock. */
static void undo(struct vfiopy_space *space, struct vfiopy_unmap *unmap)
{
    struct vfiopy_mapping *mapping;

    while ((mapping = unmap->ready)) {
        unmap->ready = mapping->next;
        vfiopy_stays(space, mapping, VFIOPY_LIVE);
    }
    vfiopy_changed(space);
}

int vfiopy_unmap_finish(struct vfiopy_space *space, struct vfiopy_unmap *unmap, struct vfiopy_failure *failure)
{
    struct vfiopy_tally tally = {0};
    int result;

    vfiopy_lock(space);
    result = unmap->stepwise ? VFIOPY_OK : vfiopy_enter_at_once(space, failure);
    if (result) {
        undo(space, unmap);
    } else {
        result = vfiopy_unmap_list(space, unmap->ready, &tally, &unmap->gone, failure);
        unmap->ready = NULL;
        unmap->bytes += tally.bytes;
        if (!unmap->stepwise)
            vfiopy_leave_at_once(space);
    }
    vfiopy_unlock(space);
    return result;
}

void vfiopy_unmap_hand_out(struct vfiopy_space *space, struct vfiopy_unmap *unmap)
{
    vfiopy_lock(space);
    for (struct vfiopy_mapping *mapping = unmap->ready; mapping; mapping = mapping->next) {
        mapping->busy = false;
        mapping->handed_out = true;
    }
    unmap->ready = NULL;
    vfiopy_changed(space);
    vfiopy_unlock(space);
}

/* Others may have mapped, and handed out, in the same range since: theirs stays theirs. */
static bool is_mine(const struct vfiopy_mapping *mapping, const struct vfiopy_unmap *unmap)
{
    return mapping->handed_out && mapping->unmap_id == unmap->id;
}

void vfiopy_unmap_adopt(struct vfiopy_space *space, struct vfiopy_unmap *unmap)
{
    struct vfiopy_mapping *mapping, **end = &unmap->ready;

    vfiopy_lock(space);
    mapping = vfiopy_mapping_in(space, unmap->range);
    while (mapping) {
        if (is_mine(mapping, unmap) && mapping->busy) {
            vfiopy_wait(space); /* a mapper joins or leaves */
            mapping = vfiopy_mapping_in(space, unmap->range);
            continue;
        }
        mapping = vfiopy_mapping_next_in(mapping, unmap->range);
    }
    mapping = vfiopy_mapping_in(space, unmap->range);
    for (; mapping; mapping = vfiopy_mapping_next_in(mapping, unmap->range)) {
        if (!is_mine(mapping, unmap))
            continue;
        mapping->handed_out = false;
        mapping->busy = true;
        *end = mapping;
        end = &mapping->next;
    }
    *end = NULL;
    vfiopy_unlock(space);
}

void vfiopy_unmap_undo(struct vfiopy_space *space, struct vfiopy_unmap *unmap)
{
    vfiopy_lock(space);
    undo(space, unmap);
    vfiopy_unlock(space);
}

int vfiopy_space_resync(struct vfiopy_space *space, struct vfiopy_gone *gone, uint64_t *bytes,
                        struct vfiopy_failure *failure)
{
    struct vfiopy_range rest = {0, UINT64_MAX};
    struct vfiopy_mapping *mapping;
    int result = VFIOPY_OK;
    bool more = true;

    vfiopy_lock(space);
    while (more && (mapping = vfiopy_mapping_in(space, rest))) {
        struct vfiopy_failure mine = {0};
        int this_one;

        if (mapping->state == VFIOPY_UNKNOWN && mapping->busy) {
            vfiopy_wait(space);
            continue;
        }
        rest.first = mapping->iova.last + 1;
        more = mapping->iova.last != UINT64_MAX;
        if (mapping->state != VFIOPY_UNKNOWN)
            continue;
        mapping->busy = true;
        this_one = vfiopy_mappers_resync(space, mapping, &mine);
        mapping->busy = false;
        if (!this_one) {
            *bytes += mapping->iova.last - mapping->iova.first + 1;
            vfiopy_erase(space, mapping, gone);
        } else if (!result) {
            result = this_one;
            *failure = mine;
        }
    }
    vfiopy_changed(space);
    vfiopy_unlock(space);
    return result;
}
