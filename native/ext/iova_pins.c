/* IovaSpace: owners and pins. */
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "ext/iova_methods.h"
#include "ext/iova_object.h"

static PyObject *add_owner(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"name", "callback", NULL};
    PyObject *given[2], *callback, *utf8;
    const char *name;
    uint32_t owner;

    if (vfiopy_iova_elsewhere(self) || vfiopy_arguments("add_owner", args, nargs, keywords, names, 1, given))
        return NULL;
    callback = given[1] == Py_None ? NULL : given[1];
    if (callback && !PyCallable_Check(callback)) {
        PyErr_Format(PyExc_TypeError, "callback must be callable as callback(iova, size), not %R", callback);
        return NULL;
    }
    utf8 = PyUnicode_AsUTF8String(given[0]);
    name = utf8 ? PyBytes_AsString(utf8) : NULL;
    if (!name) {
        Py_XDECREF(utf8);
        return NULL;
    }
    Py_XINCREF(callback);
    owner = vfiopy_space_add_owner(vfiopy_space_of(self), name, callback);
    Py_DECREF(utf8);
    if (owner)
        return PyLong_FromUnsignedLong(owner);
    Py_XDECREF(callback);
    return PyErr_NoMemory();
}

static PyObject *remove_owner(PyObject *self, PyObject *argument)
{
    struct vfiopy_failure failure = {0};
    void *callback = NULL;
    uint64_t owner;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_u64(argument, "owner", &owner))
        return NULL;
    if (vfiopy_space_remove_owner(vfiopy_space_of(self), owner > UINT32_MAX ? UINT32_MAX : (uint32_t)owner,
                                  &callback, &failure))
        return vfiopy_raise_failure(self, "remove_owner", &failure, NULL);
    Py_XDECREF((PyObject *)callback);
    Py_RETURN_NONE;
}

static int get_owner(PyObject *value, uint32_t *owner)
{
    uint64_t number;

    if (!value) {
        *owner = 0;
        return 0;
    }
    if (vfiopy_get_u64(value, "owner", &number))
        return -1;
    *owner = number > UINT32_MAX ? UINT32_MAX : (uint32_t)number;
    return 0;
}

/* A list with a page frame number or None for each page. Without the GIL pages are looked up, a system call a batch. */
static PyObject *pfn_list(PyObject *self, struct vfiopy_range range)
{
    struct vfiopy_space *space = vfiopy_space_of(self);
    size_t count = vfiopy_space_page_count(space, range);
    uint64_t *pfns = calloc(count, sizeof(*pfns));
    struct vfiopy_failure failure = {.asked = range};
    PyObject *list;
    int result;

    if (!pfns)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);

    result = vfiopy_space_pfns(space, range, pagemap, pfns, &failure);
    if (pagemap >= 0)
        close(pagemap);
    Py_END_ALLOW_THREADS
    list = result ? vfiopy_raise_failure(self, "pin", &failure, NULL) : PyList_New((Py_ssize_t)count);
    for (size_t i = 0; i < count && list; i++) {
        PyObject *pfn = pfns[i] ? PyLong_FromUnsignedLongLong(pfns[i]) : Py_NewRef(Py_None);

        if (pfn)
            PyList_SetItem(list, (Py_ssize_t)i, pfn);
        else
            Py_CLEAR(list);
    }
    free(pfns);
    return list;
}

static PyObject *pin(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"iova", "size", "prot", "owner", "peer", "pfns", NULL};
    struct vfiopy_failure failure = {0};
    PyObject *given[6], *list;
    bool peer, pfns;
    uint32_t owner;
    uint8_t prot;

    if (vfiopy_iova_elsewhere(self) || vfiopy_arguments("pin", args, nargs, keywords, names, 3, given) ||
        vfiopy_get_range(given[0], given[1], &failure.asked) || vfiopy_get_prot(given[2], &prot) ||
        get_owner(given[3], &owner) || vfiopy_get_flag(given[4], &peer) || vfiopy_get_flag(given[5], &pfns))
        return NULL;
    if (vfiopy_space_pin(vfiopy_space_of(self), failure.asked, prot, owner, peer, &failure))
        return vfiopy_raise_failure(self, "pin", &failure, NULL);
    if (!pfns)
        Py_RETURN_NONE;
    list = pfn_list(self, failure.asked);
    if (!list)
        vfiopy_space_unpin(vfiopy_space_of(self), failure.asked, owner, &failure);
    return list;
}

static PyObject *unpin(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"iova", "size", "owner", NULL};
    struct vfiopy_failure failure = {0};
    PyObject *given[3];
    uint32_t owner;

    if (vfiopy_iova_elsewhere(self) || vfiopy_arguments("unpin", args, nargs, keywords, names, 2, given) ||
        vfiopy_get_range(given[0], given[1], &failure.asked) || get_owner(given[2], &owner))
        return NULL;
    if (vfiopy_space_unpin(vfiopy_space_of(self), failure.asked, owner, &failure))
        return vfiopy_raise_failure(self, "unpin", &failure, NULL);
    Py_RETURN_NONE;
}

PyMethodDef vfiopy_iova_pin_methods[] = {
    {"add_owner", VFIOPY_FAST(add_owner), METH_FASTCALL | METH_KEYWORDS,
     "add_owner(name, callback=None): who holds pins; callback(iova, size) is called before a mapping goes"},
    {"remove_owner", remove_owner, METH_O, "remove_owner(owner): refused while it holds pins"},
    {"pin", VFIOPY_FAST(pin), METH_FASTCALL | METH_KEYWORDS,
     "pin(iova, size, prot, owner=0, peer=False, pfns=False): count one more on each page: all or none; a list of page "
     "frame numbers if they are asked for"},
    {"unpin", VFIOPY_FAST(unpin), METH_FASTCALL | METH_KEYWORDS,
     "unpin(iova, size, owner=0): count one less on each page: all or none"},
    {NULL, NULL, 0, NULL},
};
