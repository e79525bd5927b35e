/* What module.c asks of each part: add its types and functions to the module. 0, or -1 with an error set. */
#ifndef VFIOPY_EXT_MODULE_H
#define VFIOPY_EXT_MODULE_H

#include <Python.h>

int vfiopy_region_type_init(PyObject *module);
int vfiopy_iova_type_init(PyObject *module);
int vfiopy_dma_types_init(PyObject *module);
int vfiopy_event_type_init(PyObject *module);
int vfiopy_wire_type_init(PyObject *module);

#endif
