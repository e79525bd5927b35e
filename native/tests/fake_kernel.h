/* The part of the kernel that maps, as tables: what MAP_DMA, UNMAP_DMA, IOAS_MAP and IOAS_UNMAP do to them. */
#ifndef VFIOPY_TESTS_FAKE_KERNEL_H
#define VFIOPY_TESTS_FAKE_KERNEL_H

#include <stdbool.h>
#include <stdint.h>

enum { FAKE_FDS = 8, FAKE_MOST = 4096 };

struct fake_mapping {
    uint64_t iova, size, address;
    uint32_t flags;
};

struct fake_table {
    struct fake_mapping mappings[FAKE_MOST];
    int count;
};

extern struct fake_table fake_tables[FAKE_FDS];

/* Calls fail_from .. fail_to (from 1; counted by fake_calls) return fail_errno and do nothing. */
extern unsigned fake_calls, fail_from, fail_to;
extern int fail_errno;

int fake_ioctl(int fd, unsigned long request, void *argument);
void fake_reset(void);
bool fake_has(int fd, uint64_t iova, uint64_t size);

#endif
