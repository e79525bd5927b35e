/*
 * The Python type IovaClosing: an unmap that waits for pins without a thread, through a file descriptor.
 *
 * Made by IovaSpace.closing(); from then on the range takes no new pins. Dropped before its end it gives up.
 *
 * Owners' callbacks and calls without the GIL run inside its methods, so each of them takes the object first. Who comes
 * second is refused, but for give_up(): that is left to whoever is inside, to be done on the way out.
 */
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "ext/iova_methods.h"
#include "ext/iova_object.h"
#include "ext/raise.h"

struct closing {
    PyObject_HEAD
    PyObject *space;
    struct vfiopy_unmap unmap;
    atomic_int event; /* -1: over */
    atomic_int use;
    bool ready;
};

enum use { IDLE, TAKEN, DOOMED /* taken, and to be given up afterwards */ };

static PyTypeObject *closing_type;

static struct closing *of(PyObject *self)
{
    return (struct closing *)self;
}

/* No watching any more; what is closing stays so. In a forked child there is nothing but the descriptor. */
static void end(struct closing *closing)
{
    if (closing->event < 0)
        return;
    if (vfiopy_iova_is_here(closing->space))
        vfiopy_unmap_unwatch(vfiopy_space_of(closing->space), &closing->unmap);
    close(closing->event);
    closing->event = -1;
}

static void undo(struct closing *closing)
{
    if (closing->event < 0)
        return;
    if (!vfiopy_iova_is_here(closing->space))
        ; /* it is the parent's */
    else if (closing->ready)
        vfiopy_unmap_undo(vfiopy_space_of(closing->space), &closing->unmap);
    else
        vfiopy_unmap_give_up(vfiopy_space_of(closing->space), &closing->unmap);
    end(closing);
}

static bool swap(struct closing *closing, int from, int to)
{
    return atomic_compare_exchange_strong(&closing->use, &from, to);
}

static void leave(struct closing *closing)
{
    if (swap(closing, TAKEN, IDLE))
        return;
    undo(closing);
    closing->use = IDLE;
}

static void give_up(struct closing *closing)
{
    for (;;) {
        if (swap(closing, IDLE, TAKEN)) {
            undo(closing);
            leave(closing);
            return;
        }
        if (swap(closing, TAKEN, DOOMED) || closing->use == DOOMED)
            return;
    }
}

static int raise_over(void)
{
    vfiopy_raise_state("StateError", "this unmap is over");
    return -1;
}

static int check_open(struct closing *closing)
{
    return closing->event < 0 ? raise_over() : vfiopy_iova_elsewhere(closing->space);
}

/* 0, and leave() must follow; or -1 with an error set. */
static int enter(struct closing *closing)
{
    if (check_open(closing))
        return -1;
    if (!swap(closing, IDLE, TAKEN)) {
        vfiopy_raise_state("StateError", "another call of this unmap is under way, in an owner's callback or in "
                                         "another thread; only give_up() may come in between");
        return -1;
    }
    if (!check_open(closing))
        return 0;
    leave(closing);
    return -1;
}

static PyObject *start(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_range range;
    struct closing *closing;
    bool stepwise;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_flag(nargs == 3 ? args[2] : NULL, &stepwise) ||
        vfiopy_get_bounds("closing", args, nargs == 3 ? 2 : nargs, &range))
        return NULL;
    closing = of(PyType_GenericAlloc(closing_type, 0));
    if (!closing)
        return NULL;
    closing->event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (closing->event < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF((PyObject *)closing);
        return NULL;
    }
    closing->space = Py_NewRef(self);
    closing->unmap.range = range;
    closing->unmap.stepwise = stepwise;
    vfiopy_unmap_watch(vfiopy_space_of(self), &closing->unmap, closing->event);
    return (PyObject *)closing;
}

