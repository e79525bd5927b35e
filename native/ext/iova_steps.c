/*
 * IovaSpace in steps, for callers with mappers of their own: the Python types IovaReservation and IovaUnmapping.
 *
 * begin_map() and begin_unmap() answer with an object that has to be ended, and that aborts when it is dropped: a
 * KeyboardInterrupt at any bytecode leaves nothing reserved.
 */
#include <Python.h>
#include <structmember.h>

#include <stdatomic.h>

#include "ext/iova_methods.h"
#include "ext/iova_object.h"
#include "ext/raise.h"

struct step {
    PyObject_HEAD
    PyObject *space;
    atomic_bool open;
};

struct reservation {
    struct step step;
    uint64_t iova, size;
    uint64_t serial; /* 0 until it is committed */
};

struct unmapping {
    struct step step;
    struct vfiopy_unmap unmap;
    PyObject *mappings;
};

static PyTypeObject *reservation_type, *unmapping_type;

/* Whoever ends it first has it. 0, or -1 with an error set. */
static int take(struct step *step, const char *what)
{
    if (vfiopy_iova_elsewhere(step->space))
        return -1;
    if (atomic_exchange(&step->open, false))
        return 0;
    vfiopy_raise_state("StateError", "this %s is over", what);
    return -1;
}

/* As take(), without an error: for what may be called at any time. */
static bool take_quietly(struct step *step)
{
    return step->space && vfiopy_iova_is_here(step->space) && atomic_exchange(&step->open, false);
}

static int step_bool(PyObject *self)
{
    return ((struct step *)self)->open;
}

static PyObject *step_enter(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return Py_NewRef(self);
}

static int step_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((struct step *)self)->space);
    return 0;
}

static void step_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    Py_CLEAR(((struct step *)self)->space);
    release(self);
    Py_DECREF(type);
}

static PyObject *step_new(PyTypeObject *type, PyObject *space)
{
    struct step *step = (struct step *)PyType_GenericAlloc(type, 0);

    if (step)
        step->space = Py_NewRef(space);
    return (PyObject *)step;
}

/* --- a map ----------------------------------------------------------------------------------------------------- */

static PyObject *begin_map(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_request request;
    struct reservation *made;

    if (vfiopy_iova_elsewhere(self) || vfiopy_iova_parse_request("begin_map", args, nargs, keywords, &request))
        return NULL;
    made = (struct reservation *)step_new(reservation_type, self);
    if (!made)
        return NULL;
    failure.asked = (struct vfiopy_range){request.iova, request.iova + (request.size - 1)};
    made->size = request.size;
    Py_INCREF((PyObject *)request.memory); /* the book's */
    if (!vfiopy_space_begin_map(vfiopy_space_of(self), &request, &made->iova, &failure)) {
        made->step.open = true;
        return (PyObject *)made;
    }
    Py_DECREF((PyObject *)request.memory);
    Py_DECREF((PyObject *)made);
    return vfiopy_raise_failure(self, "begin_map", &failure, NULL);
}

static PyObject *commit_map(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    struct reservation *it = (struct reservation *)self;
    struct vfiopy_failure failure = {.asked = {it->iova, it->iova + (it->size - 1)}};
    struct vfiopy_gone gone = {0};
    uint64_t serial = 0;
    int result;

    if (take(&it->step, "map"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = vfiopy_space_commit_map(vfiopy_space_of(it->step.space), it->iova, &serial, &gone, &failure);
    Py_END_ALLOW_THREADS
    vfiopy_drop_gone(&gone);
    if (result)
        return vfiopy_raise_failure(it->step.space, "commit_map", &failure, NULL);
    it->serial = serial;
    return PyLong_FromUnsignedLongLong(serial);
}

static void give_back(struct reservation *it)
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};

    vfiopy_space_abort_map(vfiopy_space_of(it->step.space), it->iova, &gone, &failure);
    vfiopy_drop_gone(&gone);
}

static PyObject *abort_map(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    if (take_quietly((struct step *)self))
        give_back((struct reservation *)self);
    Py_RETURN_NONE;
}

