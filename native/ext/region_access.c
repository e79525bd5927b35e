/* One register access on whatever path the region's state asks for, and what to say when there is none. */
#include "ext/region_object.h"

#include "ext/raise.h"

const char *vfiopy_direction_name(enum vfiopy_direction direction)
{
    return direction == VFIOPY_READ ? "read" : "write";
}

int vfiopy_parse_offset(RegionObject *self, PyObject *argument, uint64_t *offset)
{
    PyObject *number = PyNumber_Index(argument);
    unsigned long long value;

    if (!number)
        return -1;
    value = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (value == (unsigned long long)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
        vfiopy_raise("AddressRangeError", self->name, "offsets count from the start of the region, in bytes",
                     "offset or count %S is negative or exceeds 64 bits", argument);
        return -1;
    }
    *offset = value;
    return 0;
}

int vfiopy_parse_value(RegionObject *self, PyObject *argument, unsigned width, uint64_t *value)
{
    PyObject *number = PyNumber_Index(argument);
    unsigned long long parsed;
    bool fits;

    if (!number)
        return -1;
    parsed = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    fits = true;
    if (parsed == (unsigned long long)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError))
            return -1;
        PyErr_Clear();
        fits = false;
    }
    if (!fits || (width < 8 && parsed >> (8 * width))) {
        vfiopy_raise("AccessError", self->name,
                     "mask it to the width of the register; negative numbers have no width of their own",
                     "value %S does not fit into %u unsigned bits", argument, 8 * width);
        return -1;
    }
    *value = parsed;
    return 0;
}

