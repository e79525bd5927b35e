/*
 * Hold: a promise that a part of a region stays mapped, for code that takes its address.
 *
 * Buffers are holds as well: a memoryview or numpy array of a region keeps one alive until it dies.
 */
#include <Python.h>
#include <structmember.h>

#include "ext/raise.h"
#include "ext/region_object.h"

struct hold_object {
    PyObject_HEAD
    RegionObject *region; /* NULL once released */
    uint64_t offset;
    uint64_t length;
    uintptr_t address;
    PyObject *label;
    Py_ssize_t exports;
    struct hold_object *next; /* in region->holds, newest first */
    PyObject *weak_references;
};
typedef struct hold_object HoldObject;

static PyTypeObject *hold_type;

/*
 * A hold's own lock protects `region` and `exports`, the region's lock its list of holds. Never both at a time.
 *
 * Let go of the region, unless there are views and `force` is not set. Returns the number of views.
 */
static Py_ssize_t unlink_hold(HoldObject *self, bool force)
{
    RegionObject *region = NULL;
    Py_ssize_t exports;

    REGION_ENTER(self)
    exports = self->exports;
    if (force || exports == 0) {
        region = self->region;
        self->region = NULL;
    }
    REGION_LEAVE()
    if (!region)
        return exports;
    REGION_ENTER(region)
    for (HoldObject **link = &region->holds; *link; link = &(*link)->next) {
        if (*link == self) {
            *link = self->next;
            break;
        }
    }
    REGION_LEAVE()
    Py_DECREF((PyObject *)region);
    return exports;
}

PyObject *vfiopy_region_hold_labels(RegionObject *self)
{
    PyObject *labels = PyList_New(0), *result;
    int failed = 0;

    if (!labels)
        return NULL;
    REGION_ENTER(self)
    for (HoldObject *hold = self->holds; hold && !failed; hold = hold->next)
        failed = PyList_Append(labels, hold->label);
    REGION_LEAVE()
    if (!failed)
        failed = PyList_Reverse(labels);
    result = failed ? NULL : PyList_AsTuple(labels);
    Py_DECREF(labels);
    return result;
}

PyObject *vfiopy_hold_new(RegionObject *region, uint64_t offset, uint64_t length, PyObject *label)
{
    enum vfiopy_direction direction = region->core.directions & VFIOPY_READ ? VFIOPY_READ : VFIOPY_WRITE;
    enum vfiopy_verdict verdict;
    struct vfiopy_place place = {0, 0};
    bool slow = false;
    HoldObject *self;

    if (length == 0) {
        vfiopy_raise("AddressRangeError", region->name, NULL, "a hold on 0 bytes");
        return NULL;
    }
    self = (HoldObject *)PyType_GenericAlloc(hold_type, 0);
    if (!self)
        return NULL;
    Py_INCREF(label);
    self->label = label;

    REGION_ENTER(region)
    verdict = vfiopy_region_check(&region->core, offset, length == UINT64_MAX ? 1 : length, 1, direction);
    if (verdict == VFIOPY_ALLOWED) {
        slow = vfiopy_region_flags(&region->core) & VFIOPY_REGION_SLOW;
        if (!slow)
            place = vfiopy_region_locate(&region->core, offset, 1);
        if (place.address && (length == UINT64_MAX || length <= place.room)) {
            self->offset = offset;
            self->length = length == UINT64_MAX ? place.room : length;
            self->address = place.address;
            Py_INCREF((PyObject *)region);
            self->region = region;
            self->next = region->holds;
            region->holds = self;
        }
    }
    REGION_LEAVE()

    if (self->region) {
        /* What goes through the address is not seen: the trace has to know at least that. */
        if (vfiopy_region_flags(&region->core) & VFIOPY_REGION_TRACED
            && vfiopy_region_report(region, "hold", self->offset, self->length, Py_NewRef(label)) < 0)
            Py_CLEAR(self);
        return (PyObject *)self;
    }
    if (verdict != VFIOPY_ALLOWED) {
        vfiopy_raise_verdict(region, verdict, offset, length == UINT64_MAX ? 1 : length, 1, direction);
    } else {
        char range[64];

        PyOS_snprintf(range, sizeof(range), "0x%llx", (unsigned long long)offset);
        vfiopy_raise("AccessError", region->name,
                     slow ? NULL : "ask for a part within one of Region.windows; single accesses work everywhere",
                     slow ? "an address at offset %s: the mapping may not be touched now"
                          : "an address at offset %s: the range is not mapped in one piece",
                     range);
    }
    Py_DECREF(self);
    return NULL;
}

