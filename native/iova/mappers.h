/* Fan-out to the mappers of a space: for mappers.c, mapper_changes.c and addresses.c. */
#ifndef VFIOPY_IOVA_MAPPERS_H
#define VFIOPY_IOVA_MAPPERS_H

#include "internal.h"

#define VFIOPY_SLOT(n) (UINT32_C(1) << (n))

/* Sets of slots are walked bit by bit, lowest first: there is one mapper as a rule. */
static inline struct vfiopy_mapper *vfiopy_lowest(struct vfiopy_space *space, uint32_t slots)
{
    return &space->mappers[__builtin_ctz(slots)];
}

static inline uint32_t vfiopy_without_lowest(uint32_t slots)
{
    return slots & (slots - 1);
}

/* Keep the mappers of these slots from leaving, and let them. With the lock. */
static inline void vfiopy_mappers_enter(struct vfiopy_space *space, uint32_t slots)
{
    for (; slots; slots = vfiopy_without_lowest(slots))
        vfiopy_lowest(space, slots)->calls++;
}

static inline void vfiopy_mappers_leave(struct vfiopy_space *space, uint32_t slots)
{
    for (; slots; slots = vfiopy_without_lowest(slots))
        vfiopy_lowest(space, slots)->calls--;
    vfiopy_changed(space);
}

/* Say which mappers have the mapping now. With the lock. */
void vfiopy_set_mapped_in(struct vfiopy_mapping *mapping, uint32_t slots);

/* One call; without the lock, the mapper entered and the mapping busy. */
typedef int (*vfiopy_mapper_call)(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                                  struct vfiopy_failure *failure);
int vfiopy_map_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                  struct vfiopy_failure *failure);
int vfiopy_unmap_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                    struct vfiopy_failure *failure);
int vfiopy_set_address_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                          struct vfiopy_failure *failure);
int vfiopy_lose_address_in(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                           struct vfiopy_failure *failure);

/* Undo what was just done in these slots; the slots where that failed. */
uint32_t vfiopy_mappers_undo(struct vfiopy_space *space, const struct vfiopy_mapping *mapping, uint32_t slots,
                             vfiopy_mapper_call how);

/* The mapper said that it does not have the mapping (or not all of it), rather than that it keeps it. */
bool vfiopy_not_there(const struct vfiopy_failure *failure);

#endif
