/* Wire: one end of a vfio-user socket, for vfiopy.vfio_user.channel, which explains it. Here: messages in and out. */
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "ext/iova_object.h"
#include "ext/lives.h"
#include "ext/module.h"
#include "ext/wire_object.h"

PyObject *vfiopy_wire_raise_kind(struct wire_object *self, int kind, long value)
{
    PyObject *error = PyObject_CallFunction(self->fault, "il", kind, value);

    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return NULL;
}

PyObject *vfiopy_wire_raise(struct wire_object *self, int result)
{
    struct vfiopy_wire_header header = {0};

    if (result == -ENOMEM)
        return PyErr_NoMemory();
    if (result < 0)
        return vfiopy_wire_raise_kind(self, VFIOPY_WIRE_ERRNO, -result);
    if (result == VFIOPY_WIRE_SIZE || result == VFIOPY_WIRE_FLAGS)
        memcpy(&header, self->wire.buffer + self->wire.start, sizeof(header));
    return vfiopy_wire_raise_kind(self, result, result == VFIOPY_WIRE_SIZE ? header.size : header.flags);
}

PyObject *vfiopy_wire_take(struct wire_object *self, const struct vfiopy_wire_message *message)
{
    const struct vfiopy_wire_header *h = &message->header;
    PyObject *payload, *header = NULL, *fds = NULL, *made = NULL;
    int taken[VFIOPY_WIRE_MOST_FDS + 1];
    unsigned count = message->fd_count;

    memcpy(taken, message->fds, count * sizeof(*taken));
    payload = PyByteArray_FromStringAndSize((const char *)message->payload, (Py_ssize_t)message->size);
    vfiopy_wire_pop(&self->wire, true); /* before any Python runs, which may close the wire */
    if (payload)
        header = Py_BuildValue("(HHIII)", h->id, h->command, h->size, h->flags, h->error);
    if (header)
        fds = PyList_New(count);
    for (unsigned i = 0; fds && i < count; i++) {
        PyObject *number = PyLong_FromLong(taken[i]);

        if (!number)
            Py_CLEAR(fds);
        else
            PyList_SetItem(fds, i, number);
    }
    if (fds)
        made = PyObject_CallFunctionObjArgs(self->message, header, payload, fds, NULL);
    for (unsigned i = 0; !made && i < count; i++)
        close(taken[i]);
    Py_XDECREF(fds);
    Py_XDECREF(header);
    Py_XDECREF(payload);
    return made;
}

int vfiopy_wire_get_parts(struct vfiopy_wire_parts *parts, PyObject *given, PyObject *fds)
{
    Py_ssize_t count = PySequence_Size(given), fd_count = fds ? PySequence_Size(fds) : 0;

    parts->count = parts->fd_count = 0;
    parts->size = 0;
    if (count < 0 || fd_count < 0)
        return -1;
    if (count >= VFIOPY_WIRE_PARTS || fd_count > VFIOPY_WIRE_MOST_FDS) {
        PyErr_Format(PyExc_ValueError, "a message of %zd parts and %zd fds", count, fd_count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < fd_count; i++) {
        PyObject *number = PySequence_GetItem(fds, i);
        long fd = number ? PyLong_AsLong(number) : -1;

        Py_XDECREF(number);
        if (fd == -1 && PyErr_Occurred())
            return -1;
        parts->fds[parts->fd_count++] = (int)fd;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *part = PySequence_GetItem(given, i);
        int result = part ? PyObject_GetBuffer(part, &parts->buffers[i], PyBUF_SIMPLE) : -1;

        Py_XDECREF(part); /* the buffer keeps it */
        if (result < 0) {
            vfiopy_wire_let_parts_go(parts);
            return -1;
        }
        parts->parts[i] = (struct iovec){parts->buffers[i].buf, (size_t)parts->buffers[i].len};
        parts->size += (size_t)parts->buffers[i].len;
        parts->count++;
    }
    return 0;
}

void vfiopy_wire_let_parts_go(struct vfiopy_wire_parts *parts)
{
    while (parts->count)
        PyBuffer_Release(&parts->buffers[--parts->count]);
}

/* --- the type ---------------------------------------------------------------------------------------------------- */

static PyObject *wire_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"", "", "", "", "", NULL};
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    PyObject *fault, *message;
    struct wire_object *self;
    unsigned most, most_fds;
    int fd;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "iIIOO", names, &fd, &most, &most_fds, &fault, &message))
        return NULL;
    self = vfiopy_wire_of(allocate(type, 0));
    if (!self)
        return NULL;
    self->fault = Py_NewRef(fault);
    self->message = Py_NewRef(message);
    self->process = vfiopy_process();
    if (vfiopy_wire_init(&self->wire, fd, most, most_fds)) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static int wire_traverse(PyObject *object, visitproc visit, void *arg)
{
    struct wire_object *self = vfiopy_wire_of(object);

    Py_VISIT(Py_TYPE(object));
    Py_VISIT(self->fault);
    Py_VISIT(self->message);
    if (self->asking) {
        Py_VISIT(self->asking->dispatch);
        Py_VISIT(self->asking->turn_over);
    }
    return 0;
}