PyObject *vfiopy_region_hold(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"offset", "length", "label", NULL};
    RegionObject *self = (RegionObject *)op;
    PyObject *offset_argument = NULL, *length_argument = Py_None, *label = NULL, *hold;
    uint64_t offset = 0, length = UINT64_MAX;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "|OO$U:hold", names, &offset_argument, &length_argument,
                                     &label))
        return NULL;
    if (offset_argument && vfiopy_parse_offset(self, offset_argument, &offset) < 0)
        return NULL;
    if (length_argument != Py_None && vfiopy_parse_offset(self, length_argument, &length) < 0)
        return NULL;
    if (label)
        return vfiopy_hold_new(self, offset, length, label);
    label = PyUnicode_FromString("hold()");
    hold = label ? vfiopy_hold_new(self, offset, length, label) : NULL;
    Py_XDECREF(label);
    return hold;
}

int vfiopy_region_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    RegionObject *self = (RegionObject *)op;
    PyObject *label, *hold;
    int result;

    view->obj = NULL;
    if (self->core.window_count != 1 || self->core.windows[0].length != self->core.size) {
        PyErr_Format(PyExc_BufferError,
                     "%U is not mapped in one piece: take a buffer of a part with Region.hold(offset, length)",
                     self->name);
        return -1;
    }
    label = PyUnicode_FromString("buffer");
    hold = label ? vfiopy_hold_new(self, 0, self->core.size, label) : NULL;
    Py_XDECREF(label);
    if (!hold)
        return -1;
    /* The buffer's owner is the hold: when the last view dies, so does the hold. */
    result = PyObject_GetBuffer(hold, view, flags);
    Py_DECREF(hold);
    return result;
}

/* The region as a new reference, or NULL with an error set. */
static RegionObject *get_region(HoldObject *self)
{
    RegionObject *region;

    REGION_ENTER(self)
    region = self->region;
    Py_XINCREF((PyObject *)region);
    REGION_LEAVE()
    if (!region) {
        vfiopy_raise_state("ClosedError", "hold '%U' was released: its address means nothing any more", self->label);
        return NULL;
    }
    if (vfiopy_region_flags(&region->core) & VFIOPY_REGION_FORKED) {
        vfiopy_raise_state("ForkedError",
                           "hold '%U' on %U belongs to the process that opened it and this is a forked child. Open the "
                           "device again in the child, or use the 'spawn' start method of multiprocessing",
                           self->label, region->name);
        Py_DECREF((PyObject *)region);
        return NULL;
    }
    return region;
}

