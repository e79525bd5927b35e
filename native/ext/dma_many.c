/* SpaceBase: many maps or unmaps in one native call, with no bytecode between. */
#include <Python.h>

#include <stdlib.h>

#include "ext/dma_object.h"

struct batch {
    size_t count, done;
    struct vfiopy_request *requests;
    struct vfiopy_mapping_object **mappings;
};

static struct vfiopy_space_base *of(PyObject *object)
{
    return (struct vfiopy_space_base *)object;
}

/* Drop what the book did not take. */
static void clear(struct batch *batch)
{
    for (size_t i = 0; i < batch->count; i++) {
        if (i >= batch->done && batch->requests)
            Py_XDECREF((PyObject *)batch->requests[i].memory);
        if (batch->mappings)
            Py_XDECREF((PyObject *)batch->mappings[i]);
    }
    free(batch->requests);
    free(batch->mappings);
}

/* 1: all of it is plain memory; 0: it is not; -1 with an error set. Ends with clear() in any case. */
static int prepare(PyObject *object, PyObject *things, const struct vfiopy_request *like, struct batch *batch)
{
    batch->count = (size_t)PyList_Size(things);
    batch->requests = calloc(batch->count ? batch->count : 1, sizeof(*batch->requests));
    batch->mappings = calloc(batch->count ? batch->count : 1, sizeof(*batch->mappings));
    if (!batch->requests || !batch->mappings) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < batch->count; i++) {
        struct vfiopy_host_memory *memory = vfiopy_plain_memory(PyList_GetItem(things, (Py_ssize_t)i), like->prot);

        if (!memory)
            return PyErr_Occurred() ? -1 : 0;
        batch->requests[i] = *like;
        batch->requests[i].memory = memory;
        batch->requests[i].address = memory->address;
        batch->requests[i].size = memory->size;
        batch->mappings[i] = vfiopy_mapping_new(object);
        if (!batch->mappings[i])
            return -1;
        batch->mappings[i]->address = memory->address;
        batch->mappings[i]->size = memory->size;
        batch->mappings[i]->prot = like->prot;
    }
    return 1;
}

/* The error that is set, as an exception with its traceback; it is not set any more. */
static PyObject *take_error(void)
{
    PyObject *type, *value, *traceback;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(traceback);
    Py_XDECREF(type);
    return value;
}

/*
 * As in Python, what failed last is raised, in the context of what failed before; but what is to end the program stays
 * in front of what is not. Takes over both; returns what is to be raised.
 */
static PyObject *chain(PyObject *error, PyObject *next)
{
    if (next == error) {
        Py_DECREF(next);
        return error;
    }
    if (PyErr_GivenExceptionMatches(error, PyExc_Exception) || !PyErr_GivenExceptionMatches(next, PyExc_Exception)) {
        PyException_SetContext(next, error);
        return next;
    }
    PyException_SetContext(next, PyException_GetContext(error));
    PyException_SetContext(error, next);
    return error;
}

/*
 * Take down again the first `mapped` of the list, last first, after one map failed with `error`, which is taken over;
 * sets the error to raise. What fails does not end it, and neither does a KeyboardInterrupt: nobody else has handles.
 * It is tried a second time; what is mapped even then is named in a note.
 */
static void roll_back(PyObject *mappings, Py_ssize_t mapped, PyObject *error)
{
    bool trouble = false;

    for (Py_ssize_t at = mapped; at-- > 0;) {
        if (vfiopy_mapping_take_down((struct vfiopy_mapping_object *)PyList_GetItem(mappings, at), 0)) {
            error = chain(error, take_error());
            trouble = true;
        }
    }
    for (Py_ssize_t at = trouble ? mapped : 0; at-- > 0;) {
        PyObject *mapping = PyList_GetItem(mappings, at), *note, *answer = NULL;
        int left = PyObject_IsTrue(mapping);

        if (left > 0 && !vfiopy_mapping_take_down((struct vfiopy_mapping_object *)mapping, 0))
            continue;
        if (PyErr_Occurred())
            error = chain(error, take_error());
        if (!left)
            continue;
        note = PyUnicode_FromFormat("%R could not be taken down again: space.unmap(iova) may do it later", mapping);
        if (note)
            answer = PyObject_CallMethod(error, "add_note", "O", note);
        Py_XDECREF(note);
        Py_XDECREF(answer);
        PyErr_Clear(); /* no memory for a note */
    }
    PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(error)), error, PyException_GetTraceback(error));
}

