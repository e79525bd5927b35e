/* SpaceBase: many maps or unmaps in one native call, with no bytecode between. */
#include <Python.h>

#include <stdlib.h>

#include "ext/dma_object.h"

/* What is to be mapped, and the handles that say so afterwards. */
struct batch {
    size_t count; /* of pieces that are there; as many handles */
    struct vfiopy_piece *pieces;
    PyObject *mappings; /* a list */
};

static struct vfiopy_space_base *of(PyObject *object)
{
    return (struct vfiopy_space_base *)object;
}

static struct vfiopy_mapping_object *mapping_at(PyObject *list, Py_ssize_t index)
{
    return (struct vfiopy_mapping_object *)PyList_GetItem(list, index);
}

/* Drop what the book did not take. */
static void clear(struct batch *batch)
{
    for (size_t i = 0; i < batch->count; i++) {
        if (!batch->pieces[i].kept)
            Py_DECREF((PyObject *)batch->pieces[i].memory);
    }
    free(batch->pieces);
    Py_XDECREF(batch->mappings);
}

/* 1: all of it is plain memory; 0: it is not; -1 with an error set. Ends with clear() in any case. */
static int prepare(PyObject *object, PyObject *things, uint8_t prot, struct batch *batch)
{
    Py_ssize_t count = PyList_Size(things);

    batch->mappings = PyList_New(count);
    batch->pieces = malloc((count ? (size_t)count : 1) * sizeof(*batch->pieces));
    if (!batch->mappings)
        return -1;
    if (!batch->pieces) {
        PyErr_NoMemory();
        return -1;
    }
    /* The list may be changed by what exporting a buffer does. */
    for (Py_ssize_t i = 0; i < count && i < PyList_Size(things); i++) {
        struct vfiopy_host_memory *memory = vfiopy_plain_memory(PyList_GetItem(things, i), prot);
        struct vfiopy_mapping_object *mapping;

        if (!memory)
            return PyErr_Occurred() ? -1 : 0;
        batch->pieces[i] = (struct vfiopy_piece){memory, memory->address, memory->size, 0, 0, false};
        batch->count++;
        mapping = vfiopy_mapping_new(object);
        if (!mapping || PyList_SetItem(batch->mappings, i, (PyObject *)mapping))
            return -1;
        mapping->address = memory->address;
        mapping->size = memory->size;
        mapping->prot = prot;
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
 * Take down again what is mapped of the list, last first, after one map failed with `error`, which is taken over; sets
 * the error to raise. What fails does not end it, and neither does a KeyboardInterrupt: nobody else has handles.
 * It is tried a second time; what is mapped even then is named in a note.
 */
static void roll_back(PyObject *mappings, PyObject *error)
{
    Py_ssize_t count = PyList_Size(mappings);
    bool trouble = false;

    for (Py_ssize_t at = count; at-- > 0;) {
        struct vfiopy_mapping_object *mapping = mapping_at(mappings, at);

        if (mapping->serial && vfiopy_mapping_take_down(mapping, 0)) {
            error = chain(error, take_error());
            trouble = true;
        }
    }
    for (Py_ssize_t at = trouble ? count : 0; at-- > 0;) {
        PyObject *mapping = PyList_GetItem(mappings, at), *note, *answer = NULL;
        int left = PyObject_IsTrue(mapping);

        if (left > 0 && !vfiopy_mapping_take_down(mapping_at(mappings, at), 0))
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
    roll_back(args[0], Py_NewRef(args[1]));
    return NULL;
}

/* NULL without an error: mappers in Python have to be called too, nothing has happened. */
static PyObject *map_all(PyObject *object, const struct vfiopy_request *like, struct batch *batch)
{
    struct vfiopy_space *space = vfiopy_space_of(of(object)->book);
    struct vfiopy_failure failure = {0};
    int result;

    Py_BEGIN_ALLOW_THREADS
    result = vfiopy_space_map_many(space, like, batch->pieces, batch->count, &failure);
    Py_END_ALLOW_THREADS
    for (size_t i = 0; i < batch->count; i++) {
        struct vfiopy_mapping_object *mapping = mapping_at(batch->mappings, (Py_ssize_t)i);

        mapping->iova = batch->pieces[i].iova;
        mapping->serial = batch->pieces[i].serial;
    }
    if (!result)
        return Py_NewRef(batch->mappings);
    if (result == VFIOPY_IN_STEPS)
        return NULL;
    vfiopy_raise_failure(of(object)->book, "map", &failure, NULL);
    roll_back(batch->mappings, take_error());
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

        plain = prepare(object, things, like.prot, &batch);
        if (plain > 0)
            mappings = map_all(object, &like, &batch);
        clear(&batch);
    }
    if (plain >= 0 && !mappings && !PyErr_Occurred())
        mappings = map_many_slowly(object, things, given);
    Py_DECREF(things);
    return mappings;
}

/* --- unmap_many() -------------------------------------------------------------------------------------------- */

/* As many of the handles as go at once; how many. A failure is the next one's. */
static size_t unmap_at_once(PyObject *object, const struct vfiopy_handle *handles, size_t count,
                            struct vfiopy_failure *failure)
{
    struct vfiopy_gone gone = {0};
    size_t done;

    Py_BEGIN_ALLOW_THREADS
    vfiopy_space_unmap_idle_many(vfiopy_space_of(of(object)->book), handles, count, &done, &gone, failure);
    Py_END_ALLOW_THREADS
    vfiopy_drop_gone(&gone);
    return done;
}

/* The handles belong to the mappings of the list, which nobody else has. */
static int unmap_list(PyObject *object, PyObject *list, const struct vfiopy_handle *handles, double timeout)
{
    size_t count = (size_t)PyList_Size(list), at = 0;

    while (at < count) {
        struct vfiopy_failure failure = {0};

        if (vfiopy_space_is_direct(of(object))) {
            at += unmap_at_once(object, handles + at, count - at, &failure);
            if (failure.result) {
                failure.asked = (struct vfiopy_range){failure.clash.first, failure.clash.last};
                vfiopy_raise_failure(of(object)->book, "unmap", &failure, NULL);
                return -1;
            }
        }
        if (at < count && vfiopy_mapping_take_down(mapping_at(list, (Py_ssize_t)at++), timeout))
            return -1;
    }
    return 0;
}

static PyObject *unmap_many(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"mappings", "timeout", NULL};
    struct vfiopy_handle *handles;
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
    handles = malloc((count ? (size_t)count : 1) * sizeof(*handles));
    if (!handles) {
        Py_DECREF(list);
        return PyErr_NoMemory();
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        struct vfiopy_mapping_object *mapping = mapping_at(list, i);

        if (!vfiopy_is_mapping((PyObject *)mapping) || mapping->space != object) {
            PyErr_Format(PyExc_ValueError, "%R is no mapping of this address space", mapping);
            goto out;
        }
        handles[i] = (struct vfiopy_handle){mapping->iova, mapping->serial};
    }
    result = unmap_list(object, list, handles, timeout);
out:
    free(handles);
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
