/*
 * The client's end of a Wire: a request and its reply without a change of threads.
 *
 * Who has the turn reads the socket. A thread of the client's waits for the socket by epoll while nobody does, and
 * must not be woken for a reply: so the socket is taken out of the epoll first, and put back when the turn is over.
 */
#include <Python.h>

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#include "ext/lives.h"
#include "ext/wire_object.h"

enum { REGION_READ = 9, REGION_WRITE = 10, TICK = 200 /* ms */ };

struct access {
    uint64_t offset;
    uint32_t region, size;
};

/* --- ids --------------------------------------------------------------------------------------------------------- */

static bool is_taken(const struct wire_asking *asking, uint16_t id)
{
    return asking->taken[id / 64] >> id % 64 & 1;
}

/* An id for a request; kept where a reply may come. Fewer are kept than there are: threads, and late ones. */
static uint16_t next_id(struct wire_asking *asking, bool keep)
{
    uint16_t id;

    pthread_mutex_lock(&asking->lock);
    while (is_taken(asking, asking->next))
        asking->next++;
    id = asking->next++;
    if (keep)
        asking->taken[id / 64] |= UINT64_C(1) << id % 64;
    pthread_mutex_unlock(&asking->lock);
    return id;
}

static void release_locked(struct wire_asking *asking, uint16_t id)
{
    asking->taken[id / 64] &= ~(UINT64_C(1) << id % 64);
}

static void release(struct wire_asking *asking, uint16_t id)
{
    pthread_mutex_lock(&asking->lock);
    release_locked(asking, id);
    pthread_mutex_unlock(&asking->lock);
}

/* Its reply may still come, and is to be dropped. The oldest of too many is forgotten. */
static void add_late(struct wire_asking *asking, uint16_t id, uint16_t command)
{
    unsigned at;

    pthread_mutex_lock(&asking->lock);
    if (asking->late_count == VFIOPY_LATE) {
        release_locked(asking, asking->late[asking->late_first].id);
        asking->late_first = (asking->late_first + 1) % VFIOPY_LATE;
        asking->late_count--;
    }
    at = (asking->late_first + asking->late_count++) % VFIOPY_LATE;
    asking->late[at].id = id;
    asking->late[at].command = command;
    pthread_mutex_unlock(&asking->lock);
}

static bool take_late(struct wire_asking *asking, uint16_t id, uint16_t command)
{
    bool found = false;

    pthread_mutex_lock(&asking->lock);
    for (unsigned i = 0; i < asking->late_count && !found; i++) {
        unsigned at = (asking->late_first + i) % VFIOPY_LATE;

        if (asking->late[at].id != id || asking->late[at].command != command)
            continue;
        found = true;
        release_locked(asking, id);
        asking->late[at] = asking->late[asking->late_first];
        asking->late_first = (asking->late_first + 1) % VFIOPY_LATE;
        asking->late_count--;
    }
    pthread_mutex_unlock(&asking->lock);
    return found;
}

/* --- the turn ---------------------------------------------------------------------------------------------------- */

static bool take_turn(struct wire_asking *asking)
{
    unsigned long free = 0;

    return atomic_compare_exchange_strong(&asking->reading, &free, PyThread_get_thread_ident());
}

static void watch(struct wire_object *self, uint32_t events)
{
    struct epoll_event event = {.events = events | EPOLLONESHOT, .data.fd = self->wire.fd};

    if (self->asking->poll >= 0 && self->wire.fd >= 0)
        epoll_ctl(self->asking->poll, EPOLL_CTL_MOD, self->wire.fd, &event); /* fails for who is closing only */
}

/* Nobody reads now. An exception that is set stays. 0, or -1 with one set that says why others were not told. */
static int give_turn(struct wire_object *self)
{
    PyObject *type, *value, *traceback, *result;

    atomic_store(&self->asking->reading, 0);
    if (!atomic_load(&self->asking->waiting))
        return 0;
    PyErr_Fetch(&type, &value, &traceback);
    result = PyObject_CallFunctionObjArgs(self->asking->turn_over, NULL);
    if (type) {
        if (!result)
            PyErr_Clear(); /* who waits looks again by itself, five times a second */
        PyErr_Restore(type, value, traceback);
    }
    Py_XDECREF(result);
    return result || type ? 0 : -1;
}

