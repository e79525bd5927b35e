/*
 * The book of one DMA address space: every mapping, every free range, every pin.
 *
 * All ranges have both ends included. Functions return VFIOPY_OK or a reason, and then say in
 * `failure` what stood in the way. Any function may be called from any thread; one leaf mutex
 * guards the book and is never held across an ioctl or a callback. Whoever maps keeps a reference
 * to the memory alive until it comes back in a `struct vfiopy_gone`.
 */
#ifndef VFIOPY_IOVA_SPACE_H
#define VFIOPY_IOVA_SPACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VFIOPY_MAX_MAPPERS 32
#define VFIOPY_NO_FIXED_IOVA UINT64_MAX /* never a legal first IOVA: no page begins there */

enum vfiopy_result {
    VFIOPY_OK,
    VFIOPY_NO_MEMORY,     /* of the host, for the book itself */
    VFIOPY_BAD_SIZE,      /* zero, or wraps around the end of the address space */
    VFIOPY_BAD_PROT,      /* empty or unknown bits */
    VFIOPY_BAD_ALIGNMENT, /* value: the alignment that is needed; clash.first: what has not got it (call: which) */
    VFIOPY_BAD_RANGES,    /* unsorted, overlapping or too many; clash: the first bad one */
    VFIOPY_BAD_KIND,      /* the mapper cannot take this kind of memory, or the kind cannot be pinned */
    VFIOPY_OVERLAP,       /* clash: the mapping */
    VFIOPY_BUSY,          /* clash: a mapping that is coming, going or unknown */
    VFIOPY_OUTSIDE,       /* of usable ranges; clash: the mapping, or the window that is in the way */
    VFIOPY_EXCLUDED,      /* clash: the window that the user reserved */
    VFIOPY_OVER_LIMIT,    /* value: the highest IOVA that the request allows */
    VFIOPY_NO_SPACE,      /* value: the largest free range in bytes less one; clash.state < 0: none at all */
    VFIOPY_TOO_MANY,      /* value: the number of mappings that the kernel takes */
    VFIOPY_NOT_MAPPED,    /* clash.first: the first IOVA without a mapping */
    VFIOPY_CUTS,          /* clash: the mapping that an end would cut in two */
    VFIOPY_NO_ACCESS,     /* clash: the mapping; value: its prot */
    VFIOPY_PINNED,        /* clash: the mapping */
    VFIOPY_IS_UNMAPPING,  /* clash: the mapping */
    VFIOPY_NOT_PINNED,    /* clash.first: the page; value: owner */
    VFIOPY_TOO_MANY_PINS, /* clash.first: the page */
    VFIOPY_NO_OWNER,      /* value: the id */
    VFIOPY_OWNER_HOLDS,   /* value: the number of pins */
    VFIOPY_NO_MAPPER,     /* value: the token */
    VFIOPY_KERNEL,        /* call, error, mapper; clash: the mapping and the state that it was left in */
    VFIOPY_SHORT,         /* the kernel unmapped value bytes, not all; clash as above */
    VFIOPY_NO_ADDRESS,    /* clash: a mapping whose memory has no valid address now */
    VFIOPY_HAS_ADDRESS,   /* clash: a mapping whose address was not lost */
    VFIOPY_IN_STEPS,      /* the caller has mappers of its own, to be called in between: see set_stepwise */
    VFIOPY_REVOKED,       /* clash: a mapping whose device memory was taken away */
};

enum vfiopy_state {
    VFIOPY_RESERVED,  /* the IOVA is taken, the mapping is not there yet */
    VFIOPY_LIVE,      /* mapped */
    VFIOPY_CLOSING,   /* mapped; no new pins; owners were told */
    VFIOPY_UNMAPPING, /* being unmapped; the IOVA is still taken */
    VFIOPY_UNKNOWN,   /* a mapper may or may not have it: not reused before vfiopy_space_resync */
};

enum vfiopy_kind { VFIOPY_HOST, VFIOPY_FILE, VFIOPY_MMIO, VFIOPY_REMOTE, VFIOPY_KINDS };

enum { VFIOPY_PROT_READ = 1, VFIOPY_PROT_WRITE = 2, VFIOPY_PROT_ALL = 3 };

enum vfiopy_mapper_kind { VFIOPY_MAPPER_TYPE1 = 1, VFIOPY_MAPPER_IOAS = 2 };

