/* Kernel mappers that join a space with mappings in it, and leave it. */
#include "mappers.h"

uint32_t vfiopy_space_add_mapper(struct vfiopy_space *space, enum vfiopy_mapper_kind kind, int fd, uint32_t object,
                                 vfiopy_ioctl call)
{
    const struct vfiopy_mapper_ops *ops = vfiopy_mapper_ops_of(kind);
    uint32_t token = 0;

    vfiopy_lock(space);
    for (int slot = 0; slot < VFIOPY_MAX_MAPPERS && ops && !token; slot++) {
        if (space->mappers[slot].token)
            continue;
        token = ++space->last_token;
        space->mappers[slot] = (struct vfiopy_mapper){
            .ops = ops,
            .ioctl = call ? call : vfiopy_system_ioctl,
            .fd = fd,
            .object = object,
            .token = token,
            .kind = kind,
        };
        space->active |= VFIOPY_SLOT(slot);
        space->present++;
    }
    vfiopy_unlock(space);
    return token;
}

/* The slot of a mapper that stays, or -1; with the lock. */
static int slot_of(const struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure)
{
    for (int slot = 0; token && slot < VFIOPY_MAX_MAPPERS; slot++) {
        if (space->mappers[slot].token == token && !space->mappers[slot].leaving)
            return slot;
    }
    failure->value = token;
    vfiopy_fail(failure, VFIOPY_NO_MAPPER);
    return -1;
}

int vfiopy_space_remove_mapper(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure)
{
    int slot;

    vfiopy_lock(space);
    slot = slot_of(space, token, failure);
    if (slot >= 0) {
        struct vfiopy_mapping *mapping;

        space->mappers[slot].leaving = true;
        space->active &= ~VFIOPY_SLOT(slot);
        while (space->mappers[slot].calls)
            vfiopy_wait(space);
        mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));
        for (; mapping; mapping = vfiopy_mapping_after(mapping))
            vfiopy_set_mapped_in(mapping, mapping->mapped_in & ~VFIOPY_SLOT(slot));
        space->mappers[slot] = (struct vfiopy_mapper){0};
        space->present--;
    }
    vfiopy_unlock(space);
    return slot < 0 ? VFIOPY_NO_MAPPER : VFIOPY_OK;
}

/*
 * Visit every mapping that was there at the start, in order, when nobody else works on it. The visitor is called
 * without the lock, with the mapping busy; it returns false to stop.
 */
static void for_each_idle(struct vfiopy_space *space, bool (*wanted)(const struct vfiopy_mapping *, uint32_t bit),
                          bool (*visit)(struct vfiopy_space *, struct vfiopy_mapping *, int slot, void *), int slot,
                          void *context)
{
    struct vfiopy_range rest = {0, UINT64_MAX};
    struct vfiopy_mapping *mapping;
    bool more = true;

    vfiopy_lock(space);
    while (more && (mapping = vfiopy_mapping_in(space, rest))) {
        if (mapping->busy) {
            vfiopy_wait(space);
            continue;
        }
        rest.first = mapping->iova.last + 1;
        more = mapping->iova.last != UINT64_MAX;
        if (!wanted(mapping, VFIOPY_SLOT(slot)))
            continue;
        mapping->busy = true;
        vfiopy_unlock(space);
        if (!visit(space, mapping, slot, context))
            more = false;
        vfiopy_lock(space);
        mapping->busy = false;
        vfiopy_changed(space);
    }
    vfiopy_unlock(space);
}

static bool is_there(const struct vfiopy_mapping *mapping, uint32_t bit)
{
    return mapping->mapped_in & bit;
}

/* What is reserved goes to the mapper when it is committed, what was revoked when it is restored. */
static bool is_missing(const struct vfiopy_mapping *mapping, uint32_t bit)
{
    return mapping->state != VFIOPY_RESERVED && mapping->state != VFIOPY_UNKNOWN && !(mapping->mapped_in & bit) &&
           !mapping->revoked;
}

static void set_mapped_in(struct vfiopy_space *space, struct vfiopy_mapping *mapping, int slot, bool there)
{
    vfiopy_lock(space);
    vfiopy_set_mapped_in(mapping,
                         there ? mapping->mapped_in | VFIOPY_SLOT(slot) : mapping->mapped_in & ~VFIOPY_SLOT(slot));
    vfiopy_unlock(space);
}

static bool replay_one(struct vfiopy_space *space, struct vfiopy_mapping *mapping, int slot, void *context)
{
    struct vfiopy_failure *failure = context;

    if (vfiopy_map_in(&space->mappers[slot], mapping, failure))
        return false;
    set_mapped_in(space, mapping, slot, true);
    return true;
}

