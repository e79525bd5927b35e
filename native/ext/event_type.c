/* EventBase: an eventfd(2) that counts events, for vfiopy.device.Vector. */
#include <Python.h>
#include <structmember.h>

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stdatomic.h>
#include <time.h>
#include <unistd.h>

#include "ext/iova_object.h"
#include "ext/lives.h"
#include "ext/module.h"

#ifdef Py_GIL_DISABLED
#define OBJECT_ENTER(object) Py_BEGIN_CRITICAL_SECTION(object);
#define OBJECT_LEAVE() Py_END_CRITICAL_SECTION();
#else
#define OBJECT_ENTER(object) {
#define OBJECT_LEAVE() }
#endif

#define FOREVER 1e9 /* seconds: time_t may be small, and a wait is repeated */

struct event_object {
    PyObject_HEAD
    uint64_t total;
    PyObject *observer; /* told of what was taken, or NULL; written and read with the GIL or the object's lock */
    unsigned process;
    atomic_int fd;      /* -1 before it is set and once it is closed */
    atomic_int users;   /* threads that are in a call with the fd, maybe asleep */
    atomic_int retired; /* closed while somebody used it: the last of them closes it for the kernel; else -1 */
};

static struct event_object *of(PyObject *object)
{
    return (struct event_object *)object;
}

static PyObject *event_new(PyTypeObject *type, PyObject *Py_UNUSED(arguments), PyObject *Py_UNUSED(keywords))
{
    allocfunc allocate = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    struct event_object *self = of(allocate(type, 0));

    if (self) {
        self->fd = -1;
        self->retired = -1;
        self->process = vfiopy_process();
    }
    return (PyObject *)self;
}

static int event_traverse(PyObject *object, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(object));
    Py_VISIT(of(object)->observer);
    return 0;
}

static int event_clear(PyObject *object)
{
    Py_CLEAR(of(object)->observer);
    return 0;
}

/* The fd is not closed here: the kernel's side has to be told first, and that is for the owner to do. */
static void event_dealloc(PyObject *object)
{
    PyTypeObject *type = Py_TYPE(object);
    freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

    PyObject_GC_UnTrack(object);
    event_clear(object);
    release(object);
    Py_DECREF(type);
}

/* Set the exception that the object's method returns. */
static void raise_made_by(PyObject *object, const char *method, PyObject *argument)
{
    PyObject *name = PyUnicode_FromString(method), *error = NULL;

    if (name)
        error = PyObject_CallMethodObjArgs(object, name, argument, NULL);
    if (error)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(name);
    Py_XDECREF(error);
}

/* 0, or -1 with ClosedError or ForkedError set, by the words of vfiopy/lives.py. */
static int check(PyObject *object)
{
    PyObject *answer;

    if (of(object)->fd >= 0 && of(object)->process == vfiopy_process())
        return 0;
    answer = PyObject_CallMethod(object, "check_open", NULL);
    if (answer) /* another thread is closing it: the fd has gone first */
        raise_made_by(object, "_closing", NULL);
    Py_XDECREF(answer);
    return -1;
}

static void close_retired(PyObject *object)
{
    int fd = atomic_exchange(&of(object)->retired, -1);

    if (fd >= 0)
        close(fd);
}

/* The fd, which stays open until leave(); -1 once the vector is closed. */
static int enter(PyObject *object)
{
    atomic_fetch_add(&of(object)->users, 1);
    return of(object)->fd;
}

static void leave(PyObject *object)
{
    if (atomic_fetch_sub(&of(object)->users, 1) == 1)
        close_retired(object);
}

