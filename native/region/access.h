/*
 * Register accessors: one load or one store of the asked width, whatever the compiler would like to do.
 *
 * Each access is a single instruction in inline assembly, so it can be neither split, merged, repeated nor left out.
 * Its address is recorded in the section `vfiopy_faults` next to the address of a few fixup instructions: when it
 * raises SIGBUS (memory decode off, device asleep or gone) the handler in fault.c resumes there. The fixup sets
 * *faulted to 1 and a load yields all ones, which is what a bus without a device answers too.
 *
 *     vfiopy_load8/16/32/64(address, &faulted)           bare access, ordered only against other such accesses
 *     vfiopy_store8/16/32/64(address, value, &faulted)
 *     vfiopy_read8/16/32/64, vfiopy_write8/16/32/64      with the ordering that drivers expect (below)
 *
 * Ordering of read: later accesses, to memory too, happen after it. A status register that says "done" can be
 * followed by a look at the DMA buffer. Ordering of write: earlier accesses, to memory too, are visible to the device
 * before it. A descriptor can be followed by its doorbell. That is what Linux promises for readl and writel.
 */
#ifndef VFIOPY_REGION_ACCESS_H
#define VFIOPY_REGION_ACCESS_H

#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "byte order of registers is told from a little-endian CPU");

/* One line of the fault table: two 32-bit distances from themselves, so that the table needs no relocation. */
struct vfiopy_fault_entry {
    int32_t access;
    int32_t fixup;
};

#define VFIOPY_FAULT_ENTRY(access, fixup)                                                                              \
    ".pushsection vfiopy_faults, \"a\"\n\t"                                                                            \
    ".balign 4\n\t"                                                                                                    \
    ".long " access " - .\n\t"                                                                                         \
    ".long " fixup " - .\n\t"                                                                                          \
    ".popsection\n\t"

#if defined(__x86_64__)
#include "region/access_x86_64.h"
#elif defined(__aarch64__)
#include "region/access_arm64.h"
#else
#error "vfiopy has register accessors for x86-64 and arm64; a port needs its own region/access_*.h"
#endif

#define VFIOPY_DEFINE_ORDERED(width)                                                                                   \
    static inline uint##width##_t vfiopy_read##width(const volatile void *address, int *faulted)                       \
    {                                                                                                                  \
        uint##width##_t value = vfiopy_load##width(address, faulted);                                                  \
                                                                                                                       \
        vfiopy_order_after_read((uint64_t)value);                                                                      \
        return value;                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    static inline void vfiopy_write##width(volatile void *address, uint##width##_t value, int *faulted)                \
    {                                                                                                                  \
        vfiopy_order_before_write();                                                                                   \
        vfiopy_store##width(address, value, faulted);                                                                  \
    }

VFIOPY_DEFINE_ORDERED(8)
VFIOPY_DEFINE_ORDERED(16)
VFIOPY_DEFINE_ORDERED(32)
VFIOPY_DEFINE_ORDERED(64)
#undef VFIOPY_DEFINE_ORDERED

#endif
