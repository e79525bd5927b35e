/* What methods of IovaSpace answer with: errors, views, lists. */
#include <stdlib.h>
#include <unistd.h>

#include "ext/iova_object.h"
#include "ext/raise.h"

/* --- errors -------------------------------------------------------------------------------------------------- */

int vfiopy_iova_raise_forked(PyObject *self)
{
    struct vfiopy_iova_object *object = (struct vfiopy_iova_object *)self;

    vfiopy_raise_state("ForkedError",
                       "space %R belongs to process %d; this is its child %d. "
                       "Open the device again in the child, or use the 'spawn' start method of multiprocessing",
                       object->name, object->pid, (int)getpid());
    return -1;
}

static const char *const result_names[] = {
    [VFIOPY_OK] = "ok",
    [VFIOPY_NO_MEMORY] = "no_memory",
    [VFIOPY_BAD_SIZE] = "bad_size",
    [VFIOPY_BAD_PROT] = "bad_prot",
    [VFIOPY_BAD_ALIGNMENT] = "bad_alignment",
    [VFIOPY_BAD_RANGES] = "bad_ranges",
    [VFIOPY_BAD_KIND] = "bad_kind",
    [VFIOPY_OVERLAP] = "overlap",
    [VFIOPY_BUSY] = "busy",
    [VFIOPY_OUTSIDE] = "outside",
    [VFIOPY_EXCLUDED] = "excluded",
    [VFIOPY_OVER_LIMIT] = "over_limit",
    [VFIOPY_NO_SPACE] = "no_space",
    [VFIOPY_TOO_MANY] = "too_many",
    [VFIOPY_NOT_MAPPED] = "not_mapped",
    [VFIOPY_CUTS] = "cuts",
    [VFIOPY_NO_ACCESS] = "no_access",
    [VFIOPY_PINNED] = "pinned",
    [VFIOPY_IS_UNMAPPING] = "is_unmapping",
    [VFIOPY_IN_STEPS] = "in_steps",
    [VFIOPY_NOT_PINNED] = "not_pinned",
    [VFIOPY_TOO_MANY_PINS] = "too_many_pins",
    [VFIOPY_NO_OWNER] = "no_owner",
    [VFIOPY_OWNER_HOLDS] = "owner_holds",
    [VFIOPY_NO_MAPPER] = "no_mapper",
    [VFIOPY_KERNEL] = "kernel",
    [VFIOPY_SHORT] = "short",
    [VFIOPY_NO_ADDRESS] = "no_address",
    [VFIOPY_REVOKED] = "revoked",
    [VFIOPY_HAS_ADDRESS] = "has_address",
};

/* The words are Python's: vfiopy/iova/failures.py, imported when first needed. */
static PyObject *failure_maker(void)
{
    static PyObject *maker;

    if (!maker) {
        PyObject *module = PyImport_ImportModule("vfiopy.iova.failures");

        if (module)
            maker = PyObject_GetAttrString(module, "failure");
        Py_XDECREF(module);
    }
    return maker;
}

PyObject *vfiopy_raise_failure(PyObject *self, const char *operation, const struct vfiopy_failure *failure,
                               PyObject *holders)
{
    PyObject *maker, *error = NULL;

    if (failure->result == VFIOPY_NO_MEMORY) {
        Py_XDECREF(holders);
        return PyErr_NoMemory();
    }
    maker = failure_maker();
    if (maker)
        error = PyObject_CallFunction(
            maker, "sOs(KKKKiKziI)O", result_names[failure->result], ((struct vfiopy_iova_object *)self)->name,
            operation, (unsigned long long)failure->asked.first,
            (unsigned long long)failure->asked.last, (unsigned long long)failure->clash.first,
            (unsigned long long)failure->clash.last, failure->clash.state, (unsigned long long)failure->value,
            failure->call, failure->error, (unsigned int)failure->mapper, holders ? holders : Py_None);
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    Py_XDECREF(holders);
    return NULL;
}

/* --- views and lists ----------------------------------------------------------------------------------------- */

static PyTypeObject *view_type;

