/* Raise the exceptions of vfiopy/errors.py from C. */
#ifndef VFIOPY_EXT_RAISE_H
#define VFIOPY_EXT_RAISE_H

#include <Python.h>

/*
 * Make an exception of a VfioError class: `object` is what was acted on (or NULL), `hint` what to do about it (or
 * NULL), `format` the meaning as for PyUnicode_FromFormat. Returns a new reference, or NULL with another error set.
 */
PyObject *vfiopy_make_error(const char *class_name, PyObject *object, const char *hint, const char *format, ...);

/* Make and set it. */
void vfiopy_raise(const char *class_name, PyObject *object, const char *hint, const char *format, ...);

/* Set an exception of a StateError class, which takes a message only. */
void vfiopy_raise_state(const char *class_name, const char *format, ...);

#endif
