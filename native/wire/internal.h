/* Between the files of this folder. */
#ifndef VFIOPY_WIRE_INTERNAL_H
#define VFIOPY_WIRE_INTERNAL_H

#include "wire/wire.h"

/* Forget what came in, and close the fds that came with it. */
void vfiopy_wire_drop_incoming(struct vfiopy_wire *wire);

#endif
