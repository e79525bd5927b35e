/* IovaSpace: its geometry, that is, which IOVAs may be used. */
#include <stdlib.h>

#include "ext/iova_methods.h"
#include "ext/iova_object.h"

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

PyMethodDef vfiopy_iova_geometry_methods[] = {
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
