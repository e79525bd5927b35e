/* What the parts of the book share. Outside of native/iova only space.h counts. */
#ifndef VFIOPY_IOVA_INTERNAL_H
#define VFIOPY_IOVA_INTERNAL_H

#include <pthread.h>

#include "free_space.h"
#include "mapper_kernel.h"
#include "space.h"

struct vfiopy_pins;

/* How many mappings are worked on together: so long the lock is held. */
enum { VFIOPY_BATCH = 128 };

/* One cache line for searches by IOVA, one for searches by address, and the rest. */
struct vfiopy_mapping {
    struct vfiopy_interval iova;
    void *memory;
    uint8_t prot, kind, state;
    bool address_known;
    bool has_fd;
    bool busy;       /* somebody works on it without the lock: wait for `changed` */
    bool handed_out; /* reserved or marked unmapping for a caller with mappers of its own */
    bool revoked;    /* see revoke.c */

    struct vfiopy_interval address; /* in the tree if there is one, `address_known` and not reserved */
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
    bool told;                   /* its owners were told by operation unmap_id */
};

struct vfiopy_geometry {
    struct vfiopy_range *usable, *excluded;
    struct vfiopy_cell *cells; /* usable without excluded, cut at the borders of the transient window */
    size_t usable_count, excluded_count, cell_count;
    struct vfiopy_range transient; /* first > last: none */
    uint64_t page_sizes;
    uint64_t max_mappings; /* 0: no limit */
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
    bool addresses_listed; /* by_address is made when it is first looked into, and kept from then on */
    struct vfiopy_free_space free;
    struct vfiopy_pool pool; /* of mappings; those that are gone but not popped count as used */
    struct vfiopy_geometry geometry;
    struct vfiopy_mapper mappers[VFIOPY_MAX_MAPPERS];
    uint32_t active;       /* slots that new mappings go to */
    _Atomic uint32_t present; /* number of mappers, for a look without the lock */
    uint32_t last_token, last_unmap;
    bool stepwise;     /* callers have mappers of their own: everything goes in steps */
    unsigned at_once;  /* maps and unmaps under way that do not */
    struct vfiopy_unmap *watched; /* unmaps that want to hear when their pins are gone */
    uint64_t last_serial;
    struct vfiopy_owner *owners; /* by id */
    size_t owner_count;
    size_t owners_gone, last_reused; /* free entries of that table; see owners.c */
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
    return vfiopy_mapping_of(vfiopy_interval_in(&space->by_iova, range.first, range.last));
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

/* Two ways by which a mapping that is not just reserved comes into by_address, and out of it. */
static inline void vfiopy_list_address(struct vfiopy_space *space, struct vfiopy_mapping *mapping)
{
    if (space->addresses_listed && mapping->address_known)
        vfiopy_interval_insert(&space->by_address, &mapping->address);
}

static inline void vfiopy_unlist_address(struct vfiopy_space *space, struct vfiopy_mapping *mapping)
{
    if (space->addresses_listed && mapping->address_known)
        vfiopy_rb_erase(&space->by_address, &mapping->address.rb);
}

/* Could memory of this size contain a page larger than the smallest? */
static inline bool vfiopy_takes_large_page(const struct vfiopy_space *space, uint64_t size)
{
    uint64_t larger = space->geometry.page_sizes & (space->geometry.page_sizes - 1);

    return larger && size >= (larger & -larger);
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

static inline void vfiopy_lock(struct vfiopy_space *space)
{
    pthread_mutex_lock(&space->lock);
}

static inline void vfiopy_unlock(struct vfiopy_space *space)
{
    pthread_mutex_unlock(&space->lock);
}

/* lock.c: wait for any change; the lock is let go meanwhile. */
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

/* With the lock: begin and end a map or unmap that is not in steps. VFIOPY_IN_STEPS: it must be. */
static inline int vfiopy_enter_at_once(struct vfiopy_space *space, struct vfiopy_failure *failure)
{
    if (space->stepwise)
        return vfiopy_fail(failure, VFIOPY_IN_STEPS);
    space->at_once++;
    return VFIOPY_OK;
}

static inline void vfiopy_leave_at_once(struct vfiopy_space *space)
{
    space->at_once--;
    vfiopy_changed(space);
}

/* look.c; with the lock */
void vfiopy_fill_view(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                      struct vfiopy_view *view);

/* VFIOPY_OK or VFIOPY_NO_MEMORY. */
int vfiopy_views_add(const struct vfiopy_space *space, const struct vfiopy_mapping *mapping,
                     struct vfiopy_views *views);

/* gone.c; with the lock: erase a mapping (its mappers no longer have it) and hand it over. */
void vfiopy_erase(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_gone *gone);
/* The same, for several that follow each other: their range is given back by the caller. */
void vfiopy_take_out(struct vfiopy_space *space, struct vfiopy_mapping *mapping, struct vfiopy_gone *gone);
/* Free the first of those that are there; what it kept alive. With the lock. */
void *vfiopy_gone_free(struct vfiopy_gone *gone);

/* map.c; with the lock. Where it can be, and in which free range; room for one more mapping is made. */
int vfiopy_find_place(struct vfiopy_space *space, const struct vfiopy_request *request, struct vfiopy_free **from,
                      uint64_t *iova, struct vfiopy_failure *failure);
/* Put a reserved mapping into the book. `before`: one that may be next to it, below, or NULL. */
struct vfiopy_mapping *vfiopy_put(struct vfiopy_space *space, const struct vfiopy_request *request, uint64_t iova,
                                  struct vfiopy_mapping *before);
/* Make a reserved and busy mapping, for which its mappers were asked with this result, live; else it is gone or
 * unknown. A mapper may have joined: the lock is let go to call it too. */
int vfiopy_settle(struct vfiopy_space *space, struct vfiopy_mapping *mapping, int result, struct vfiopy_gone *gone,
                  struct vfiopy_failure *failure);

/* unmap_list.c; with the lock */
struct vfiopy_tally {
    uint64_t bytes;
    size_t mappings;
};
/* Unmap and erase a list (by `next`) of what is unmapping and busy, up to the first failure; what is left is as it was.
 * Adds to the tally. The lock is let go for the mappers' calls. */
int vfiopy_unmap_list(struct vfiopy_space *space, struct vfiopy_mapping *list, struct vfiopy_tally *tally,
                      struct vfiopy_gone *gone, struct vfiopy_failure *failure);
/* It was to be unmapped, but is not. */
void vfiopy_stays(struct vfiopy_space *space, struct vfiopy_mapping *mapping, uint8_t state);

/* geometry.c */
int vfiopy_geometry_init(struct vfiopy_space *space, uint64_t page_size);
void vfiopy_geometry_destroy(struct vfiopy_space *space);
const struct vfiopy_cell *vfiopy_cell_of(const struct vfiopy_geometry *geometry, uint64_t iova);
/* Where a fixed request outside of all cells hits the border. */
int vfiopy_fail_outside(const struct vfiopy_geometry *geometry, struct vfiopy_range asked,
                        struct vfiopy_failure *failure);

/*
 * mappers.c; with the lock, which is let go for all the calls of a list (by `next`) together: its mappings are the
 * caller's alone (busy). The one that failed, or NULL: for those behind it nothing was called.
 */
struct vfiopy_mapping *vfiopy_mappers_map(struct vfiopy_space *space, struct vfiopy_mapping *list,
                                          struct vfiopy_failure *failure);
/* No mapper has those before it any more; failure->clash.state says whether it is live again or unknown. */
struct vfiopy_mapping *vfiopy_mappers_unmap(struct vfiopy_space *space, struct vfiopy_mapping *list,
                                            struct vfiopy_failure *failure);
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
