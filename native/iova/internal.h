/* What the parts of the book share. Outside of native/iova only space.h counts. */
#ifndef VFIOPY_IOVA_INTERNAL_H
#define VFIOPY_IOVA_INTERNAL_H

#include <pthread.h>

#include "free_space.h"
#include "mapper_kernel.h"
#include "space.h"

struct vfiopy_pins;

/* One cache line for searches by IOVA, one for searches by address, and the rest. */
struct vfiopy_mapping {
    struct vfiopy_interval iova;
    void *memory;
    uint8_t prot, kind, state;
    bool address_known;
    bool has_fd;
    bool busy;       /* somebody works on it without the lock: wait for `changed` */
    bool handed_out; /* reserved or marked unmapping for a caller with mappers of its own */
    bool told;       /* its owners were told by operation unmap_id */

    struct vfiopy_interval address; /* in the tree if `address_known` and not reserved */
    struct vfiopy_pins *pins;       /* NULL before the first pin */
    uint64_t serial;

    uint32_t mapped_in; /* slots of the mappers that have it */
    int fd;
    uint64_t fd_offset;
    struct vfiopy_mapping *next; /* of what one operation works on, or of what is gone */
    uint64_t physical;           /* where device memory is on the bus, or 0 */
    uint32_t unmap_id;           /* the operation that is closing or unmapping it */
    bool taken_over;             /* the mappers had it before this book: they are told its address only */
    bool address_lost;           /* see addresses.c */
};

struct vfiopy_geometry {
    struct vfiopy_range *usable, *excluded;
    struct vfiopy_cell *cells; /* usable without excluded, cut at the borders of the transient window */
    size_t usable_count, excluded_count, cell_count;
    struct vfiopy_range transient; /* first > last: none */
    uint64_t page_sizes;
    uint64_t max_mappings; /* 0: no limit */
};

/* An unmap that waits for a caller with mappers of its own. */
struct vfiopy_handed_out {
    struct vfiopy_range range; /* as it was asked for: what the caller ends it by */
    uint32_t id;
    struct vfiopy_handed_out *next;
};

struct vfiopy_owner {
    char *name;
    void *callback;
    uint64_t pins;
    bool here;
};

struct vfiopy_space {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a mapping is no longer busy or lost its pins, a mapper its last call */
    unsigned waiters;
    struct vfiopy_rb_tree by_iova, by_address;
    struct vfiopy_free_space free;
    struct vfiopy_pool pool; /* of mappings; those that are gone but not popped count as used */
    struct vfiopy_geometry geometry;
    struct vfiopy_mapper mappers[VFIOPY_MAX_MAPPERS];
    uint32_t active;       /* slots that new mappings go to */
    _Atomic uint32_t present; /* number of mappers, for a look without the lock */
    uint32_t last_token, last_unmap;
    struct vfiopy_unmap *watched; /* unmaps that want to hear when their pins are gone */
    struct vfiopy_handed_out *handed_out;
    uint64_t last_serial;
    struct vfiopy_owner *owners; /* by id */
    size_t owner_count;
    unsigned page_shift; /* of a pin */
    void (*retain)(void *memory);
    /* sums */
    size_t mappings, lost_addresses;
    uint64_t mapped_bytes; /* modulo 2**64 */
    uint64_t kind_mappings[VFIOPY_KINDS], kind_bytes[VFIOPY_KINDS], states[VFIOPY_UNKNOWN + 1];
    uint64_t pins, pinned_pages, pin_bytes;
};

static inline struct vfiopy_mapping *vfiopy_mapping_of(const struct vfiopy_interval *iova)
{
    return iova ? VFIOPY_ENTRY(iova, struct vfiopy_mapping, iova) : NULL;
}

static inline struct vfiopy_mapping *vfiopy_mapping_at(const struct vfiopy_space *space, uint64_t iova)
{
    return vfiopy_mapping_of(vfiopy_interval_at(&space->by_iova, iova));
}

/* The lowest mapping that touches the range, or NULL. */
static inline struct vfiopy_mapping *vfiopy_mapping_in(const struct vfiopy_space *space, struct vfiopy_range range)
{
    return vfiopy_mapping_of(vfiopy_interval_overlap(&space->by_iova, range.first, range.last));
}

