/* IovaSpace: looking things up. */

#include "ext/iova_methods.h"
#include "ext/iova_object.h"

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
