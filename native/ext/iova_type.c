/* The Python type IovaSpace: its life, its geometry and its figures. */
#include <stdlib.h>
#include <unistd.h>

#include "ext/iova_object.h"
#include "ext/raise.h"

/* Called under the book's lock: counts, and nothing else. */
static void retain(void *memory)
{
    Py_XINCREF((PyObject *)memory);
}

static PyObject *iova_new(PyTypeObject *type, PyObject *args, PyObject *keywords)
{
    static char *names[] = {"name", NULL};
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct vfiopy_iova_object *self;
    PyObject *name = NULL;

    if (!PyArg_ParseTupleAndKeywords(args, keywords, "|U:IovaSpace", names, &name))
        return NULL;
    self = (struct vfiopy_iova_object *)allocate(type, 0);
    if (!self)
        return NULL;
    self->process = vfiopy_process();
    self->pid = (int)getpid();
    self->name = name ? Py_NewRef(name) : PyUnicode_FromString("space");
    self->space = vfiopy_space_create((uint64_t)sysconf(_SC_PAGESIZE), retain);
    if (self->name && self->space)
        return (PyObject *)self;
    Py_DECREF((PyObject *)self);
    return PyErr_NoMemory();
}

int vfiopy_iova_raise_forked(PyObject *self)
{
    struct vfiopy_iova_object *object = (struct vfiopy_iova_object *)self;

    vfiopy_raise_state("ForkedError",
                       "space %R belongs to process %d; this is its child %d. "
                       "Open the device again in the child, or use the 'spawn' start method of multiprocessing",
                       object->name, object->pid, (int)getpid());
    return -1;
}

/* A forked child's collector must not wait for a lock of the parent's: what the book holds is leaked there. */
static bool is_alive(PyObject *self)
{
    return vfiopy_space_of(self) && vfiopy_iova_is_here(self);
}

static int visit_one(void *object, void *context)
{
    void **call = context;
    visitproc visit = (visitproc)(uintptr_t)call[0];

    return visit((PyObject *)object, call[1]);
}

static int iova_traverse(PyObject *self, visitproc visit, void *arg)
{
    void *call[2] = {(void *)(uintptr_t)visit, arg};

    Py_VISIT(Py_TYPE(self));
    return is_alive(self) ? vfiopy_space_visit(vfiopy_space_of(self), visit_one, call) : 0;
}

/* Callbacks are what makes cycles; memory stays until the book goes. */
static int iova_clear(PyObject *self)
{
    PyObject *callback;

    while (is_alive(self) && (callback = vfiopy_space_take_callback(vfiopy_space_of(self))))
        Py_DECREF(callback);
    return 0;
}

static void iova_dealloc(PyObject *self)
{
    struct vfiopy_iova_object *object = (struct vfiopy_iova_object *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    struct vfiopy_gone gone = {0};

    PyObject_GC_UnTrack(self);
    iova_clear(self);
    if (is_alive(self)) {
        vfiopy_space_forget(object->space, &gone);
        vfiopy_drop_gone(&gone);
        vfiopy_space_destroy(object->space);
    }
    Py_CLEAR(object->name);
    release(self);
    Py_DECREF(type);
}

/* --- geometry ------------------------------------------------------------------------------------------------ */

/* A range from a pair of ints. */
static int get_pair(PyObject *item, struct vfiopy_range *range)
{
    PyObject *pair = PySequence_Tuple(item), *first, *last;
    int result = -1;

    if (!pair)
        return -1;
    if (PyTuple_Size(pair) != 2) {
        PyErr_Format(PyExc_TypeError, "a range is a pair (first, last), not %R", item);
    } else {
        first = PyTuple_GetItem(pair, 0);
        last = PyTuple_GetItem(pair, 1);
        if (!vfiopy_get_u64(first, "first", &range->first) && !vfiopy_get_u64(last, "last", &range->last))
            result = 0;
    }
    Py_DECREF(pair);
    return result;
}

static PyObject *set_usable(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"ranges", "page_sizes", "max_mappings", NULL};
    struct vfiopy_failure failure = {0};
    struct vfiopy_range *ranges;
    uint64_t page_sizes, max_mappings = 0;
    PyObject *given[3], *sequence;
    Py_ssize_t count;
    int result = -1;

    if (vfiopy_iova_elsewhere(self) || vfiopy_arguments("set_usable", args, nargs, keywords, names, 2, given) ||
        vfiopy_get_u64(given[1], "page_sizes", &page_sizes) ||
        (given[2] && vfiopy_get_u64(given[2], "max_mappings", &max_mappings)))
        return NULL;
    sequence = PySequence_Tuple(given[0]);
    if (!sequence)
        return NULL;
    count = PyTuple_Size(sequence);
    ranges = calloc(count ? (size_t)count : 1, sizeof(*ranges));
    if (!ranges) {
        Py_DECREF(sequence);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        if (get_pair(PyTuple_GetItem(sequence, i), &ranges[i]))
            goto out;
    }
    result = vfiopy_space_set_usable(vfiopy_space_of(self), ranges, (size_t)count, page_sizes, max_mappings, &failure);
    if (result)
        vfiopy_raise_failure(self, "set_usable", &failure, NULL);
out:
    free(ranges);
    Py_DECREF(sequence);
    return result ? NULL : Py_NewRef(Py_None);
}

