/* IovaSpace: figures, and the debug walk. */
#include <unistd.h>

#include "ext/iova_methods.h"
#include "ext/iova_object.h"
#include "ext/raise.h"

static int add_figure(PyObject *dict, const char *key, PyObject *value)
{
    int result = value ? PyDict_SetItemString(dict, key, value) : -1;

    Py_XDECREF(value);
    return result;
}

static PyObject *counts(const uint64_t *values, const char *const *names, int count)
{
    PyObject *dict = PyDict_New();

    for (int i = 0; i < count && dict; i++) {
        if (add_figure(dict, names[i], PyLong_FromUnsignedLongLong(values[i])))
            Py_CLEAR(dict);
    }
    return dict;
}

/* 2**64 does not fit where spans do: add up in Python. */
static PyObject *sum_of(uint64_t a, uint64_t b)
{
    PyObject *left = PyLong_FromUnsignedLongLong(a), *right = PyLong_FromUnsignedLongLong(b), *sum = NULL;

    if (left && right)
        sum = PyNumber_Add(left, right);
    Py_XDECREF(left);
    Py_XDECREF(right);
    return sum;
}

static PyObject *stats_method(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    static const char *const kinds[] = {"host", "file", "mmio", "remote"};
    static const char *const states[] = {"reserved", "live", "closing", "unmapping", "unknown"};
    uint64_t page_size = (uint64_t)sysconf(_SC_PAGESIZE);
    struct vfiopy_stats stats;
    PyObject *dict;

    if (vfiopy_iova_elsewhere(self))
        return NULL;
    dict = PyDict_New();
    vfiopy_space_stats(vfiopy_space_of(self), &stats);
    double free_bytes = (double)stats.free_spans + (double)stats.free_ranges;
    double largest = stats.free_ranges ? (double)stats.largest_free_span + 1 : 0;
    if (!dict || add_figure(dict, "mappings", PyLong_FromUnsignedLongLong(stats.mappings)) ||
        add_figure(dict, "mapped_bytes", PyLong_FromUnsignedLongLong(stats.mapped_bytes)) ||
        add_figure(dict, "max_mappings", PyLong_FromUnsignedLongLong(stats.max_mappings)) ||
        add_figure(dict, "page_sizes", PyLong_FromUnsignedLongLong(stats.page_sizes)) ||
        add_figure(dict, "mappings_by_kind", counts(stats.kind_mappings, kinds, VFIOPY_KINDS)) ||
        add_figure(dict, "bytes_by_kind", counts(stats.kind_bytes, kinds, VFIOPY_KINDS)) ||
        add_figure(dict, "mappings_by_state", counts(stats.states, states, VFIOPY_UNKNOWN + 1)) ||
        add_figure(dict, "free_ranges", PyLong_FromUnsignedLongLong(stats.free_ranges)) ||
        add_figure(dict, "free_bytes", sum_of(stats.free_spans, stats.free_ranges)) ||
        add_figure(dict, "largest_free_bytes", sum_of(stats.largest_free_span, stats.free_ranges ? 1 : 0)) ||
        add_figure(dict, "fragmentation", PyFloat_FromDouble(free_bytes > 0 ? 1 - largest / free_bytes : 0)) ||
        add_figure(dict, "pins", PyLong_FromUnsignedLongLong(stats.pins)) ||
        add_figure(dict, "pinned_pages", PyLong_FromUnsignedLongLong(stats.pinned_pages)) ||
        add_figure(dict, "pinned_bytes", PyLong_FromUnsignedLongLong(stats.pinned_pages * page_size)) ||
        add_figure(dict, "pin_memory", PyLong_FromUnsignedLongLong(stats.pin_bytes)) ||
        add_figure(dict, "book_memory", PyLong_FromUnsignedLongLong(stats.book_bytes)) ||
        add_figure(dict, "kernel_mappers", PyLong_FromUnsignedLongLong(stats.mappers)) ||
        add_figure(dict, "owners", PyLong_FromUnsignedLongLong(stats.owners)))
        Py_CLEAR(dict);
    return dict;
}

static PyObject *verify(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    const char *wrong;

    if (vfiopy_iova_elsewhere(self))
        return NULL;
    wrong = vfiopy_space_verify(vfiopy_space_of(self));
    if (!wrong)
        Py_RETURN_NONE;
    vfiopy_raise_state("StateError", "space %R: %s: this is a bug in vfiopy", ((struct vfiopy_iova_object *)self)->name,
                       wrong);
    return NULL;
}

static PyObject *kernel_mappers(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    struct vfiopy_mapper_view views[VFIOPY_MAX_MAPPERS];
    PyObject *list;
    size_t count;

    if (vfiopy_iova_elsewhere(self))
        return NULL;
    count = vfiopy_space_mappers(vfiopy_space_of(self), views);
    list = PyList_New((Py_ssize_t)count);
    for (size_t i = 0; i < count && list; i++) {
        PyObject *item = Py_BuildValue("IiiINKK", (unsigned int)views[i].token, (int)views[i].kind, views[i].fd,
                                       (unsigned int)views[i].object, PyBool_FromLong(views[i].active),
                                       (unsigned long long)views[i].mappings, (unsigned long long)views[i].charged);

        if (item)
            PyList_SetItem(list, (Py_ssize_t)i, item);
        else
            Py_CLEAR(list);
    }
    return list;
}

PyMethodDef vfiopy_iova_stats_methods[] = {
    {"stats", stats_method, METH_NOARGS, "stats(): figures by name"},
    {"kernel_mappers", kernel_mappers, METH_NOARGS,
     "kernel_mappers(): (token, kind, fd, object_id, active, mappings, charged bytes) of each"},
    {"verify", verify, METH_NOARGS, "verify(): walk the whole book; raises StateError if it is not right"},
    {NULL, NULL, 0, NULL},
};
