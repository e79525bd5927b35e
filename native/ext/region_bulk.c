/* Many accesses with one call: read_fifo, write_fifo, read_block, write_block. */
#include "ext/region_object.h"

#include <string.h>

#include "ext/raise.h"
#include "region/fault.h"
#include "region/runs.h"

/* Elements. A read from a real device takes about 1 us: below this, others do not miss the GIL. */
#define WORTH_RELEASING 32
/* How many are done before signals and the state are looked at again. */
#define LONGEST_RUN 8192

struct transfer {
    uint64_t offset;
    uint64_t count; /* elements */
    unsigned width;
    bool fifo;
    enum vfiopy_direction direction;
    unsigned char *data; /* read from for a write */
};

static size_t run(const struct transfer *transfer, uintptr_t address, unsigned char *data, size_t count)
{
    size_t step = transfer->fifo ? 0 : transfer->width;

    if (transfer->direction == VFIOPY_READ)
        return vfiopy_read_run(address, step, data, count, transfer->width);
    return vfiopy_write_run(address, step, data, count, transfer->width);
}

/* One element, as bytes on the bus. */
static int single(RegionObject *self, const struct transfer *transfer, uint64_t offset, unsigned char *data)
{
    uint64_t value = 0;

    if (transfer->direction == VFIOPY_WRITE) {
        memcpy(&value, data, transfer->width);
        if (self->core.swap)
            value = vfiopy_swap(value, transfer->width);
        return vfiopy_region_put(self, offset, transfer->width, false, value);
    }
    if (vfiopy_region_get(self, offset, transfer->width, false, &value) < 0)
        return -1;
    if (self->core.swap)
        value = vfiopy_swap(value, transfer->width);
    memcpy(data, &value, transfer->width);
    return 0;
}

/*
 * All that is left, by one call of a slow path that takes bursts. 1: done; 0: it takes none, or what is left goes
 * element by element for another reason; -1 with an error set.
 */
static int burst(RegionObject *self, const struct transfer *transfer, uint64_t offset, unsigned char *data,
                 uint64_t left)
{
    unsigned flags = vfiopy_region_flags(&self->core);
    PyObject *method, *bytes, *result = NULL;

    if (transfer->direction != VFIOPY_WRITE || left < 2 || !self->slow || flags & VFIOPY_REGION_TRACED ||
        (self->core.window_count && !(flags & VFIOPY_REGION_SLOW)))
        return 0;
    method = PyObject_GetAttrString(self->slow, "write_burst");
    if (!method) {
        if (!PyErr_ExceptionMatches(PyExc_AttributeError))
            return -1;
        PyErr_Clear();
        return 0;
    }
    bytes = PyBytes_FromStringAndSize((const char *)data, (Py_ssize_t)(left * transfer->width));
    if (bytes)
        result = PyObject_CallFunction(method, "KIIO", (unsigned long long)offset, transfer->width,
                                       transfer->fifo ? 0 : transfer->width, bytes);
    Py_XDECREF(bytes);
    Py_DECREF(method);
    Py_XDECREF(result);
    return result ? 1 : -1;
}

static int perform(RegionObject *self, const struct transfer *transfer)
{
    unsigned width = transfer->width;
    uint64_t done = 0;

    if (transfer->count >= WORTH_RELEASING && self->core.window_count > 0)
        vfiopy_fault_install();
    while (done < transfer->count) {
        uint64_t offset = transfer->fifo ? transfer->offset : transfer->offset + done * width;
        uint64_t left = transfer->count - done;
        unsigned char *data = transfer->data + done * width;
        struct vfiopy_place place = {0, 0};
        enum vfiopy_verdict verdict;
        size_t count = left < LONGEST_RUN ? left : LONGEST_RUN;
        size_t went;

        REGION_ENTER(self)
        verdict = vfiopy_region_check(&self->core, offset, transfer->fifo ? 1 : left, width, transfer->direction);
        if (verdict == VFIOPY_ALLOWED
            && !(vfiopy_region_flags(&self->core) & (VFIOPY_REGION_NO_WINDOW | VFIOPY_REGION_TRACED)))
            place = vfiopy_region_locate(&self->core, offset, width);
        if (place.address)
            atomic_fetch_add(&self->core.users, 1);
        REGION_LEAVE()

        if (verdict != VFIOPY_ALLOWED)
            return vfiopy_raise_verdict(self, verdict, offset, transfer->fifo ? 1 : left, width, transfer->direction);
        if (!place.address) {
            int all = burst(self, transfer, offset, data, left);

            if (all)
                return all < 0 ? -1 : 0;
            if (single(self, transfer, offset, data) < 0)
                return -1;
            done++;
            continue;
        }
        if (!transfer->fifo && count > place.room / width)
            count = place.room / width;
        if (count < WORTH_RELEASING) {
            went = run(transfer, place.address, data, count);
            atomic_fetch_sub(&self->core.users, 1);
        } else {
            Py_BEGIN_ALLOW_THREADS
            went = run(transfer, place.address, data, count);
            atomic_fetch_sub(&self->core.users, 1);
            Py_END_ALLOW_THREADS
        }
        done += went;
        if (went < count)
            return vfiopy_raise_fault(self, transfer->fifo ? offset : offset + went * width, done, transfer->count,
                                      width, transfer->direction);
        if (done < transfer->count && PyErr_CheckSignals() < 0)
            return -1;
    }
    return 0;
}

