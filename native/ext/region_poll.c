/* Waiting for a register: poll8 ... poll64. */
#include "ext/region_object.h"

#include <sched.h>
#include <time.h>

#include "ext/raise.h"
#include "region/fault.h"
#include "region/runs.h"

/* ns between looks for a KeyboardInterrupt; each may have to wait for the GIL. */
#define SIGNAL_INTERVAL 10000000u

struct wait {
    uint64_t offset;
    unsigned width;
    uint64_t mask;
    uint64_t value;
    uint64_t deadline; /* ns as vfiopy_now(), UINT64_MAX for none */
    uint64_t interval; /* ns */
    double timeout;    /* as given, for the message */
    uint64_t seen;
};

enum outcome { MATCHED, EXPIRED, UNDECIDED, FAILED };

static int parse_seconds(RegionObject *self, PyObject *number, const char *what, double *seconds)
{
    *seconds = PyFloat_AsDouble(number);
    if (*seconds == -1.0 && PyErr_Occurred())
        return -1;
    if (*seconds >= 0.0) /* false for NaN, too */
        return 0;
    vfiopy_raise("AccessError", self->name, NULL, "%s must be 0 or more seconds, not %S", what, number);
    return -1;
}

static uint64_t to_ns(double seconds)
{
    return seconds < 9e9 ? (uint64_t)(seconds * 1e9) : UINT64_MAX / 2;
}

/* Signals are handled by the main thread only: the others need not ask. */
static int is_main_thread(void)
{
    PyObject *threading = PyImport_ImportModule("threading");
    PyObject *thread = threading ? PyObject_CallMethod(threading, "main_thread", NULL) : NULL;
    PyObject *ident = thread ? PyObject_GetAttrString(thread, "ident") : NULL;
    unsigned long main_ident = 0;

    if (ident)
        main_ident = PyLong_AsUnsignedLong(ident);
    Py_XDECREF(ident);
    Py_XDECREF(thread);
    Py_XDECREF(threading);
    if (PyErr_Occurred())
        return -1;
    return main_ident == PyThread_get_thread_ident();
}

static bool enter_if_open(RegionObject *self)
{
    bool open;

    REGION_ENTER(self)
    open = vfiopy_region_flags(&self->core) == 0;
    if (open)
        atomic_fetch_add(&self->core.users, 1);
    REGION_LEAVE()
    return open;
}

/* Wait on the mapping without the GIL for as long as the region is open. */
static enum outcome wait_mapped(RegionObject *self, struct wait *wait, uintptr_t address)
{
    struct vfiopy_poll poll = {
        .address = address,
        .width = wait->width,
        .swap = self->core.swap,
        .mask = wait->mask,
        .value = wait->value,
        .interval = wait->interval,
        .deadline = wait->deadline,
        .flags = &self->core.flags,
        .expected = 0,
        .next = wait->interval ? vfiopy_now() + wait->interval : 0,
    };
    int main_thread = is_main_thread();
    enum vfiopy_poll_result result = VFIOPY_POLL_CHECK;

    while (main_thread >= 0) {
        if (!enter_if_open(self))
            return UNDECIDED;
        Py_BEGIN_ALLOW_THREADS
        poll.check_at = main_thread ? vfiopy_now() + SIGNAL_INTERVAL : UINT64_MAX;
        result = vfiopy_poll_run(&poll);
        atomic_fetch_sub(&self->core.users, 1);
        wait->seen = poll.seen;
        Py_END_ALLOW_THREADS
        /* Not as a user: a signal handler may close the region, and would wait for us. */
        if (result != VFIOPY_POLL_CHECK || PyErr_CheckSignals() < 0)
            break;
    }
    switch (result) {
    case VFIOPY_POLL_MATCH:
        return MATCHED;
    case VFIOPY_POLL_TIME:
        return EXPIRED;
    case VFIOPY_POLL_STATE:
        return UNDECIDED;
    case VFIOPY_POLL_FAULT:
        vfiopy_raise_fault(self, wait->offset, 0, 1, wait->width, VFIOPY_READ);
        return FAILED;
    default:
        return FAILED;
    }
}

/* Let others run until the next read of a register that Python code serves. */
static int pause_between(const struct wait *wait, uint64_t until)
{
    Py_BEGIN_ALLOW_THREADS
    if (wait->interval == 0) {
        sched_yield();
    } else {
        uint64_t now = vfiopy_now();

        if (now < until) {
            uint64_t left = until - now < SIGNAL_INTERVAL ? until - now : SIGNAL_INTERVAL;
            struct timespec length = {0, (long)left};

            nanosleep(&length, NULL);
        }
    }
    Py_END_ALLOW_THREADS
    return PyErr_CheckSignals();
}

