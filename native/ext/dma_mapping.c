/* Mapping: a handle of one mapping of an address space. */
#include <Python.h>
#include <structmember.h>

#include <math.h>

#include "ext/dma_object.h"
#include "ext/raise.h"
#include "ext/spares.h"

static PyTypeObject *mapping_type;
static struct vfiopy_spares spares;

static struct vfiopy_mapping_object *of(PyObject *object)
{
    return (struct vfiopy_mapping_object *)object;
}

static struct vfiopy_space_base *space_of(PyObject *object)
{
    return (struct vfiopy_space_base *)of(object)->space;
}

struct vfiopy_mapping_object *vfiopy_mapping_new(PyObject *space)
{
    struct vfiopy_mapping_object *self = of(vfiopy_spares_take(&spares, mapping_type));

    if (!self)
        return NULL;
    self->space = Py_NewRef(space);
    self->iova = self->size = self->address = self->serial = 0; /* no mapping has this serial number */
    self->prot = 0;
    PyObject_GC_Track((PyObject *)self);
    return self;
}

bool vfiopy_is_mapping(PyObject *object)
{
    return Py_IS_TYPE(object, mapping_type);
}

static PyObject *mapping_new(PyTypeObject *Py_UNUSED(type), PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"space", "iova", "size", "address", "prot", "serial", NULL};
    struct vfiopy_mapping_object *self;
    PyObject *space, *values[5];
    uint64_t numbers[5];

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "OOOOOO:Mapping", names, &space, &values[0], &values[1],
                                     &values[2], &values[3], &values[4]))
        return NULL;
    for (int i = 0; i < 5; i++) {
        if (vfiopy_get_u64(values[i], names[i + 1], &numbers[i]))
            return NULL;
    }
    if (!vfiopy_is_space_base(space)) {
        PyErr_Format(PyExc_TypeError, "a mapping belongs to an AddressSpace, not to %R", space);
        return NULL;
    }
    self = vfiopy_mapping_new(space);
    if (!self)
        return NULL;
    self->iova = numbers[0];
    self->size = numbers[1];
    self->address = numbers[2];
    self->prot = (uint8_t)numbers[3];
    self->serial = numbers[4];
    return (PyObject *)self;
}

static int mapping_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(of(object)->space);
    return 0;
}

static void mapping_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);

    PyObject_GC_UnTrack(object);
    Py_CLEAR(of(object)->space);
    vfiopy_spares_give(&spares, object);
    Py_DECREF(type);
}

/* --- whether it is still there ------------------------------------------------------------------------------- */

/* What is mapped, as a new reference; NULL without an error where it is not mapped any more. */
static PyObject *find(PyObject *object)
{
    struct vfiopy_view view;

    if (!vfiopy_space_find(vfiopy_space_of(space_of(object)->book), of(object)->iova, &view))
        return NULL;
    if (view.serial == of(object)->serial)
        return view.memory;
    Py_XDECREF((PyObject *)view.memory); /* something else came to its IOVA */
    return NULL;
}

