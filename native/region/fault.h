/*
 * SIGBUS fixup: a register access to a device that is gone becomes a flag, not the end of the process.
 *
 * Only the accessor instructions of access.h are fixed up, recognised by their address. Every other SIGBUS goes to the
 * handler that was there before, as if this one did not exist.
 *
 * SIGBUS must not be blocked in a thread that touches registers: the kernel kills a process whose fault it cannot
 * deliver.
 */
#ifndef VFIOPY_REGION_FAULT_H
#define VFIOPY_REGION_FAULT_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Make sure that our handler is the current one; costs one system call when it is. Call it before an address is first
 * touched and, because other code may install a handler that does not pass signals on (faulthandler.enable()), again
 * from time to time. Returns 0 or -errno. Any thread.
 */
int vfiopy_fault_install(void);

/* Whether our handler is the current one. Any thread. */
bool vfiopy_fault_installed(void);

/* How many accesses this copy of the handler has fixed up since the process started. */
uint64_t vfiopy_fault_count(void);

#endif
