/*
 * What vfiopy._shim offers: read by cffi as data and by the C compiler as prototypes. cffi takes no preprocessor lines.
 *
 * A function that can fail returns -errno (-4095 ... -1) and never sets a global. Addresses are integers, because that
 * is what both Python and compiled code (Numba) have. All of them run without the GIL.
 */

/*
 * ioctl with a pointer or with a number as its argument. EINTR is the caller's to judge: not every VFIO call may be
 * repeated.
 */
long vfiopy_ioctl(int fd, unsigned long number, void *argument);
long vfiopy_ioctl_value(int fd, unsigned long number, unsigned long value);

/* An ioctl that answers with an fd: its result or, with `at` >= 0, the int there in the argument. -4096: none. */
long vfiopy_ioctl_fd(int fd, unsigned long number, void *argument, long at);

/*
 * Map `length` bytes of a device fd, shared. The address is congruent to `offset` modulo `alignment` (a power of two;
 * 0 stands for the largest that fits into `length`, at most 1 GiB), so that the kernel can use huge page table entries.
 * `prot` is PROT_READ | PROT_WRITE of mmap(2). A forked child does not have the mapping. Returns the address.
 */
intptr_t vfiopy_mmap_aligned(int fd, int64_t offset, size_t length, int prot, size_t alignment);
int vfiopy_munmap(uintptr_t address, size_t length);

/*
 * Zeroed memory for DMA, present and writable, that a forked child does not have. `page_shift` is 0 for ordinary pages
 * (2 MiB aligned where that is worth it), 21 or 30 for hugetlb pages of 2 MiB or 1 GiB; `size` is a multiple of the page
 * size; `numa_node` is -1 for any, else no other node is used. Returns the address; -ENOMEM when the pages run out.
 */
intptr_t vfiopy_alloc_pages(size_t size, int page_shift, int numa_node);
int vfiopy_free_pages(uintptr_t address, size_t size);

/* Have the pages of a range come from one NUMA node only; to be called before they are touched. */
int vfiopy_bind_node(uintptr_t address, size_t size, int numa_node);

/*
 * Register accesses for compiled code: one load or store each, ordered like Region's, or relaxed. (Numba knows uint64_t
 * but not uintptr_t: numba.core.typing.cffi_utils.register_module(vfiopy._shim) makes them callable.) After
 * vfiopy_fault_install() an access to a device that is gone is counted and a read yields all ones; without it,
 * SIGBUS ends the process.
 */
uint8_t vfiopy_mmio_read8(uint64_t address);
uint16_t vfiopy_mmio_read16(uint64_t address);
uint32_t vfiopy_mmio_read32(uint64_t address);
uint64_t vfiopy_mmio_read64(uint64_t address);
void vfiopy_mmio_write8(uint64_t address, uint8_t value);
void vfiopy_mmio_write16(uint64_t address, uint16_t value);
void vfiopy_mmio_write32(uint64_t address, uint32_t value);
void vfiopy_mmio_write64(uint64_t address, uint64_t value);
uint8_t vfiopy_mmio_read8_relaxed(uint64_t address);
uint16_t vfiopy_mmio_read16_relaxed(uint64_t address);
uint32_t vfiopy_mmio_read32_relaxed(uint64_t address);
uint64_t vfiopy_mmio_read64_relaxed(uint64_t address);
void vfiopy_mmio_write8_relaxed(uint64_t address, uint8_t value);
void vfiopy_mmio_write16_relaxed(uint64_t address, uint16_t value);
void vfiopy_mmio_write32_relaxed(uint64_t address, uint32_t value);
void vfiopy_mmio_write64_relaxed(uint64_t address, uint64_t value);

/* Barriers: against everything, and between accesses to coherent DMA memory only. */
void vfiopy_mmio_barrier(void);
void vfiopy_mmio_read_barrier(void);
void vfiopy_mmio_write_barrier(void);
void vfiopy_dma_rmb(void);
void vfiopy_dma_wmb(void);

/* The SIGBUS handler of this module's accessors; how many of their accesses went nowhere so far. */
int vfiopy_fault_install(void);
uint64_t vfiopy_fault_count(void);
