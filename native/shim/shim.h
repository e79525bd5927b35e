/* The declarations of shim.cdef.h with the types that they need. */
#ifndef VFIOPY_SHIM_SHIM_H
#define VFIOPY_SHIM_SHIM_H

#include <stddef.h>
#include <stdint.h>

#include "shim/shim.cdef.h"

#endif
