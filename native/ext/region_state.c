/* What state a Region is in and who may change it: set_state, set_trace, close. */
#include "ext/region_object.h"

#include <string.h>
#include <time.h>

#include "ext/raise.h"

/* --- state ------------------------------------------------------------------------------------------------------ */

const char *vfiopy_state_name(unsigned flags)
{
    return flags & VFIOPY_REGION_CLOSED   ? "closed"
           : flags & VFIOPY_REGION_FORKED ? "forked"
           : flags & VFIOPY_REGION_GONE   ? "gone"
           : flags & VFIOPY_REGION_SLOW   ? "slow"
           : flags & VFIOPY_REGION_TRACED ? "traced"
                                          : "open";
}

PyObject *vfiopy_region_get_state(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(vfiopy_state_name(vfiopy_region_flags(&((RegionObject *)op)->core)));
}

/*
 * Wait for accesses that began before one of `flags` was set, unless it is taken back. Those that run without the GIL
 * look at the state between chunks and sleeps: this does not take long.
 */
static void wait_for_users(RegionObject *self, unsigned flags)
{
    const struct timespec pause = {0, 50000};

    if (atomic_load(&self->core.users) == 0)
        return;
    Py_BEGIN_ALLOW_THREADS
    while (atomic_load(&self->core.users) > 0 && vfiopy_region_flags(&self->core) & flags)
        nanosleep(&pause, NULL);
    Py_END_ALLOW_THREADS
}

PyObject *vfiopy_region_set_state(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"state", "reason", NULL};
    const unsigned all = VFIOPY_REGION_GONE | VFIOPY_REGION_SLOW;
    RegionObject *self = (RegionObject *)op;
    PyObject *reason = Py_None, *old;
    const char *state;
    unsigned set;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "s|O:set_state", names, &state, &reason))
        return NULL;
    if (reason != Py_None && !PyUnicode_Check(reason)) {
        PyErr_SetString(PyExc_TypeError, "reason must be a string or None");
        return NULL;
    }
    if (strcmp(state, "open") == 0) {
        set = 0;
    } else if (strcmp(state, "slow") == 0) {
        set = VFIOPY_REGION_SLOW;
    } else if (strcmp(state, "gone") == 0) {
        set = VFIOPY_REGION_GONE;
    } else {
        vfiopy_raise("AccessError", self->name, "tracing is switched by set_trace(), the end is made by close()",
                     "state '%s' is none of 'open', 'slow' and 'gone'", state);
        return NULL;
    }
    if (vfiopy_region_flags(&self->core) & VFIOPY_REGION_CLOSED) {
        vfiopy_raise_state("ClosedError", "%U is closed (set_state)", self->name);
        return NULL;
    }
    reason = reason == Py_None ? NULL : reason;
    Py_XINCREF(reason);
    REGION_ENTER(self)
    old = self->reason;
    self->reason = reason;
    vfiopy_region_set_flags(&self->core, set, all & ~set);
    REGION_LEAVE()
    Py_XDECREF(old);
    if (set) /* what comes next may be a reset: no burst may still be under way */
        wait_for_users(self, set | VFIOPY_REGION_CLOSED);
    Py_RETURN_NONE;
}

PyObject *vfiopy_region_set_trace(PyObject *op, PyObject *trace)
{
    RegionObject *self = (RegionObject *)op;
    PyObject *old;

    if (trace != Py_None && !PyCallable_Check(trace)) {
        PyErr_SetString(PyExc_TypeError, "trace must be a callable(operation, offset, width, value) or None");
        return NULL;
    }
    trace = trace == Py_None ? NULL : trace;
    Py_XINCREF(trace);
    REGION_ENTER(self)
    old = self->trace;
    self->trace = trace;
    vfiopy_region_set_flags(&self->core, trace ? VFIOPY_REGION_TRACED : 0, trace ? 0 : VFIOPY_REGION_TRACED);
    REGION_LEAVE()
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

/* --- close ------------------------------------------------------------------------------------------------------ */

static int raise_held(RegionObject *self)
{
    PyObject *labels = vfiopy_region_hold_labels(self), *separator = NULL, *text = NULL;

    if (labels)
        separator = PyUnicode_FromString("', '");
    if (separator)
        text = PyUnicode_Join(separator, labels);
    if (text)
        vfiopy_raise("BusyError", self->name,
                     "release the holds and delete the arrays and memoryviews first; the mapping stays until then",
                     "cannot be closed while its address is in use by %zd: '%U'", PyTuple_Size(labels), text);
    Py_XDECREF(text);
    Py_XDECREF(separator);
    Py_XDECREF(labels);
    return -1;
}

static int close_region(RegionObject *self)
{
    bool held;

    REGION_ENTER(self)
    /* Holds of a forked parent are not ours to wait for. */
    held = self->holds && !(vfiopy_region_flags(&self->core) & VFIOPY_REGION_FORKED);
    if (!held)
        vfiopy_region_set_flags(&self->core, VFIOPY_REGION_CLOSED, 0);
    REGION_LEAVE()
    if (held)
        return raise_held(self);
    wait_for_users(self, VFIOPY_REGION_CLOSED);
    return 0;
}

PyObject *vfiopy_region_close(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    if (close_region((RegionObject *)op) < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *vfiopy_region_exit(PyObject *op, PyObject *Py_UNUSED(arguments))
{
    return vfiopy_region_close(op, NULL);
}

PyObject *vfiopy_region_enter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    RegionObject *self = (RegionObject *)op;

    if (vfiopy_region_flags(&self->core) & VFIOPY_REGION_CLOSED) {
        vfiopy_raise_state("ClosedError", "%U is closed", self->name);
        return NULL;
    }
    Py_INCREF(op);
    return op;
}

int vfiopy_region_bool(PyObject *op)
{
    return !(vfiopy_region_flags(&((RegionObject *)op)->core) & VFIOPY_REGION_CLOSED);
}
