/* Arguments of IovaSpace's methods, and its errors. */
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

int vfiopy_get_iova_or_any(PyObject *value, uint64_t *out)
{
    int overflow = 0;

    if (to_long_long(value, &overflow) == -1 && !overflow) {
        if (PyErr_Occurred())
            return -1;
        *out = VFIOPY_NO_FIXED_IOVA;
        return 0;
    }
    return vfiopy_get_u64(value, "iova", out);
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

/* --- errors -------------------------------------------------------------------------------------------------- */

static const char *const result_names[] = {
    [VFIOPY_OK] = "ok",
    [VFIOPY_NO_MEMORY] = "no_memory",
    [VFIOPY_BAD_SIZE] = "bad_size",
    [VFIOPY_BAD_PROT] = "bad_prot",
    [VFIOPY_BAD_ALIGNMENT] = "bad_alignment",
    [VFIOPY_BAD_RANGES] = "bad_ranges",
    [VFIOPY_BAD_KIND] = "bad_kind",
    [VFIOPY_OVERLAP] = "overlap",
    [VFIOPY_BUSY] = "busy",
    [VFIOPY_OUTSIDE] = "outside",
    [VFIOPY_EXCLUDED] = "excluded",
    [VFIOPY_OVER_LIMIT] = "over_limit",
    [VFIOPY_NO_SPACE] = "no_space",
    [VFIOPY_TOO_MANY] = "too_many",
    [VFIOPY_NOT_MAPPED] = "not_mapped",
    [VFIOPY_CUTS] = "cuts",
    [VFIOPY_NO_ACCESS] = "no_access",
    [VFIOPY_PINNED] = "pinned",
    [VFIOPY_IS_UNMAPPING] = "is_unmapping",
    [VFIOPY_NOT_BEGUN] = "not_begun",
    [VFIOPY_NOT_PINNED] = "not_pinned",
    [VFIOPY_TOO_MANY_PINS] = "too_many_pins",
    [VFIOPY_NO_OWNER] = "no_owner",
    [VFIOPY_OWNER_HOLDS] = "owner_holds",
    [VFIOPY_NO_MAPPER] = "no_mapper",
    [VFIOPY_KERNEL] = "kernel",
    [VFIOPY_SHORT] = "short",
    [VFIOPY_NO_ADDRESS] = "no_address",
    [VFIOPY_HAS_ADDRESS] = "has_address",
};

/* The words are Python's: vfiopy/iova/failures.py, imported when first needed. */
static PyObject *failure_maker(void)
{
    static PyObject *maker;

    if (!maker) {
        PyObject *module = PyImport_ImportModule("vfiopy.iova.failures");

        if (module)
            maker = PyObject_GetAttrString(module, "failure");
        Py_XDECREF(module);
    }
    return maker;
}

PyObject *vfiopy_raise_failure(PyObject *self, const char *operation, const struct vfiopy_failure *failure,
                               PyObject *holders)
{
    PyObject *maker, *error = NULL;

    if (failure->result == VFIOPY_NO_MEMORY) {
        Py_XDECREF(holders);
        return PyErr_NoMemory();
    }
    maker = failure_maker();
    if (maker)
        error = PyObject_CallFunction(
            maker, "sOs(KKKKiKziI)O", result_names[failure->result], ((struct vfiopy_iova_object *)self)->name,
            operation, (unsigned long long)failure->asked.first,
            (unsigned long long)failure->asked.last, (unsigned long long)failure->clash.first,
            (unsigned long long)failure->clash.last, failure->clash.state, (unsigned long long)failure->value,
            failure->call, failure->error, (unsigned int)failure->mapper, holders ? holders : Py_None);
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    Py_XDECREF(holders);
    return NULL;
}

void vfiopy_drop_gone(struct vfiopy_gone *gone)
{
    void *memory;

    while (vfiopy_gone_pop(gone, &memory))
        Py_XDECREF((PyObject *)memory);
}
