/* The Python type IovaSpace: its life, and its methods put together. */
#include <unistd.h>

#include "ext/iova_methods.h"
#include "ext/iova_object.h"

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

/* Devices can reach this memory: it is never let go. Where there is no module any more to keep it, it is leaked. */
static void keep(PyObject *self, struct vfiopy_gone *reachable)
{
    PyObject *type, *value, *traceback, *module = NULL;
    unsigned long long count = 0;
    void *memory;

    PyErr_Fetch(&type, &value, &traceback);
    while (vfiopy_gone_pop(reachable, &memory)) {
        PyObject *kept = NULL;

        if (memory == Py_None)
            continue; /* somebody else sees to it */
        count++;
        if (!module)
            module = PyImport_ImportModule("vfiopy.iova.closing");
        if (module)
            kept = PyObject_CallMethod(module, "keep_for_ever", "O", (PyObject *)memory);
        PyErr_Clear();
        if (kept)
            Py_DECREF((PyObject *)memory);
        Py_XDECREF(kept);
    }
    Py_XDECREF(module);
    if (count && PyErr_ResourceWarning(NULL, 1,
                                       "space %R was dropped while kernel mappers have %llu mappings of it: their memory "
                                       "is never freed. Unmap first, or call remove_kernel_mapper() once the container "
                                       "or IOAS is gone",
                                       ((struct vfiopy_iova_object *)self)->name, count))
        PyErr_WriteUnraisable(((struct vfiopy_iova_object *)self)->name);
    PyErr_Restore(type, value, traceback);
}

static void iova_dealloc(PyObject *self)
{
    struct vfiopy_iova_object *object = (struct vfiopy_iova_object *)self;
    PyTypeObject *type = Py_TYPE(self);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);
    struct vfiopy_gone gone = {0}, reachable = {0};

    PyObject_GC_UnTrack(self);
    iova_clear(self);
    if (is_alive(self)) {
        vfiopy_space_forget(object->space, &gone, &reachable);
        vfiopy_drop_gone(&gone);
        keep(self, &reachable);
        vfiopy_space_destroy(object->space);
    }
    Py_CLEAR(object->name);
    release(self);
    Py_DECREF(type);
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
    PyMethodDef *const tables[] = {vfiopy_iova_geometry_methods, vfiopy_iova_map_methods, vfiopy_iova_unmap_methods,
                                   vfiopy_iova_look_methods, vfiopy_iova_pin_methods, vfiopy_iova_stats_methods,
                                   vfiopy_iova_move_methods, vfiopy_iova_closing_methods, vfiopy_iova_step_methods};

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
    if (result || vfiopy_iova_closing_init(module) || vfiopy_iova_steps_init(module))
        return -1;
    return vfiopy_iova_views_init(module);
}
