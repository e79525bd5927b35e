/* HostMemory, Mapping and SpaceBase, the C side of vfiopy.dma: what their files share. */
#ifndef VFIOPY_EXT_DMA_OBJECT_H
#define VFIOPY_EXT_DMA_OBJECT_H

#include "ext/iova_object.h"
#include "ext/lives.h"

/* Memory of this process: vfiopy.backend.HostMemory. Does not change after it was made. */
struct vfiopy_host_memory {
    PyObject_HEAD
    uint64_t address, size;
    PyObject *owner;
    Py_buffer view; /* the export of `owner` that keeps it where it is; view.obj NULL: none */
    PyObject *weak_references;
    bool writable;
};

/* The base of vfiopy.dma.AddressSpace. */
struct vfiopy_space_base {
    PyObject_HEAD
    PyObject *book; /* an IovaSpace; NULL before __init__ */
    unsigned process;
    char direct; /* open, and all that a map of host memory takes is a call to the book */
};

/* A handle of one mapping: vfiopy.dma.Mapping. Does not change after it was made, and keeps no memory alive. */
struct vfiopy_mapping_object {
    PyObject_HEAD
    PyObject *space; /* a SpaceBase */
    uint64_t iova, size, address, serial;
    uint8_t prot;
};

/* --- memory -------------------------------------------------------------------------------------------------- */

/*
 * Make HostMemory of what can be mapped as it is, with these rights: HostMemory itself, or a writable, page-aligned
 * buffer. A new reference, or NULL, with or without an error set: without one vfiopy/dma/memory.py says what is wrong.
 */
struct vfiopy_host_memory *vfiopy_plain_memory(PyObject *thing, uint8_t prot);
int vfiopy_host_memory_init(PyObject *module);

/* --- handles ------------------------------------------------------------------------------------------------- */

/* An empty handle: made first, so that a mapping that came about is never lost for want of memory. */
struct vfiopy_mapping_object *vfiopy_mapping_new(PyObject *space);
bool vfiopy_is_mapping(PyObject *object);
/* Unmap by way of what the space needs; 0, or -1 with an error set. */
int vfiopy_mapping_take_down(struct vfiopy_mapping_object *mapping, double timeout);
int vfiopy_mapping_init(PyObject *module);

/* --- spaces -------------------------------------------------------------------------------------------------- */

static inline bool vfiopy_space_is_here(const struct vfiopy_space_base *space)
{
    return space->book && space->process == vfiopy_process();
}

/* What map() and its relatives do where the short way does not go. */
static inline bool vfiopy_space_is_direct(const struct vfiopy_space_base *space)
{
    return space->direct && vfiopy_space_is_here(space);
}

extern PyMethodDef vfiopy_space_many_methods[];
/* With a book. */
bool vfiopy_is_space_base(PyObject *object);

#endif
