/* IovaSpace: looking things up. */
#include <stdlib.h>

#include "ext/iova_object.h"

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
    {NULL, NULL},
};

static PyStructSequence_Desc view_description = {
    .name = "vfiopy._native.IovaMapping",
    .doc = "A mapping as it was when it was looked up: the first seven fields as a tuple, the rest as attributes.",
    .fields = view_fields,
    .n_in_sequence = 7,
};

int vfiopy_iova_look_init(PyObject *module)
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
    PyObject *values[10];

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
    PyStructSequence_SetItem(object, 6, memory);
    for (int i = 0; i < 10; i++)
        PyStructSequence_SetItem(object, i < 6 ? i : i + 1, values[i]);
    for (int i = 0; i < 10; i++) {
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

static int two(const char *function, Py_ssize_t nargs)
{
    if (nargs == 2)
        return 0;
    PyErr_Format(PyExc_TypeError, "%s() takes 2 arguments, not %zd", function, nargs);
    return -1;
}

static PyObject *find(PyObject *self, PyObject *argument)
{
    struct vfiopy_view view;
    uint64_t iova;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_u64(argument, "iova", &iova))
        return NULL;
    if (!vfiopy_space_find(vfiopy_space_of(self), iova, &view))
        Py_RETURN_NONE;
    return vfiopy_view_object(&view);
}

static PyObject *list_range(PyObject *self, struct vfiopy_range range,
                            int (*search)(struct vfiopy_space *, struct vfiopy_range, struct vfiopy_views *))
{
    struct vfiopy_views views = {0};
    int result = search(vfiopy_space_of(self), range, &views);
    PyObject *list = vfiopy_views_list(&views, vfiopy_view_object);

    if (result) {
        Py_XDECREF(list);
        return PyErr_NoMemory();
    }
    return list;
}

static PyObject *overlapping(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_range range;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_bounds("overlapping", args, nargs, &range))
        return NULL;
    return list_range(self, range, vfiopy_space_overlapping);
}

static PyObject *mappings(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    if (vfiopy_iova_elsewhere(self))
        return NULL;
    return list_range(self, (struct vfiopy_range){0, UINT64_MAX}, vfiopy_space_overlapping);
}

static PyObject *by_address(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_range range;

    if (vfiopy_iova_elsewhere(self) || two("by_address", nargs) || vfiopy_get_range(args[0], args[1], &range))
        return NULL;
    return list_range(self, range, vfiopy_space_by_address);
}

static PyObject *holders(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_range range;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_bounds("holders", args, nargs, &range))
        return NULL;
    return vfiopy_holders_list(self, range);
}

static PyObject *pinned(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_range range, *runs;
    size_t count = 0;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_bounds("pinned", args, nargs, &range))
        return NULL;
    runs = vfiopy_space_pinned(vfiopy_space_of(self), range, &count);
    return vfiopy_ranges_list(runs, count);
}

static PyObject *segment(const struct vfiopy_view *view)
{
    PyObject *memory = view->memory ? view->memory : Py_NewRef(Py_None);

    return Py_BuildValue("KKN", (unsigned long long)view->address,
                         (unsigned long long)(view->iova.last - view->iova.first + 1), memory);
}

static PyObject *check(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_views views = {0};
    PyObject *list;
    uint8_t prot;

    if (nargs != 3) {
        PyErr_Format(PyExc_TypeError, "check() takes 3 arguments (iova, size, prot), not %zd", nargs);
        return NULL;
    }
    if (vfiopy_iova_elsewhere(self) || vfiopy_get_range(args[0], args[1], &failure.asked) ||
        vfiopy_get_prot(args[2], &prot))
        return NULL;
    if (!vfiopy_space_check(vfiopy_space_of(self), failure.asked, prot, &views, &failure))
        return vfiopy_views_list(&views, segment);
    list = vfiopy_views_list(&views, segment); /* for the references */
    Py_XDECREF(list);
    return list ? vfiopy_raise_failure(self, "check", &failure, NULL) : NULL;
}

PyMethodDef vfiopy_iova_look_methods[] = {
    {"find", find, METH_O, "find(iova): the mapping that contains it, or None"},
    {"overlapping", VFIOPY_FAST(overlapping), METH_FASTCALL, "overlapping(first, last): mappings that touch it"},
    {"mappings", mappings, METH_NOARGS, "mappings(): all of them, by IOVA"},
    {"by_address", VFIOPY_FAST(by_address), METH_FASTCALL,
     "by_address(address, size): mappings of memory that this process has there"},
    {"holders", VFIOPY_FAST(holders), METH_FASTCALL,
     "holders(first, last): (name, owner, pins, iova, size) for each owner of pins in each mapping"},
    {"pinned", VFIOPY_FAST(pinned), METH_FASTCALL, "pinned(first, last): runs of pinned pages, [(first, last)]"},
    {"check", VFIOPY_FAST(check), METH_FASTCALL,
     "check(iova, size, prot): what a device finds there, [(address, length, memory)]"},
    {NULL, NULL, 0, NULL},
};
