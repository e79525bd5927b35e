/* IovaSpace: memory that gets another address, or another process, or is taken away, while devices use it. */
#include "ext/iova_methods.h"
#include "ext/iova_object.h"

static PyObject *lose_addresses(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_range range;
    uint64_t bytes;
    int result;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_bounds("lose_addresses", args, nargs, &range))
        return NULL;
    failure.asked = range;
    Py_BEGIN_ALLOW_THREADS
    result = vfiopy_space_lose_addresses(vfiopy_space_of(self), range, &bytes, &failure);
    Py_END_ALLOW_THREADS
    if (result)
        return vfiopy_raise_failure(self, "lose_addresses", &failure, NULL);
    return PyLong_FromUnsignedLongLong(bytes);
}

static PyObject *set_address(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"iova", "size", "address", "memory", NULL};
    struct vfiopy_failure failure = {0};
    PyObject *given[4];
    uint64_t address;
    void *memory;
    int result;

    if (vfiopy_iova_elsewhere(self) || vfiopy_arguments("set_address", args, nargs, keywords, names, 4, given) ||
        vfiopy_get_range(given[0], given[1], &failure.asked) || vfiopy_get_u64(given[2], "address", &address))
        return NULL;
    memory = Py_NewRef(given[3]);
    Py_BEGIN_ALLOW_THREADS
    result = vfiopy_space_set_address(vfiopy_space_of(self), failure.asked, address, &memory, &failure);
    Py_END_ALLOW_THREADS
    Py_XDECREF((PyObject *)memory); /* the old one; the new one where it failed */
    if (result)
        return vfiopy_raise_failure(self, "set_address", &failure, NULL);
    Py_RETURN_NONE;
}

static PyObject *change_process(PyObject *self, PyObject *argument)
{
    struct vfiopy_failure failure = {0};
    uint64_t token;
    int result;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_u64(argument, "token", &token))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = vfiopy_space_change_process(vfiopy_space_of(self), token > UINT32_MAX ? 0 : (uint32_t)token, &failure);
    Py_END_ALLOW_THREADS
    if (result)
        return vfiopy_raise_failure(self, "change_process", &failure, NULL);
    Py_RETURN_NONE;
}

static int get_one(const char *function, PyObject *const *args, Py_ssize_t nargs, uint64_t *iova, uint64_t *serial)
{
    if (nargs >= 2)
        return vfiopy_get_u64(args[0], "iova", iova) || vfiopy_get_u64(args[1], "serial", serial) ? -1 : 0;
    PyErr_Format(PyExc_TypeError, "%s() takes an IOVA and a serial number", function);
    return -1;
}

static PyObject *set_revoked(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    uint64_t iova, serial;
    bool revoked = true;

    if (vfiopy_iova_elsewhere(self) || get_one("set_revoked", args, nargs, &iova, &serial) ||
        (nargs > 2 && vfiopy_get_flag(args[2], &revoked)))
        return NULL;
    return PyBool_FromLong(vfiopy_space_set_revoked(vfiopy_space_of(self), iova, serial, revoked));
}

static PyObject *restore(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct vfiopy_failure failure = {0};
    uint64_t iova, serial;
    int result;

    if (vfiopy_iova_elsewhere(self) || get_one("restore", args, nargs, &iova, &serial))
        return NULL;
    failure.asked = (struct vfiopy_range){iova, iova};
    Py_BEGIN_ALLOW_THREADS
    result = vfiopy_space_restore(vfiopy_space_of(self), iova, serial, &failure);
    Py_END_ALLOW_THREADS
    if (result)
        return vfiopy_raise_failure(self, "restore", &failure, NULL);
    Py_RETURN_NONE;
}

PyMethodDef vfiopy_iova_move_methods[] = {
    {"set_revoked", VFIOPY_FAST(set_revoked), METH_FASTCALL,
     "set_revoked(iova, serial, revoked=True): the exporter took the memory of this mapping away; False if the mapping "
     "is not there any more"},
    {"restore", VFIOPY_FAST(restore), METH_FASTCALL,
     "restore(iova, serial): unmap what was revoked and map it again at the same IOVA, in all mappers"},
    {"lose_addresses", VFIOPY_FAST(lose_addresses), METH_FASTCALL,
     "lose_addresses(first, last): the memory of these mappings will have no address here for a while; returns bytes"},
    {"set_address", VFIOPY_FAST(set_address), METH_FASTCALL | METH_KEYWORDS,
     "set_address(iova, size, address, memory): where the memory of one mapping is now"},
    {"change_process", change_process, METH_O,
     "change_process(token): under iommufd, all file memory belongs to the calling process from now on"},
    {NULL, NULL, 0, NULL},
};
