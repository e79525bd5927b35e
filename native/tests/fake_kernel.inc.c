/* Included by the tests that need it: one program, one kernel. Thread-safe. */
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "fake_kernel.h"
#include "uapi/vfiopy_uapi.h"

struct fake_table fake_tables[FAKE_FDS];
unsigned fake_calls, fail_from, fail_to;
int fail_errno;
static pthread_mutex_t fake_lock = PTHREAD_MUTEX_INITIALIZER;

static int fake_map(struct fake_table *table, struct fake_mapping mapping)
{
    for (int i = 0; i < table->count; i++) {
        if (mapping.iova <= table->mappings[i].iova + (table->mappings[i].size - 1) &&
            table->mappings[i].iova <= mapping.iova + (mapping.size - 1))
            return EEXIST;
    }
    if (table->count == FAKE_MOST)
        return ENOSPC;
    table->mappings[table->count++] = mapping;
    return 0;
}

static uint64_t fake_unmap(struct fake_table *table, uint64_t iova, uint64_t size)
{
    uint64_t unmapped = 0;

    for (int i = table->count - 1; i >= 0; i--) {
        struct fake_mapping *mapping = &table->mappings[i];

        if (mapping->iova < iova || mapping->iova + (mapping->size - 1) > iova + (size - 1))
            continue;
        unmapped += mapping->size;
        *mapping = table->mappings[--table->count];
    }
    return unmapped;
}

static int fake_call(struct fake_table *table, unsigned long request, void *argument)
{
    switch (request) {
    case VFIOPY_VFIO_IOMMU_MAP_DMA: {
        struct vfiopy_vfio_iommu_type1_dma_map *map = argument;

        return fake_map(table, (struct fake_mapping){map->iova, map->size, map->vaddr, map->flags});
    }
    case VFIOPY_VFIO_IOMMU_UNMAP_DMA: {
        struct vfiopy_vfio_iommu_type1_dma_unmap *unmap = argument;

        unmap->size = fake_unmap(table, unmap->iova, unmap->size);
        return 0;
    }
    case VFIOPY_IOMMU_IOAS_MAP: {
        struct vfiopy_iommu_ioas_map *map = argument;

        return fake_map(table, (struct fake_mapping){map->iova, map->length, map->user_va, map->flags});
    }
    case VFIOPY_IOMMU_IOAS_MAP_FILE: {
        struct vfiopy_iommu_ioas_map_file *map = argument;

        return fake_map(table, (struct fake_mapping){map->iova, map->length, map->start, map->flags});
    }
    case VFIOPY_IOMMU_IOAS_UNMAP: {
        struct vfiopy_iommu_ioas_unmap *unmap = argument;

        unmap->length = fake_unmap(table, unmap->iova, unmap->length);
        return unmap->length ? 0 : ENOENT;
    }
    }
    return ENOTTY;
}

int fake_ioctl(int fd, unsigned long request, void *argument)
{
    int error;

    pthread_mutex_lock(&fake_lock);
    fake_calls++;
    if (fake_calls >= fail_from && fake_calls <= fail_to)
        error = fail_errno;
    else
        error = fake_call(&fake_tables[fd], request, argument);
    pthread_mutex_unlock(&fake_lock);
    errno = error;
    return error ? -1 : 0;
}

void fake_reset(void)
{
    memset(fake_tables, 0, sizeof(fake_tables));
    fake_calls = fail_from = fail_to = 0;
}

bool fake_has(int fd, uint64_t iova, uint64_t size)
{
    for (int i = 0; i < fake_tables[fd].count; i++) {
        if (fake_tables[fd].mappings[i].iova == iova && fake_tables[fd].mappings[i].size == size)
            return true;
    }
    return false;
}