static PyObject *take_back(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    if (nargs != 2 || !PyList_Check(args[0]) || !PyExceptionInstance_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "_take_back() takes a list of mappings and an exception");
        return NULL;
    }
    for (Py_ssize_t at = 0; at < PyList_Size(args[0]); at++) {
        PyObject *item = PyList_GetItem(args[0], at);

        if (!vfiopy_is_mapping(item) || ((struct vfiopy_mapping_object *)item)->space != object) {
            PyErr_Format(PyExc_ValueError, "%R is no mapping of this address space", item);
            return NULL;
        }
    }
    roll_back(args[0], PyList_Size(args[0]), Py_NewRef(args[1]));
    return NULL;
}

static PyObject *map_all(PyObject *object, struct batch *batch)
{
    struct vfiopy_space *space = vfiopy_space_of(of(object)->book);
    struct vfiopy_failure failure = {0};
    PyObject *list = PyList_New((Py_ssize_t)batch->count);
    size_t i = 0;
    int result = VFIOPY_OK;

    if (!list)
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    for (; i < batch->count && !result; i++) {
        struct vfiopy_request *request = &batch->requests[i];

        failure.asked = (struct vfiopy_range){request->iova, request->iova + (request->size - 1)};
        result = vfiopy_space_map(space, request, &batch->mappings[i]->iova, &batch->mappings[i]->serial, &failure);
    }
    Py_END_ALLOW_THREADS
    for (size_t at = 0; at < batch->count; at++)
        PyList_SetItem(list, (Py_ssize_t)at, Py_NewRef((PyObject *)batch->mappings[at]));
    if (!result) {
        batch->done = batch->count;
        return list;
    }
    batch->done = failure.kept ? i : i - 1;
    vfiopy_raise_failure(of(object)->book, "map", &failure, NULL);
    roll_back(list, (Py_ssize_t)i - 1, take_error());
    Py_DECREF(list);
    return NULL;
}

static PyObject *map_many_slowly(PyObject *object, PyObject *things, PyObject *const *given)
{
    PyObject *prot = given[1] ? Py_NewRef(given[1]) : PyLong_FromLong(VFIOPY_PROT_ALL);
    PyObject *limit = given[2] ? Py_NewRef(given[2]) : PyLong_FromUnsignedLongLong(UINT64_MAX);
    PyObject *mappings = NULL;

    if (prot && limit)
        mappings = PyObject_CallMethod(object, "_map_many_slowly", "OOO", things, prot, limit);
    Py_XDECREF(prot);
    Py_XDECREF(limit);
    return mappings;
}

static PyObject *map_many(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"memories", "prot", "limit", NULL};
    struct vfiopy_request like = {.iova = VFIOPY_NO_FIXED_IOVA, .limit = UINT64_MAX, .fd = -1};
    PyObject *given[3], *things, *mappings = NULL;
    int prot = VFIOPY_PROT_ALL, plain = 0;

    if (nargs > 1) {
        PyErr_Format(PyExc_TypeError, "map_many() takes 1 positional argument, but %zd were given", nargs);
        return NULL;
    }
    if (vfiopy_arguments("map_many", args, nargs, keywords, names, 1, given) ||
        (given[1] && vfiopy_get_int(given[1], "prot", &prot)) ||
        (given[2] && vfiopy_get_u64(given[2], "limit", &like.limit)))
        return NULL;
    like.prot = prot < 0 || prot > UINT8_MAX ? UINT8_MAX : (uint8_t)prot;
    things = PySequence_List(given[0]);
    if (!things)
        return NULL;
    if (vfiopy_space_is_direct(of(object)) && !vfiopy_leftovers_wait()) {
        struct batch batch = {0};

        plain = prepare(object, things, &like, &batch);
        if (plain > 0)
            mappings = map_all(object, &batch);
        clear(&batch);
    }
    if (!plain)
        mappings = map_many_slowly(object, things, given);
    Py_DECREF(things);
    return mappings;
}

