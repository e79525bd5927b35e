/* The pins of one mapping: counts by page, and who holds how many. */
#ifndef VFIOPY_IOVA_PINS_H
#define VFIOPY_IOVA_PINS_H

#include "internal.h"
#include "pin_pages.h"

struct vfiopy_held {
    uint64_t pins;
    uint32_t owner;
};

struct vfiopy_pins {
    uint64_t pins, pinned; /* sum of all counts; pages with one */
    struct vfiopy_pin_pages pages;
    struct vfiopy_held *held; /* unordered; `one` as long as one owner is enough */
    struct vfiopy_held one;
    uint32_t held_count, held_room;
};

static inline uint64_t vfiopy_page_count(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping)
{
    return (mapping->iova.last >> space->page_shift) - (mapping->iova.first >> space->page_shift) + 1;
}

/* The pages of a range, counted from the mapping's first; the range is cut to the mapping. */
static inline struct vfiopy_range vfiopy_pages_in(const struct vfiopy_space *space,
                                                  const struct vfiopy_mapping *mapping, struct vfiopy_range range)
{
    uint64_t origin = mapping->iova.first >> space->page_shift;
    uint64_t first = range.first > mapping->iova.first ? range.first : mapping->iova.first;
    uint64_t last = range.last < mapping->iova.last ? range.last : mapping->iova.last;

    return (struct vfiopy_range){(first >> space->page_shift) - origin, (last >> space->page_shift) - origin};
}

static inline uint64_t vfiopy_iova_of_page(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                                           uint64_t page)
{
    return ((mapping->iova.first >> space->page_shift) + page) << space->page_shift;
}

/* Neighbour by neighbour, the range must be mapped without a hole. NULL: the failure says where it is not. */
static inline struct vfiopy_mapping *vfiopy_next_without_hole(const struct vfiopy_space *space,
                                                              const struct vfiopy_mapping *mapping,
                                                              struct vfiopy_range range,
                                                              struct vfiopy_failure *failure)
{
    uint64_t at = mapping ? mapping->iova.last + 1 : range.first;
    struct vfiopy_mapping *next = vfiopy_mapping_at(space, at);

    if (!next)
        vfiopy_fail_range(failure, VFIOPY_NOT_MAPPED, (struct vfiopy_range){at, at});
    return next;
}

#endif
