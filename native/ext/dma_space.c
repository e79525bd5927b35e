/* SpaceBase: the short way from a buffer to the book, for vfiopy.dma.AddressSpace. Its other ways are Python's. */
#include <Python.h>
#include <structmember.h>

#include "ext/dma_object.h"
#include "ext/module.h"

static PyTypeObject *space_type;

static struct vfiopy_space_base *of(PyObject *object)
{
    return (struct vfiopy_space_base *)object;
}

bool vfiopy_is_space_base(PyObject *object)
{
    return PyObject_TypeCheck(object, space_type) && of(object)->book;
}

static int space_init(PyObject *object, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"book", NULL};
    PyObject *book, *before = of(object)->book;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O:SpaceBase", names, &book))
        return -1;
    if (!vfiopy_is_iova_space(book)) {
        PyErr_Format(PyExc_TypeError, "the book of an address space is an IovaSpace, not %R", book);
        return -1;
    }
    if (vfiopy_iova_elsewhere(book))
        return -1;
    if (before) {
        PyErr_SetString(PyExc_TypeError, "an address space has one book for all its life");
        return -1;
    }
    of(object)->book = Py_NewRef(book);
    of(object)->process = vfiopy_process();
    return 0;
}

static int space_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(of(object)->book);
    return 0;
}

static void space_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(object);
    Py_CLEAR(of(object)->book);
    release(object);
    Py_DECREF(type);
}

/* --- map() --------------------------------------------------------------------------------------------------- */

enum { MEMORY, IOVA, PROT, LIMIT, ALIGNMENT, ARGUMENTS };

/* What the arguments of map() ask for, but for the memory itself. */
static int parse_wishes(PyObject *const *given, struct vfiopy_request *request)
{
    int prot = VFIOPY_PROT_ALL;

    *request = (struct vfiopy_request){.iova = VFIOPY_NO_FIXED_IOVA, .limit = UINT64_MAX, .fd = -1};
    if ((given[IOVA] && given[IOVA] != Py_None && vfiopy_get_fixed_iova(given[IOVA], &request->iova)) ||
        (given[PROT] && vfiopy_get_int(given[PROT], "prot", &prot)) ||
        (given[LIMIT] && vfiopy_get_u64(given[LIMIT], "limit", &request->limit)) ||
        (given[ALIGNMENT] && vfiopy_get_u64(given[ALIGNMENT], "alignment", &request->alignment)))
        return -1;
    request->prot = prot < 0 || prot > UINT8_MAX ? UINT8_MAX : (uint8_t)prot;
    return 0;
}

static PyObject *map_slowly(PyObject *object, PyObject *const *given)
{
    PyObject *prot = given[PROT] ? Py_NewRef(given[PROT]) : PyLong_FromLong(VFIOPY_PROT_ALL);
    PyObject *limit = given[LIMIT] ? Py_NewRef(given[LIMIT]) : PyLong_FromUnsignedLongLong(UINT64_MAX);
    PyObject *alignment = given[ALIGNMENT] ? Py_NewRef(given[ALIGNMENT]) : PyLong_FromLong(0);
    PyObject *mapping = NULL;

    if (prot && limit && alignment)
        mapping = PyObject_CallMethod(object, "_map_slowly", "OOOOO", given[MEMORY],
                                      given[IOVA] ? given[IOVA] : Py_None, prot, limit, alignment);
    Py_XDECREF(prot);
    Py_XDECREF(limit);
    Py_XDECREF(alignment);
    return mapping;
}

/*
 * Map what the request says. `memory` is the reference that goes to the book. None: mappers in Python have to be called
 * too, nothing has happened.
 */
static PyObject *map_request(PyObject *object, struct vfiopy_request *request, PyObject *memory)
{
    PyObject *book = of(object)->book;
    struct vfiopy_space *space = vfiopy_space_of(book);
    struct vfiopy_mapping_object *mapping = vfiopy_mapping_new(object);
    struct vfiopy_failure failure = {.asked = {request->iova, request->iova + (request->size - 1)}};
    int result;

    if (!mapping) {
        Py_DECREF(memory);
        return NULL;
    }
    request->memory = memory;
    if (vfiopy_space_has_mappers(space)) {
        Py_BEGIN_ALLOW_THREADS
        result = vfiopy_space_map(space, request, &mapping->iova, &mapping->serial, &failure);
        Py_END_ALLOW_THREADS
    } else {
        result = vfiopy_space_map(space, request, &mapping->iova, &mapping->serial, &failure);
    }
    if (result) {
        if (!failure.kept)
            Py_DECREF(memory);
        Py_DECREF((PyObject *)mapping);
        if (result == VFIOPY_IN_STEPS)
            Py_RETURN_NONE;
        return vfiopy_raise_failure(book, "map", &failure, NULL);
    }
    mapping->size = request->size;
    mapping->address = request->address;
    mapping->prot = request->prot;
    return (PyObject *)mapping;
}

