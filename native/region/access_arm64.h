/*
 * Accessors and barriers of arm64. Included by access.h only.
 *
 * BARs are mapped as Device memory: accesses to the same device stay in order, but not against normal memory. Plain
 * base-register addressing is used because a hypervisor that emulates the access can decode no other form.
 */
#ifndef VFIOPY_REGION_ACCESS_ARM64_H
#define VFIOPY_REGION_ACCESS_ARM64_H

#define VFIOPY_DEFINE_ACCESS(width, type, suffix, modifier)                                                            \
    static inline type vfiopy_load##width(const volatile void *address, int *faulted)                                  \
    {                                                                                                                  \
        type value;                                                                                                    \
                                                                                                                       \
        __asm__ volatile("1:\tldr" suffix " %" modifier "0, %2\n"                                                      \
                         "2:\n\t"                                                                                      \
                         ".pushsection .text.vfiopy_fixup, \"ax\", %%progbits\n"                                       \
                         "3:\tmov %w1, #1\n\t"                                                                         \
                         "mov %" modifier "0, #-1\n\t"                                                                 \
                         "b 2b\n\t"                                                                                    \
                         ".popsection\n\t"                                                                             \
                         VFIOPY_FAULT_ENTRY("1b", "3b")                                                                \
                         : "=r"(value), "+r"(*faulted)                                                                 \
                         : "Q"(*(const volatile type *)address));                                                      \
        return value;                                                                                                  \
    }                                                                                                                  \
                                                                                                                       \
    static inline void vfiopy_store##width(volatile void *address, type value, int *faulted)                           \
    {                                                                                                                  \
        __asm__ volatile("1:\tstr" suffix " %" modifier "2, %0\n"                                                      \
                         "2:\n\t"                                                                                      \
                         ".pushsection .text.vfiopy_fixup, \"ax\", %%progbits\n"                                       \
                         "3:\tmov %w1, #1\n\t"                                                                         \
                         "b 2b\n\t"                                                                                    \
                         ".popsection\n\t"                                                                             \
                         VFIOPY_FAULT_ENTRY("1b", "3b")                                                                \
                         : "=Q"(*(volatile type *)address), "+r"(*faulted)                                             \
                         : "r"(value));                                                                                \
    }

VFIOPY_DEFINE_ACCESS(8, uint8_t, "b", "w")
VFIOPY_DEFINE_ACCESS(16, uint16_t, "h", "w")
VFIOPY_DEFINE_ACCESS(32, uint32_t, "", "w")
VFIOPY_DEFINE_ACCESS(64, uint64_t, "", "x")
#undef VFIOPY_DEFINE_ACCESS

/*
 * The load barrier orders later loads and stores to memory. A branch that hangs on the value, even one that leads to
 * the next instruction either way, makes the CPU have the value before it goes on: time read after it is later time.
 */
static inline void vfiopy_order_after_read(uint64_t value)
{
    __asm__ volatile("dmb oshld\n\t"
                     "cbnz %0, 1f\n"
                     "1:"
                     :
                     : "r"(value)
                     : "memory");
}

static inline void vfiopy_order_before_write(void)
{
    __asm__ volatile("dmb oshst" ::: "memory");
}

/* All earlier accesses complete before any later one starts; loads only; stores only. */
static inline void vfiopy_barrier(void)
{
    __asm__ volatile("dsb sy" ::: "memory");
}

static inline void vfiopy_read_barrier(void)
{
    __asm__ volatile("dsb ld" ::: "memory");
}

static inline void vfiopy_write_barrier(void)
{
    __asm__ volatile("dsb st" ::: "memory");
}

/* Order, without waiting for completion, between accesses to coherent DMA memory. */
static inline void vfiopy_dma_read_barrier(void)
{
    __asm__ volatile("dmb oshld" ::: "memory");
}

static inline void vfiopy_dma_write_barrier(void)
{
    __asm__ volatile("dmb oshst" ::: "memory");
}

static inline void vfiopy_cpu_relax(void)
{
    __asm__ volatile("yield" ::: "memory");
}

#endif