static inline struct vfiopy_mapping *vfiopy_mapping_after(const struct vfiopy_mapping *mapping)
{
    return vfiopy_mapping_of(vfiopy_interval_step(&mapping->iova, 1));
}

/* As vfiopy_mapping_after, within a range. */
static inline struct vfiopy_mapping *vfiopy_mapping_next_in(const struct vfiopy_mapping *mapping,
                                                            struct vfiopy_range range)
{
    struct vfiopy_mapping *next = mapping->iova.last < range.last ? vfiopy_mapping_after(mapping) : NULL;

    return next && next->iova.first <= range.last ? next : NULL;
}

static inline bool vfiopy_state_is_mapped(uint8_t state)
{
    return state == VFIOPY_LIVE || state == VFIOPY_CLOSING;
}

static inline void vfiopy_set_state(struct vfiopy_space *space, struct vfiopy_mapping *mapping, uint8_t state)
{
    space->states[mapping->state]--;
    mapping->state = state;
    space->states[state]++;
}

/* lock.c */
void vfiopy_lock(struct vfiopy_space *space);
void vfiopy_unlock(struct vfiopy_space *space);
/* Wait for any change; the lock is let go meanwhile. */
void vfiopy_wait(struct vfiopy_space *space);
static inline void vfiopy_changed(struct vfiopy_space *space)
{
    if (space->waiters)
        pthread_cond_broadcast(&space->changed);
}

/* A closing mapping lost its last pin: tell who waits for it. With the lock. */
void vfiopy_pins_gone(struct vfiopy_space *space, const struct vfiopy_mapping *mapping);

/* failure.c: say in `failure` what is in the way; return `result`. */
int vfiopy_fail(struct vfiopy_failure *failure, enum vfiopy_result result);
int vfiopy_fail_at(struct vfiopy_failure *failure, enum vfiopy_result result, const struct vfiopy_mapping *clash);
int vfiopy_fail_range(struct vfiopy_failure *failure, enum vfiopy_result result, struct vfiopy_range clash);

/* look.c; with the lock */
void vfiopy_fill_view(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                      struct vfiopy_view *view);

/* VFIOPY_OK or VFIOPY_NO_MEMORY. */
int vfiopy_views_add(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                     struct vfiopy_views *views);

/* gone.c; with the lock: erase a mapping (its mappers no longer have it) and hand it over. */
void vfiopy_erase(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_gone *gone);

/* geometry.c */
int vfiopy_geometry_init(struct vfiopy_space *space, uint64_t page_size);
void vfiopy_geometry_destroy(struct vfiopy_space *space);
const struct vfiopy_cell *vfiopy_cell_of(const struct vfiopy_geometry *geometry, uint64_t iova);
/* Where a fixed request outside of all cells hits the border. */
int vfiopy_fail_outside(const struct vfiopy_geometry *geometry, struct vfiopy_range asked,
                        struct vfiopy_failure *failure);

/* mappers.c; with the lock, which is let go for the calls: the mapping is the caller's alone (busy) */
int vfiopy_mappers_map(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_failure *failure);
/* VFIOPY_OK: no mapper has it. Else failure->clash.state says whether it is live again or unknown. */
int vfiopy_mappers_unmap(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_failure *failure);
/* Unmap what is unknown from every mapper that may have it; VFIOPY_OK: none has it any more. */
int vfiopy_mappers_resync(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_failure *failure);

/* pins.c and owners.c; with the lock */
uint64_t vfiopy_pins_of(const struct vfiopy_mapping *mapping);
void vfiopy_pins_free(struct vfiopy_space *space, struct vfiopy_mapping *mapping);
/* How many owners have pins; and what they are to be told (the number of notices, at most that many). */
size_t vfiopy_pins_owners(const struct vfiopy_mapping *mapping);
size_t vfiopy_pins_notices(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                           struct vfiopy_notice *notices);
const char *vfiopy_pins_verify(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                               uint64_t *pins, uint64_t *pages, uint64_t *bytes);

#endif
