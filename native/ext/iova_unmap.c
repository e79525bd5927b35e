/* IovaSpace: unmapping. Tells the owners of pins, with no lock held, and waits for them. */
#include <math.h>
#include <stdlib.h>
#include <time.h>

#include "ext/iova_methods.h"
#include "ext/iova_object.h"

#define SLICE 0.05 /* seconds between looks for a pending signal */

static double now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

int vfiopy_iova_tell(struct vfiopy_unmap *unmap)
{
    int result = 0;

    for (size_t i = 0; i < unmap->notice_count; i++) {
        struct vfiopy_notice *notice = &unmap->notices[i];
        PyObject *callback = notice->callback, *answer = NULL;

        if (!result)
            answer = PyObject_CallFunction(callback, "KK", (unsigned long long)notice->iova,
                                           (unsigned long long)notice->size);
        if (!result && !answer) {
            if (PyErr_ExceptionMatches(PyExc_Exception))
                PyErr_WriteUnraisable(callback);
            else
                result = -1;
        }
        Py_XDECREF(answer);
        if (result) {
            PyObject *type, *value, *traceback; /* a destructor must not lose it */

            PyErr_Fetch(&type, &value, &traceback);
            Py_DECREF(callback);
            PyErr_Restore(type, value, traceback);
        } else {
            Py_DECREF(callback);
        }
    }
    free(unmap->notices);
    unmap->notices = NULL;
    unmap->notice_count = 0;
    return result;
}

/* `holders` is stolen; NULL with an error set. */
static PyObject *give_up_pinned(PyObject *self, const char *operation, struct vfiopy_unmap *unmap, PyObject *holders)
{
    struct vfiopy_failure failure = {.result = VFIOPY_PINNED, .asked = unmap->range};

    vfiopy_unmap_give_up(vfiopy_space_of(self), unmap);
    return holders ? vfiopy_raise_failure(self, operation, &failure, holders) : NULL;
}

PyObject *vfiopy_iova_raise_pinned(PyObject *self, const char *operation, struct vfiopy_unmap *unmap)
{
    return give_up_pinned(self, operation, unmap, vfiopy_holders_list(self, unmap->range));
}

/* A callback or a signal handler may have forked: the unmap is the parent's then. */
static void back_out(PyObject *self, struct vfiopy_unmap *unmap)
{
    if (vfiopy_iova_is_here(self))
        vfiopy_unmap_give_up(vfiopy_space_of(self), unmap);
}

int vfiopy_iova_get_ready(PyObject *self, const char *operation, struct vfiopy_unmap *unmap, double timeout)
{
    struct vfiopy_space *space = vfiopy_space_of(self);
    struct vfiopy_failure failure = {.asked = unmap->range};
    double deadline = 0, left;

    for (;;) {
        if (vfiopy_iova_elsewhere(self))
            return -1;
        switch (vfiopy_unmap_step(space, unmap, &failure)) {
        case VFIOPY_STEP_READY:
            return 0;
        case VFIOPY_STEP_FAILED:
            failure.asked = unmap->range;
            vfiopy_raise_failure(self, operation, &failure, NULL);
            return -1;
        case VFIOPY_STEP_BUSY:
            Py_BEGIN_ALLOW_THREADS
            vfiopy_unmap_wait_idle(space, unmap);
            Py_END_ALLOW_THREADS
            break;
        case VFIOPY_STEP_NOTIFY:
            if (vfiopy_iova_tell(unmap)) {
                back_out(self, unmap);
                return -1;
            }
            break;
        case VFIOPY_STEP_WAIT:
            if (!deadline)
                deadline = now() + timeout;
            left = deadline - now();
            if (left <= 0) {
                PyObject *holders = vfiopy_holders_list(self, unmap->range);

                if (!holders || PyList_Size(holders)) {
                    give_up_pinned(self, operation, unmap, holders);
                    return -1;
                }
                Py_DECREF(holders); /* they went since we looked: there is nobody to name, and nothing in the way */
                break;
            }
            Py_BEGIN_ALLOW_THREADS
            vfiopy_unmap_wait(space, unmap, (uint64_t)(fmin(left, SLICE) * 1e9));
            Py_END_ALLOW_THREADS
            break;
        }
        if (PyErr_CheckSignals()) {
            back_out(self, unmap);
            return -1;
        }
    }
}

int vfiopy_iova_finish(PyObject *self, const char *operation, struct vfiopy_unmap *unmap)
{
    struct vfiopy_space *space = vfiopy_space_of(self);
    struct vfiopy_failure failure = {0};
    int result;

    if (vfiopy_space_has_mappers(space)) {
        Py_BEGIN_ALLOW_THREADS
        result = vfiopy_unmap_finish(space, unmap, &failure);
        Py_END_ALLOW_THREADS
    } else {
        result = vfiopy_unmap_finish(space, unmap, &failure);
    }
    vfiopy_drop_gone(&unmap->gone);
    if (!result)
        return 0;
    failure.asked = unmap->range;
    vfiopy_raise_failure(self, operation, &failure, NULL);
    return -1;
}

