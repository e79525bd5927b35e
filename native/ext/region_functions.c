/* Functions of the module that belong to regions: barriers and the SIGBUS handler. */
#include "ext/region_object.h"

#include <string.h>

#include "ext/raise.h"
#include "region/fault.h"

#define DEFINE_BARRIER(name)                                                                                           \
    static PyObject *name(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))                                   \
    {                                                                                                                  \
        vfiopy_##name();                                                                                               \
        Py_RETURN_NONE;                                                                                                \
    }

DEFINE_BARRIER(barrier)
DEFINE_BARRIER(read_barrier)
DEFINE_BARRIER(write_barrier)
DEFINE_BARRIER(dma_read_barrier)
DEFINE_BARRIER(dma_write_barrier)

int vfiopy_install_fault_handler(PyObject *name)
{
    int result = vfiopy_fault_install();

    if (result == 0)
        return 0;
    vfiopy_raise("VfioError", name, NULL, "cannot install a SIGBUS handler: %s", strerror(-result));
    return -1;
}

static PyObject *install_fault_handler(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    if (vfiopy_install_fault_handler(NULL) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *fault_handler_installed(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyBool_FromLong(vfiopy_fault_installed());
}

static PyObject *fault_count(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(ignored))
{
    return PyLong_FromUnsignedLongLong(vfiopy_fault_count());
}

static PyMethodDef functions[] = {
    {"barrier", barrier, METH_NOARGS, "barrier()\n--\n\nAll earlier accesses come before all later ones."},
    {"read_barrier", read_barrier, METH_NOARGS, "read_barrier()\n--\n\nEarlier loads come before later loads."},
    {"write_barrier", write_barrier, METH_NOARGS, "write_barrier()\n--\n\nEarlier stores come before later stores."},
    {"dma_read_barrier", dma_read_barrier, METH_NOARGS,
     "dma_read_barrier()\n--\n\nEarlier loads of coherent DMA memory come before later ones."},
    {"dma_write_barrier", dma_write_barrier, METH_NOARGS,
     "dma_write_barrier()\n--\n\nEarlier stores to coherent DMA memory come before later ones."},
    {"install_fault_handler", install_fault_handler, METH_NOARGS,
     "install_fault_handler()\n--\n\nPut the SIGBUS handler (back) on top; cheap when it is there."},
    {"fault_handler_installed", fault_handler_installed, METH_NOARGS,
     "fault_handler_installed()\n--\n\nWhether the SIGBUS handler is the current one."},
    {"fault_count", fault_count, METH_NOARGS,
     "fault_count()\n--\n\nHow many accesses found nothing behind their mapping since the process started."},
    {NULL, NULL, 0, NULL},
};

int vfiopy_region_functions_init(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
