/* HostMemory: where a piece of memory is, and what keeps it there. */
#include <Python.h>
#include <structmember.h>

#include <unistd.h>

#include "ext/dma_object.h"
#include "ext/spares.h"

static PyTypeObject *memory_type;
static uint64_t page_mask;
static struct vfiopy_spares spares;

static struct vfiopy_host_memory *of(PyObject *object)
{
    return (struct vfiopy_host_memory *)object;
}

/* Whether this is a buffer of whole pages that does not belong to Python's own objects. */
static bool is_plain(PyObject *thing, const Py_buffer *view)
{
    return view->len > 0 && !((uintptr_t)view->buf & page_mask) && !((uint64_t)view->len & page_mask) &&
           !PyBytes_Check(thing);
}

static struct vfiopy_host_memory *export(PyObject *thing)
{
    Py_buffer view;
    struct vfiopy_host_memory *self;

    if (PyObject_GetBuffer(thing, &view, PyBUF_SIMPLE)) {
        if (PyErr_ExceptionMatches(PyExc_Exception))
            PyErr_Clear(); /* not what is meant to end the program */
        return NULL;
    }
    self = is_plain(thing, &view) ? of(vfiopy_spares_take(&spares, memory_type)) : NULL;
    if (!self) {
        PyBuffer_Release(&view);
        return NULL;
    }
    self->address = (uintptr_t)view.buf;
    self->size = (uint64_t)view.len;
    self->writable = !view.readonly;
    self->owner = Py_NewRef(thing);
    self->view = view;
    self->weak_references = NULL;
    PyObject_GC_Track((PyObject *)self);
    return self;
}

struct vfiopy_host_memory *vfiopy_plain_memory(PyObject *thing, uint8_t prot)
{
    struct vfiopy_host_memory *self = Py_IS_TYPE(thing, memory_type) ? of(Py_NewRef(thing)) : export(thing);

    if (!self || self->writable || !(prot & VFIOPY_PROT_WRITE))
        return self;
    Py_DECREF((PyObject *)self);
    return NULL;
}

static PyObject *memory_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"address", "size", "writable", "owner", NULL};
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct vfiopy_host_memory *self;
    PyObject *address, *size, *owner;
    uint64_t numbers[2];
    int writable;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOpO:HostMemory", names, &address, &size, &writable,
                                     &owner) ||
        vfiopy_get_u64(address, "address", &numbers[0]) || vfiopy_get_u64(size, "size", &numbers[1]))
        return NULL;
    self = of(allocate(type, 0));
    if (!self)
        return NULL;
    self->address = numbers[0];
    self->size = numbers[1];
    self->writable = writable;
    self->owner = Py_NewRef(owner);
    return (PyObject *)self;
}

/*
 * No tp_clear: a collector that let go of the owner would free memory that a device may still be writing. Whatever
 * refers to this object in a cycle can be cleared instead.
 */
static int memory_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(of(object)->owner);
    Py_VISIT(of(object)->view.obj);
    return 0;
}

static void memory_dealloc(PyObject *object)
{
    struct vfiopy_host_memory *self = of(object);
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(object);
    if (self->weak_references)
        PyObject_ClearWeakRefs(object);
    if (self->view.obj)
        PyBuffer_Release(&self->view);
    Py_CLEAR(self->owner);
    vfiopy_spares_give(&spares, object);
    Py_DECREF(type);
}

static PyObject *memory_repr(PyObject *object)
{
    struct vfiopy_host_memory *self = of(object);
    PyObject *owner = PyType_GetName(Py_TYPE(self->owner)), *text = NULL;

    if (owner)
        text = PyUnicode_FromFormat("<HostMemory %p of %llu bytes%s, in a %U object>",
                                    (void *)(uintptr_t)self->address, (unsigned long long)self->size,
                                    self->writable ? "" : ", read-only", owner);
    Py_XDECREF(owner);
    return text;
}

/* The constant is Python's, imported when first asked for. */
static PyObject *get_kind(PyObject *Py_UNUSED(object), void *Py_UNUSED(ignored))
{
    static PyObject *kind;
    PyObject *backend, *kinds = NULL;

    if (kind)
        return Py_NewRef(kind);
    backend = PyImport_ImportModule("vfiopy.backend");
    if (backend)
        kinds = PyObject_GetAttrString(backend, "MemoryKind");
    Py_XDECREF(backend);
    if (kinds)
        kind = PyObject_GetAttrString(kinds, "HOST");
    Py_XDECREF(kinds);
    return Py_XNewRef(kind);
}

static PyMemberDef members[] = {
    {"address", T_ULONGLONG, offsetof(struct vfiopy_host_memory, address), READONLY, "virtual address, in bytes"},
    {"size", T_ULONGLONG, offsetof(struct vfiopy_host_memory, size), READONLY, "size in bytes"},
    {"writable", T_BOOL, offsetof(struct vfiopy_host_memory, writable), READONLY, "devices may be allowed to write"},
    {"owner", T_OBJECT_EX, offsetof(struct vfiopy_host_memory, owner), READONLY, "what is kept alive with it"},
    {"__weaklistoffset__", T_PYSSIZET, offsetof(struct vfiopy_host_memory, weak_references), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"kind", get_kind, NULL, "MemoryKind.HOST", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "HostMemory(address, size, writable, owner)\n--\n\n"
                "Memory of this process, to be mapped for devices.\n\n"
                "Attributes:\n"
                "    address: virtual address, a multiple of the page size.\n"
                "    size: bytes, a multiple of the page size.\n"
                "    writable: the device may be allowed to write it.\n"
                "    owner: kept alive for as long as it is mapped.\n"
                "    kind: ``MemoryKind.HOST``."},
    {Py_tp_new, memory_new},
    {Py_tp_dealloc, memory_dealloc},
    {Py_tp_traverse, memory_traverse},
    {Py_tp_repr, memory_repr},
    {Py_tp_members, members},
    {Py_tp_getset, attributes},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vfiopy._native.HostMemory",
    .basicsize = sizeof(struct vfiopy_host_memory),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int vfiopy_host_memory_init(PyObject *module)
{
    page_mask = (uint64_t)sysconf(_SC_PAGESIZE) - 1;
    memory_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return memory_type ? PyModule_AddObjectRef(module, "HostMemory", (PyObject *)memory_type) : -1;
}
