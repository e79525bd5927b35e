/* What a fast road looks at before it sets out: is this still the process, is anything waiting to be cleaned up? */
#ifndef VFIOPY_EXT_LIVES_H
#define VFIOPY_EXT_LIVES_H

#include <Python.h>
#include <stdatomic.h>
#include <stdbool.h>

extern unsigned vfiopy_process_number;
extern atomic_bool vfiopy_leftovers;

/* A number that a forked child does not share with its parent. */
static inline unsigned vfiopy_process(void)
{
    return vfiopy_process_number;
}

/* Finalizers have left something in the queue of vfiopy/lives.py. */
static inline bool vfiopy_leftovers_wait(void)
{
    return atomic_load_explicit(&vfiopy_leftovers, memory_order_relaxed);
}

int vfiopy_lives_init(PyObject *module);

#endif
