/* The Python type IovaSpace: what its files share. */
#ifndef VFIOPY_EXT_IOVA_OBJECT_H
#define VFIOPY_EXT_IOVA_OBJECT_H

#include "ext/lives.h"
#include "ext/module.h"
#include "iova/space.h"

struct vfiopy_iova_object {
    PyObject_HEAD
    struct vfiopy_space *space;
    PyObject *name;
    unsigned process; /* of vfiopy_process(), and what messages call it: */
    int pid;
};

#define VFIOPY_FAST(function) ((PyCFunction)(void (*)(void))(function))

typedef PyObject *(*vfiopy_fast_keywords)(PyObject *, PyObject *const *, Py_ssize_t, PyObject *);

static inline struct vfiopy_space *vfiopy_space_of(PyObject *self)
{
    return ((struct vfiopy_iova_object *)self)->space;
}

static inline bool vfiopy_iova_is_here(PyObject *self)
{
    return ((struct vfiopy_iova_object *)self)->process == vfiopy_process();
}

/* Raise ForkedError; -1. */
int vfiopy_iova_raise_forked(PyObject *self);

/*
 * Every method begins with this. In a forked child the book's lock may be held by a thread that does not exist, and
 * the kernel's mappers are the parent's. 0, or -1 with an error set.
 */
static inline int vfiopy_iova_elsewhere(PyObject *self)
{
    return vfiopy_iova_is_here(self) ? 0 : vfiopy_iova_raise_forked(self);
}

/* --- arguments: 0, or -1 with an error set ------------------------------------------------------------------- */

/*
 * Sort positional and keyword arguments into `out` by `names` (ended by NULL); what is missing stays NULL, but the
 * first `required` must be there.
 */
int vfiopy_arguments(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords,
                     const char *const *names, int required, PyObject **out);
int vfiopy_get_u64(PyObject *value, const char *what, uint64_t *out);
/* As get_u64, but for what stands for VFIOPY_NO_FIXED_IOVA here. */
int vfiopy_get_fixed_iova(PyObject *value, uint64_t *out);
/* The same, and -1 for VFIOPY_NO_FIXED_IOVA. */
int vfiopy_get_iova_or_any(PyObject *value, uint64_t *out);
int vfiopy_get_int(PyObject *value, const char *what, int *out);
/* Size in bytes, not 0 and not beyond the end of the address space. */
int vfiopy_get_range(PyObject *first, PyObject *size, struct vfiopy_range *out);
/* NULL: false. */
int vfiopy_get_flag(PyObject *value, bool *out);
int vfiopy_get_prot(PyObject *value, uint8_t *out);
/* first <= last. */
int vfiopy_get_bounds(const char *function, PyObject *const *args, Py_ssize_t nargs, struct vfiopy_range *range);
/* Seconds as a float, None for ever. */
int vfiopy_get_timeout(PyObject *value, double *out);

/* --- results ------------------------------------------------------------------------------------------------- */

/* Raise what vfiopy.iova.failures makes of it; returns NULL. `holders` (a list, may be NULL) is stolen. */
PyObject *vfiopy_raise_failure(PyObject *self, const char *operation, const struct vfiopy_failure *failure,
                               PyObject *holders);

/* A view as IovaMapping; its reference to the memory is taken over, or dropped on failure. */
PyObject *vfiopy_view_object(const struct vfiopy_view *view);
/* A list of them; frees the array. NULL items for a list of `make`'s choosing. */
PyObject *vfiopy_views_list(struct vfiopy_views *views, PyObject *(*make)(const struct vfiopy_view *view));
/* Pairs (first, last); frees the array, NULL for no memory. */
PyObject *vfiopy_ranges_list(struct vfiopy_range *ranges, size_t count);
PyObject *vfiopy_holders_list(PyObject *self, struct vfiopy_range range);

bool vfiopy_is_iova_space(PyObject *object);

/* The arguments of map(): 0, or -1 with an error set. */
int vfiopy_iova_parse_request(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords,
                              struct vfiopy_request *request);

/*
 * Unmap the mapping with this first IOVA and serial. 1: done; 0: it is not mapped any more; 2: mappers in Python have to
 * be called; -1 with an error set.
 */
int vfiopy_iova_unmap_one(PyObject *book, uint64_t iova, uint64_t serial, double timeout);

/* Drop the references to memory of mappings that are gone. */
void vfiopy_drop_gone(struct vfiopy_gone *gone);

/* --- unmapping, for iova_unmap.c, iova_steps.c and iova_closing.c --------------------------------------------- */

/* Bring an unmap to where it is ready. 0, or -1 with an error set and everything as it was. */
int vfiopy_iova_get_ready(PyObject *self, const char *operation, struct vfiopy_unmap *unmap, double timeout);

/*
 * Call each owner in `notices`. What a callback raises is reported as unraisable: the other owners must hear of it all
 * the same. Only what is meant to end the program (KeyboardInterrupt, SystemExit) goes up; -1.
 */
int vfiopy_iova_tell(struct vfiopy_unmap *unmap);
/* Give up, and raise PinnedError with the owners' names; NULL. */
PyObject *vfiopy_iova_raise_pinned(PyObject *self, const char *operation, struct vfiopy_unmap *unmap);
/* Call the mappers and let the memory go; -1 with an error set. */
int vfiopy_iova_finish(PyObject *self, const char *operation, struct vfiopy_unmap *unmap);

/* Make the struct sequence type of views, the types of what is under way, and add them to the module. */
int vfiopy_iova_views_init(PyObject *module);
int vfiopy_iova_closing_init(PyObject *module);
int vfiopy_iova_steps_init(PyObject *module);

#endif