static int wire_clear(PyObject *object)
{
    struct wire_object *self = vfiopy_wire_of(object);

    Py_CLEAR(self->fault);
    Py_CLEAR(self->message);
    if (self->asking) {
        Py_CLEAR(self->asking->dispatch);
        Py_CLEAR(self->asking->turn_over);
    }
    return 0;
}

static void wire_dealloc(PyObject *object)
{
    struct wire_object *self = vfiopy_wire_of(object);
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(object);
    wire_clear(object);
    vfiopy_wire_destroy(&self->wire);
    if (self->asking) {
        pthread_mutex_destroy(&self->asking->lock);
        free(self->asking);
    }
    release(object);
    Py_DECREF(type);
}

static PyObject *wire_receive(PyObject *object, PyObject *argument)
{
    struct wire_object *self = vfiopy_wire_of(object);
    struct vfiopy_wire_message message;
    int wait = PyObject_IsTrue(argument), result;

    if (wait < 0)
        return NULL;
    while ((result = vfiopy_wire_next(&self->wire, &message)) == VFIOPY_WIRE_NOTHING) {
        if (wait) {
            Py_BEGIN_ALLOW_THREADS
            result = vfiopy_wire_fill(&self->wire, true);
            Py_END_ALLOW_THREADS
        } else {
            result = vfiopy_wire_fill(&self->wire, false);
        }
        if (result == -EINTR) {
            if (PyErr_CheckSignals())
                return NULL;
        } else if (result == VFIOPY_WIRE_NOTHING) {
            Py_RETURN_NONE;
        } else if (result != VFIOPY_WIRE_DONE) {
            break;
        }
    }
    return result == VFIOPY_WIRE_DONE ? vfiopy_wire_take(self, &message) : vfiopy_wire_raise(self, result);
}

static PyObject *wire_send(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    struct wire_object *self = vfiopy_wire_of(object);
    struct vfiopy_wire_header header;
    struct vfiopy_wire_parts parts;
    unsigned long numbers[4];
    int result;

    if (nargs != 6) {
        PyErr_SetString(PyExc_TypeError, "send(number, command, flags, error, parts, fds)");
        return NULL;
    }
    for (int i = 0; i < 4; i++) {
        numbers[i] = PyLong_AsUnsignedLong(args[i]);
        if (PyErr_Occurred())
            return NULL;
    }
    if (vfiopy_wire_get_parts(&parts, args[4], args[5]))
        return NULL;
    header = (struct vfiopy_wire_header){(uint16_t)numbers[0], (uint16_t)numbers[1],
                                         (uint32_t)(VFIOPY_WIRE_HEADER + parts.size), (uint32_t)numbers[2],
                                         (uint32_t)numbers[3]};
    result = vfiopy_wire_send(&self->wire, &header, parts.parts, parts.count, parts.fds, parts.fd_count);
    vfiopy_wire_let_parts_go(&parts);
    if (result != VFIOPY_WIRE_DONE && result != VFIOPY_WIRE_NOTHING)
        return vfiopy_wire_raise(self, result);
    return PyBool_FromLong(result == VFIOPY_WIRE_DONE);
}

static PyObject *wire_flush(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct wire_object *self = vfiopy_wire_of(object);
    int result = vfiopy_wire_flush(&self->wire);

    if (result != VFIOPY_WIRE_DONE && result != VFIOPY_WIRE_NOTHING)
        return vfiopy_wire_raise(self, result);
    return PyBool_FromLong(result == VFIOPY_WIRE_DONE);
}

static PyObject *wire_close(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    vfiopy_wire_of(object)->usable = 0;
    vfiopy_wire_close(&vfiopy_wire_of(object)->wire);
    Py_RETURN_NONE;
}

static PyObject *wire_queued(PyObject *object, void *Py_UNUSED(closure))
{
    return PyLong_FromSize_t(atomic_load(&vfiopy_wire_of(object)->wire.queued));
}