/* --- asking ------------------------------------------------------------------------------------------------------ */

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Wait for a message, without the interpreter. DONE, NOTHING after a while, or what vfiopy_wire_fill() says. */
static int wait_for_message(struct vfiopy_wire *wire, double deadline, struct vfiopy_wire_message *message)
{
    bool again = false;
    int result;

    for (; (result = vfiopy_wire_next(wire, message)) == VFIOPY_WIRE_NOTHING; again = true) {
        bool stuck = atomic_load(&wire->queued) > 0;

        if (again && now() >= deadline) /* a message that comes byte by byte */
            return VFIOPY_WIRE_NOTHING;
        if (stuck) {
            struct pollfd both = {.fd = wire->fd, .events = POLLIN | POLLOUT};

            if (poll(&both, 1, TICK) < 0)
                return -errno;
            result = vfiopy_wire_flush(wire);
            if (result < 0)
                return result;
        }
        result = vfiopy_wire_fill(wire, !stuck);
        if (result != VFIOPY_WIRE_DONE)
            return result;
    }
    return result;
}

/* Hand a message to Python that is not what this thread waits for. 0, or -1 with an error set. */
static int dispatch(struct wire_object *self, const struct vfiopy_wire_message *message)
{
    PyObject *made = vfiopy_wire_take(self, message);
    PyObject *result = made ? PyObject_CallFunctionObjArgs(self->asking->dispatch, made, NULL) : NULL;

    Py_XDECREF(made);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

struct request {
    struct vfiopy_wire_header header;
    const struct iovec *parts;
    unsigned count;
    const int *fds;
    unsigned fd_count;
    double timeout, deadline;
    Py_ssize_t data; /* bytes of data that the answer to a read is to have; -1 for what is none */
};

/* The reply as the caller wants it. */
static PyObject *result_of(struct wire_object *self, const struct request *request,
                           const struct vfiopy_wire_message *message)
{
    PyObject *bytes;

    if (request->data < 0 || message->header.flags & VFIOPY_WIRE_ERROR || message->fd_count ||
        message->size != sizeof(struct access) + (size_t)request->data)
        return vfiopy_wire_take(self, message);
    bytes = PyBytes_FromStringAndSize((const char *)message->payload + sizeof(struct access), request->data);
    vfiopy_wire_pop(&self->wire, false);
    return bytes;
}

/* Read until the reply is there. NULL with an error set; `open` says whether the reply may still come. */
static PyObject *await_reply(struct wire_object *self, const struct request *request, int result,
                             struct vfiopy_wire_message *message, bool *open)
{
    for (;;) {
        *open = true;
        if (result == VFIOPY_WIRE_DONE) {
            const struct vfiopy_wire_header *h = &message->header;

            if (h->id == request->header.id && h->command == request->header.command &&
                (h->flags & VFIOPY_WIRE_TYPE) == VFIOPY_WIRE_REPLY) {
                *open = false;
                return result_of(self, request, message);
            }
            if (dispatch(self, message))
                return NULL;
        } else if (result != VFIOPY_WIRE_NOTHING && result != -EINTR) {
            *open = false;
            return vfiopy_wire_raise(self, result);
        }
        if (PyErr_CheckSignals())
            return NULL;
        if (now() >= request->deadline)
            return vfiopy_wire_raise_kind(self, VFIOPY_WIRE_TIMEOUT, request->header.command);
        Py_BEGIN_ALLOW_THREADS
        result = wait_for_message(&self->wire, request->deadline, message);
        Py_END_ALLOW_THREADS
    }
}

/*
 * Everything that has come belongs to somebody, whom no event of the socket tells of it. An exception that is set stays.
 * 0, or -1 with one set that was not.
 */
static int drain(struct wire_object *self)
{
    struct vfiopy_wire_message message;
    PyObject *type, *value, *traceback;
    int result = 0;

    PyErr_Fetch(&type, &value, &traceback);
    while (!result && vfiopy_wire_next(&self->wire, &message) == VFIOPY_WIRE_DONE)
        result = dispatch(self, &message);
    if (!type)
        return result;
    PyErr_Restore(type, value, traceback);
    return 0;
}

/* Nobody gets this answer: an error came after it. Its fds are closed. */
static PyObject *drop(PyObject *answer)
{
    PyObject *type, *value, *traceback, *fds;

    PyErr_Fetch(&type, &value, &traceback);
    fds = PyBytes_Check(answer) ? NULL : PyObject_GetAttrString(answer, "fds");
    for (Py_ssize_t i = fds ? PyList_Size(fds) : 0; i > 0; i--) {
        PyObject *number = PyList_GetItem(fds, i - 1);

        if (number)
            close((int)PyLong_AsLong(number));
    }
    Py_XDECREF(fds);
    Py_DECREF(answer);
    PyErr_Restore(type, value, traceback);
    return NULL;
}

static PyObject *ask(struct wire_object *self, struct request *request)
{
    struct wire_asking *asking = self->asking;
    struct vfiopy_wire_message message;
    PyObject *answer = NULL;
    bool open = false;
    int result;

    if (!self->usable || self->process != vfiopy_process() || !take_turn(asking))
        Py_RETURN_NONE;
    if (!self->usable) { /* closed between the two */
        give_turn(self);
        Py_RETURN_NONE;
    }
    request->header.id = next_id(asking, true);
    request->deadline = now() + request->timeout;
    Py_BEGIN_ALLOW_THREADS
    watch(self, 0);
    result = vfiopy_wire_send(&self->wire, &request->header, request->parts, request->count, request->fds,
                              request->fd_count);
    if (result >= 0)
        result = wait_for_message(&self->wire, request->deadline, &message);
    Py_END_ALLOW_THREADS
    answer = await_reply(self, request, result, &message, &open);
    if (open)
        add_late(asking, request->header.id, request->header.command);
    else
        release(asking, request->header.id);
    if (drain(self) && answer)
        answer = drop(answer);
    watch(self, EPOLLIN);
    if (give_turn(self) && answer)
        answer = drop(answer);
    return answer;
}

PyObject *vfiopy_wire_exchange(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    struct request request = {.data = -1};
    struct vfiopy_wire_parts parts;
    PyObject *answer;

    if (nargs != 4 || !vfiopy_wire_of(object)->asking) {
        PyErr_SetString(PyExc_TypeError, "exchange(command, parts, fds, timeout), of a client's end");
        return NULL;
    }
    request.header.command = (uint16_t)PyLong_AsUnsignedLong(args[0]);
    request.timeout = PyFloat_AsDouble(args[3]);
    if (PyErr_Occurred() || vfiopy_wire_get_parts(&parts, args[1], args[2]))
        return NULL;
    request.header.size = (uint32_t)(VFIOPY_WIRE_HEADER + parts.size);
    request.parts = parts.parts;
    request.count = parts.count;
    request.fds = parts.fds;
    request.fd_count = parts.fd_count;
    answer = ask(vfiopy_wire_of(object), &request);
    vfiopy_wire_let_parts_go(&parts);
    return answer;
}

/* region, offset and size or data of an access. 0, or -1 with an error set. */
static int get_access(PyObject *object, PyObject *const *args, Py_ssize_t nargs, struct access *access)
{
    if (nargs != 3 || !vfiopy_wire_of(object)->asking) {
        PyErr_SetString(PyExc_TypeError, "(region, offset, size or data), of a client's end");
        return -1;
    }
    access->region = (uint32_t)PyLong_AsUnsignedLong(args[0]);
    access->offset = PyLong_AsUnsignedLongLong(args[1]);
    return PyErr_Occurred() ? -1 : 0;
}

PyObject *vfiopy_wire_read(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    struct wire_object *self = vfiopy_wire_of(object);
    struct access access;
    struct iovec part = {&access, sizeof(access)};
    struct request request = {.parts = &part, .count = 1, .timeout = self->timeout};

    if (get_access(object, args, nargs, &access))
        return NULL;
    access.size = (uint32_t)PyLong_AsUnsignedLong(args[2]);
    if (PyErr_Occurred())
        return NULL;
    request.header.command = REGION_READ;
    request.header.size = VFIOPY_WIRE_HEADER + sizeof(access);
    request.data = access.size;
    return ask(self, &request);
}

PyObject *vfiopy_wire_post(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    struct wire_object *self = vfiopy_wire_of(object);
    struct vfiopy_wire_header header = {.command = REGION_WRITE, .flags = VFIOPY_WIRE_NO_REPLY};
    struct iovec parts[2];
    struct access access;
    Py_ssize_t size;
    char *data;
    int result;

    if (get_access(object, args, nargs, &access) || PyBytes_AsStringAndSize(args[2], &data, &size))
        return NULL;
    if (!self->usable || self->process != vfiopy_process())
        Py_RETURN_NONE;
    access.size = (uint32_t)size;
    parts[0] = (struct iovec){&access, sizeof(access)};
    parts[1] = (struct iovec){data, (size_t)size};
    header.id = next_id(self->asking, false);
    header.size = (uint32_t)(VFIOPY_WIRE_HEADER + sizeof(access) + (size_t)size);
    result = vfiopy_wire_send(&self->wire, &header, parts, 2, NULL, 0);
    if (result != VFIOPY_WIRE_DONE && result != VFIOPY_WIRE_NOTHING)
        return vfiopy_wire_raise(self, result);
    return PyBool_FromLong(result == VFIOPY_WIRE_DONE);
}

/* --- for the slow road ------------------------------------------------------------------------------------------- */

PyObject *vfiopy_wire_use(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    struct wire_object *self = vfiopy_wire_of(object);
    long poll;

    if (nargs != 3) {
        PyErr_SetString(PyExc_TypeError, "use(dispatch, turn_over, poll)");
        return NULL;
    }
    poll = PyLong_AsLong(args[2]);
    if (poll == -1 && PyErr_Occurred())
        return NULL;
    if (!self->asking) {
        self->asking = calloc(1, sizeof(*self->asking));
        if (!self->asking)
            return PyErr_NoMemory();
        pthread_mutex_init(&self->asking->lock, NULL);
        self->asking->dispatch = Py_NewRef(args[0]);
        self->asking->turn_over = Py_NewRef(args[1]);
    }
    self->asking->poll = (int)poll;
    Py_RETURN_NONE;
}

static struct wire_asking *asking_of(PyObject *object)
{
    struct wire_asking *asking = vfiopy_wire_of(object)->asking;

    if (!asking)
        PyErr_SetString(PyExc_TypeError, "this is no client's end");
    return asking;
}

PyObject *vfiopy_wire_claim(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct wire_asking *asking = asking_of(object);

    return asking ? PyLong_FromLong(next_id(asking, true)) : NULL;
}

PyObject *vfiopy_wire_release(PyObject *object, PyObject *argument)
{
    struct wire_asking *asking = asking_of(object);
    unsigned long id = asking ? PyLong_AsUnsignedLong(argument) : 0;

    if (PyErr_Occurred())
        return NULL;
    release(asking, (uint16_t)id);
    Py_RETURN_NONE;
}

static int get_late(PyObject *object, PyObject *const *args, Py_ssize_t nargs, uint16_t *id, uint16_t *command)
{
    if (nargs != 2) {
        PyErr_SetString(PyExc_TypeError, "(number, command)");
        return -1;
    }
    if (!asking_of(object))
        return -1;
    *id = (uint16_t)PyLong_AsUnsignedLong(args[0]);
    *command = (uint16_t)PyLong_AsUnsignedLong(args[1]);
    return PyErr_Occurred() ? -1 : 0;
}

PyObject *vfiopy_wire_late(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    uint16_t id, command;

    if (get_late(object, args, nargs, &id, &command))
        return NULL;
    add_late(vfiopy_wire_of(object)->asking, id, command);
    Py_RETURN_NONE;
}

PyObject *vfiopy_wire_take_late(PyObject *object, PyObject *const *args, Py_ssize_t nargs)
{
    uint16_t id, command;

    if (get_late(object, args, nargs, &id, &command))
        return NULL;
    return PyBool_FromLong(take_late(vfiopy_wire_of(object)->asking, id, command));
}

PyObject *vfiopy_wire_take_turn(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct wire_asking *asking = asking_of(object);

    return asking ? PyBool_FromLong(take_turn(asking)) : NULL;
}

PyObject *vfiopy_wire_has_turn(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct wire_asking *asking = asking_of(object);

    return asking ? PyBool_FromLong(atomic_load(&asking->reading) == PyThread_get_thread_ident()) : NULL;
}

PyObject *vfiopy_wire_give_turn(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    struct wire_asking *asking = asking_of(object);

    if (!asking || (atomic_load(&asking->reading) == PyThread_get_thread_ident() && give_turn(vfiopy_wire_of(object))))
        return NULL;
    Py_RETURN_NONE;
}

PyObject *vfiopy_wire_wait(PyObject *object, PyObject *argument)
{
    struct wire_asking *asking = asking_of(object);
    long difference = asking ? PyLong_AsLong(argument) : 0;

    if (PyErr_Occurred())
        return NULL;
    atomic_fetch_add(&asking->waiting, (int)difference);
    Py_RETURN_NONE;
}
