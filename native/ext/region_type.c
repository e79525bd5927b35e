/* The Region type: construction and attributes. What it does is in the other region_*.c files. */
#include <Python.h>
#include <structmember.h>

#include <stdlib.h>
#include <string.h>

#include "ext/module.h"
#include "ext/raise.h"
#include "ext/region_object.h"

static PyTypeObject *region_type;

/* --- construction ----------------------------------------------------------------------------------------------- */

static int parse_window(PyObject *item, struct vfiopy_window *window)
{
    unsigned long long offset, address, length;
    PyObject *fields = PySequence_Tuple(item);
    int parsed;

    if (!fields)
        return -1;
    parsed = PyArg_ParseTuple(fields, "KKK;a window is (offset, address, length)", &offset, &address, &length);
    Py_DECREF(fields);
    if (!parsed)
        return -1;
    *window = (struct vfiopy_window){.offset = offset, .length = length, .address = (uintptr_t)address};
    return 0;
}

/* malloc'ed, because the C side frees it. */
static struct vfiopy_window *parse_windows(PyObject *sequence, size_t *count)
{
    PyObject *items = sequence ? PySequence_Tuple(sequence) : PyTuple_New(0);
    struct vfiopy_window *windows = NULL;
    Py_ssize_t size;

    if (!items)
        return NULL;
    size = PyTuple_Size(items);
    windows = calloc(size ? (size_t)size : 1, sizeof(*windows));
    if (!windows)
        PyErr_NoMemory();
    for (Py_ssize_t i = 0; windows && i < size; i++) {
        if (parse_window(PyTuple_GetItem(items, i), &windows[i]) < 0) {
            free(windows);
            windows = NULL;
        }
    }
    Py_DECREF(items);
    *count = (size_t)size;
    return windows;
}

static int parse_byteorder(RegionObject *self, const char *text, bool *swap)
{
    *swap = strcmp(text, "big") == 0;
    if (*swap || strcmp(text, "little") == 0 || strcmp(text, "native") == 0)
        return 0;
    vfiopy_raise("AccessError", self->name, "PCI registers are 'little' unless their manual says otherwise",
                 "byteorder '%s' is none of 'little', 'big' and 'native'", text);
    return -1;
}

static int set_slow(RegionObject *self, PyObject *slow)
{
    if (!slow || slow == Py_None)
        return 0;
    self->slow_read = PyObject_GetAttrString(slow, "read");
    self->slow_write = self->slow_read ? PyObject_GetAttrString(slow, "write") : NULL;
    if (!self->slow_write)
        return -1;
    Py_INCREF(slow);
    self->slow = slow;
    return 0;
}

static int fill(RegionObject *self, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"name", "size", "windows", "slow", "readable", "writable", "byteorder", NULL};
    PyObject *name, *size_argument, *sequence = NULL, *slow = NULL;
    const char *byteorder = "little", *wrong;
    int readable = 1, writable = 1;
    struct vfiopy_window *windows;
    size_t count = 0, which = 0;
    uint64_t size = 0;
    bool swap = false;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "UO|O$Opps:Region", names, &name, &size_argument, &sequence,
                                     &slow, &readable, &writable, &byteorder))
        return -1;
    Py_INCREF(name);
    self->name = name;
    if (vfiopy_parse_offset(self, size_argument, &size) < 0 || parse_byteorder(self, byteorder, &swap) < 0
        || set_slow(self, slow) < 0)
        return -1;
    windows = parse_windows(sequence, &count);
    if (!windows)
        return -1;
    if (count > 0 && vfiopy_install_fault_handler(name) < 0) {
        free(windows);
        return -1;
    }
    wrong = vfiopy_region_init(&self->core, size, (readable ? VFIOPY_READ : 0u) | (writable ? VFIOPY_WRITE : 0u), swap,
                               windows, count, &which);
    if (wrong) {
        free(windows);
        vfiopy_raise("AccessError", name, "windows are (offset, address, length), sorted, disjoint and inside the region",
                     "window %zu %s", which, wrong);
        return -1;
    }
    return 0;
}

static PyObject *region_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    RegionObject *self = (RegionObject *)allocate(type, 0);

    if (self && fill(self, arguments, keywords) < 0) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static int region_traverse(PyObject *op, visitproc visit, void *arg)
{
    RegionObject *self = (RegionObject *)op;

    Py_VISIT(Py_TYPE(op));
    Py_VISIT(self->slow);
    Py_VISIT(self->slow_read);
    Py_VISIT(self->slow_write);
    Py_VISIT(self->trace);
    return 0;
}

