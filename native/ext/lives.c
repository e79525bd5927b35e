#include "ext/lives.h"

#include <pthread.h>

unsigned vfiopy_process_number; /* written in a child before any of its threads runs */
atomic_bool vfiopy_leftovers;

static void after_fork_in_child(void)
{
    vfiopy_process_number++;
}

static PyObject *set_leftovers(PyObject *Py_UNUSED(module), PyObject *argument)
{
    int wait = PyObject_IsTrue(argument);

    if (wait < 0)
        return NULL;
    atomic_store(&vfiopy_leftovers, wait);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"set_leftovers", set_leftovers, METH_O,
     "set_leftovers(wait, /)\n--\n\nFor vfiopy.lives: whether the queue of finalizers may hold something."},
    {NULL, NULL, 0, NULL},
};

int vfiopy_lives_init(PyObject *module)
{
    if (pthread_atfork(NULL, NULL, after_fork_in_child)) {
        PyErr_NoMemory();
        return -1;
    }
    return PyModule_AddFunctions(module, functions);
}
