/* IovaSpace: mapping, and the kernel's mappers. */
#include "ext/iova_methods.h"
#include "ext/iova_object.h"

int vfiopy_iova_parse_request(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords,
                              struct vfiopy_request *request)
{
    static const char *const names[] = {"memory", "address", "size", "prot", "iova", "limit", "align", "kind",
                                        "fd", "fd_offset", "transient", "physical", "take_over", NULL};
    PyObject *given[13];
    int prot, kind = VFIOPY_HOST;

    *request = (struct vfiopy_request){.iova = VFIOPY_NO_FIXED_IOVA, .limit = UINT64_MAX, .fd = -1};
    if (vfiopy_arguments(function, args, nargs, keywords, names, 4, given) ||
        vfiopy_get_u64(given[1], "address", &request->address) ||
        vfiopy_get_u64(given[2], "size", &request->size) || vfiopy_get_int(given[3], "prot", &prot) ||
        (given[4] && vfiopy_get_iova_or_any(given[4], &request->iova)) ||
        (given[5] && vfiopy_get_u64(given[5], "limit", &request->limit)) ||
        (given[6] && vfiopy_get_u64(given[6], "align", &request->alignment)) ||
        (given[7] && vfiopy_get_int(given[7], "kind", &kind)) ||
        (given[8] && vfiopy_get_int(given[8], "fd", &request->fd)) ||
        (given[9] && vfiopy_get_u64(given[9], "fd_offset", &request->fd_offset)) ||
        vfiopy_get_flag(given[10], &request->transient) ||
        (given[11] && vfiopy_get_u64(given[11], "physical", &request->physical)) ||
        vfiopy_get_flag(given[12], &request->take_over))
        return -1;
    request->prot = prot < 0 || prot > UINT8_MAX ? UINT8_MAX : (uint8_t)prot;
    request->kind = kind < 0 || kind > UINT8_MAX ? UINT8_MAX : (uint8_t)kind;
    request->memory = given[0];
    return 0;
}

static struct vfiopy_range asked_of(const struct vfiopy_request *request)
{
    return (struct vfiopy_range){request->iova, request->iova + (request->size - 1)};
}

static PyObject *map_method(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    struct vfiopy_space *space = vfiopy_space_of(self);
    struct vfiopy_failure failure = {0};
    struct vfiopy_request request;
    PyObject *memory;
    uint64_t iova;
    int result;

    if (vfiopy_iova_elsewhere(self) || vfiopy_iova_parse_request("map", args, nargs, keywords, &request))
        return NULL;
    failure.asked = asked_of(&request);
    memory = Py_NewRef((PyObject *)request.memory); /* the book's */
    if (vfiopy_space_has_mappers(space)) {
        Py_BEGIN_ALLOW_THREADS
        result = vfiopy_space_map(space, &request, &iova, NULL, &failure);
        Py_END_ALLOW_THREADS
    } else {
        result = vfiopy_space_map(space, &request, &iova, NULL, &failure);
    }
    if (!result)
        return PyLong_FromUnsignedLongLong(iova);
    if (!failure.kept)
        Py_DECREF(memory);
    return vfiopy_raise_failure(self, "map", &failure, NULL);
}

/* --- mappers ------------------------------------------------------------------------------------------------- */

static PyObject *add_kernel_mapper(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"kind", "fd", "object_id", "ioctl", NULL};
    uint64_t object = 0, call = 0;
    PyObject *given[4];
    uint32_t token;
    int kind, fd;

    if (vfiopy_iova_elsewhere(self) ||
        vfiopy_arguments("add_kernel_mapper", args, nargs, keywords, names, 2, given) ||
        vfiopy_get_int(given[0], "kind", &kind) || vfiopy_get_int(given[1], "fd", &fd) ||
        (given[2] && vfiopy_get_u64(given[2], "object_id", &object)) ||
        (given[3] && vfiopy_get_u64(given[3], "ioctl", &call)))
        return NULL;
    if ((kind != VFIOPY_MAPPER_TYPE1 && kind != VFIOPY_MAPPER_IOAS) || object > UINT32_MAX) {
        PyErr_Format(PyExc_ValueError, "no kernel mapper is of kind %d with an object of that id", kind);
        return NULL;
    }
    token = vfiopy_space_add_mapper(vfiopy_space_of(self), (enum vfiopy_mapper_kind)kind, fd, (uint32_t)object,
                                    (vfiopy_ioctl)(uintptr_t)call);
    if (token)
        return PyLong_FromUnsignedLong(token);
    PyErr_Format(PyExc_RuntimeError, "space %R has %d kernel mappers already", ((struct vfiopy_iova_object *)self)->name,
                 VFIOPY_MAX_MAPPERS);
    return NULL;
}

static PyObject *with_mapper(PyObject *self, PyObject *argument, const char *operation,
                             int (*act)(struct vfiopy_space *, uint32_t, struct vfiopy_failure *))
{
    struct vfiopy_failure failure = {0};
    uint64_t token;
    int result;

    if (vfiopy_iova_elsewhere(self) || vfiopy_get_u64(argument, "token", &token))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = act(vfiopy_space_of(self), token > UINT32_MAX ? 0 : (uint32_t)token, &failure);
    Py_END_ALLOW_THREADS
    if (result)
        return vfiopy_raise_failure(self, operation, &failure, NULL);
    Py_RETURN_NONE;
}

static PyObject *remove_kernel_mapper(PyObject *self, PyObject *argument)
{
    return with_mapper(self, argument, "remove_kernel_mapper", vfiopy_space_remove_mapper);
}

static PyObject *replay(PyObject *self, PyObject *argument)
{
    return with_mapper(self, argument, "replay", vfiopy_space_replay);
}

static PyObject *drop(PyObject *self, PyObject *argument)
{
    return with_mapper(self, argument, "drop", vfiopy_space_drop);
}

PyMethodDef vfiopy_iova_map_methods[] = {
    {"map", VFIOPY_FAST(map_method), METH_FASTCALL | METH_KEYWORDS,
     "map(memory, address, size, prot, iova=-1, limit=2**64-1, align=0, kind=0, fd=-1, fd_offset=0, "
     "transient=False, physical=0, take_over=False): map it everywhere; returns the IOVA"},
    {"add_kernel_mapper", VFIOPY_FAST(add_kernel_mapper), METH_FASTCALL | METH_KEYWORDS,
     "add_kernel_mapper(kind, fd, object_id=0, ioctl=0): new mappings go there too; returns a token"},
    {"remove_kernel_mapper", remove_kernel_mapper, METH_O, "remove_kernel_mapper(token): forget it, without a call"},
    {"replay", replay, METH_O, "replay(token): map there what the mapper does not have yet: all, or nothing"},
    {"drop", drop, METH_O, "drop(token): unmap everything from that mapper alone"},
    {NULL, NULL, 0, NULL},
};
