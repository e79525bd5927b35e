/* ioctl, mappings, DMA memory and register accessors as plain functions. See shim.cdef.h for what each promises. */
#define _GNU_SOURCE
#include "shim/shim.h"

#include <errno.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "region/access.h"

/* A shared object has its own accessors, hence its own table of them and its own handler. */
#include "region/fault.c" /* NOLINT */

#ifndef MAP_HUGE_SHIFT
#define MAP_HUGE_SHIFT 26
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#define HUGE_PAGE ((size_t)1 << 21)
#define LARGEST_ALIGNMENT ((size_t)1 << 30)
#define POLICY_BIND 2 /* MPOL_BIND of linux/mempolicy.h */
#define MOST_NODES 1024
#define VFIOPY_NO_FD (-4096)
#define BITS_PER_LONG (8 * sizeof(long))
#define MOST_PLACES 64 /* tried before a mapping is given up because other threads are always there first */

long vfiopy_ioctl(int fd, unsigned long number, void *argument)
{
    int result = ioctl(fd, number, argument);

    return result < 0 ? -errno : result;
}

long vfiopy_ioctl_value(int fd, unsigned long number, unsigned long value)
{
    int result = ioctl(fd, number, value);

    return result < 0 ? -errno : result;
}

long vfiopy_ioctl_fd(int fd, unsigned long number, void *argument, long at)
{
    int result = ioctl(fd, number, argument);

    if (result < 0)
        return -errno;
    if (at >= 0)
        memcpy(&result, (char *)argument + at, sizeof(result));
    return result < 0 ? VFIOPY_NO_FD : result;
}

static size_t page_size(void)
{
    return (size_t)sysconf(_SC_PAGESIZE);
}

/*
 * Reserve `length` bytes at an address that is congruent to `phase` modulo `alignment`: take more than needed, give
 * back what is too much. MAP_FAILED on failure.
 */
static void *reserve(size_t length, size_t alignment, size_t phase)
{
    size_t whole = length + alignment;
    uintptr_t first, start, end;
    void *mapping;

    if (whole < length) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    mapping = mmap(NULL, whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED)
        return MAP_FAILED;
    first = (uintptr_t)mapping;
    start = first + ((phase - first) & (alignment - 1));
    end = start + length;
    if (start > first)
        munmap(mapping, start - first);
    if (first + whole > end)
        munmap((void *)end, first + whole - end);
    return (void *)start;
}

intptr_t vfiopy_mmap_aligned(int fd, int64_t offset, size_t length, int prot, size_t alignment)
{
    size_t page = page_size();
    size_t mapped = (length + page - 1) & ~(page - 1);
    void *address, *result = MAP_FAILED;

    if (length == 0 || mapped < length || (alignment & (alignment - 1)) || offset < 0
        || (size_t)offset & (page - 1))
        return -EINVAL;
    if (alignment == 0) {
        alignment = page;
        while (alignment < LARGEST_ALIGNMENT && alignment * 2 <= mapped)
            alignment *= 2;
    }
    if (alignment < page)
        alignment = page;

    /*
     * The reservation only finds a place. Mapped over, it could not be taken back after a failure: kernels before 6.12
     * have removed it by then, and whatever another thread has mapped there meanwhile would go in its stead.
     */
    errno = EEXIST;
    for (int place = 0; result == MAP_FAILED && errno == EEXIST && place < MOST_PLACES; place++) {
        address = reserve(mapped, alignment, (size_t)offset);
        if (address == MAP_FAILED)
            return -errno;
        munmap(address, mapped);
        result = mmap(address, length, prot, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, offset);
        if (result != MAP_FAILED && result != address) { /* before Linux 4.17 the flag is a hint */
            munmap(result, length);
            result = MAP_FAILED;
            errno = EEXIST;
        }
    }
    if (result == MAP_FAILED)
        return errno == EEXIST ? -EAGAIN : -errno;
    /* Both are wishes: an old kernel that does not know them for device memory maps it all the same. */
    (void)madvise(address, mapped, MADV_HUGEPAGE);
    (void)madvise(address, mapped, MADV_DONTFORK);
    return (intptr_t)address;
}

int vfiopy_munmap(uintptr_t address, size_t length)
{
    return munmap((void *)address, length) < 0 ? -errno : 0;
}

int vfiopy_bind_node(uintptr_t address, size_t size, int numa_node)
{
    unsigned long nodes[MOST_NODES / BITS_PER_LONG] = {0};

    if (numa_node < 0 || numa_node >= MOST_NODES)
        return -EINVAL;
    nodes[(size_t)numa_node / BITS_PER_LONG] = 1ul << ((size_t)numa_node % BITS_PER_LONG);
    /* The kernel looks at one bit less than it is told. */
    return syscall(SYS_mbind, address, size, POLICY_BIND, nodes, (unsigned long)MOST_NODES + 1, 0u) < 0 ? -errno : 0;
}

