/* The methods of IovaSpace, a table for each file: iova_type.c puts them together. */
#ifndef VFIOPY_EXT_IOVA_METHODS_H
#define VFIOPY_EXT_IOVA_METHODS_H

#include <Python.h>

extern PyMethodDef vfiopy_iova_map_methods[];
extern PyMethodDef vfiopy_iova_unmap_methods[];
extern PyMethodDef vfiopy_iova_step_methods[];
extern PyMethodDef vfiopy_iova_look_methods[];
extern PyMethodDef vfiopy_iova_pin_methods[];
extern PyMethodDef vfiopy_iova_geometry_methods[];
extern PyMethodDef vfiopy_iova_stats_methods[];
extern PyMethodDef vfiopy_iova_move_methods[];
extern PyMethodDef vfiopy_iova_closing_methods[];

#endif