static int region_clear(PyObject *op)
{
    RegionObject *self = (RegionObject *)op;

    Py_CLEAR(self->slow);
    Py_CLEAR(self->slow_read);
    Py_CLEAR(self->slow_write);
    Py_CLEAR(self->trace);
    return 0;
}

static void region_dealloc(PyObject *op)
{
    RegionObject *self = (RegionObject *)op;
    PyTypeObject *type = Py_TYPE(op);

    PyObject_GC_UnTrack(op);
    if (self->weak_references)
        PyObject_ClearWeakRefs(op);
    region_clear(op);
    vfiopy_region_destroy(&self->core);
    Py_CLEAR(self->reason);
    Py_CLEAR(self->name);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(op);
    Py_DECREF(type);
}

/* --- attributes ------------------------------------------------------------------------------------------------- */

static PyObject *region_get_size(PyObject *op, void *Py_UNUSED(closure))
{
    return PyLong_FromUnsignedLongLong(((RegionObject *)op)->core.size);
}

static PyObject *region_get_readable(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong((((RegionObject *)op)->core.directions & VFIOPY_READ) != 0);
}

static PyObject *region_get_writable(PyObject *op, void *Py_UNUSED(closure))
{
    return PyBool_FromLong((((RegionObject *)op)->core.directions & VFIOPY_WRITE) != 0);
}

static PyObject *region_get_byteorder(PyObject *op, void *Py_UNUSED(closure))
{
    return PyUnicode_FromString(((RegionObject *)op)->core.swap ? "big" : "little");
}

static PyObject *region_get_trace(PyObject *op, void *Py_UNUSED(closure))
{
    PyObject *trace;

    REGION_ENTER(op)
    trace = ((RegionObject *)op)->trace;
    trace = trace ? trace : Py_None;
    Py_INCREF(trace);
    REGION_LEAVE()
    return trace;
}

static PyObject *region_get_holds(PyObject *op, void *Py_UNUSED(closure))
{
    return vfiopy_region_hold_labels((RegionObject *)op);
}

static PyObject *region_get_windows(PyObject *op, void *Py_UNUSED(closure))
{
    const struct vfiopy_region *core = &((RegionObject *)op)->core;
    PyObject *windows = PyTuple_New((Py_ssize_t)core->window_count);

    for (size_t i = 0; windows && i < core->window_count; i++) {
        PyObject *pair = Py_BuildValue("(KK)", (unsigned long long)core->windows[i].offset,
                                       (unsigned long long)core->windows[i].length);

        if (!pair || PyTuple_SetItem(windows, (Py_ssize_t)i, pair) < 0) {
            Py_DECREF(windows);
            return NULL;
        }
    }
    return windows;
}

static PyObject *region_repr(PyObject *op)
{
    RegionObject *self = (RegionObject *)op;
    char size[32];

    PyOS_snprintf(size, sizeof(size), "0x%llx", (unsigned long long)self->core.size);
    return PyUnicode_FromFormat("<Region %U, %s bytes, %s>", self->name, size,
                                vfiopy_state_name(vfiopy_region_flags(&self->core)));
}

#define KEYWORDS(function) (PyCFunction)(void (*)(void))function, METH_VARARGS | METH_KEYWORDS

