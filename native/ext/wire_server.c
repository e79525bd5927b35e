/* The server's end of a Wire: register accesses, from the socket to the device and back. */
#include <Python.h>

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>

#include "ext/wire_object.h"

enum { REGION_READ = 9, REGION_WRITE = 10, MOST_READ = 4096 };

struct access {
    uint64_t offset;
    uint32_t region, size;
};

/* It is a register access as it should be; everything else is looked at by Python. */
static bool is_access(const struct vfiopy_wire_message *message, struct access *access)
{
    if (message->fd_count || message->size < sizeof(*access))
        return false;
    memcpy(access, message->payload, sizeof(*access));
    if (message->header.command == REGION_READ)
        return !message->header.flags && message->size == sizeof(*access) && access->size <= MOST_READ;
    return message->header.command == REGION_WRITE && !(message->header.flags & ~(uint32_t)VFIOPY_WIRE_NO_REPLY) &&
           message->size == sizeof(*access) + access->size;
}

static int reply(struct wire_object *self, const struct vfiopy_wire_header *request, const struct access *access,
                 const void *data, size_t size)
{
    struct vfiopy_wire_header header = {request->id, request->command,
                                        (uint32_t)(VFIOPY_WIRE_HEADER + sizeof(*access) + size), VFIOPY_WIRE_REPLY, 0};
    struct iovec parts[2] = {{(void *)access, sizeof(*access)}, {(void *)data, size}};

    return vfiopy_wire_send(&self->wire, &header, parts, size ? 2 : 1, NULL, 0);
}

/* A handler has raised: (message, exception), so that Python says what that means. */
static PyObject *failure(struct wire_object *self, const struct vfiopy_wire_header *h)
{
    PyObject *type, *value, *traceback, *message = NULL, *pair = NULL;

    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (value && traceback)
        PyException_SetTraceback(value, traceback);
    message = PyObject_CallFunction(self->message, "(HHIII)N[]", h->id, h->command, h->size, h->flags, h->error,
                                    PyByteArray_FromStringAndSize("", 0));
    if (message && value)
        pair = PyTuple_Pack(2, message, value);
    Py_XDECREF(message);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return pair;
}

/* Do one access, which is taken from the wire already: a handler may do anything with it. 1, or -1 with an error set. */
static int perform(struct wire_object *self, const struct vfiopy_wire_header *header, const struct access *access,
                   PyObject *handler, PyObject *data, int *sent)
{
    PyObject *region = PyLong_FromUnsignedLong(access->region);
    PyObject *offset = PyLong_FromUnsignedLongLong(access->offset);
    PyObject *last = data ? Py_NewRef(data) : PyLong_FromUnsignedLong(access->size);
    PyObject *result = NULL;
    char *bytes = NULL;
    Py_ssize_t size = 0;

    if (region && offset && last)
        result = PyObject_CallFunctionObjArgs(handler, region, offset, last, NULL);
    Py_XDECREF(region);
    Py_XDECREF(offset);
    Py_XDECREF(last);
    if (!result)
        return -1;
    *sent = VFIOPY_WIRE_DONE;
    if (!data && (PyBytes_AsStringAndSize(result, &bytes, &size) || size != (Py_ssize_t)access->size)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "a read of %u bytes gave %zd", access->size, size);
        Py_DECREF(result);
        return -1;
    }
    if (!(header->flags & VFIOPY_WIRE_NO_REPLY))
        *sent = reply(self, header, access, bytes, (size_t)size);
    Py_DECREF(result);
    return 1;
}

/* Who does the accesses, and how many at once. */
struct work {
    PyObject *read, *write;
    long limit, most_queued;
};