static PyObject *space_map(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"memory", "iova", "prot", "limit", "alignment", NULL};
    PyObject *given[ARGUMENTS] = {NULL};
    struct vfiopy_host_memory *memory = NULL;
    struct vfiopy_request request;
    PyObject *mapping;

    if (nargs == 1 && !keywords) {
        given[MEMORY] = args[0];
    } else if (nargs > 1) {
        PyErr_Format(PyExc_TypeError, "map() takes 1 positional argument, but %zd were given", nargs);
        return NULL;
    } else if (vfiopy_arguments("map", args, nargs, keywords, names, 1, given)) {
        return NULL;
    }
    if (parse_wishes(given, &request))
        return NULL;
    if (vfiopy_space_is_direct(of(object)) && request.iova && !vfiopy_leftovers_wait()) { /* 0: refused in words */
        memory = vfiopy_plain_memory(given[MEMORY], request.prot);
        if (!memory && PyErr_Occurred())
            return NULL;
    }
    if (!memory)
        return map_slowly(object, given);
    request.address = memory->address;
    request.size = memory->size;
    mapping = map_request(object, &request, (PyObject *)memory);
    if (mapping != Py_None)
        return mapping;
    Py_DECREF(mapping);
    return map_slowly(object, given); /* a mapper in Python joined since we looked */
}

static PyObject *space_map_memory(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    struct vfiopy_request request;

    if (!of(object)->book || !vfiopy_space_is_here(of(object))) {
        PyErr_SetString(PyExc_RuntimeError, "check_open() comes first");
        return NULL;
    }
    if (vfiopy_iova_parse_request("_map_memory", args, nargs, keywords, &request))
        return NULL;
    return map_request(object, &request, Py_NewRef((PyObject *)request.memory));
}

static PyMethodDef methods[] = {
    {"map", VFIOPY_FAST(space_map), METH_FASTCALL | METH_KEYWORDS,
     "map($self, memory, *, iova=None, prot=3, limit=0xffffffffffffffff, alignment=0)\n--\n\n"
     "Make memory reachable for the devices of this space.\n\n"
     "Args:\n"
     "    memory: a page-aligned buffer (``mmap``, numpy array), ``file_memory()``, or a ``Memory``. It is kept alive\n"
     "        until it is unmapped.\n"
     "    iova: where, but never 0; None lets the book choose.\n"
     "    prot: what devices may do: ``Prot.READ``, ``Prot.WRITE`` or ``Prot.RW``.\n"
     "    limit: the highest IOVA that may be used, for devices with few address lines.\n"
     "    alignment: of a chosen IOVA, bytes; 0 for what suits the memory's page sizes best.\n\n"
     "Raises:\n"
     "    AlignmentError, MemoryKindError: this memory cannot be mapped as it is; the message says what can.\n"
     "    OverlapError: something is mapped there.\n"
     "    IovaRangeError: 0, or outside of what IOMMU, reserved windows or ``limit`` allow.\n"
     "    NoSpaceError: no hole is big enough, or the kernel takes no more mappings.\n"
     "    MemlockError: RLIMIT_MEMLOCK; the message says how much is charged."},
    {"_map_memory", VFIOPY_FAST(space_map_memory), METH_FASTCALL | METH_KEYWORDS,
     "Map by the arguments of IovaSpace.map; returns a Mapping, or None where mappers in Python have to be called too. "
     "For AddressSpace."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"book", T_OBJECT_EX, offsetof(struct vfiopy_space_base, book), READONLY, "The native IOVA space below."},
    {"_direct", T_BOOL, offsetof(struct vfiopy_space_base, direct), 0,
     "For AddressSpace: it is open, and nothing but the book has to be asked to map host memory."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "SpaceBase(book)\n--\n\nThe native part of vfiopy.dma.AddressSpace."},
    {Py_tp_init, space_init},
    {Py_tp_dealloc, space_dealloc},
    {Py_tp_traverse, space_traverse},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vfiopy._native.SpaceBase",
    .basicsize = sizeof(struct vfiopy_space_base),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

/* A type takes one method table. */
static int add_methods(PyMethodDef *method)
{
    for (; method->ml_name; method++) {
        PyObject *descriptor = PyDescr_NewMethod(space_type, method);
        int result = descriptor ? PyObject_SetAttrString((PyObject *)space_type, method->ml_name, descriptor) : -1;

        Py_XDECREF(descriptor);
        if (result < 0)
            return -1;
    }
    return 0;
}

int vfiopy_dma_types_init(PyObject *module)
{
    space_type = (PyTypeObject *)PyType_FromSpec(&spec);
    if (!space_type || add_methods(vfiopy_space_many_methods) ||
        PyModule_AddObjectRef(module, "SpaceBase", (PyObject *)space_type) < 0)
        return -1;
    return vfiopy_lives_init(module) || vfiopy_host_memory_init(module) || vfiopy_mapping_init(module) ? -1 : 0;
}
