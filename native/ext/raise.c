/* Raise the exceptions of vfiopy/errors.py from C. See raise.h. */
#include "ext/raise.h"

#include <stdarg.h>

static PyObject *find_class(const char *class_name)
{
    PyObject *errors = PyImport_ImportModule("vfiopy.errors");
    PyObject *class;

    if (!errors)
        return NULL;
    class = PyObject_GetAttrString(errors, class_name);
    Py_DECREF(errors);
    return class;
}

/* Takes over `meaning`, which may be NULL. */
static PyObject *make(const char *class_name, PyObject *object, const char *hint, PyObject *meaning)
{
    PyObject *class = meaning ? find_class(class_name) : NULL;
    PyObject *arguments = NULL, *keywords = NULL, *error = NULL;

    if (class)
        arguments = PyTuple_Pack(1, meaning);
    if (arguments)
        keywords = object ? Py_BuildValue("{s:O,s:s}", "object", object, "hint", hint ? hint : "")
                          : Py_BuildValue("{s:s}", "hint", hint ? hint : "");
    if (keywords)
        error = PyObject_Call(class, arguments, keywords);
    Py_XDECREF(keywords);
    Py_XDECREF(arguments);
    Py_XDECREF(class);
    Py_XDECREF(meaning);
    return error;
}

/* Takes over `error`, which may be NULL. */
static void set(PyObject *error)
{
    if (!error)
        return;
    PyErr_SetObject((PyObject *)Py_TYPE(error), error);
    Py_DECREF(error);
}

PyObject *vfiopy_make_error(const char *class_name, PyObject *object, const char *hint, const char *format, ...)
{
    PyObject *meaning;
    va_list values;

    va_start(values, format);
    meaning = PyUnicode_FromFormatV(format, values);
    va_end(values);
    return make(class_name, object, hint, meaning);
}

void vfiopy_raise(const char *class_name, PyObject *object, const char *hint, const char *format, ...)
{
    PyObject *meaning;
    va_list values;

    va_start(values, format);
    meaning = PyUnicode_FromFormatV(format, values);
    va_end(values);
    set(make(class_name, object, hint, meaning));
}

void vfiopy_raise_state(const char *class_name, const char *format, ...)
{
    PyObject *class, *message;
    va_list values;

    va_start(values, format);
    message = PyUnicode_FromFormatV(format, values);
    va_end(values);
    class = message ? find_class(class_name) : NULL;
    if (class) {
        set(PyObject_CallFunctionObjArgs(class, message, NULL));
        Py_DECREF(class);
    }
    Py_XDECREF(message);
}