typedef int (*vfiopy_ioctl)(int fd, unsigned long request, void *argument); /* returns -1 and sets errno */

struct vfiopy_range {
    uint64_t first, last;
};

struct vfiopy_failure {
    enum vfiopy_result result;
    struct vfiopy_range asked;
    struct {
        uint64_t first, last;
        int state; /* enum vfiopy_state, or -1 where it is no mapping */
    } clash;
    uint64_t value;
    const char *call; /* the kernel's name for it; or the argument that is wrong */
    int error;        /* errno */
    uint32_t mapper;  /* token */
    bool kept;        /* the mapping that failed is in the book all the same, unknown, and holds its memory */
};

struct vfiopy_request {
    uint64_t iova; /* or VFIOPY_NO_FIXED_IOVA */
    uint64_t size;
    uint64_t limit;     /* the highest IOVA allowed */
    uint64_t alignment; /* of the IOVA, a power of two; 0: none beyond the page size */
    uint64_t address;   /* where this process has the memory, or 0 */
    uint64_t fd_offset;
    int fd; /* or -1 */
    uint64_t physical; /* where device memory is on the bus, or 0 for not known */
    uint8_t prot, kind;
    bool transient; /* short-lived: take it from the window for one-shot buffers, if there is one */
    bool take_over; /* the mappers have it already, from another process, and are told the address only */
    void *memory;   /* what must stay alive; opaque here */
};

struct vfiopy_view {
    struct vfiopy_range iova;
    uint64_t serial; /* tells it from every other mapping of this book, before and after */
    uint64_t address, fd_offset, pins;
    void *memory; /* with a reference of its own where vfiopy_space_create was told how to take one */
    int fd;
    uint8_t prot, kind, state;
    bool revoked;
};

struct vfiopy_views {
    struct vfiopy_view *items; /* free() it */
    size_t count;
};

struct vfiopy_space;
struct vfiopy_mapping;

/* Mappings that are no longer in the book. */
struct vfiopy_gone {
    struct vfiopy_mapping *head;
    struct vfiopy_space *space;
};

/* Take one out and free it; false when there is none. `memory` is what its request said. */
bool vfiopy_gone_pop(struct vfiopy_gone *gone, void **memory);
/* Take out several, at most as many as there is room for; returns how many. */
size_t vfiopy_gone_take(struct vfiopy_gone *gone, void **memories, size_t room);

/* --- the space ------------------------------------------------------------------------------------------- */

/* `retain` takes a reference to memory and is called under the lock; NULL where nobody needs it. */
struct vfiopy_space *vfiopy_space_create(uint64_t page_size, void (*retain)(void *memory));

/* Forget all mappings, without a call to any mapper; then, when they are popped, free the book. Nobody else may use
 * it any more. What mappers still have, devices can reach: its memory must stay for ever. */
void vfiopy_space_forget(struct vfiopy_space *space, struct vfiopy_gone *gone, struct vfiopy_gone *reachable);
void vfiopy_space_destroy(struct vfiopy_space *space);

/* Replace the usable ranges (sorted, disjoint). On failure nothing has changed. max_mappings 0: no limit. */
int vfiopy_space_set_usable(struct vfiopy_space *space, const struct vfiopy_range *ranges, size_t count,
                            uint64_t page_sizes, uint64_t max_mappings, struct vfiopy_failure *failure);
int vfiopy_space_exclude(struct vfiopy_space *space, struct vfiopy_range window, struct vfiopy_failure *failure);
int vfiopy_space_include(struct vfiopy_space *space, struct vfiopy_range window, struct vfiopy_failure *failure);
/* Keep a window for transient requests; first > last: no window any more. */
int vfiopy_space_set_transient(struct vfiopy_space *space, struct vfiopy_range window,
                               struct vfiopy_failure *failure);

enum vfiopy_ranges_of { VFIOPY_USABLE, VFIOPY_EXCLUDED_WINDOWS, VFIOPY_FREE, VFIOPY_TRANSIENT_WINDOW };
/* A copy to free(), or NULL with *count 0 (none) or SIZE_MAX (no memory). */
struct vfiopy_range *vfiopy_space_ranges(struct vfiopy_space *space, enum vfiopy_ranges_of which, size_t *count);

