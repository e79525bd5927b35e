/* Objects that come and go all the time are kept for the next one of their type, which then need not be made. */
#ifndef VFIOPY_EXT_SPARES_H
#define VFIOPY_EXT_SPARES_H

#include <Python.h>

/* Linked by the first word behind their heads. The GIL is their lock: without one there are none. */
struct vfiopy_spares {
    PyObject *first;
    unsigned count;
};

enum { VFIOPY_MOST_SPARES = 256 };

/* A new object that the collector does not track yet, and whose fields hold whatever was there; or NULL. */
static inline PyObject *vfiopy_spares_take(struct vfiopy_spares *spares, PyTypeObject *type)
{
    PyObject *object = spares->first;

    if (!object)
        return PyObject_GC_New(PyObject, type);
    spares->first = *(PyObject **)(object + 1);
    spares->count--;
    return PyObject_Init(object, type);
}

/* In place of PyObject_GC_Del(), for an object that is not tracked any more. */
static inline void vfiopy_spares_give(struct vfiopy_spares *spares, PyObject *object)
{
#ifndef Py_GIL_DISABLED
    if (spares->count < VFIOPY_MOST_SPARES) {
        *(PyObject **)(object + 1) = spares->first;
        spares->first = object;
        spares->count++;
        return;
    }
#else
    (void)spares;
#endif
    PyObject_GC_Del(object);
}

#endif