int vfiopy_region_report(RegionObject *self, const char *operation, uint64_t offset, uint64_t width, PyObject *value)
{
    PyObject *trace, *result;

    if (!value)
        return -1;
    REGION_ENTER(self)
    trace = self->trace;
    Py_XINCREF(trace);
    REGION_LEAVE()
    if (!trace) {
        Py_DECREF(value);
        return 0;
    }
    result = PyObject_CallFunction(trace, "sKKN", operation, (unsigned long long)offset, (unsigned long long)width,
                                   value);
    Py_DECREF(trace);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

static int call_trace(RegionObject *self, uint64_t offset, unsigned width, enum vfiopy_direction direction,
                      uint64_t value)
{
    if (!(vfiopy_region_flags(&self->core) & VFIOPY_REGION_TRACED))
        return 0;
    return vfiopy_region_report(self, vfiopy_direction_name(direction), offset, width,
                                PyLong_FromUnsignedLongLong(value));
}

/* Report an access that failed, with the exception that is set in place of a value; what the report raises wins. */
static int report_failure(RegionObject *self, uint64_t offset, unsigned width, enum vfiopy_direction direction)
{
    unsigned flags = vfiopy_region_flags(&self->core);
    PyObject *type, *error, *traceback;

    if (!(flags & VFIOPY_REGION_TRACED) || flags & VFIOPY_REGION_FORKED) /* the trace is the parent's */
        return -1;
    PyErr_Fetch(&type, &error, &traceback);
    PyErr_NormalizeException(&type, &error, &traceback);
    if (vfiopy_region_report(self, vfiopy_direction_name(direction), offset, width, Py_NewRef(error)) == 0) {
        PyErr_Restore(type, error, traceback);
        return -1;
    }
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(traceback);
    return -1;
}

static void raise_gone(RegionObject *self, const char *access)
{
    PyObject *reason;

    REGION_ENTER(self)
    reason = self->reason;
    Py_XINCREF(reason);
    REGION_LEAVE()
    if (reason)
        vfiopy_raise("DeviceGoneError", self->name, NULL, "%s: the device does not answer: %U", access, reason);
    else
        vfiopy_raise("DeviceGoneError", self->name, NULL, "%s: the device does not answer", access);
    Py_XDECREF(reason);
}

int vfiopy_raise_verdict(RegionObject *self, enum vfiopy_verdict verdict, uint64_t offset, uint64_t count,
                         unsigned width, enum vfiopy_direction direction)
{
    const char *what = vfiopy_direction_name(direction);
    char access[96];

    if (count == 1)
        PyOS_snprintf(access, sizeof(access), "%s of %u byte%s at offset 0x%llx", what, width, width == 1 ? "" : "s",
                      (unsigned long long)offset);
    else
        PyOS_snprintf(access, sizeof(access), "%s of %llu x %u byte%s at offset 0x%llx", what,
                      (unsigned long long)count, width, width == 1 ? "" : "s", (unsigned long long)offset);

    switch (verdict) {
    case VFIOPY_ALLOWED:
        break;
    case VFIOPY_IS_CLOSED:
        vfiopy_raise_state("ClosedError", "%U is closed (%s)", self->name, access);
        break;
    case VFIOPY_IS_FORKED:
        vfiopy_raise_state("ForkedError",
                           "%U belongs to the process that opened it and this is a forked child (%s). Open the device "
                           "again in the child, or use the 'spawn' start method of multiprocessing",
                           self->name, access);
        break;
    case VFIOPY_IS_GONE:
        raise_gone(self, access);
        break;
    case VFIOPY_OUT_OF_RANGE: {
        char size[32];

        PyOS_snprintf(size, sizeof(size), "0x%llx", (unsigned long long)self->core.size);
        vfiopy_raise("AddressRangeError", self->name, "offsets count from the start of the region, in bytes",
                     "%s is outside of the region, which has %s bytes", access, size);
        break;
    }
    case VFIOPY_MISALIGNED:
        vfiopy_raise("AccessError", self->name, "use a narrower access, or an offset that is a multiple of the width",
                     "%s is not naturally aligned", access);
        break;
    case VFIOPY_WRONG_DIRECTION:
        vfiopy_raise("AccessError", self->name, NULL, "%s: the region is %s", access,
                     self->core.directions & VFIOPY_READ    ? "read-only"
                     : self->core.directions & VFIOPY_WRITE ? "write-only"
                                                            : "neither readable nor writable");
        break;
    }
    return report_failure(self, offset, width, direction);
}

int vfiopy_raise_fault(RegionObject *self, uint64_t offset, uint64_t done, uint64_t count, unsigned width,
                       enum vfiopy_direction direction)
{
    const char *hint = "check that the device is still there and in D0, and that its command register has memory "
                       "decode on; a reset may be under way";
    char access[128];

    PyOS_snprintf(access, sizeof(access), "%s of %u byte%s at offset 0x%llx", vfiopy_direction_name(direction), width,
                  width == 1 ? "" : "s", (unsigned long long)offset);
    if (count == 1)
        vfiopy_raise("DeviceGoneError", self->name, hint, "%s: nothing is behind the mapping (SIGBUS)", access);
    else
        vfiopy_raise("DeviceGoneError", self->name, hint,
                     "%s: nothing is behind the mapping (SIGBUS), after %llu of %llu elements", access,
                     (unsigned long long)done, (unsigned long long)count);
    return report_failure(self, offset, width, direction);
}

static int raise_no_path(RegionObject *self, uint64_t offset, unsigned width, enum vfiopy_direction direction)
{
    char place[32];

    PyOS_snprintf(place, sizeof(place), "0x%llx", (unsigned long long)offset);
    vfiopy_raise("AccessError", self->name, "the region has to be given a slow path for accesses that no mapping serves",
                 "%s of %u bytes at offset %s: %s", vfiopy_direction_name(direction), width, place,
                 vfiopy_region_flags(&self->core) & VFIOPY_REGION_SLOW
                     ? "the mapping may not be touched now and there is no other way"
                     : "this part is not mapped and there is no other way");
    return -1;
}

/* The slow path speaks in values of a little-endian register. */
static int slow_read(RegionObject *self, uint64_t offset, unsigned width, uint64_t *value)
{
    PyObject *method = self->slow_read, *result;

    if (!method)
        return raise_no_path(self, offset, width, VFIOPY_READ);
    Py_INCREF(method);
    result = PyObject_CallFunction(method, "KI", (unsigned long long)offset, width);
    Py_DECREF(method);
    if (!result)
        return -1;
    if (vfiopy_parse_value(self, result, width, value) < 0) {
        Py_DECREF(result);
        return -1;
    }
    Py_DECREF(result);
    if (self->core.swap)
        *value = vfiopy_swap(*value, width);
    return 0;
}

static int slow_write(RegionObject *self, uint64_t offset, unsigned width, uint64_t value)
{
    PyObject *method = self->slow_write, *result;

    if (!method)
        return raise_no_path(self, offset, width, VFIOPY_WRITE);
    if (self->core.swap)
        value = vfiopy_swap(value, width);
    Py_INCREF(method);
    result = PyObject_CallFunction(method, "KIK", (unsigned long long)offset, width, (unsigned long long)value);
    Py_DECREF(method);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

int vfiopy_region_get(RegionObject *self, uint64_t offset, unsigned width, bool relaxed, uint64_t *value)
{
    enum vfiopy_verdict verdict;
    struct vfiopy_place place = {0, 0};
    int faulted = 0;

    REGION_ENTER(self)
    verdict = vfiopy_region_check(&self->core, offset, 1, width, VFIOPY_READ);
    if (verdict == VFIOPY_ALLOWED) {
        if (!(vfiopy_region_flags(&self->core) & VFIOPY_REGION_NO_WINDOW))
            place = vfiopy_region_locate(&self->core, offset, width);
        if (place.address)
            *value = vfiopy_load_any(place.address, width, self->core.swap, relaxed, &faulted);
    }
    REGION_LEAVE()

    if (verdict != VFIOPY_ALLOWED)
        return vfiopy_raise_verdict(self, verdict, offset, 1, width, VFIOPY_READ);
    if (faulted)
        return vfiopy_raise_fault(self, offset, 0, 1, width, VFIOPY_READ);
    if (!place.address && slow_read(self, offset, width, value) < 0)
        return report_failure(self, offset, width, VFIOPY_READ);
    return call_trace(self, offset, width, VFIOPY_READ, *value);
}

int vfiopy_region_put(RegionObject *self, uint64_t offset, unsigned width, bool relaxed, uint64_t value)
{
    enum vfiopy_verdict verdict = vfiopy_region_check(&self->core, offset, 1, width, VFIOPY_WRITE);
    struct vfiopy_place place = {0, 0};
    int faulted = 0;

    if (verdict != VFIOPY_ALLOWED)
        return vfiopy_raise_verdict(self, verdict, offset, 1, width, VFIOPY_WRITE);
    /* Before the access, so that the last line of a trace is the write that the machine did not survive. */
    if (call_trace(self, offset, width, VFIOPY_WRITE, value) < 0)
        return -1;

    REGION_ENTER(self)
    verdict = vfiopy_region_check(&self->core, offset, 1, width, VFIOPY_WRITE);
    if (verdict == VFIOPY_ALLOWED) {
        if (!(vfiopy_region_flags(&self->core) & VFIOPY_REGION_NO_WINDOW))
            place = vfiopy_region_locate(&self->core, offset, width);
        if (place.address)
            vfiopy_store_any(place.address, width, self->core.swap, relaxed, value, &faulted);
    }
    REGION_LEAVE()

    if (verdict != VFIOPY_ALLOWED)
        return vfiopy_raise_verdict(self, verdict, offset, 1, width, VFIOPY_WRITE);
    if (faulted)
        return vfiopy_raise_fault(self, offset, 0, 1, width, VFIOPY_WRITE);
    if (!place.address && slow_write(self, offset, width, value) < 0)
        return report_failure(self, offset, width, VFIOPY_WRITE);
    return 0;
}