static const PyMethodDef other_methods[] = {
    {"poll8", KEYWORDS(vfiopy_region_poll8), "poll8($self, offset, mask, value, timeout, interval=0.0)\n--\n\nSee poll32."},
    {"poll16", KEYWORDS(vfiopy_region_poll16),
     "poll16($self, offset, mask, value, timeout, interval=0.0)\n--\n\nSee poll32."},
    {"poll32", KEYWORDS(vfiopy_region_poll32),
     "poll32($self, offset, mask, value, timeout, interval=0.0)\n--\n\n"
     "Read the register until (register & mask) == value; return the last value read.\n\n"
     "timeout and interval (from one read to the next; 0 spins) are in seconds, a timeout of None waits for ever.\n"
     "Other threads run meanwhile. VfioTimeoutError, with the last value as .value, when it does not come true."},
    {"poll64", KEYWORDS(vfiopy_region_poll64),
     "poll64($self, offset, mask, value, timeout, interval=0.0)\n--\n\nSee poll32."},
    {"read_fifo", KEYWORDS(vfiopy_region_read_fifo),
     "read_fifo($self, offset, count, width=4, into=None)\n--\n\n"
     "Read the register at `offset` `count` times; return the bytes as they came, or fill `into`."},
    {"write_fifo", KEYWORDS(vfiopy_region_write_fifo),
     "write_fifo($self, offset, data, width=4)\n--\n\nWrite data to the one register at `offset`, `width` bytes a time."},
    {"read_block", KEYWORDS(vfiopy_region_read_block),
     "read_block($self, offset, count, width=4, into=None)\n--\n\n"
     "Read `count` registers of `width` bytes in ascending order; return their bytes, or fill `into`."},
    {"write_block", KEYWORDS(vfiopy_region_write_block),
     "write_block($self, offset, data, width=4)\n--\n\nWrite data in ascending order, `width` bytes a time."},
    {"hold", KEYWORDS(vfiopy_region_hold),
     "hold($self, offset=0, length=None, *, label='hold()')\n--\n\n"
     "Take the address of a mapped part, for compiled code; close() is refused until it is released."},
    {"set_state", KEYWORDS(vfiopy_region_set_state),
     "set_state($self, state, reason=None)\n--\n\n"
     "For the owner: 'open', 'slow' (do not touch the mapping) or 'gone'. Once it has returned no access that began\n"
     "before 'slow' or 'gone' is under way."},
    {"set_trace", vfiopy_region_set_trace, METH_O,
     "set_trace($self, trace, /)\n--\n\n"
     "Call trace(operation, offset, width, value) for each access; None stops it.\n\n"
     "A `\"read\"` is reported after it, a `\"write\"` before it; one that failed, with the exception for a value.\n"
     "Bursts and polls become single accesses, a `\"poll\"` is told first with (mask, value) for a value, and a\n"
     "`\"hold\"` with its length and label: accesses through the address that it gives are not seen."},
    {"close", vfiopy_region_close, METH_NOARGS,
     "close($self, /)\n--\n\n"
     "Refuse all further access; idempotent. BusyError while the address is in use. Once it has returned no access is\n"
     "under way: the owner may unmap."},
    {"__enter__", vfiopy_region_enter, METH_NOARGS, NULL},
    {"__exit__", vfiopy_region_exit, METH_VARARGS, NULL},
};

#define OTHER_METHODS (sizeof(other_methods) / sizeof(other_methods[0]))

static PyMethodDef methods[VFIOPY_REGION_FAST_METHODS + OTHER_METHODS + 1];

static PyMemberDef members[] = {
    {"name", T_OBJECT_EX, offsetof(RegionObject, name), READONLY, "What the user calls it."},
    {"reason", T_OBJECT, offsetof(RegionObject, reason), READONLY, "Why it is gone or slow, or None."},
    {"slow", T_OBJECT, offsetof(RegionObject, slow), READONLY, "What serves accesses that no mapping serves, or None."},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(RegionObject, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"size", region_get_size, NULL, "Size in bytes.", NULL},
    {"state", vfiopy_region_get_state, NULL, "'open', 'traced', 'slow', 'gone', 'closed' or 'forked'.", NULL},
    {"readable", region_get_readable, NULL, "Reads are allowed.", NULL},
    {"writable", region_get_writable, NULL, "Writes are allowed.", NULL},
    {"byteorder", region_get_byteorder, NULL, "'little' or 'big'.", NULL},
    {"trace", region_get_trace, NULL, "What set_trace() was given, or None.", NULL},
    {"holds", region_get_holds, NULL, "Labels of the live holds, oldest first.", NULL},
    {"windows", region_get_windows, NULL, "The mapped pieces as (offset, length).", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Region(name, size, windows=(), *, slow=None, readable=True, writable=True, byteorder='little')\n--\n\n"
                "The registers or the memory of one region of a device. See vfiopy.mmio."},
    {Py_tp_new, region_new},
    {Py_tp_dealloc, region_dealloc},
    {Py_tp_traverse, region_traverse},
    {Py_tp_clear, region_clear},
    {Py_tp_repr, region_repr},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, attributes},
    {Py_nb_bool, vfiopy_region_bool},
    {Py_bf_getbuffer, vfiopy_region_getbuffer},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vfiopy._native.Region",
    .basicsize = sizeof(RegionObject),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int vfiopy_region_type_init(PyObject *module)
{
    memcpy(methods, vfiopy_region_fast_methods, sizeof(vfiopy_region_fast_methods));
    memcpy(methods + VFIOPY_REGION_FAST_METHODS, other_methods, sizeof(other_methods));
    region_type = (PyTypeObject *)PyType_FromSpec(&spec);
    if (!region_type || PyModule_AddObjectRef(module, "Region", (PyObject *)region_type) < 0)
        return -1;
    if (vfiopy_hold_type_init(module) < 0)
        return -1;
    return vfiopy_region_functions_init(module);
}