static enum outcome wait_slowly(struct wait *wait, bool *late)
{
    uint64_t now = vfiopy_now();
    uint64_t until = now + wait->interval < wait->deadline ? now + wait->interval : wait->deadline;

    if (*late)
        return EXPIRED;
    do {
        if (pause_between(wait, until) < 0)
            return FAILED;
        now = vfiopy_now();
    } while (now < until && wait->interval);
    *late = now >= wait->deadline;
    return UNDECIDED;
}

static enum outcome wait_for(RegionObject *self, struct wait *wait)
{
    enum outcome outcome = UNDECIDED;
    bool late = false;

    while (outcome == UNDECIDED) {
        struct vfiopy_place place = {0, 0};

        if (vfiopy_region_get(self, wait->offset, wait->width, false, &wait->seen) < 0)
            return FAILED;
        if ((wait->seen & wait->mask) == wait->value)
            return MATCHED;
        REGION_ENTER(self)
        if (vfiopy_region_flags(&self->core) == 0)
            place = vfiopy_region_locate(&self->core, wait->offset, wait->width);
        REGION_LEAVE()
        outcome = place.address ? wait_mapped(self, wait, place.address) : wait_slowly(wait, &late);
    }
    return outcome;
}

static void raise_timeout(RegionObject *self, const struct wait *wait)
{
    uint64_t ones = UINT64_MAX >> (64 - 8 * wait->width);
    const char *hint = wait->seen == ones ? "all ones is also what a device answers that is gone or asleep" : NULL;
    PyObject *error, *seen;
    char text[160];

    PyOS_snprintf(text, sizeof(text),
                  "(register & 0x%llx) == 0x%llx at offset 0x%llx, %u bits, was not seen within %g s; it last read 0x%llx",
                  (unsigned long long)wait->mask, (unsigned long long)wait->value, (unsigned long long)wait->offset,
                  8 * wait->width, wait->timeout, (unsigned long long)wait->seen);
    error = vfiopy_make_error("VfioTimeoutError", self->name, hint, "%s", text);
    seen = error ? PyLong_FromUnsignedLongLong(wait->seen) : NULL;
    if (seen && PyObject_SetAttrString(error, "value", seen) == 0)
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_XDECREF(seen);
    Py_XDECREF(error);
}

static PyObject *poll(PyObject *op, PyObject *arguments, PyObject *keywords, unsigned width, const char *format)
{
    static char *names[] = {"offset", "mask", "value", "timeout", "interval", NULL};
    PyObject *offset, *mask, *value, *timeout, *interval = NULL;
    RegionObject *self = (RegionObject *)op;
    struct wait wait = {.width = width, .deadline = UINT64_MAX};
    double seconds = 0.0;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, format, names, &offset, &mask, &value, &timeout, &interval)
        || vfiopy_parse_offset(self, offset, &wait.offset) < 0
        || vfiopy_parse_value(self, mask, width, &wait.mask) < 0
        || vfiopy_parse_value(self, value, width, &wait.value) < 0)
        return NULL;
    if (wait.value & ~wait.mask) {
        vfiopy_raise("AccessError", self->name, "value is compared after the mask was applied",
                     "value %S has bits outside of mask %S: it can never be seen", value, mask);
        return NULL;
    }
    if (interval) {
        if (parse_seconds(self, interval, "interval", &seconds) < 0)
            return NULL;
        wait.interval = to_ns(seconds);
    }
    if (timeout != Py_None) {
        if (parse_seconds(self, timeout, "timeout", &wait.timeout) < 0)
            return NULL;
        wait.deadline = vfiopy_now() + to_ns(wait.timeout);
    }
    if (self->core.window_count > 0)
        vfiopy_fault_install();
    if (vfiopy_region_flags(&self->core) & VFIOPY_REGION_TRACED
        && vfiopy_region_report(self, "poll", wait.offset, width,
                                Py_BuildValue("(KK)", (unsigned long long)wait.mask, (unsigned long long)wait.value))
               < 0)
        return NULL;
    switch (wait_for(self, &wait)) {
    case MATCHED:
        return PyLong_FromUnsignedLongLong(wait.seen);
    case EXPIRED:
        raise_timeout(self, &wait);
        return NULL;
    default:
        return NULL;
    }
}

PyObject *vfiopy_region_poll8(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return poll(op, arguments, keywords, 1, "OOOO|O:poll8");
}

PyObject *vfiopy_region_poll16(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return poll(op, arguments, keywords, 2, "OOOO|O:poll16");
}

PyObject *vfiopy_region_poll32(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return poll(op, arguments, keywords, 4, "OOOO|O:poll32");
}

PyObject *vfiopy_region_poll64(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return poll(op, arguments, keywords, 8, "OOOO|O:poll64");
}