static int parse_width(RegionObject *self, int width)
{
    if (width == 1 || width == 2 || width == 4 || width == 8)
        return 0;
    vfiopy_raise("AccessError", self->name, "width is in bytes: 1, 2, 4 or 8", "no access is %d bytes wide", width);
    return -1;
}

/* Nothing is touched unless all of it may be. */
static int check_all(RegionObject *self, const struct transfer *transfer)
{
    uint64_t count = transfer->fifo ? 1 : transfer->count;
    enum vfiopy_verdict verdict;

    verdict = vfiopy_region_check(&self->core, transfer->offset, count, transfer->width, transfer->direction);
    if (verdict == VFIOPY_ALLOWED)
        return 0;
    return vfiopy_raise_verdict(self, verdict, transfer->offset, count, transfer->width, transfer->direction);
}

static PyObject *read_into(RegionObject *self, struct transfer *transfer, PyObject *into)
{
    uint64_t size = transfer->count * transfer->width;
    Py_buffer view;
    int result = -1;

    if (PyObject_GetBuffer(into, &view, PyBUF_WRITABLE) < 0)
        return NULL;
    if ((uint64_t)view.len < size) {
        vfiopy_raise("AccessError", self->name, NULL, "'into' has %zd bytes where %zd are to be read", view.len,
                     (Py_ssize_t)size);
    } else {
        transfer->data = view.buf;
        result = perform(self, transfer);
    }
    PyBuffer_Release(&view);
    if (result < 0)
        return NULL;
    Py_INCREF(into);
    return into;
}

static PyObject *read_bytes(RegionObject *self, struct transfer *transfer)
{
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, (Py_ssize_t)(transfer->count * transfer->width));

    if (!bytes)
        return NULL;
    transfer->data = (unsigned char *)PyBytes_AsString(bytes);
    if (perform(self, transfer) < 0) {
        Py_DECREF(bytes);
        return NULL;
    }
    return bytes;
}

static PyObject *read_many(PyObject *op, PyObject *arguments, PyObject *keywords, bool fifo, const char *format)
{
    static char *names[] = {"offset", "count", "width", "into", NULL};
    RegionObject *self = (RegionObject *)op;
    struct transfer transfer = {.fifo = fifo, .direction = VFIOPY_READ};
    PyObject *offset, *count, *into = Py_None;
    int width = 4;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, format, names, &offset, &count, &width, &into)
        || parse_width(self, width) < 0 || vfiopy_parse_offset(self, offset, &transfer.offset) < 0
        || vfiopy_parse_offset(self, count, &transfer.count) < 0)
        return NULL;
    transfer.width = (unsigned)width;
    if (transfer.count > PY_SSIZE_T_MAX / 8) {
        vfiopy_raise("AddressRangeError", self->name, NULL, "a count of %S elements", count);
        return NULL;
    }
    if (check_all(self, &transfer) < 0)
        return NULL;
    return into == Py_None ? read_bytes(self, &transfer) : read_into(self, &transfer, into);
}

static PyObject *write_many(PyObject *op, PyObject *arguments, PyObject *keywords, bool fifo, const char *format)
{
    static char *names[] = {"offset", "data", "width", NULL};
    RegionObject *self = (RegionObject *)op;
    struct transfer transfer = {.fifo = fifo, .direction = VFIOPY_WRITE};
    PyObject *offset, *data;
    Py_buffer view;
    int width = 4, result = -1;

    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, format, names, &offset, &data, &width)
        || parse_width(self, width) < 0 || vfiopy_parse_offset(self, offset, &transfer.offset) < 0
        || PyObject_GetBuffer(data, &view, PyBUF_SIMPLE) < 0)
        return NULL;
    if (view.len % width != 0) {
        vfiopy_raise("AccessError", self->name, NULL, "%zd bytes of data are not a whole number of %d-byte accesses",
                     view.len, width);
    } else {
        transfer.width = (unsigned)width;
        transfer.count = (uint64_t)view.len / transfer.width;
        transfer.data = view.buf;
        result = check_all(self, &transfer);
        if (result == 0)
            result = perform(self, &transfer);
    }
    PyBuffer_Release(&view);
    if (result < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *vfiopy_region_read_fifo(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return read_many(op, arguments, keywords, true, "OO|iO:read_fifo");
}

PyObject *vfiopy_region_read_block(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return read_many(op, arguments, keywords, false, "OO|iO:read_block");
}

PyObject *vfiopy_region_write_fifo(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return write_many(op, arguments, keywords, true, "OO|i:write_fifo");
}

PyObject *vfiopy_region_write_block(PyObject *op, PyObject *arguments, PyObject *keywords)
{
    return write_many(op, arguments, keywords, false, "OO|i:write_block");
}