/* Visit every memory and every callback, under the lock, until one visit returns something else than 0. */
int vfiopy_space_visit(struct vfiopy_space *space, int (*visit)(void *object, void *context), void *context);
/* Take every callback away; returns one at a time, NULL when there is none left. */
void *vfiopy_space_take_callback(struct vfiopy_space *space);

/* --- looking --------------------------------------------------------------------------------------------- */

bool vfiopy_space_has(struct vfiopy_space *space, uint64_t iova);
bool vfiopy_space_find(struct vfiopy_space *space, uint64_t iova, struct vfiopy_view *view);
/* By IOVA, or by address in this process. VFIOPY_OK or VFIOPY_NO_MEMORY. */
int vfiopy_space_overlapping(struct vfiopy_space *space, struct vfiopy_range range, struct vfiopy_views *views);
int vfiopy_space_by_address(struct vfiopy_space *space, struct vfiopy_range range, struct vfiopy_views *views);

/* What a device finds at a range: views cut to it, in order, without a hole, all with `prot`. */
int vfiopy_space_check(struct vfiopy_space *space, struct vfiopy_range range, uint8_t prot,
                       struct vfiopy_views *views, struct vfiopy_failure *failure);

struct vfiopy_stats {
    uint64_t mappings, mapped_bytes, max_mappings, page_sizes;
    uint64_t kind_mappings[VFIOPY_KINDS], kind_bytes[VFIOPY_KINDS];
    uint64_t states[VFIOPY_UNKNOWN + 1];
    uint64_t free_ranges, free_spans, largest_free_span; /* a span is bytes less one; spans can be added */
    uint64_t pins, pinned_pages, pin_bytes, book_bytes;
    uint64_t mappers, owners;
};
void vfiopy_space_stats(struct vfiopy_space *space, struct vfiopy_stats *stats);

/* Walk everything; NULL if it is right, else what is not. Slow: for tests and after an accident. */
const char *vfiopy_space_verify(struct vfiopy_space *space);

/* --- mapping --------------------------------------------------------------------------------------------- */

/* Reserve, call every mapper, then commit; or undo all of it. `serial` may be NULL. */
int vfiopy_space_map(struct vfiopy_space *space, const struct vfiopy_request *request, uint64_t *iova,
                     uint64_t *serial, struct vfiopy_failure *failure);

/* One of several pieces of memory that are mapped alike. */
struct vfiopy_piece {
    void *memory;
    uint64_t address, size;
    uint64_t iova, serial; /* answers: where it is live; serial 0: it is not */
    bool kept;             /* answer: it is in the book, live or unknown, and holds its memory */
};

/*
 * Map each piece as vfiopy_space_map() does, at an IOVA that the book chooses: reserve many, call, commit many. After a
 * failure, which says what was asked, some pieces may be live: the caller unmaps what it does not want.
 */
int vfiopy_space_map_many(struct vfiopy_space *space, const struct vfiopy_request *like, struct vfiopy_piece *pieces,
                          size_t count, struct vfiopy_failure *failure);

/* The same in two steps, for callers with mappers of their own in between. Commit calls the kernel's mappers.
 *
 * Such a caller says so when its first mapper comes: from then on nothing is mapped or unmapped at once, which would
 * pass it by, and what was under way is waited for. The caller sees to it that its own steps and the mapper's coming
 * and going do not overlap. */
void vfiopy_space_set_stepwise(struct vfiopy_space *space, bool stepwise);
bool vfiopy_space_is_stepwise(struct vfiopy_space *space);
int vfiopy_space_begin_map(struct vfiopy_space *space, const struct vfiopy_request *request, uint64_t *iova,
                           struct vfiopy_failure *failure);
int vfiopy_space_commit_map(struct vfiopy_space *space, uint64_t iova, uint64_t *serial, struct vfiopy_gone *gone,
                            struct vfiopy_failure *failure);
int vfiopy_space_abort_map(struct vfiopy_space *space, uint64_t iova, struct vfiopy_gone *gone,
                           struct vfiopy_failure *failure);

/* --- unmapping (unmap.c says how the steps go together) -------------------------------------------------------- */

struct vfiopy_notice {
    uint64_t iova, size;
    uint32_t owner;
    void *callback; /* with a reference of its own */
};

