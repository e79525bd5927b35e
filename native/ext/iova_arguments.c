/* Arguments of IovaSpace's methods. */
#include <math.h>

#include "ext/iova_object.h"

int vfiopy_arguments(const char *function, PyObject *const *args, Py_ssize_t nargs, PyObject *keywords,
                     const char *const *names, int required, PyObject **out)
{
    Py_ssize_t keyword_count = keywords ? PyTuple_Size(keywords) : 0;
    int count = 0;

    while (names[count]) {
        out[count] = count < nargs ? args[count] : NULL;
        count++;
    }
    if (nargs > count) {
        PyErr_Format(PyExc_TypeError, "%s() takes at most %d arguments, not %zd", function, count, nargs);
        return -1;
    }
    for (Py_ssize_t i = 0; i < keyword_count; i++) {
        PyObject *keyword = PyTuple_GetItem(keywords, i);
        int at = 0;

        while (names[at] && PyUnicode_CompareWithASCIIString(keyword, names[at]))
            at++;
        if (!names[at] || out[at]) {
            PyErr_Format(PyExc_TypeError, names[at] ? "%s() got two values for argument '%U'"
                                                    : "%s() got an unexpected argument '%U'", function, keyword);
            return -1;
        }
        out[at] = args[nargs + i];
    }
    for (int i = 0; i < required; i++) {
        if (!out[i]) {
            PyErr_Format(PyExc_TypeError, "%s() needs argument '%s'", function, names[i]);
            return -1;
        }
    }
    return 0;
}

/* The value of an int, or of what has __index__. On -1 an error is set unless *overflow says why not. */
static long long to_long_long(PyObject *value, int *overflow)
{
    PyObject *index;
    long long result;

    if (PyLong_Check(value))
        return PyLong_AsLongLongAndOverflow(value, overflow);
    index = PyNumber_Index(value);
    if (!index)
        return -1;
    result = PyLong_AsLongLongAndOverflow(index, overflow);
    Py_DECREF(index);
    return result;
}

static int out_of_range(PyObject *value, const char *what)
{
    PyErr_Format(PyExc_ValueError, "%s must be an int from 0 to 2**64 - 1, not %R", what, value);
    return -1;
}

int vfiopy_get_u64(PyObject *value, const char *what, uint64_t *out)
{
    int overflow = 0;
    long long number = to_long_long(value, &overflow);
    PyObject *index;

    if (number >= 0) {
        *out = (uint64_t)number;
        return 0;
    }
    if (!overflow)
        return PyErr_Occurred() ? -1 : out_of_range(value, what);
    if (overflow < 0)
        return out_of_range(value, what);
    index = PyNumber_Index(value);
    if (!index)
        return -1;
    *out = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return out_of_range(value, what);
    }
    return 0;
}

int vfiopy_get_fixed_iova(PyObject *value, uint64_t *out)
{
    if (vfiopy_get_u64(value, "iova", out))
        return -1;
    if (*out != VFIOPY_NO_FIXED_IOVA)
        return 0;
    PyErr_Format(PyExc_ValueError, "no page begins at iova %R", value);
    return -1;
}

int vfiopy_get_iova_or_any(PyObject *value, uint64_t *out)
{
    int overflow = 0;

    if (to_long_long(value, &overflow) == -1 && !overflow) {
        if (PyErr_Occurred())
            return -1;
        *out = VFIOPY_NO_FIXED_IOVA;
        return 0;
    }
    return vfiopy_get_fixed_iova(value, out);
}

int vfiopy_get_int(PyObject *value, const char *what, int *out)
{
    int overflow = 0;
    long long number = to_long_long(value, &overflow);

    if (number == -1 && !overflow && PyErr_Occurred())
        return -1;
    if (overflow || number < INT32_MIN || number > INT32_MAX) {
        PyErr_Format(PyExc_ValueError, "%s must be an int of 32 bits, not %R", what, value);
        return -1;
    }
    *out = (int)number;
    return 0;
}

int vfiopy_get_range(PyObject *first, PyObject *size, struct vfiopy_range *out)
{
    uint64_t bytes;

    if (vfiopy_get_u64(first, "iova", &out->first) || vfiopy_get_u64(size, "size", &bytes))
        return -1;
    if (!bytes || bytes - 1 > UINT64_MAX - out->first) {
        PyErr_Format(PyExc_ValueError, bytes ? "size %S from iova %S reaches beyond the 64-bit address space"
                                             : "size must not be 0", size, first);
        return -1;
    }
    out->last = out->first + (bytes - 1);
    return 0;
}

int vfiopy_get_flag(PyObject *value, bool *out)
{
    int result = value ? PyObject_IsTrue(value) : 0;

    *out = result > 0;
    return result < 0 ? -1 : 0;
}

int vfiopy_get_prot(PyObject *value, uint8_t *out)
{
    int prot;

    if (vfiopy_get_int(value, "prot", &prot))
        return -1;
    if (prot < 1 || prot > VFIOPY_PROT_ALL) {
        PyErr_Format(PyExc_ValueError, "prot must be 1 (the device reads), 2 (it writes) or 3, not %d", prot);
        return -1;
    }
    *out = (uint8_t)prot;
    return 0;
}

int vfiopy_get_bounds(const char *function, PyObject *const *args, Py_ssize_t nargs, struct vfiopy_range *range)
{
    if (nargs != 2) {
        PyErr_Format(PyExc_TypeError, "%s() takes 2 arguments (first, last), not %zd", function, nargs);
        return -1;
    }
    if (vfiopy_get_u64(args[0], "first", &range->first) ||
        vfiopy_get_u64(args[1], "last", &range->last))
        return -1;
    if (range->first <= range->last)
        return 0;
    PyErr_Format(PyExc_ValueError, "%s(): first %S is above last %S", function, args[0], args[1]);
    return -1;
}

int vfiopy_get_timeout(PyObject *value, double *out)
{
    if (value == Py_None) {
        *out = HUGE_VAL;
        return 0;
    }
    *out = PyFloat_AsDouble(value);
    if (*out == -1.0 && PyErr_Occurred())
        return -1;
    if (isnan(*out)) {
        PyErr_SetString(PyExc_ValueError, "timeout must be a number of seconds or None, not nan");
        return -1;
    }
    return 0;
}