/* The common case in one go. 1: done; 0: it is not that simple; -1 with an error set. */
static int at_once(PyObject *self, const char *operation, const struct vfiopy_handle *handle, uint64_t *bytes)
{
    struct vfiopy_space *space = vfiopy_space_of(self);
    struct vfiopy_failure failure = {0};
    void *memory = NULL;
    int result;

    if (vfiopy_space_has_mappers(space)) {
        Py_BEGIN_ALLOW_THREADS
        result = vfiopy_space_unmap_idle(space, handle, bytes, &memory, &failure);
        Py_END_ALLOW_THREADS
    } else {
        result = vfiopy_space_unmap_idle(space, handle, bytes, &memory, &failure);
    }
    Py_XDECREF((PyObject *)memory);
    if (!result)
        return *bytes != 0;
    failure.asked = (struct vfiopy_range){failure.clash.first, failure.clash.last};
    vfiopy_raise_failure(self, operation, &failure, NULL);
    return -1;
}

static PyObject *run(PyObject *self, const char *operation, struct vfiopy_unmap *unmap, PyObject *timeout)
{
    double seconds = 0;
    int done = 0;

    if (vfiopy_iova_elsewhere(self) || (timeout && vfiopy_get_timeout(timeout, &seconds)))
        return NULL;
    if (unmap->exact) {
        const struct vfiopy_handle handle = {unmap->range.first, unmap->serial};

        done = at_once(self, operation, &handle, &unmap->bytes);
    }
    if (done < 0 ||
        (!done && (vfiopy_iova_get_ready(self, operation, unmap, seconds) || vfiopy_iova_finish(self, operation, unmap))))
        return NULL;
    return PyLong_FromUnsignedLongLong(unmap->bytes);
}

/* As vfiopy_iova_unmap_one, where it is not that simple. */
static int unmap_in_steps(PyObject *book, const struct vfiopy_handle *handle, double timeout)
{
    struct vfiopy_unmap unmap = {.range = {handle->iova, handle->iova}, .exact = true, .serial = handle->serial};
    struct vfiopy_view view;

    if (!vfiopy_space_find(vfiopy_space_of(book), handle->iova, &view))
        return 0;
    Py_XDECREF((PyObject *)view.memory);
    if (view.serial != handle->serial)
        return 0;
    if (vfiopy_space_is_stepwise(vfiopy_space_of(book)))
        return 2;
    return vfiopy_iova_get_ready(book, "unmap", &unmap, timeout) || vfiopy_iova_finish(book, "unmap", &unmap) ? -1 : 1;
}

int vfiopy_iova_unmap_one(PyObject *book, uint64_t iova, uint64_t serial, double timeout)
{
    const struct vfiopy_handle handle = {iova, serial};
    uint64_t bytes;
    int done = at_once(book, "unmap", &handle, &bytes);

    return done ? done : unmap_in_steps(book, &handle, timeout);
}

static PyObject *unmap_method(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"iova", "timeout", NULL};
    struct vfiopy_unmap unmap = {.exact = true};
    PyObject *given[2];

    if (vfiopy_arguments("unmap", args, nargs, keywords, names, 1, given) ||
        vfiopy_get_u64(given[0], "iova", &unmap.range.first))
        return NULL;
    unmap.range.last = unmap.range.first;
    return run(self, "unmap", &unmap, given[1]);
}

static PyObject *unmap_range(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"first", "last", "timeout", NULL};
    struct vfiopy_unmap unmap = {0};
    PyObject *given[3];

    if (vfiopy_arguments("unmap_range", args, nargs, keywords, names, 2, given) ||
        vfiopy_get_bounds("unmap_range", given, 2, &unmap.range))
        return NULL;
    return run(self, "unmap_range", &unmap, given[2]);
}

static PyObject *unmap_all(PyObject *self, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords)
{
    static const char *const names[] = {"timeout", NULL};
    struct vfiopy_unmap unmap = {.range = {0, UINT64_MAX}};
    PyObject *given[1];

    if (vfiopy_arguments("unmap_all", args, nargs, keywords, names, 0, given))
        return NULL;
    return run(self, "unmap_all", &unmap, given[0]);
}

static PyObject *resync(PyObject *self, PyObject *Py_UNUSED(ignored))
{
    struct vfiopy_failure failure = {0};
    struct vfiopy_gone gone = {0};
    uint64_t bytes = 0;
    int result;

    if (vfiopy_iova_elsewhere(self))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    result = vfiopy_space_resync(vfiopy_space_of(self), &gone, &bytes, &failure);
    Py_END_ALLOW_THREADS
    vfiopy_drop_gone(&gone);
    if (!result)
        return PyLong_FromUnsignedLongLong(bytes);
    failure.asked = (struct vfiopy_range){failure.clash.first, failure.clash.last};
    return vfiopy_raise_failure(self, "resync", &failure, NULL);
}

PyMethodDef vfiopy_iova_unmap_methods[] = {
    {"unmap", VFIOPY_FAST(unmap_method), METH_FASTCALL | METH_KEYWORDS,
     "unmap(iova, timeout=0): unmap the mapping that begins there; returns its size"},
    {"unmap_range", VFIOPY_FAST(unmap_range), METH_FASTCALL | METH_KEYWORDS,
     "unmap_range(first, last, timeout=0): unmap all mappings in the range; returns the number of bytes"},
    {"unmap_all", VFIOPY_FAST(unmap_all), METH_FASTCALL | METH_KEYWORDS,
     "unmap_all(timeout=0): unmap everything; returns the number of bytes"},
    {"resync", resync, METH_NOARGS,
     "resync(): unmap again what is in an unknown state; returns the number of bytes that are free now"},
    {NULL, NULL, 0, NULL},
};