/* In a forked child the book's lock may be held by a thread that does not exist: nothing may look into it. */
static int check_process(PyObject *object)
{
    PyObject *answer;

    if (vfiopy_space_is_here(space_of(object)))
        return 0;
    answer = PyObject_CallMethod(of(object)->space, "check_open", NULL); /* raises ForkedError, or ClosedError */
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

static int is_mapped(PyObject *object)
{
    PyObject *memory = check_process(object) ? NULL : find(object);

    Py_XDECREF(memory);
    return memory ? 1 : PyErr_Occurred() ? -1 : 0;
}

static int raise_unmapped(PyObject *object)
{
    PyObject *text = PyObject_Repr(object);

    if (text)
        vfiopy_raise_state("ClosedError", "%U was unmapped before", text);
    Py_XDECREF(text);
    return -1;
}

static PyObject *get_memory(PyObject *object, void *Py_UNUSED(ignored))
{
    PyObject *memory = check_process(object) ? NULL : find(object);

    if (!memory && !PyErr_Occurred())
        raise_unmapped(object);
    return memory;
}

/* --- unmapping ----------------------------------------------------------------------------------------------- */

/* Through the space, which has mappers of its own to call. */
static int unmap_through_space(PyObject *object, double timeout)
{
    PyObject *unmap, *arguments, *keywords, *answer = NULL;
    int mapped = is_mapped(object);

    if (mapped <= 0)
        return mapped ? -1 : raise_unmapped(object);
    unmap = PyObject_GetAttrString(of(object)->space, "unmap");
    arguments = Py_BuildValue("(K)", (unsigned long long)of(object)->iova);
    keywords = isinf(timeout) ? Py_BuildValue("{s:O}", "timeout", Py_None) : Py_BuildValue("{s:d}", "timeout", timeout);
    if (unmap && arguments && keywords)
        answer = PyObject_Call(unmap, arguments, keywords);
    Py_XDECREF(keywords);
    Py_XDECREF(arguments);
    Py_XDECREF(unmap);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

int vfiopy_mapping_take_down(struct vfiopy_mapping_object *self, double timeout)
{
    struct vfiopy_space_base *space = (struct vfiopy_space_base *)self->space;
    int done;

    if (!vfiopy_space_is_direct(space))
        return unmap_through_space((PyObject *)self, timeout);
    done = vfiopy_iova_unmap_one(space->book, self->iova, self->serial, timeout);
    if (!done)
        return raise_unmapped((PyObject *)self);
    if (done == 2) /* a mapper in Python joined since we looked */
        return unmap_through_space((PyObject *)self, timeout);
    return done < 0 ? -1 : 0;
}

static PyObject *mapping_unmap(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"timeout", NULL};
    PyObject *given[1];
    double timeout = 0;

    if (nargs) {
        PyErr_Format(PyExc_TypeError, "unmap() takes no positional argument, but %zd were given", nargs);
        return NULL;
    }
    if (keywords && (vfiopy_arguments("unmap", args, 0, keywords, names, 0, given) ||
                     (given[0] && vfiopy_get_timeout(given[0], &timeout))))
        return NULL;
    if (vfiopy_mapping_take_down(of(object), timeout))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *mapping_enter(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    return Py_NewRef(object);
}

static PyObject *mapping_exit(PyObject *object, PyObject *Py_UNUSED(arguments))
{
    int mapped = is_mapped(object);

    if (mapped < 0 || (mapped && vfiopy_mapping_take_down(of(object), 0)))
        return NULL;
    Py_RETURN_NONE;
}

/* --- looking ------------------------------------------------------------------------------------------------- */

static PyObject *get_last(PyObject *object, void *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(of(object)->iova + (of(object)->size - 1));
}

/* The type is Python's, imported when first asked for. */
static PyObject *get_prot(PyObject *object, void *Py_UNUSED(ignored))
{
    static PyObject *prot;

    if (!prot) {
        PyObject *backend = PyImport_ImportModule("vfiopy.backend");

        if (backend)
            prot = PyObject_GetAttrString(backend, "Prot");
        Py_XDECREF(backend);
    }
    return prot ? PyObject_CallFunction(prot, "i", (int)of(object)->prot) : NULL;
}

static PyObject *mapping_repr(PyObject *object)
{
    static const char *const rights[] = {"", "r", "w", "rw"};
    struct vfiopy_mapping_object *self = of(object);
    /* No error here: a debugger shows a handle in a forked child too. */
    PyObject *memory = vfiopy_space_is_here(space_of(object)) ? find(object) : NULL;
    bool mapped = memory != NULL;
    char ends[2][24];

    Py_XDECREF(memory);
    PyOS_snprintf(ends[0], sizeof(ends[0]), "%#llx", (unsigned long long)self->iova);
    PyOS_snprintf(ends[1], sizeof(ends[1]), "%#llx", (unsigned long long)(self->iova + (self->size - 1)));
    return PyUnicode_FromFormat("<Mapping %s-%s %s%s>", ends[0], ends[1], rights[self->prot & VFIOPY_PROT_ALL],
                                mapped ? "" : " (unmapped)");
}

static PyMethodDef methods[] = {
    {"unmap", VFIOPY_FAST(mapping_unmap), METH_FASTCALL | METH_KEYWORDS,
     "unmap($self, *, timeout=0.0)\n--\n\n"
     "Take the memory away from the devices of the space.\n\n"
     "Args:\n"
     "    timeout: seconds to wait for the owners of pins to let go, after they were told; None: for ever.\n\n"
     "Raises:\n"
     "    PinnedError: pins are left; the mapping is as it was.\n"
     "    UnmappingError: it is being unmapped already.\n"
     "    ClosedError: it was unmapped before."},
    {"__enter__", mapping_enter, METH_NOARGS, NULL},
    {"__exit__", mapping_exit, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"iova", T_ULONGLONG, offsetof(struct vfiopy_mapping_object, iova), READONLY, "The first IOVA."},
    {"serial", T_ULONGLONG, offsetof(struct vfiopy_mapping_object, serial), READONLY,
     "Tells it from every other mapping of its space, before and after."},
    {"size", T_ULONGLONG, offsetof(struct vfiopy_mapping_object, size), READONLY, "Size in bytes."},
    {"address", T_ULONGLONG, offsetof(struct vfiopy_mapping_object, address), READONLY,
     "Virtual address of the memory in this process; 0 where it has none."},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef attributes[] = {
    {"prot", get_prot, NULL, "What devices may do.", NULL},
    {"last", get_last, NULL, "The last IOVA that belongs to the mapping.", NULL},
    {"memory", get_memory, NULL, "What is mapped. ClosedError: it is not mapped any more.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Memory mapped into an address space; made by ``AddressSpace.map()``.\n\n"
                "Attributes:\n"
                "    iova: the first IOVA.\n"
                "    last: the last IOVA.\n"
                "    size: bytes.\n"
                "    prot: what devices may do.\n"
                "    address: virtual address of the memory in this process; 0 where it has none.\n"
                "    memory: what is mapped; ClosedError once it is not mapped any more.\n\n"
                "``bool(mapping)`` says whether it is mapped. Dropping the object does not unmap: the device may be\n"
                "using the memory. It goes with ``unmap()``, at the end of a ``with`` block, or with the space.\n\n"
                "Threads: may be shared; the book serialises."},
    {Py_tp_new, mapping_new},
    {Py_tp_dealloc, mapping_dealloc},
    {Py_tp_traverse, mapping_traverse},
    {Py_tp_repr, mapping_repr},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, attributes},
    {Py_nb_bool, is_mapped},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vfiopy._native.Mapping",
    .basicsize = sizeof(struct vfiopy_mapping_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int vfiopy_mapping_init(PyObject *module)
{
    mapping_type = (PyTypeObject *)PyType_FromSpec(&spec);
    return mapping_type ? PyModule_AddObjectRef(module, "Mapping", (PyObject *)mapping_type) : -1;
}
