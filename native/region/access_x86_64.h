/*
 * Accessors and barriers of x86-64. Included by access.h only.
 *
 * BARs are mapped uncached: the CPU performs such accesses in program order and orders a store after all earlier stores
 * to memory. So read and write need no more than a compiler that keeps its hands off.
 */
#ifndef VFIOPY_REGION_ACCESS_X86_64_H
#define VFIOPY_REGION_ACCESS_X86_64_H

#define VFIOPY_DEFINE_ACCESS(width, type, suffix, modifier)                                                            \
    static inline type vfiopy_load##width(const volatile void *address, int *faulted)                                  \
    {                                                                                                                  \
        type value;                                                                                                    \
                                                                                                                       \
        __asm__ volatile("1:\tmov" suffix " %2, %" modifier "0\n"                                                      \
                         "2:\n\t"                                                                                      \
                         ".pushsection .text.vfiopy_fixup, \"ax\", @progbits\n"                                        \
                         "3:\tmovl $1, %1\n\t"                                                                         \
                         "mov" suffix " $-1, %" modifier "0\n\t"                                                       \
                         "jmp 2b\n\t"                                                                                  \
                         ".popsection\n\t"                                                                             \
                         VFIOPY_FAULT_ENTRY("1b", "3b")                                                                \
                         : "=r"(value), "+r"(*faulted)                                                                 \
                         : "m"(*(const volatile type *)address));                                                      \
        return value;                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    static inline void vfiopy_store##width(volatile void *address, type value, int *faulted)                           \
    {                                                                                                                  \
        __asm__ volatile("1:\tmov" suffix " %" modifier "2, %0\n"                                                      \
                         "2:\n\t"                                                                                      \
                         ".pushsection .text.vfiopy_fixup, \"ax\", @progbits\n"                                        \
                         "3:\tmovl $1, %1\n\t"                                                                         \
                         "jmp 2b\n\t"                                                                                  \
                         ".popsection\n\t"                                                                             \
                         VFIOPY_FAULT_ENTRY("1b", "3b")                                                                \
                         : "=m"(*(volatile type *)address), "+r"(*faulted)                                             \
                         : "r"(value));                                                                                \
    }

VFIOPY_DEFINE_ACCESS(8, uint8_t, "b", "b")
VFIOPY_DEFINE_ACCESS(16, uint16_t, "w", "w")
VFIOPY_DEFINE_ACCESS(32, uint32_t, "l", "k")
VFIOPY_DEFINE_ACCESS(64, uint64_t, "q", "q")
#undef VFIOPY_DEFINE_ACCESS

static inline void vfiopy_order_after_read(uint64_t value)
{
    (void)value;
    __asm__ volatile("" ::: "memory");
}

static inline void vfiopy_order_before_write(void)
{
    __asm__ volatile("" ::: "memory");
}

/* All earlier accesses before all later ones; loads only; stores only. Strong enough for write-combined memory. */
static inline void vfiopy_barrier(void)
{
    __asm__ volatile("mfence" ::: "memory");
}

static inline void vfiopy_read_barrier(void)
{
    __asm__ volatile("lfence" ::: "memory");
}

static inline void vfiopy_write_barrier(void)
{
    __asm__ volatile("sfence" ::: "memory");
}

/* The same between accesses to coherent DMA memory, which x86 keeps in order by itself. */
static inline void vfiopy_dma_read_barrier(void)
{
    __asm__ volatile("" ::: "memory");
}

static inline void vfiopy_dma_write_barrier(void)
{
    __asm__ volatile("" ::: "memory");
}

static inline void vfiopy_cpu_relax(void)
{
    __asm__ volatile("pause" ::: "memory");
}

#endif
