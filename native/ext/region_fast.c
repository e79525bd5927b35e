/*
 * The methods read8 ... write64_relaxed.
 *
 * The fast path of each is two comparisons and the access; whatever is unusual (state, byte order, another window, a
 * hole, odd argument types, errors) is left to the general path in region_access.c.
 */
#include "ext/region_object.h"

#include "region/access.h"

static PyObject *read_general(RegionObject *self, PyObject *argument, unsigned width, bool relaxed)
{
    uint64_t offset, value;

    PyErr_Clear(); /* of the fast path's attempt to get an offset */
    if (vfiopy_parse_offset(self, argument, &offset) < 0
        || vfiopy_region_get(self, offset, width, relaxed, &value) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(value);
}

static PyObject *write_general(RegionObject *self, PyObject *const *arguments, Py_ssize_t count, unsigned width,
                               bool relaxed)
{
    uint64_t offset, value;

    PyErr_Clear();
    if (count != 2) {
        PyErr_Format(PyExc_TypeError, "write%u%s() takes exactly 2 arguments, offset and value (%zd given)", 8 * width,
                     relaxed ? "_relaxed" : "", count);
        return NULL;
    }
    if (vfiopy_parse_offset(self, arguments[0], &offset) < 0
        || vfiopy_parse_value(self, arguments[1], width, &value) < 0
        || vfiopy_region_put(self, offset, width, relaxed, value) < 0)
        return NULL;
    Py_RETURN_NONE;
}

/* (uint64_t)-1, which stands for "not an offset", is never in a span. */
#define DEFINE_READ(method, bits, access, relaxed)                                                                     \
    static PyObject *region_##method(PyObject *op, PyObject *argument)                                                 \
    {                                                                                                                  \
        RegionObject *self = (RegionObject *)op;                                                                       \
        uint64_t offset = PyLong_AsSize_t(argument);                                                                   \
        uint##bits##_t value = 0;                                                                                      \
        int faulted = 0;                                                                                               \
        bool done;                                                                                                     \
                                                                                                                       \
        REGION_ENTER(op)                                                                                               \
        done = offset - self->core.start < self->core.read_span && !(offset & (sizeof(value) - 1));                    \
        if (VFIOPY_LIKELY(done))                                                                                       \
            value = access((const volatile void *)(self->core.base + offset), &faulted);                               \
        REGION_LEAVE()                                                                                                 \
                                                                                                                       \
        if (VFIOPY_LIKELY(done && !faulted))                                                                           \
            return PyLong_FromUnsignedLong(value);                                                                     \
        if (done) {                                                                                                    \
            vfiopy_raise_fault(self, offset, 0, 1, sizeof(value), VFIOPY_READ);                                        \
            return NULL;                                                                                               \
        }                                                                                                              \
        return read_general(self, argument, sizeof(value), relaxed);                                                   \
    }

#define DEFINE_WRITE(method, bits, access, relaxed)                                                                    \
    static PyObject *region_##method(PyObject *op, PyObject *const *arguments, Py_ssize_t count)                       \
    {                                                                                                                  \
        RegionObject *self = (RegionObject *)op;                                                                       \
        uint64_t offset;                                                                                               \
        unsigned long value;                                                                                           \
        int faulted = 0;                                                                                               \
        bool done;                                                                                                     \
                                                                                                                       \
        if (count != 2)                                                                                                \
            return write_general(self, arguments, count, bits / 8, relaxed);                                           \
        offset = PyLong_AsSize_t(arguments[0]);                                                                        \
        value = PyLong_AsUnsignedLong(arguments[1]);                                                                   \
        if (bits == 64 ? value == UINT64_MAX && PyErr_Occurred() : value > UINT##bits##_MAX)                           \
            return write_general(self, arguments, count, bits / 8, relaxed);                                           \
                                                                                                                       \
        REGION_ENTER(op)                                                                                               \
        done = offset - self->core.start < self->core.write_span && !(offset & (bits / 8 - 1));                        \
        if (VFIOPY_LIKELY(done))                                                                                       \
            access((volatile void *)(self->core.base + offset), (uint##bits##_t)value, &faulted);                      \
        REGION_LEAVE()                                                                                                 \
                                                                                                                       \
        if (VFIOPY_LIKELY(done && !faulted))                                                                           \
            Py_RETURN_NONE;                                                                                            \
        if (done) {                                                                                                    \
            vfiopy_raise_fault(self, offset, 0, 1, bits / 8, VFIOPY_WRITE);                                            \
            return NULL;                                                                                               \
        }                                                                                                              \
        return write_general(self, arguments, count, bits / 8, relaxed);                                               \
    }

#define DEFINE_WIDTH(bits)                                                                                             \
    DEFINE_READ(read##bits, bits, vfiopy_read##bits, false)                                                            \
    DEFINE_READ(read##bits##_relaxed, bits, vfiopy_load##bits, true)                                                   \
    DEFINE_WRITE(write##bits, bits, vfiopy_write##bits, false)                                                         \
    DEFINE_WRITE(write##bits##_relaxed, bits, vfiopy_store##bits, true)

DEFINE_WIDTH(8)
DEFINE_WIDTH(16)
DEFINE_WIDTH(32)
DEFINE_WIDTH(64)

#define READ_DOC(bits, more)                                                                                           \
    "($self, offset, /)\n--\n\nRead the " #bits "-bit register at `offset` (bytes): exactly one load." more
#define WRITE_DOC(bits, more)                                                                                          \
    "($self, offset, value, /)\n--\n\nWrite the " #bits "-bit register at `offset` (bytes): exactly one store." more
#define READ_ORDER " Later accesses, to memory too, come after it."
#define WRITE_ORDER " Earlier accesses, to memory too, come before it."
#define NO_ORDER " Ordered only against other accesses to the same device."

#define METHODS(bits)                                                                                                  \
    {"read" #bits, region_read##bits, METH_O, "read" #bits READ_DOC(bits, READ_ORDER)},                                \
    {"read" #bits "_relaxed", region_read##bits##_relaxed, METH_O, "read" #bits "_relaxed" READ_DOC(bits, NO_ORDER)},  \
    {"write" #bits, (PyCFunction)(void (*)(void))region_write##bits, METH_FASTCALL,                                    \
     "write" #bits WRITE_DOC(bits, WRITE_ORDER)},                                                                      \
    {"write" #bits "_relaxed", (PyCFunction)(void (*)(void))region_write##bits##_relaxed, METH_FASTCALL,               \
     "write" #bits "_relaxed" WRITE_DOC(bits, NO_ORDER)}

const PyMethodDef vfiopy_region_fast_methods[VFIOPY_REGION_FAST_METHODS] = {METHODS(8), METHODS(16), METHODS(32),
                                                                            METHODS(64)};