static PyObject *change_window(PyObject *self, PyObject *const *args, Py_ssize_t nargs, const char *operation,
                               int (*change)(struct vfiopy_space *, struct vfiopy_range, struct vfiopy_failure *))
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_range window;

    if (vfiopy_iova_elsewhere(self))
        return NULL;
    if (nargs != 2) {
        PyErr_Format(PyExc_TypeError, "%s() takes 2 arguments (first, last), not %zd", operation, nargs);
        return NULL;
    }
    if (vfiopy_get_u64(args[0], "first", &window.first) || vfiopy_get_u64(args[1], "last", &window.last))
        return NULL;
    failure.asked = window;
    if (change(vfiopy_space_of(self), window, &failure))
        return vfiopy_raise_failure(self, operation, &failure, NULL);
    Py_RETURN_NONE;
}

static PyObject *exclude(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return change_window(self, args, nargs, "exclude", vfiopy_space_exclude);
}

static PyObject *include(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    return change_window(self, args, nargs, "include", vfiopy_space_include);
}

static PyObject *set_transient(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    static const char *const operation = "set_transient";

    if (vfiopy_iova_elsewhere(self))
        return NULL;
    if (nargs != 0)
        return change_window(self, args, nargs, operation, vfiopy_space_set_transient);
    if (vfiopy_space_set_transient(vfiopy_space_of(self), (struct vfiopy_range){1, 0},
                                   &(struct vfiopy_failure){0}))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

PyObject *vfiopy_ranges_list(struct vfiopy_range *ranges, size_t count)
{
    PyObject *list;

    if (!ranges)
        return PyErr_NoMemory();
    list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; i < count && list; i++) {
        PyObject *pair = Py_BuildValue("KK", (unsigned long long)ranges[i].first, (unsigned long long)ranges[i].last);

        if (pair)
            PyList_SetItem(list, (Py_ssize_t)i, pair);
        else
            Py_CLEAR(list);
    }
    free(ranges);
    return list;
}

static PyObject *list_ranges(PyObject *self, enum vfiopy_ranges_of which)
{
    struct vfiopy_range *ranges;
    size_t count = 0;

    if (vfiopy_iova_elsewhere(self))
        return NULL;
    ranges = vfiopy_space_ranges(vfiopy_space_of(self), which, &count);
    return vfiopy_ranges_list(ranges, count);
}

static PyObject *usable(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return list_ranges(self, VFIOPY_USABLE);
}

static PyObject *excluded(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return list_ranges(self, VFIOPY_EXCLUDED_WINDOWS);
}

static PyObject *transient(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return list_ranges(self, VFIOPY_TRANSIENT_WINDOW);
}

static PyObject *free_ranges(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    return list_ranges(self, VFIOPY_FREE);
}

static Py_ssize_t iova_length(PyObject *self)
{
    struct vfiopy_stats stats;

    if (vfiopy_iova_elsewhere(self))
        return -1;
    vfiopy_space_stats(vfiopy_space_of(self), &stats);
    return (Py_ssize_t)(stats.mappings - stats.states[VFIOPY_RESERVED]);
}

static int iova_contains(PyObject *self, PyObject *value)
{
    uint64_t iova;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_u64(value, "iova", &iova))
        return -1;
    return vfiopy_space_has(vfiopy_space_of(self), iova);
}

static int iova_bool(PyObject *Py_UNUSED(self))
{
    return 1; /* an empty book is a book */
}

static PyObject *iova_repr(PyObject *self)
{
    struct vfiopy_iova_object *object = (struct vfiopy_iova_object *)self;

    if (!vfiopy_iova_is_here(self))
        return PyUnicode_FromFormat("<IovaSpace %R of process %d>", object->name, object->pid);
    return PyUnicode_FromFormat("<IovaSpace %R: %zd mappings>", object->name, iova_length(self));
}