static int get_work(struct work *work, PyObject *const *args)
{
    work->read = args[0];
    work->write = args[1];
    work->limit = PyLong_AsLong(args[2]);
    work->most_queued = PyLong_AsLong(args[3]);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *serve(struct wire_object *self, const struct work *work)
{
    struct vfiopy_wire_message message;
    struct access access;
    bool filled = false;
    int result, sent = VFIOPY_WIRE_DONE;

    for (long left = work->limit; left > 0; left--) {
        struct vfiopy_wire_header header;
        PyObject *data = NULL;
        int done;

        while ((result = vfiopy_wire_next(&self->wire, &message)) == VFIOPY_WIRE_NOTHING) {
            result = self->wire.drained && filled ? VFIOPY_WIRE_NOTHING : vfiopy_wire_fill(&self->wire, false);
            filled = true; /* and where that took all that there was, the next one would find nothing */
            if (result == VFIOPY_WIRE_NOTHING)
                return PyBool_FromLong(atomic_load(&self->wire.queued) > 0);
            if (result != VFIOPY_WIRE_DONE && result != -EINTR)
                break;
        }
        if (result != VFIOPY_WIRE_DONE)
            return vfiopy_wire_raise(self, result);
        if (!is_access(&message, &access))
            return vfiopy_wire_take(self, &message);
        header = message.header;
        if (header.command == REGION_WRITE) {
            data = PyBytes_FromStringAndSize((const char *)message.payload + sizeof(access), access.size);
            if (!data)
                return NULL;
        }
        vfiopy_wire_pop(&self->wire, false);
        done = perform(self, &header, &access, data ? work->write : work->read, data, &sent);
        Py_XDECREF(data);
        if (done < 0)
            return failure(self, &header);
        if (sent != VFIOPY_WIRE_DONE && sent != VFIOPY_WIRE_NOTHING)
            return vfiopy_wire_raise(self, sent);
        if ((long)atomic_load(&self->wire.queued) > work->most_queued)
            break;
    }
    Py_RETURN_TRUE;
}

PyObject *vfiopy_wire_serve(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    struct work work;

    if (nargs != 4) {
        PyErr_SetString(PyExc_TypeError, "serve(read, write, limit, most_queued)");
        return NULL;
    }
    return get_work(&work, args) ? NULL : serve(vfiopy_wire_of(object), &work);
}

/* --- with an epoll around it ------------------------------------------------------------------------------------- */

enum { MOST_EVENTS = 16 };

static PyObject *as_dict(const struct epoll_event *events, int count)
{
    PyObject *found = PyDict_New();

    for (int i = 0; found && i < count; i++) {
        PyObject *fd = PyLong_FromLong(events[i].data.fd), *what = PyLong_FromUnsignedLong(events[i].events);

        if (!fd || !what || PyDict_SetItem(found, fd, what))
            Py_CLEAR(found);
        Py_XDECREF(fd);
        Py_XDECREF(what);
    }
    return found;
}

/* With the server's lock: serve once. 1: all is done; 0: Python has to look; -1 with an error set. */
static int serve_locked(struct wire_object *self, const struct work *work, PyObject *found)
{
    PyObject *result = self->usable ? serve(self, work) : Py_NewRef(Py_True), *told;

    if (!result)
        return -1;
    if (result == Py_False || result == Py_True) {
        Py_DECREF(result);
        return result == Py_False;
    }
    told = PyObject_CallFunctionObjArgs(found, result, NULL);
    Py_DECREF(result);
    Py_XDECREF(told);
    return told ? 0 : -1;
}

/* Call lock.acquire or lock.release; an exception that is set stays. */
static int call(PyObject *method)
{
    PyObject *type, *value, *traceback, *result;

    PyErr_Fetch(&type, &value, &traceback);
    result = PyObject_CallFunctionObjArgs(method, NULL);
    Py_XDECREF(result);
    if (type)
        PyErr_Restore(type, value, traceback);
    return result ? 0 : -1;
}

PyObject *vfiopy_wire_run(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    struct wire_object *self = vfiopy_wire_of(object);
    struct epoll_event events[MOST_EVENTS];
    struct work work;
    long poll;

    if (nargs != 8) {
        PyErr_SetString(PyExc_TypeError, "run(read, write, limit, most_queued, poll, acquire, release, found)");
        return NULL;
    }
    poll = PyLong_AsLong(args[4]);
    if (PyErr_Occurred() || get_work(&work, args))
        return NULL;
    for (;;) {
        int count, done;

        Py_BEGIN_ALLOW_THREADS
        count = epoll_wait((int)poll, events, MOST_EVENTS, -1);
        Py_END_ALLOW_THREADS
        if (count < 0 && errno != EINTR)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (count < 0) {
            if (PyErr_CheckSignals())
                return NULL;
            continue;
        }
        if (count != 1 || events[0].events != EPOLLIN || events[0].data.fd != self->wire.fd)
            return as_dict(events, count);
        if (call(args[5]))
            return NULL;
        done = serve_locked(self, &work, args[7]);
        if (call(args[6]) || done < 0)
            return NULL;
        if (!done)
            return as_dict(events, count);
    }
}