/* Touch each page with an accessor: hugetlb pages that are not there are a SIGBUS. */
static int populate_by_hand(uintptr_t address, size_t size, size_t page)
{
    int faulted = 0, result = vfiopy_fault_install();

    for (size_t done = 0; result == 0 && !faulted && done < size; done += page)
        vfiopy_store8((volatile void *)(address + done), 0, &faulted);
    return faulted ? -ENOMEM : result;
}

static int populate(void *address, size_t size, size_t page)
{
    int result;

    do
        result = madvise(address, size, MADV_POPULATE_WRITE);
    while (result < 0 && (errno == EINTR || errno == EAGAIN));
    if (result == 0)
        return 0;
    if (errno == EINVAL) /* before Linux 5.14 */
        return populate_by_hand((uintptr_t)address, size, page);
    return errno == EFAULT ? -ENOMEM : -errno; /* EFAULT is how it reports a SIGBUS */
}

static void *map_anonymous(size_t size, int page_shift)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    void *address;

    if (page_shift)
        return mmap(NULL, size, PROT_READ | PROT_WRITE, flags | MAP_HUGETLB | (page_shift << MAP_HUGE_SHIFT), -1, 0);
    if (size < HUGE_PAGE)
        return mmap(NULL, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    address = reserve(size, HUGE_PAGE, 0);
    if (address == MAP_FAILED)
        return MAP_FAILED;
    if (mprotect(address, size, PROT_READ | PROT_WRITE) < 0) {
        int error = errno;

        munmap(address, size);
        errno = error;
        return MAP_FAILED;
    }
    (void)madvise(address, size, MADV_HUGEPAGE);
    return address;
}

intptr_t vfiopy_alloc_pages(size_t size, int page_shift, int numa_node)
{
    size_t page = page_shift ? (size_t)1 << (page_shift & 63) : page_size();
    void *address;
    int result = 0;

    if (page_shift != 0 && page_shift != 21 && page_shift != 30)
        return -EINVAL;
    if (size == 0 || size % page || numa_node < -1)
        return -EINVAL;
    address = map_anonymous(size, page_shift);
    if (address == MAP_FAILED)
        return -errno;
    /* A child's first write would otherwise take the pages away from under the device. */
    if (madvise(address, size, MADV_DONTFORK) < 0)
        result = -errno;
    if (result == 0 && numa_node >= 0)
        result = vfiopy_bind_node((uintptr_t)address, size, numa_node);
    if (result == 0)
        result = populate(address, size, page);
    if (result < 0) {
        munmap(address, size);
        return result;
    }
    return (intptr_t)address;
}

int vfiopy_free_pages(uintptr_t address, size_t size)
{
    return vfiopy_munmap(address, size);
}

/* --- for compiled code ------------------------------------------------------------------------------------------ */

/* The handler counts a fault, and a load has all ones by then: the flag says nothing more. */
#define DEFINE_ACCESSORS(bits)                                                                                         \
    uint##bits##_t vfiopy_mmio_read##bits(uint64_t address)                                                            \
    {                                                                                                                  \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        return vfiopy_read##bits((const volatile void *)(uintptr_t)address, &faulted);                                 \
    }                                                                                                                  \
                                                                                                                       \
    uint##bits##_t vfiopy_mmio_read##bits##_relaxed(uint64_t address)                                                  \
    {                                                                                                                  \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        return vfiopy_load##bits((const volatile void *)(uintptr_t)address, &faulted);                                 \
    }                                                                                                                  \
                                                                                                                       \
    void vfiopy_mmio_write##bits(uint64_t address, uint##bits##_t value)                                               \
    {                                                                                                                  \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        vfiopy_write##bits((volatile void *)(uintptr_t)address, value, &faulted);                                      \
    }                                                                                                                  \
                                                                                                                       \
    void vfiopy_mmio_write##bits##_relaxed(uint64_t address, uint##bits##_t value)                                     \
    {                                                                                                                  \
        int faulted = 0;                                                                                               \
                                                                                                                       \
        vfiopy_store##bits((volatile void *)(uintptr_t)address, value, &faulted);                                      \
    }

DEFINE_ACCESSORS(8)
DEFINE_ACCESSORS(16)
DEFINE_ACCESSORS(32)
DEFINE_ACCESSORS(64)

void vfiopy_mmio_barrier(void)
{
    vfiopy_barrier();
}

void vfiopy_mmio_read_barrier(void)
{
    vfiopy_read_barrier();
}

void vfiopy_mmio_write_barrier(void)
{
    vfiopy_write_barrier();
}

void vfiopy_dma_rmb(void)
{
    vfiopy_dma_read_barrier();
}

void vfiopy_dma_wmb(void)
{
    vfiopy_dma_write_barrier();
}