static PyObject *get_name(PyObject *self, void *Py_UNUSED(ignored))
{
    return Py_NewRef(((struct vfiopy_iova_object *)self)->name);
}

PyMethodDef vfiopy_iova_space_methods[] = {
    {"set_usable", VFIOPY_FAST(set_usable), METH_FASTCALL | METH_KEYWORDS,
     "set_usable(ranges, page_sizes, max_mappings=0): what all mappers together can do"},
    {"exclude", VFIOPY_FAST(exclude), METH_FASTCALL, "exclude(first, last): a window that nothing may be mapped in"},
    {"include", VFIOPY_FAST(include), METH_FASTCALL, "include(first, last): undo one exclude"},
    {"set_transient", VFIOPY_FAST(set_transient), METH_FASTCALL,
     "set_transient(first, last): keep a window for transient mappings; without arguments: none"},
    {"usable", usable, METH_NOARGS, "usable(): [(first, last)]"},
    {"excluded", excluded, METH_NOARGS, "excluded(): [(first, last)]"},
    {"transient", transient, METH_NOARGS, "transient(): [(first, last)] with the window, or []"},
    {"free_ranges", free_ranges, METH_NOARGS, "free_ranges(): [(first, last)]"},
    {NULL, NULL, 0, NULL},
};

/* --- the type ------------------------------------------------------------------------------------------------ */

static PyGetSetDef iova_getset[] = {
    {"name", get_name, NULL, "for messages", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot iova_slots[] = {
    {Py_tp_doc, "The book of one DMA address space; see vfiopy.iova."},
    {Py_tp_new, iova_new},
    {Py_tp_dealloc, iova_dealloc},
    {Py_tp_traverse, iova_traverse},
    {Py_tp_clear, iova_clear},
    {Py_tp_repr, iova_repr},
    {Py_tp_getset, iova_getset},
    {Py_sq_length, iova_length},
    {Py_sq_contains, iova_contains},
    {Py_nb_bool, iova_bool},
    {0, NULL},
};

static PyType_Spec iova_spec = {
    .name = "vfiopy._native.IovaSpace",
    .basicsize = sizeof(struct vfiopy_iova_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = iova_slots,
};

/* A type takes one method table: the tables of all files go into it as descriptors. */
static int add_methods(PyObject *type)
{
    PyMethodDef *const tables[] = {vfiopy_iova_space_methods, vfiopy_iova_map_methods, vfiopy_iova_unmap_methods,
                                   vfiopy_iova_look_methods, vfiopy_iova_pin_methods, vfiopy_iova_stats_methods,
                                   vfiopy_iova_move_methods, vfiopy_iova_closing_methods};

    for (size_t table = 0; table < sizeof(tables) / sizeof(*tables); table++) {
        for (PyMethodDef *method = tables[table]; method->ml_name; method++) {
            PyObject *descriptor = PyDescr_NewMethod((PyTypeObject *)type, method);
            int result = descriptor ? PyObject_SetAttrString(type, method->ml_name, descriptor) : -1;

            Py_XDECREF(descriptor);
            if (result < 0)
                return -1;
        }
    }
    return 0;
}

static PyObject *type;

bool vfiopy_is_iova_space(PyObject *object)
{
    return PyObject_TypeCheck(object, (PyTypeObject *)type);
}

int vfiopy_iova_type_init(PyObject *module)
{
    static const struct {
        const char *name;
        int value;
    } constants[] = {
        {"KIND_HOST", VFIOPY_HOST},
        {"KIND_FILE", VFIOPY_FILE},
        {"KIND_MMIO", VFIOPY_MMIO},
        {"KIND_REMOTE", VFIOPY_REMOTE},
        {"STATE_LIVE", VFIOPY_LIVE},
        {"STATE_CLOSING", VFIOPY_CLOSING},
        {"STATE_UNMAPPING", VFIOPY_UNMAPPING},
        {"STATE_UNKNOWN", VFIOPY_UNKNOWN},
        {"MAPPER_TYPE1", VFIOPY_MAPPER_TYPE1},
        {"MAPPER_IOAS", VFIOPY_MAPPER_IOAS},
    };
    int result = -1;

    type = PyType_FromSpec(&iova_spec);
    if (type && !add_methods(type))
        result = PyModule_AddObjectRef(module, "IovaSpace", type);
    for (size_t i = 0; i < sizeof(constants) / sizeof(*constants) && !result; i++)
        result = PyModule_AddIntConstant(module, constants[i].name, constants[i].value);
    return result || vfiopy_iova_closing_init(module) ? -1 : vfiopy_iova_look_init(module);
}