struct vfiopy_unmap {
    struct vfiopy_range range;
    bool exact; /* a mapping must begin at range.first; the range becomes that mapping's */
    bool stepwise; /* the caller has called, or will call, mappers of its own */
    uint64_t serial; /* and it must be this one; 0: any */
    uint32_t id;
    struct vfiopy_mapping *ready; /* what is marked unmapping */
    struct vfiopy_notice *notices; /* to be told now; free() it */
    size_t notice_count;
    struct vfiopy_gone gone;
    uint64_t bytes; /* unmapped */
    int eventfd;    /* of vfiopy_unmap_watch */
    struct vfiopy_unmap *next_watched;
};

enum vfiopy_step {
    VFIOPY_STEP_READY,
    VFIOPY_STEP_NOTIFY,
    VFIOPY_STEP_WAIT, /* for pins */
    VFIOPY_STEP_BUSY, /* a mapper joins or leaves and works on a mapping of the range: vfiopy_unmap_wait_idle */
    VFIOPY_STEP_FAILED,
};

struct vfiopy_handle {
    uint64_t iova;   /* the first one */
    uint64_t serial; /* 0: any */
};

/* The common case, an exact unmap of a mapping without pins that nobody works on, in one go; `memory` is what its
 * request said. No `bytes`, and no failure: it is not that simple, nothing has happened, take the steps. */
int vfiopy_space_unmap_idle(struct vfiopy_space *space, const struct vfiopy_handle *handle, uint64_t *bytes,
                            void **memory, struct vfiopy_failure *failure);
/* The same for several, in order, up to the first that is not that simple, or that fails: number *done. */
int vfiopy_space_unmap_idle_many(struct vfiopy_space *space, const struct vfiopy_handle *handles, size_t count,
                                 size_t *done, struct vfiopy_gone *gone, struct vfiopy_failure *failure);
enum vfiopy_step vfiopy_unmap_step(struct vfiopy_space *space, struct vfiopy_unmap *unmap,
                                   struct vfiopy_failure *failure);
/* Wait until pins of this unmap may be gone, at most so long. */
void vfiopy_unmap_wait(struct vfiopy_space *space, struct vfiopy_unmap *unmap, uint64_t nanoseconds);
/* Instead of waiting: write to an eventfd (non-blocking) each time a mapping of this unmap loses its last pin. Set it
 * up before a step says WAIT, or step once more afterwards. */
void vfiopy_unmap_watch(struct vfiopy_space *space, struct vfiopy_unmap *unmap, int eventfd);
void vfiopy_unmap_unwatch(struct vfiopy_space *space, struct vfiopy_unmap *unmap);
void vfiopy_unmap_wait_idle(struct vfiopy_space *space, const struct vfiopy_unmap *unmap);
/* Not ready yet: everything is as it was. */
void vfiopy_unmap_give_up(struct vfiopy_space *space, struct vfiopy_unmap *unmap);
/* Ready: call the mappers and erase. Where that fails, what was not unmapped is live again, or unknown. */
int vfiopy_unmap_finish(struct vfiopy_space *space, struct vfiopy_unmap *unmap, struct vfiopy_failure *failure);
/* What is ready. */
int vfiopy_unmap_views(struct vfiopy_space *space, const struct vfiopy_unmap *unmap, struct vfiopy_views *views);
/* Ready, in steps: leave what it marked alone while mappers of the caller's are called; then adopt it again, and finish
 * or undo it. */
void vfiopy_unmap_hand_out(struct vfiopy_space *space, struct vfiopy_unmap *unmap);
void vfiopy_unmap_adopt(struct vfiopy_space *space, struct vfiopy_unmap *unmap);
void vfiopy_unmap_undo(struct vfiopy_space *space, struct vfiopy_unmap *unmap);

/* Unmap again what is unknown. VFIOPY_OK if nothing unknown is left. */
int vfiopy_space_resync(struct vfiopy_space *space, struct vfiopy_gone *gone, uint64_t *bytes,
                        struct vfiopy_failure *failure);

/* --- kernel mappers -------------------------------------------------------------------------------------------- */

/* New mappings go there from now on; older ones with replay. `call` NULL: the system's ioctl(). 0: no room. */
uint32_t vfiopy_space_add_mapper(struct vfiopy_space *space, enum vfiopy_mapper_kind kind, int fd, uint32_t object,
                                 vfiopy_ioctl call);