static PyObject *reservation_exit(PyObject *self, PyObject *Py_UNUSED(arguments))
{
    return abort_map(self, NULL);
}

static void reservation_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    if (take_quietly((struct step *)self))
        give_back((struct reservation *)self);
    step_free(self);
}

static PyObject *get_serial(PyObject *self, void *Py_UNUSED(ignored))
{
    uint64_t serial = ((struct reservation *)self)->serial;

    return serial ? PyLong_FromUnsignedLongLong(serial) : Py_NewRef(Py_None);
}

static PyMethodDef reservation_methods[] = {
    {"commit", commit_map, METH_NOARGS,
     "commit(): call the kernel's mappers and make it live; returns its serial number. On failure the range is given "
     "back, or is in the state unknown"},
    {"abort", abort_map, METH_NOARGS, "abort(): give the range back, if that is not over; never raises"},
    {"__enter__", step_enter, METH_NOARGS, NULL},
    {"__exit__", reservation_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef reservation_members[] = {
    {"iova", T_ULONGLONG, offsetof(struct reservation, iova), READONLY, "the first IOVA"},
    {"size", T_ULONGLONG, offsetof(struct reservation, size), READONLY, "bytes"},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef reservation_attributes[] = {
    {"serial", get_serial, NULL, "the serial number of the mapping, or None where it did not come about", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot reservation_slots[] = {
    {Py_tp_doc, "A map under way, from IovaSpace.begin_map(): true until commit() or abort(). Dropped, it aborts."},
    {Py_tp_dealloc, reservation_dealloc},
    {Py_tp_traverse, step_traverse},
    {Py_tp_methods, reservation_methods},
    {Py_tp_members, reservation_members},
    {Py_tp_getset, reservation_attributes},
    {Py_nb_bool, step_bool},
    {0, NULL},
};

static PyType_Spec reservation_spec = {
    .name = "vfiopy._native.IovaReservation",
    .basicsize = sizeof(struct reservation),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = reservation_slots,
};

/* --- an unmap -------------------------------------------------------------------------------------------------- */

static PyObject *begin_unmap(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"first", "last", "timeout", NULL};
    struct vfiopy_space *space = vfiopy_space_of(self);
    struct vfiopy_views views = {0};
    struct unmapping *made;
    PyObject *given[3];
    double seconds = 0;
    int result;

    if (vfiopy_arguments("begin_unmap", args, nargs, keywords, names, 2, given))
        return NULL;
    made = (struct unmapping *)step_new(unmapping_type, self);
    if (!made)
        return NULL;
    made->unmap.stepwise = true;
    if (vfiopy_get_bounds("begin_unmap", given, 2, &made->unmap.range) ||
        (given[2] && vfiopy_get_timeout(given[2], &seconds)) ||
        vfiopy_iova_get_ready(self, "begin_unmap", &made->unmap, seconds)) {
        Py_DECREF((PyObject *)made);
        return NULL;
    }
    result = vfiopy_unmap_views(space, &made->unmap, &views);
    vfiopy_unmap_hand_out(space, &made->unmap);
    made->step.open = true; /* from here on dropping it aborts */
    made->mappings = vfiopy_views_list(&views, vfiopy_view_object);
    if (!result && made->mappings)
        return (PyObject *)made;
    Py_DECREF((PyObject *)made);
    return result ? PyErr_NoMemory() : NULL;
}

static PyObject *finish_unmap(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    struct unmapping *it = (struct unmapping *)self;

    if (take(&it->step, "unmap"))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    vfiopy_unmap_adopt(vfiopy_space_of(it->step.space), &it->unmap);
    Py_END_ALLOW_THREADS
    if (vfiopy_iova_finish(it->step.space, "finish_unmap", &it->unmap))
        return NULL;
    return PyLong_FromUnsignedLongLong(it->unmap.bytes);
}

static void undo(struct unmapping *it)
{
    struct vfiopy_space *space = vfiopy_space_of(it->step.space);

    Py_BEGIN_ALLOW_THREADS
    vfiopy_unmap_adopt(space, &it->unmap);
    vfiopy_unmap_undo(space, &it->unmap);
    Py_END_ALLOW_THREADS
}

static PyObject *abort_unmap(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    if (take_quietly((struct step *)self))
        undo((struct unmapping *)self);
    Py_RETURN_NONE;
}

static PyObject *unmapping_exit(PyObject *self, PyObject *Py_UNUSED(arguments))
{
    return abort_unmap(self, NULL);
}

static int unmapping_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(((struct unmapping *)self)->mappings);
    return step_traverse(self, visit, arg);
}

static void unmapping_dealloc(PyObject *self)
{
    PyObject_GC_UnTrack(self);
    if (take_quietly((struct step *)self))
        undo((struct unmapping *)self);
    Py_CLEAR(((struct unmapping *)self)->mappings);
    step_free(self);
}

static PyObject *get_mappings(PyObject *self, void *Py_UNUSED(ignored))
{
    return Py_NewRef(((struct unmapping *)self)->mappings);
}

static PyMethodDef unmapping_methods[] = {
    {"finish", finish_unmap, METH_NOARGS,
     "finish(): call the kernel's mappers and erase what was marked; returns the number of bytes. On failure what was "
     "not unmapped is live again, or in the state unknown"},
    {"abort", abort_unmap, METH_NOARGS, "abort(): what was marked is live again, if that is not over; never raises"},
    {"__enter__", step_enter, METH_NOARGS, NULL},
    {"__exit__", unmapping_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef unmapping_attributes[] = {
    {"mappings", get_mappings, NULL, "what was marked, by IOVA", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot unmapping_slots[] = {
    {Py_tp_doc, "An unmap under way, from IovaSpace.begin_unmap(): true until finish() or abort(). Dropped, it aborts."},
    {Py_tp_dealloc, unmapping_dealloc},
    {Py_tp_traverse, unmapping_traverse},
    {Py_tp_methods, unmapping_methods},
    {Py_tp_getset, unmapping_attributes},
    {Py_nb_bool, step_bool},
    {0, NULL},
};

static PyType_Spec unmapping_spec = {
    .name = "vfiopy._native.IovaUnmapping",
    .basicsize = sizeof(struct unmapping),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = unmapping_slots,
};

/* --- the space ------------------------------------------------------------------------------------------------- */

static PyObject *set_stepwise(PyObject *self, PyObject *argument)
{
    int stepwise = PyObject_IsTrue(argument);

    if (stepwise < 0 || vfiopy_iova_elsewhere(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    vfiopy_space_set_stepwise(vfiopy_space_of(self), stepwise);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *is_stepwise(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    if (vfiopy_iova_elsewhere(self))
        return NULL;
    return PyBool_FromLong(vfiopy_space_is_stepwise(vfiopy_space_of(self)));
}

PyMethodDef vfiopy_iova_step_methods[] = {
    {"begin_map", VFIOPY_FAST(begin_map), METH_FASTCALL | METH_KEYWORDS,
     "begin_map(...as map...): reserve a range; returns an IovaReservation"},
    {"begin_unmap", VFIOPY_FAST(begin_unmap), METH_FASTCALL | METH_KEYWORDS,
     "begin_unmap(first, last, timeout=0): mark what is there; returns an IovaUnmapping"},
    {"set_stepwise", set_stepwise, METH_O,
     "set_stepwise(flag): whether there are mappers that native code cannot call. Then map() and unmap() are refused,\n"
     "and what they are at in other threads is waited for"},
    {"is_stepwise", is_stepwise, METH_NOARGS, "is_stepwise(): what set_stepwise() said last"},
    {NULL, NULL, 0, NULL},
};

int vfiopy_iova_steps_init(PyObject *module)
{
    reservation_type = (PyTypeObject *)PyType_FromSpec(&reservation_spec);
    unmapping_type = (PyTypeObject *)PyType_FromSpec(&unmapping_spec);
    if (!reservation_type || !unmapping_type ||
        PyModule_AddObjectRef(module, "IovaReservation", (PyObject *)reservation_type) < 0)
        return -1;
    return PyModule_AddObjectRef(module, "IovaUnmapping", (PyObject *)unmapping_type);
}