/* How many events came since the last look; 0 for none; -1 with an error set. Never sleeps: the fd is non-blocking. */
static int64_t take(PyObject *object, int fd)
{
    uint64_t count;
    ssize_t got;

    do
        got = read(fd, &count, sizeof(count));
    while (got < 0 && errno == EINTR);
    if (got == sizeof(count)) {
        of(object)->total += count;
        return (int64_t)(count > INT64_MAX ? INT64_MAX : count);
    }
    if (got < 0 && errno == EAGAIN)
        return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

/* Events that nobody got after all; 0, or -1 with an error set. */
static int put_back(PyObject *object, int fd, uint64_t count)
{
    if (write(fd, &count, sizeof(count)) != sizeof(count)) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    of(object)->total -= count;
    return 0;
}

/* Tell the observer of `count` events that were taken, or of those that were put back; 0, or -1 with an error set. */
static int tell(PyObject *object, long long count)
{
    PyObject *observer = NULL, *answer;

    if (!of(object)->observer)
        return 0;
    OBJECT_ENTER(object)
    observer = of(object)->observer;
    Py_XINCREF(observer);
    OBJECT_LEAVE()
    if (!observer)
        return 0;
    answer = PyObject_CallFunction(observer, "L", count);
    Py_DECREF(observer);
    Py_XDECREF(answer);
    return answer ? 0 : -1;
}

/* take(), and the observer told: who fails to hear it leaves the events for the next. */
static int64_t take_and_tell(PyObject *object, int fd)
{
    int64_t count = take(object, fd);
    PyObject *type, *error, *traceback;

    if (count <= 0 || !tell(object, count))
        return count;
    PyErr_Fetch(&type, &error, &traceback);
    if (put_back(object, fd, (uint64_t)count))
        PyErr_Clear(); /* a full eventfd: there are events for the next anyway */
    PyErr_Restore(type, error, traceback);
    return -1;
}

static PyObject *event_set_observer(PyObject *object, PyObject *observer)
{
    PyObject *old;

    if (observer != Py_None && !PyCallable_Check(observer)) {
        PyErr_SetString(PyExc_TypeError, "an observer is a callable(count) or None");
        return NULL;
    }
    observer = observer == Py_None ? NULL : Py_NewRef(observer);
    OBJECT_ENTER(object)
    old = of(object)->observer;
    of(object)->observer = observer;
    OBJECT_LEAVE()
    Py_XDECREF(old);
    Py_RETURN_NONE;
}

static PyObject *event_set_fd(PyObject *object, PyObject *argument)
{
    int fd;

    if (vfiopy_get_int(argument, "fd", &fd))
        return NULL;
    of(object)->fd = fd;
    Py_RETURN_NONE;
}

static PyObject *event_close_fd(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    static const uint64_t one = 1;
    int fd = atomic_exchange(&of(object)->fd, -1);

    if (fd < 0)
        Py_RETURN_NONE;
    of(object)->retired = fd;
    if (of(object)->users == 0)
        close_retired(object);
    else if (write(fd, &one, sizeof(one)) < 0 && errno != EAGAIN) /* wakes who sleeps; EAGAIN: it is readable anyway */
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *event_take(PyObject *object, PyObject *Py_UNUSED(ignored))
{
    int fd = enter(object);
    int64_t count = check(object) ? -1 : take_and_tell(object, fd);

    leave(object);
    return count < 0 ? NULL : PyLong_FromLongLong(count);
}

static PyObject *event_put_back(PyObject *object, PyObject *argument)
{
    uint64_t count;
    bool done = false;
    int fd;

    if (vfiopy_get_u64(argument, "count", &count))
        return NULL;
    fd = enter(object);
    if (!check(object))
        done = !put_back(object, fd, count) && !tell(object, -(long long)count);
    leave(object);
    return done ? Py_NewRef(Py_None) : NULL;
}

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

/* Sleep until the fd can be read, at most so long. 1: it can; 0: it cannot yet; -1 with an error set. */
static int sleep_on(int fd, double seconds)
{
    struct pollfd waited = {.fd = fd, .events = POLLIN};
    struct timespec time;
    int ready;

    seconds = fmin(seconds, FOREVER);
    time.tv_sec = (time_t)seconds;
    time.tv_nsec = (long)((seconds - (double)time.tv_sec) * 1e9);
    Py_BEGIN_ALLOW_THREADS
    ready = ppoll(&waited, 1, &time, NULL);
    Py_END_ALLOW_THREADS
    if (ready >= 0)
        return ready;
    if (errno != EINTR) {
        PyErr_SetFromErrno(PyExc_OSError);
        return -1;
    }
    return PyErr_CheckSignals() ? -1 : 0;
}

static PyObject *wait_for(PyObject *object, int fd, double timeout)
{
    double left = timeout > 0 ? timeout : 0;
    double deadline = isinf(left) || !left ? left : now() + left;

    for (;;) {
        int64_t count = take_and_tell(object, fd);

        if (count < 0)
            return NULL;
        if (count)
            return PyLong_FromLongLong(count);
        if (left <= 0)
            return PyLong_FromLong(0);
        if (sleep_on(fd, left) < 0 || check(object)) /* closed meanwhile: that is what woke us */
            return NULL;
        if (!isinf(deadline))
            left = deadline - now();
    }
}

static PyObject *event_wait(PyObject *object, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"timeout", NULL};
    PyObject *given[1], *count;
    double timeout = HUGE_VAL;
    long long number;
    int fd;

    if (vfiopy_arguments("wait", args, nargs, keywords, names, 0, given) ||
        (given[0] && vfiopy_get_timeout(given[0], &timeout)))
        return NULL;
    fd = enter(object);
    count = check(object) ? NULL : wait_for(object, fd, timeout);
    leave(object);
    number = count ? PyLong_AsLongLong(count) : -1;
    if (number)
        return count;
    Py_DECREF(count);
    raise_made_by(object, "_timed_out", given[0]);
    return NULL;
}

static PyMethodDef methods[] = {
    {"take", event_take, METH_NOARGS,
     "take($self, /)\n--\n\n"
     "Return how many interrupts came since the last look, 0 for none, without waiting."},
    {"wait", VFIOPY_FAST(event_wait), METH_FASTCALL | METH_KEYWORDS,
     "wait($self, timeout=None)\n--\n\n"
     "Wait for at least one interrupt.\n\n"
     "Args:\n"
     "    timeout: seconds; None waits for ever.\n\n"
     "Returns:\n"
     "    How many interrupts came since the last look.\n\n"
     "Raises:\n"
     "    VfioTimeoutError: none came in time."},
    {"_set_fd", event_set_fd, METH_O, "For Vector: take over a non-blocking eventfd."},
    {"_close_fd", event_close_fd, METH_NOARGS, "For Vector: close it."},
    {"_set_observer", event_set_observer, METH_O,
     "For Vector: call observer(count) for events that were taken, -count for those that were put back; None stops it."},
    {"_put_back", event_put_back, METH_O, "For Vector: events were taken for somebody who is gone."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"_fd", T_INT, offsetof(struct event_object, fd), READONLY, "the eventfd, or -1"},
    {"total", T_ULONGLONG, offsetof(struct event_object, total), READONLY, "how many interrupts were taken so far"},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "EventBase()\n--\n\nThe native part of vfiopy.device.Vector."},
    {Py_tp_new, event_new},
    {Py_tp_dealloc, event_dealloc},
    {Py_tp_traverse, event_traverse},
    {Py_tp_clear, event_clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

static PyType_Spec spec = {
    .name = "vfiopy._native.EventBase",
    .basicsize = sizeof(struct event_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};

int vfiopy_event_type_init(PyObject *module)
{
    PyObject *type = PyType_FromSpec(&spec);
    int result = type ? PyModule_AddObjectRef(module, "EventBase", type) : -1;

    Py_XDECREF(type);
    return result;
}