/* Forget it, without a call: for a mapper whose kernel object is gone or going. Waits for calls under way. */
int vfiopy_space_remove_mapper(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure);
/* Map there what is mapped elsewhere: all, or it is dropped again. */
int vfiopy_space_replay(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure);
/* Nothing new goes there, and what is there is unmapped from it alone. */
int vfiopy_space_drop(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure);
bool vfiopy_space_has_mappers(const struct vfiopy_space *space);

struct vfiopy_mapper_view {
    uint32_t token, object;
    enum vfiopy_mapper_kind kind;
    int fd;
    bool active;                /* new mappings go there */
    uint64_t mappings, charged; /* bytes that count against RLIMIT_MEMLOCK */
};
/* Returns how many there are. Looks at every mapping. */
size_t vfiopy_space_mappers(struct vfiopy_space *space, struct vfiopy_mapper_view views[VFIOPY_MAX_MAPPERS]);

/* --- memory that moves (addresses.c) -------------------------------------------------------------------------------- */

/* The memory of whole mappings is about to have no address here; devices go on using it. Until each has a new one,
 * nothing can be pinned. */
int vfiopy_space_lose_addresses(struct vfiopy_space *space, struct vfiopy_range range, uint64_t *bytes,
                                struct vfiopy_failure *failure);
/* Give one mapping a new address and a new memory to keep alive; *memory is the old one afterwards. */
int vfiopy_space_set_address(struct vfiopy_space *space, struct vfiopy_range range, uint64_t address, void **memory,
                             struct vfiopy_failure *failure);
/* iommufd: the memory of all IOASes belongs to the calling process from now on. */
int vfiopy_space_change_process(struct vfiopy_space *space, uint32_t token, struct vfiopy_failure *failure);

/* --- device memory that is taken away (revoke.c) ------------------------------------------------------------------- */

/* The exporter took it away, or it turned out that it did not. False: this mapping is not there any more. */
bool vfiopy_space_set_revoked(struct vfiopy_space *space, uint64_t iova, uint64_t serial, bool revoked);
/* Unmap it and map it again at the same IOVA, in all mappers. On failure it is revoked still. */
int vfiopy_space_restore(struct vfiopy_space *space, uint64_t iova, uint64_t serial, struct vfiopy_failure *failure);

/* --- pins ------------------------------------------------------------------------------------------------------ */

/* Owner 0 is nobody in particular and always there. `name` is copied. 0: no memory. */
uint32_t vfiopy_space_add_owner(struct vfiopy_space *space, const char *name, void *callback);
int vfiopy_space_remove_owner(struct vfiopy_space *space, uint32_t owner, void **callback,
                              struct vfiopy_failure *failure);

/* Count one more, or one less, on every page that the range touches: all or nothing. */
int vfiopy_space_pin(struct vfiopy_space *space, struct vfiopy_range range, uint8_t prot, uint32_t owner, bool peer,
                     struct vfiopy_failure *failure);
/* Counts are kept by page, and by owner and mapping: an owner can take off no more pins than it has in a mapping, but
 * whose pin it was on which of its pages is not known. */
int vfiopy_space_unpin(struct vfiopy_space *space, struct vfiopy_range range, uint32_t owner,
                       struct vfiopy_failure *failure);

struct vfiopy_holder {
    uint64_t iova, size, pins; /* of the mapping; its pins by this owner */
    uint32_t owner;
    char name[64];
};
/*
 * Page frame numbers of pages that are pinned: what is known of each, else what /proc/self/pagemap (a descriptor) says
 * of memory that a kernel mapper holds, or what the bus address of device memory says. 0 where it is not known or
 * nothing holds the page in its place. As many as the range touches pages.
 */
int vfiopy_space_pfns(struct vfiopy_space *space, struct vfiopy_range range, int pagemap, uint64_t *pfns,
                      struct vfiopy_failure *failure);
size_t vfiopy_space_page_count(const struct vfiopy_space *space, struct vfiopy_range range);

/* Runs of pinned pages that touch the range, as IOVAs. A copy to free(), or NULL as in vfiopy_space_ranges. */
struct vfiopy_range *vfiopy_space_pinned(struct vfiopy_space *space, struct vfiopy_range range, size_t *count);

/* Who holds pins in mappings that touch the range. A copy to free(), or NULL as in vfiopy_space_ranges. */
struct vfiopy_holder *vfiopy_space_holders(struct vfiopy_space *space, struct vfiopy_range range, size_t *count);

#endif