static PyMethodDef methods[] = {
    {"receive", wire_receive, METH_O, "receive(wait, /)\n--\n\nReturn the next message, or None where it is not there."},
    {"send", VFIOPY_FAST(wire_send), METH_FASTCALL,
     "send(number, command, flags, error, parts, fds, /)\n--\n\n"
     "Send a message or queue what the socket does not take; return whether all of it is gone."},
    {"flush", wire_flush, METH_NOARGS, "Send what is queued; return whether nothing is left."},
    {"close", wire_close, METH_NOARGS, "Drop what is kept and close the fds that nobody took. The socket stays open."},
    {"use", VFIOPY_FAST(vfiopy_wire_use), METH_FASTCALL,
     "use(dispatch, turn_over, poll, /)\n--\n\nBecome a client's end: see vfiopy.vfio_user.connection."},
    {"exchange", VFIOPY_FAST(vfiopy_wire_exchange), METH_FASTCALL,
     "exchange(command, parts, fds, timeout, /)\n--\n\n"
     "Send a request and return its reply; None, and nothing is sent, where another thread reads."},
    {"read", VFIOPY_FAST(vfiopy_wire_read), METH_FASTCALL,
     "read(region, offset, size, /)\n--\n\n"
     "REGION_READ: return the bytes, or the reply where it is not as it should be; None as exchange() does."},
    {"post", VFIOPY_FAST(vfiopy_wire_post), METH_FASTCALL,
     "post(region, offset, data, /)\n--\n\n"
     "REGION_WRITE without a reply: return whether it is gone; None, and nothing is sent, after close()."},
    {"claim", vfiopy_wire_claim, METH_NOARGS, "Return an id that no request has whose reply may come."},
    {"release", vfiopy_wire_release, METH_O, "Give an id back: its reply is there."},
    {"late", VFIOPY_FAST(vfiopy_wire_late), METH_FASTCALL,
     "late(number, command, /)\n--\n\nNobody waits for this reply any more; it may come."},
    {"take_late", VFIOPY_FAST(vfiopy_wire_take_late), METH_FASTCALL,
     "take_late(number, command, /)\n--\n\nReturn whether it is such a reply, and forget it."},
    {"take_turn", vfiopy_wire_take_turn, METH_NOARGS, "Return whether this thread now has the turn to read."},
    {"has_turn", vfiopy_wire_has_turn, METH_NOARGS, "Return whether this thread has it."},
    {"give_turn", vfiopy_wire_give_turn, METH_NOARGS, "Let others read, if this thread has the turn."},
    {"wait", vfiopy_wire_wait, METH_O, "wait(difference, /)\n--\n\nCount who waits for the turn: 1 or -1."},
    {"serve", VFIOPY_FAST(vfiopy_wire_serve), METH_FASTCALL,
     "serve(read, write, limit, most_queued, /)\n--\n\n"
     "Answer REGION_READ and REGION_WRITE, at most `limit`, by calling read(region, offset, size) and\n"
     "write(region, offset, data). Return the first message that is something else; (message, exception) where a\n"
     "handler failed; True where more may be there, or what is queued waits for room; else False."},
    {"run", VFIOPY_FAST(vfiopy_wire_run), METH_FASTCALL,
     "run(read, write, limit, most_queued, poll, acquire, release, found, /)\n--\n\n"
     "Wait for the epoll fd `poll`, and serve() under a lock, for as long as nothing else is to be done. Then hand what\n"
     "serve() returned, if it was no bool, to found(), and return {fd: events} of the last wait."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"usable", T_BOOL, offsetof(struct wire_object, usable), 0, "exchange(), read(), post() and run() may be used"},
    {"timeout", T_DOUBLE, offsetof(struct wire_object, timeout), 0, "seconds that read() waits"},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"queued", wire_queued, NULL, "bytes that wait for room in the socket", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Wire(fd, most, most_fds, fault, message, /)\n--\n\nThe native part of vfiopy.vfio_user.channel.Channel."},
    {Py_tp_new, wire_new},
    {Py_tp_dealloc, wire_dealloc},
    {Py_tp_traverse, wire_traverse},
    {Py_tp_clear, wire_clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vfiopy._native.Wire",
    .basicsize = sizeof(struct wire_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int vfiopy_wire_type_init(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&spec);
    int result = type ? PyModule_AddObjectRef(module, "Wire", type) : -1;

    Py_XDECREF(type);
    return result;
}
