/* Who may hold pins, and is told before a mapping goes. */
#include "pins.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* So many entries must be free before one is used again: whoever still has an old id shall not meet a new owner. */
#define REST 1024

/* The entry for one more owner, or 0; with the lock. Free entries are used in turn. */
static uint32_t new_owner(struct vfiopy_space *space)
{
    struct vfiopy_owner *owners;

    if (space->owners_gone >= REST) {
        do
            space->last_reused = space->last_reused + 1 < space->owner_count ? space->last_reused + 1 : 1;
        while (space->owners[space->last_reused].here);
        space->owners_gone--;
        return (uint32_t)space->last_reused;
    }
    if (space->owner_count >= UINT32_MAX)
        return 0;
    owners = realloc(space->owners, (space->owner_count + 1) * sizeof(*owners));
    if (!owners)
        return 0;
    space->owners = owners;
    return (uint32_t)space->owner_count++;
}

uint32_t vfiopy_space_add_owner(struct vfiopy_space *space, const char *name, void *callback)
{
    char *copy = strdup(name);
    uint32_t owner = 0;

    vfiopy_lock(space);
    if (copy)
        owner = new_owner(space);
    if (owner)
        space->owners[owner] = (struct vfiopy_owner){.name = copy, .callback = callback, .here = true};
    vfiopy_unlock(space);
    if (!owner)
        free(copy);
    return owner;
}

int vfiopy_space_remove_owner(struct vfiopy_space *space, uint32_t owner, void **callback,
                              struct vfiopy_failure *failure)
{
    int result = VFIOPY_OK;

    vfiopy_lock(space);
    failure->value = owner;
    if (owner == 0 || owner >= space->owner_count || !space->owners[owner].here) {
        result = vfiopy_fail(failure, VFIOPY_NO_OWNER);
    } else if (space->owners[owner].pins) {
        failure->value = space->owners[owner].pins;
        result = vfiopy_fail(failure, VFIOPY_OWNER_HOLDS);
    } else {
        *callback = space->owners[owner].callback;
        free(space->owners[owner].name);
        space->owners[owner] = (struct vfiopy_owner){0};
        space->owners_gone++;
    }
    vfiopy_unlock(space);
    return result;
}

static void fill_holder(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                        const struct vfiopy_held *held, struct vfiopy_holder *holder)
{
    const char *name = held->owner ? space->owners[held->owner].name : "an unnamed owner";

    *holder = (struct vfiopy_holder){
        .iova = mapping->iova.first,
        .size = mapping->iova.last - mapping->iova.first + 1,
        .pins = held->pins,
        .owner = held->owner,
    };
    snprintf(holder->name, sizeof(holder->name), "%s", name);
}

struct vfiopy_holder *vfiopy_space_holders(struct vfiopy_space *space, struct vfiopy_range range, size_t *count)
{
    struct vfiopy_holder *holders;
    struct vfiopy_mapping *mapping;
    size_t found = 0;

    vfiopy_lock(space);
    for (mapping = vfiopy_mapping_in(space, range); mapping; mapping = vfiopy_mapping_next_in(mapping, range))
        found += vfiopy_pins_owners(mapping);
    holders = calloc(found ? found : 1, sizeof(*holders));
    *count = holders ? 0 : SIZE_MAX;
    mapping = holders ? vfiopy_mapping_in(space, range) : NULL;
    for (; mapping; mapping = vfiopy_mapping_next_in(mapping, range)) {
        for (uint32_t i = 0; mapping->pins && i < mapping->pins->held_count; i++)
            fill_holder(space, mapping, &mapping->pins->held[i], &holders[(*count)++]);
    }
    vfiopy_unlock(space);
    return holders;
}

int vfiopy_space_visit(struct vfiopy_space *space, int (*visit)(void *object, void *context), void *context)
{
    struct vfiopy_mapping *mapping;
    int result = 0;

    vfiopy_lock(space);
    mapping = vfiopy_mapping_of((struct vfiopy_interval *)vfiopy_rb_end(&space->by_iova, 0));
    for (; mapping && !result; mapping = vfiopy_mapping_after(mapping)) {
        if (mapping->memory)
            result = visit(mapping->memory, context);
    }
    for (size_t owner = 1; owner < space->owner_count && !result; owner++) {
        if (space->owners[owner].callback)
            result = visit(space->owners[owner].callback, context);
    }
    vfiopy_unlock(space);
    return result;
}

void *vfiopy_space_take_callback(struct vfiopy_space *space)
{
    void *callback = NULL;

    vfiopy_lock(space);
    for (size_t owner = 1; owner < space->owner_count && !callback; owner++) {
        callback = space->owners[owner].callback;
        space->owners[owner].callback = NULL;
    }
    vfiopy_unlock(space);
    return callback;
}
