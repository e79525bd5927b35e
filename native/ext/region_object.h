/* What the files of the Region type share: its layout, and who does what. */
#ifndef VFIOPY_EXT_REGION_OBJECT_H
#define VFIOPY_EXT_REGION_OBJECT_H

#include <Python.h>
#include <stdbool.h>

#include "region/region.h"

/*
 * With the GIL, a state check and the access after it cannot be separated: close() has to wait for the GIL, too. Without
 * one, the object's own lock does the same; it costs a few ns when nobody else wants it.
 */
#ifdef Py_GIL_DISABLED
#define REGION_ENTER(object) Py_BEGIN_CRITICAL_SECTION(object);
#define REGION_LEAVE() Py_END_CRITICAL_SECTION();
#else
#define REGION_ENTER(object) {
#define REGION_LEAVE() }
#endif

#define VFIOPY_LIKELY(condition) __builtin_expect(!!(condition), 1)

struct hold_object;

typedef struct {
    PyObject_HEAD
    struct vfiopy_region core;
    PyObject *name;
    PyObject *reason;     /* why it is gone, or NULL */
    PyObject *slow;       /* or NULL */
    PyObject *slow_read;  /* bound method of slow, or NULL */
    PyObject *slow_write; /* likewise */
    PyObject *trace;      /* callable, or NULL */
    struct hold_object *holds;
    PyObject *weak_references;
} RegionObject;

/* What a user calls the two directions, in messages and for the trace. */
const char *vfiopy_direction_name(enum vfiopy_direction direction);

/* region_fast.c: read8 ... write64_relaxed. */
#define VFIOPY_REGION_FAST_METHODS 16
extern const PyMethodDef vfiopy_region_fast_methods[VFIOPY_REGION_FAST_METHODS];

/* region_access.c: parsing, single accesses on every path, and the errors of all accesses. */

/* Get a count of bytes or an offset; raises AddressRangeError for what cannot be one. -1 with an error set. */
int vfiopy_parse_offset(RegionObject *self, PyObject *argument, uint64_t *offset);

/* Get a register value; raises AccessError where it does not fit into `width` bytes. */
int vfiopy_parse_value(RegionObject *self, PyObject *argument, unsigned width, uint64_t *value);

/*
 * Call the trace, if there is one: trace(operation, offset, width, value). Takes `value` over; NULL is an error that is
 * set already. Never under a lock. 0, or -1 with an error set.
 */
int vfiopy_region_report(RegionObject *self, const char *operation, uint64_t offset, uint64_t width, PyObject *value);

/* Set the exception for a verdict other than VFIOPY_ALLOWED, and tell the trace; returns -1. */
int vfiopy_raise_verdict(RegionObject *self, enum vfiopy_verdict verdict, uint64_t offset, uint64_t count,
                         unsigned width, enum vfiopy_direction direction);

/* Set the exception for an access that raised SIGBUS, and tell the trace; `done` of `count` elements went through before; returns -1. */
int vfiopy_raise_fault(RegionObject *self, uint64_t offset, uint64_t done, uint64_t count, unsigned width,
                       enum vfiopy_direction direction);

/*
 * One checked access on whatever path the state asks for, with trace. A single access looks at everything again, so
 * it may be called in a loop between which Python ran. 0, or -1 with an error set.
 */
int vfiopy_region_get(RegionObject *self, uint64_t offset, unsigned width, bool relaxed, uint64_t *value);
int vfiopy_region_put(RegionObject *self, uint64_t offset, unsigned width, bool relaxed, uint64_t value);

/* region_state.c */
const char *vfiopy_state_name(unsigned flags);
PyObject *vfiopy_region_get_state(PyObject *op, void *closure);
PyObject *vfiopy_region_set_state(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_set_trace(PyObject *op, PyObject *trace);
PyObject *vfiopy_region_close(PyObject *op, PyObject *ignored);
PyObject *vfiopy_region_enter(PyObject *op, PyObject *ignored);
PyObject *vfiopy_region_exit(PyObject *op, PyObject *arguments);
int vfiopy_region_bool(PyObject *op);

/* region_functions.c; `name` is what the handler is for, or NULL. */
int vfiopy_install_fault_handler(PyObject *name);
int vfiopy_region_functions_init(PyObject *module);

/* region_bulk.c and region_poll.c */
PyObject *vfiopy_region_read_fifo(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_write_fifo(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_read_block(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_write_block(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_poll8(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_poll16(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_poll32(PyObject *op, PyObject *arguments, PyObject *keywords);
PyObject *vfiopy_region_poll64(PyObject *op, PyObject *arguments, PyObject *keywords);

/* hold_type.c */
int vfiopy_hold_type_init(PyObject *module);
PyObject *vfiopy_hold_new(RegionObject *region, uint64_t offset, uint64_t length, PyObject *label);
PyObject *vfiopy_region_hold(PyObject *op, PyObject *arguments, PyObject *keywords);
int vfiopy_region_getbuffer(PyObject *op, Py_buffer *view, int flags);
/* Labels of the live holds, newest last, as a new tuple. */
PyObject *vfiopy_region_hold_labels(RegionObject *self);

#endif