static PyStructSequence_Field view_fields[] = {
    {"iova", "first IOVA"},
    {"size", "bytes"},
    {"prot", "what devices may do: 1 read, 2 write, 3 both"},
    {"address", "where this process has the memory, or 0"},
    {"kind", "KIND_*"},
    {"state", "STATE_*"},
    {"memory", "the object that the mapping keeps alive"},
    {"fd", "file descriptor of the memory, or -1"},
    {"fd_offset", "where in the file it begins, bytes"},
    {"pins", "sum of the pin counts of all its pages"},
    {"serial", "tells it from every other mapping of this book, before and after"},
    {"revoked", "its device memory was taken away by the exporter"},
    {NULL, NULL},
};

static PyStructSequence_Desc view_description = {
    .name = "vfiopy._native.IovaMapping",
    .doc = "A mapping as it was when it was looked up: the first seven fields as a tuple, the rest as attributes.",
    .fields = view_fields,
    .n_in_sequence = 7,
};

int vfiopy_iova_views_init(PyObject *module)
{
    view_type = PyStructSequence_NewType(&view_description);
    if (!view_type)
        return -1;
    return PyModule_AddObjectRef(module, "IovaMapping", (PyObject *)view_type);
}

PyObject *vfiopy_view_object(const struct vfiopy_view *view)
{
    PyObject *memory = view->memory ? view->memory : Py_NewRef(Py_None);
    PyObject *object = PyStructSequence_New(view_type);
    PyObject *values[11];

    if (!object) {
        Py_DECREF(memory);
        return NULL;
    }
    values[0] = PyLong_FromUnsignedLongLong(view->iova.first);
    values[1] = PyLong_FromUnsignedLongLong(view->iova.last - view->iova.first + 1);
    values[2] = PyLong_FromLong(view->prot);
    values[3] = PyLong_FromUnsignedLongLong(view->address);
    values[4] = PyLong_FromLong(view->kind);
    values[5] = PyLong_FromLong(view->state);
    values[6] = PyLong_FromLong(view->fd);
    values[7] = PyLong_FromUnsignedLongLong(view->fd_offset);
    values[8] = PyLong_FromUnsignedLongLong(view->pins);
    values[9] = PyLong_FromUnsignedLongLong(view->serial);
    values[10] = PyBool_FromLong(view->revoked);
    PyStructSequence_SetItem(object, 6, memory);
    for (int i = 0; i < 11; i++)
        PyStructSequence_SetItem(object, i < 6 ? i : i + 1, values[i]);
    for (int i = 0; i < 11; i++) {
        if (!values[i]) {
            Py_DECREF(object);
            return NULL;
        }
    }
    return object;
}

PyObject *vfiopy_views_list(struct vfiopy_views *views, PyObject *(*make)(const struct vfiopy_view *view))
{
    PyObject *list = PyList_New((Py_ssize_t)views->count);

    for (size_t i = 0; i < views->count; i++) {
        PyObject *item = list ? make(&views->items[i]) : NULL;

        if (item) {
            PyList_SetItem(list, (Py_ssize_t)i, item);
        } else if (list) {
            Py_CLEAR(list); /* an error is set; go on to drop the other references */
        } else {
            Py_XDECREF((PyObject *)views->items[i].memory);
        }
    }
    free(views->items);
    return list;
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

PyObject *vfiopy_holders_list(PyObject *self, struct vfiopy_range range)
{
    size_t count;
    struct vfiopy_holder *holders = vfiopy_space_holders(vfiopy_space_of(self), range, &count);
    PyObject *list;

    if (!holders)
        return PyErr_NoMemory();
    list = PyList_New(0);
    for (size_t i = 0; i < count && list; i++) {
        PyObject *item = Py_BuildValue("sIKKK", holders[i].name, (unsigned int)holders[i].owner,
                                       (unsigned long long)holders[i].pins, (unsigned long long)holders[i].iova,
                                       (unsigned long long)holders[i].size);

        if (!item || PyList_Append(list, item) < 0)
            Py_CLEAR(list);
        Py_XDECREF(item);
    }
    free(holders);
    return list;
}

void vfiopy_drop_gone(struct vfiopy_gone *gone)
{
    void *memories[64];
    size_t count;

    while ((count = vfiopy_gone_take(gone, memories, 64))) {
        for (size_t i = 0; i < count; i++)
            Py_XDECREF((PyObject *)memories[i]);
    }
}