static PyObject *hold_release(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    HoldObject *self = (HoldObject *)op;
    Py_ssize_t exports = unlink_hold(self, false);

    if (exports > 0) {
        vfiopy_raise("BusyError", self->label, "delete the arrays and memoryviews first",
                     "a hold with %zd live buffer%s cannot be released", exports, exports == 1 ? "" : "s");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *hold_enter(PyObject *op, PyObject *Py_UNUSED(ignored))
{
    RegionObject *region = get_region((HoldObject *)op);

    if (!region)
        return NULL;
    Py_DECREF((PyObject *)region);
    Py_INCREF(op);
    return op;
}

static PyObject *hold_exit(PyObject *op, PyObject *Py_UNUSED(arguments))
{
    return hold_release(op, NULL);
}

static PyObject *hold_get_address(PyObject *op, void *Py_UNUSED(closure))
{
    RegionObject *region = get_region((HoldObject *)op);

    if (!region)
        return NULL;
    Py_DECREF((PyObject *)region);
    return PyLong_FromUnsignedLongLong(((HoldObject *)op)->address);
}

static PyObject *hold_get_region(PyObject *op, void *Py_UNUSED(closure))
{
    return (PyObject *)get_region((HoldObject *)op);
}

static int hold_bool(PyObject *op)
{
    return ((HoldObject *)op)->region != NULL;
}

static Py_ssize_t hold_length(PyObject *op)
{
    return (Py_ssize_t)((HoldObject *)op)->length;
}

static int fill_view(HoldObject *self, const RegionObject *region, Py_buffer *view, int flags)
{
    unsigned directions = region->core.directions;
    bool held;
    int result;

    if (!(directions & VFIOPY_READ)) {
        PyErr_Format(PyExc_BufferError, "%U is write-only: no buffer can say so", region->name);
        return -1;
    }
    if (self->length > PY_SSIZE_T_MAX) {
        PyErr_Format(PyExc_BufferError, "%U: too large for a buffer", region->name);
        return -1;
    }
    REGION_ENTER(self)
    held = self->region != NULL;
    if (held)
        self->exports++;
    REGION_LEAVE()
    if (!held) {
        PyErr_Format(PyExc_BufferError, "hold '%U' was released meanwhile", self->label);
        return -1;
    }
    result = PyBuffer_FillInfo(view, (PyObject *)self, (void *)self->address, (Py_ssize_t)self->length,
                               !(directions & VFIOPY_WRITE), flags);
    if (result < 0) {
        REGION_ENTER(self)
        self->exports--;
        REGION_LEAVE()
    }
    return result;
}

static int hold_getbuffer(PyObject *op, Py_buffer *view, int flags)
{
    HoldObject *self = (HoldObject *)op;
    RegionObject *region = get_region(self);
    int result;

    view->obj = NULL;
    if (!region)
        return -1;
    result = fill_view(self, region, view, flags);
    Py_DECREF((PyObject *)region);
    return result;
}

static void hold_releasebuffer(PyObject *op, Py_buffer *Py_UNUSED(view))
{
    REGION_ENTER(op)
    ((HoldObject *)op)->exports--;
    REGION_LEAVE()
}

static PyObject *hold_repr(PyObject *op)
{
    HoldObject *self = (HoldObject *)op;
    char range[64];

    if (!hold_bool(op))
        return PyUnicode_FromFormat("<Hold '%U' (released)>", self->label);
    PyOS_snprintf(range, sizeof(range), "0x%llx+0x%llx", (unsigned long long)self->offset,
                  (unsigned long long)self->length);
    return PyUnicode_FromFormat("<Hold '%U' at %s>", self->label, range);
}

static int hold_traverse(PyObject *op, visitproc visit, void *arg)
{
    HoldObject *self = (HoldObject *)op;

    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->region);
    return 0;
}

static int hold_clear(PyObject *op)
{
    unlink_hold((HoldObject *)op, true);
    return 0;
}

static void hold_dealloc(PyObject *op)
{
    HoldObject *self = (HoldObject *)op;
    PyTypeObject *type = Py_TYPE(op);

    PyObject_GC_UnTrack(op);
    if (self->weak_references)
        PyObject_ClearWeakRefs(op);
    unlink_hold(self, true);
    Py_CLEAR(self->label);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

static PyMethodDef hold_methods[] = {
    {"release", hold_release, METH_NOARGS,
     "release($self, /)\n--\n\nLet the region go; idempotent. BusyError while an array or memoryview of it lives."},
    {"__enter__", hold_enter, METH_NOARGS, NULL},
    {"__exit__", hold_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef hold_members[] = {
    {"label", T_OBJECT_EX, offsetof(HoldObject, label), READONLY, "What it is for; close() of the region says it."},
    {"offset", T_ULONGLONG, offsetof(HoldObject, offset), READONLY, "Where it begins in the region, in bytes."},
    {"length", T_ULONGLONG, offsetof(HoldObject, length), READONLY, "Its size in bytes."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(HoldObject, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef hold_attributes[] = {
    {"address", hold_get_address, NULL, "Virtual address of the first byte, valid until release().", NULL},
    {"region", hold_get_region, NULL, "The region.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot hold_slots[] = {
    {Py_tp_doc, "Keeps a part of a region mapped. Made by Region.hold(); release it, or use it in a with statement.\n\n"
                "Accesses through the address are made by whoever makes them: neither width nor order nor the state of "
                "the device is looked at."},
    {Py_tp_dealloc, hold_dealloc},
    {Py_tp_traverse, hold_traverse},
    {Py_tp_clear, hold_clear},
    {Py_tp_repr, hold_repr},
    {Py_tp_methods, hold_methods},
    {Py_tp_members, hold_members},
    {Py_tp_getset, hold_attributes},
    {Py_nb_bool, hold_bool},
    {Py_sq_length, hold_length},
    {Py_bf_getbuffer, hold_getbuffer},
    {Py_bf_releasebuffer, hold_releasebuffer},
    {0, NULL},
};

static PyType_Spec hold_spec = {
    .name = "vfiopy._native.Hold",
    .basicsize = sizeof(HoldObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = hold_slots,
};

int vfiopy_hold_type_init(PyObject *module)
{
    hold_type = (PyTypeObject *)PyType_FromSpec(&hold_spec);
    return hold_type ? PyModule_AddObjectRef(module, "Hold", (PyObject *)hold_type) : -1;
}