/* --- unmap_many() -------------------------------------------------------------------------------------------- */

/* As many as go at once, from `first` on, in one go; the number of the first that does not. */
static Py_ssize_t unmap_at_once(struct vfiopy_space *space, struct vfiopy_mapping_object **mappings, Py_ssize_t first,
                                Py_ssize_t count, struct vfiopy_gone *gone, struct vfiopy_failure *failure)
{
    bool done = true;
    int result = VFIOPY_OK;

    Py_BEGIN_ALLOW_THREADS
    while (first < count && done && !result) {
        struct vfiopy_unmap unmap = {
            .range = {mappings[first]->iova, mappings[first]->iova},
            .exact = true,
            .serial = mappings[first]->serial,
            .gone = *gone,
        };

        result = vfiopy_unmap_at_once(space, &unmap, &done, failure);
        *gone = unmap.gone;
        failure->asked = unmap.range;
        first += done;
    }
    Py_END_ALLOW_THREADS
    return first;
}

static int unmap_list(PyObject *object, struct vfiopy_mapping_object **mappings, Py_ssize_t count, double timeout)
{
    Py_ssize_t at = 0;

    while (at < count) {
        struct vfiopy_failure failure = {0};
        struct vfiopy_gone gone = {0};

        if (vfiopy_space_is_direct(of(object))) {
            at = unmap_at_once(vfiopy_space_of(of(object)->book), mappings, at, count, &gone, &failure);
            vfiopy_drop_gone(&gone);
            if (failure.result) {
                vfiopy_raise_failure(of(object)->book, "unmap", &failure, NULL);
                return -1;
            }
        }
        if (at < count && vfiopy_mapping_take_down(mappings[at++], timeout))
            return -1;
    }
    return 0;
}

static PyObject *unmap_many(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"mappings", "timeout", NULL};
    struct vfiopy_mapping_object **mappings;
    PyObject *given[2], *list;
    double timeout = 0;
    Py_ssize_t count;
    int result = -1;

    if (vfiopy_arguments("unmap_many", args, nargs, keywords, names, 1, given) ||
        (given[1] && vfiopy_get_timeout(given[1], &timeout)))
        return NULL;
    list = PySequence_List(given[0]);
    if (!list)
        return NULL;
    count = PyList_Size(list);
    mappings = calloc(count ? (size_t)count : 1, sizeof(*mappings));
    if (!mappings) {
        Py_DECREF(list);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PyList_GetItem(list, i);

        if (!vfiopy_is_mapping(item) || ((struct vfiopy_mapping_object *)item)->space != object) {
            PyErr_Format(PyExc_ValueError, "%R is no mapping of this address space", item);
            goto out;
        }
        mappings[i] = (struct vfiopy_mapping_object *)item;
    }
    result = unmap_list(object, mappings, count, timeout);
out:
    free(mappings);
    Py_DECREF(list);
    return result ? NULL : Py_NewRef(Py_None);
}

PyMethodDef vfiopy_space_many_methods[] = {
    {"map_many", VFIOPY_FAST(map_many), METH_FASTCALL | METH_KEYWORDS,
     "map_many($self, memories, *, prot=3, limit=0xffffffffffffffff)\n--\n\n"
     "Map several pieces of memory: all of them, or none when one fails. See :meth:`map`.\n\n"
     "Buffers go to the kernel in one native call.\n\n"
     "Returns:\n"
     "    The mappings, in the order of ``memories``."},
    {"_take_back", VFIOPY_FAST(take_back), METH_FASTCALL,
     "_take_back(mappings, error): unmap all of them, whatever goes wrong, and raise. For AddressSpace."},
    {"unmap_many", VFIOPY_FAST(unmap_many), METH_FASTCALL | METH_KEYWORDS,
     "unmap_many($self, mappings, timeout=0.0)\n--\n\n"
     "Unmap several mappings of this space, in order, in one native call where nobody pins them.\n\n"
     "What fails (see :meth:`Mapping.unmap`) ends it: the mappings before that one are unmapped, it and the rest are\n"
     "as they were.\n\n"
     "Args:\n"
     "    mappings: handles from :meth:`map`.\n"
     "    timeout: seconds to wait for the owners of pins, for each mapping."},
    {NULL, NULL, 0, NULL},
};