static bool drop_one(struct vfiopy_space *space, struct vfiopy_mapping *mapping, int slot, void *context)
{
    struct vfiopy_failure *failure = context, mine = {0};

    if (!vfiopy_unmap_in(&space->mappers[slot], mapping, &mine) || vfiopy_not_there(&mine))
        set_mapped_in(space, mapping, slot, false);
    else if (!failure->result)
        *failure = mine;
    return true;
}

/* Find the mapper, keep it from leaving, and switch it on or off for new mappings. */
static int enter_one(struct vfiopy_space *space, uint32_t token, bool on, struct vfiopy_failure *failure)
{
    int slot;

    vfiopy_lock(space);
    slot = slot_of(space, token, failure);
    if (slot >= 0) {
        vfiopy_mappers_enter(space, VFIOPY_SLOT(slot));
        space->active = on ? space->active | VFIOPY_SLOT(slot) : space->active & ~VFIOPY_SLOT(slot);
    }
    vfiopy_unlock(space);
    return slot;
}

static void leave_one(struct vfiopy_space *space, int slot)
{
    vfiopy_lock(space);
    vfiopy_mappers_leave(space, VFIOPY_SLOT(slot));
    vfiopy_unlock(space);
}

int vfiopy_space_drop(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure)
{
    int slot = enter_one(space, token, false, failure);

    if (slot < 0)
        return VFIOPY_NO_MAPPER;
    failure->result = VFIOPY_OK;
    for_each_idle(space, is_there, drop_one, slot, failure);
    leave_one(space, slot);
    return failure->result;
}

int vfiopy_space_replay(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure)
{
    int slot = enter_one(space, token, true, failure);

    if (slot < 0)
        return VFIOPY_NO_MAPPER;
    failure->result = VFIOPY_OK;
    for_each_idle(space, is_missing, replay_one, slot, failure);
    leave_one(space, slot);
    if (failure->result) {
        struct vfiopy_failure second = {0};

        vfiopy_space_drop(space, token, &second);
    }
    return failure->result;
}

bool vfiopy_space_has_mappers(const struct vfiopy_space *space)
{
    return space->present != 0;
}

static uint64_t charged_bytes(const struct vfiopy_mapping *mapping)
{
    bool memory = mapping->kind == VFIOPY_HOST || mapping->kind == VFIOPY_FILE;

    return memory ? mapping->iova.last - mapping->iova.first + 1 : 0;
}

size_t vfiopy_space_mappers(struct vfiopy_space *space, struct vfiopy_mapper_view views[VFIOPY_MAX_MAPPERS])
{
    struct vfiopy_mapper_view *at[VFIOPY_MAX_MAPPERS];
    struct vfiopy_mapping *mapping;
    size_t count = 0;

    vfiopy_lock(space);
    for (int slot = 0; slot < VFIOPY_MAX_MAPPERS; slot++) {
        const struct vfiopy_mapper *mapper = &space->mappers[slot];

        if (!mapper->token)
            continue;
        views[count++] = (struct vfiopy_mapper_view){
            .token = mapper->token,
            .object = mapper->object,
            .kind = mapper->kind,
            .fd = mapper->fd,
            .active = space->active & VFIOPY_SLOT(slot),
        };
        at[slot] = &views[count - 1];
    }
    /* Nobody counts them while mapping: that is done all the time, and this is asked hardly ever. */
    mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));
    for (; mapping; mapping = vfiopy_mapping_after(mapping)) {
        for (uint32_t slots = mapping->mapped_in; slots; slots = vfiopy_without_lowest(slots)) {
            at[__builtin_ctz(slots)]->mappings++;
            at[__builtin_ctz(slots)]->charged += charged_bytes(mapping);
        }
    }
    vfiopy_unlock(space);
    return count;
}

int vfiopy_space_change_process(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure)
{
    const struct vfiopy_mapper *mapper;
    int slot;

    vfiopy_lock(space);
    slot = slot_of(space, token, failure);
    if (slot >= 0)
        vfiopy_mappers_enter(space, VFIOPY_SLOT(slot));
    vfiopy_unlock(space);
    if (slot < 0)
        return VFIOPY_NO_MAPPER;
    mapper = &space->mappers[slot];
    failure->error = mapper->ops->change_process(mapper, &failure->call);
    failure->mapper = token;
    leave_one(space, slot);
    return failure->error ? vfiopy_fail(failure, VFIOPY_KERNEL) : VFIOPY_OK;
}