/* 1: no pin is left; 0: some are; -1 with an error set. */
static int get_ready(struct closing *closing)
{
    struct vfiopy_space *space = vfiopy_space_of(closing->space);
    struct vfiopy_failure failure = {.asked = closing->unmap.range};
    uint64_t drained;

    /* Before the look, or a pin that goes in between would not be heard of. */
    if (read(closing->event, &drained, sizeof(drained)) < 0)
        drained = 0;
    while (closing->use != DOOMED) {
        switch (vfiopy_unmap_step(space, &closing->unmap, &failure)) {
        case VFIOPY_STEP_READY:
            closing->ready = true;
            return 1;
        case VFIOPY_STEP_WAIT:
            return 0;
        case VFIOPY_STEP_FAILED:
            end(closing);
            vfiopy_raise_failure(closing->space, "unmap", &failure, NULL);
            return -1;
        case VFIOPY_STEP_NOTIFY:
            if (vfiopy_iova_tell(&closing->unmap)) {
                undo(closing);
                return -1;
            }
            if (vfiopy_iova_elsewhere(closing->space)) /* an owner's callback forked */
                return -1;
            break;
        case VFIOPY_STEP_BUSY:
            Py_BEGIN_ALLOW_THREADS
            vfiopy_unmap_wait_idle(space, &closing->unmap);
            Py_END_ALLOW_THREADS
            break;
        }
    }
    return raise_over();
}

static PyObject *ready(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    int result;

    if (enter(of(self)))
        return NULL;
    result = of(self)->ready ? 1 : get_ready(of(self));
    leave(of(self));
    return result < 0 ? NULL : PyBool_FromLong(result);
}

static PyObject *finish(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    struct closing *closing = of(self);
    int result = -1;

    if (enter(closing))
        return NULL;
    if (closing->unmap.stepwise) {
        vfiopy_raise_state("StateError", "this unmap is for waiting only: give_up(), then begin_unmap()");
    } else if (closing->ready) {
        result = vfiopy_iova_finish(closing->space, "unmap", &closing->unmap);
        end(closing);
    } else {
        vfiopy_raise_state("StateError", "the range is still pinned, or ready() was not asked");
    }
    leave(closing);
    return result ? NULL : PyLong_FromUnsignedLongLong(closing->unmap.bytes);
}

static PyObject *give_up_method(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    give_up(of(self));
    Py_RETURN_NONE;
}

static PyObject *raise_pinned(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    struct closing *closing = of(self);

    if (enter(closing))
        return NULL;
    if (closing->ready) {
        vfiopy_raise_state("StateError", "no pin is in the way of this unmap: finish() or give_up() ends it");
    } else {
        vfiopy_iova_raise_pinned(closing->space, "unmap", &closing->unmap);
        end(closing);
    }
    leave(closing);
    return NULL;
}

static PyObject *file_number(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return check_open(of(self)) ? NULL : PyLong_FromLong(of(self)->event);
}

static int closing_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(of(self)->space);
    return 0;
}

static void closing_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(self);
    if (of(self)->space)
        undo(of(self)); /* nobody is inside: that would hold a reference */
    else if (of(self)->event > 0)
        close(of(self)->event);
    Py_CLEAR(of(self)->space);
    release(self);
    Py_DECREF(type);
}

PyMethodDef vfiopy_iova_closing_methods[] = {
    {"closing", VFIOPY_FAST(start), METH_FASTCALL,
     "closing(first, last, stepwise=False): begin to unmap a range without waiting; returns an IovaClosing.\n"
     "stepwise: only to wait for its pins, before a begin_unmap() that has mappers of the caller's called"},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef methods[] = {
    {"ready", ready, METH_NOARGS,
     "ready(): tell owners that were not told yet; True when no pin is left and finish() may follow"},
    {"finish", finish, METH_NOARGS, "finish(): unmap; returns the number of bytes"},
    {"give_up", give_up_method, METH_NOARGS,
     "give_up(): everything is as it was; does nothing in a forked child. While another call is inside, at its end"},
    {"raise_pinned", raise_pinned, METH_NOARGS,
     "raise_pinned(): give up with the PinnedError that names the owners; not once ready() said True"},
    {"fileno", file_number, METH_NOARGS, "fileno(): readable when a mapping of the range lost its last pin"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "An unmap under way that waits for pins; see IovaSpace.unmap_async.\n\n"
                "Threads: one call at a time; StateError for a second one. give_up() may come at any time."},
    {Py_tp_dealloc, closing_dealloc},
    {Py_tp_traverse, closing_traverse},
    {Py_tp_methods, methods},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vfiopy._native.IovaClosing",
    .basicsize = sizeof(struct closing),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};

int vfiopy_iova_closing_init(PyObject *module)
{
    closing_type = (PyTypeObject *)PyType_FromSpec(&spec);
    if (!closing_type)
        return -1;
    return PyModule_AddObjectRef(module, "IovaClosing", (PyObject *)closing_type);
}
