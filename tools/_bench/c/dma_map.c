/*
 * The least that a map and an unmap can cost: bare ioctls in a loop, on the fd that the Python side uses too.
 *
 * Compiled when tools/bench needs it. Functions return nanoseconds for the whole loop, or -errno.
 */
#include <errno.h>
#include <stdint.h>
#include <sys/ioctl.h>
#include <time.h>

#include "uapi/vfiopy_uapi.h"

enum kind { TYPE1 = 1, IOAS = 2 };

struct target {
    int32_t kind, fd;
    uint32_t ioas;
    uint64_t address, size, iova;
};

static int64_t now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static int map(const struct target *target, uint64_t iova)
{
    if (target->kind == TYPE1) {
        struct vfiopy_vfio_iommu_type1_dma_map map = {
            .argsz = sizeof(map),
            .flags = VFIOPY_VFIO_DMA_MAP_FLAG_READ | VFIOPY_VFIO_DMA_MAP_FLAG_WRITE,
            .vaddr = target->address,
            .iova = iova,
            .size = target->size,
        };

        return ioctl(target->fd, VFIOPY_VFIO_IOMMU_MAP_DMA, &map);
    } else {
        struct vfiopy_iommu_ioas_map map = {
            .size = sizeof(map),
            .flags = VFIOPY_IOMMU_IOAS_MAP_FIXED_IOVA | VFIOPY_IOMMU_IOAS_MAP_READABLE |
                     VFIOPY_IOMMU_IOAS_MAP_WRITEABLE,
            .ioas_id = target->ioas,
            .user_va = target->address,
            .length = target->size,
            .iova = iova,
        };

        return ioctl(target->fd, VFIOPY_IOMMU_IOAS_MAP, &map);
    }
}

static int unmap(const struct target *target, uint64_t iova)
{
    if (target->kind == TYPE1) {
        struct vfiopy_vfio_iommu_type1_dma_unmap unmap = {.argsz = sizeof(unmap), .iova = iova, .size = target->size};

        return ioctl(target->fd, VFIOPY_VFIO_IOMMU_UNMAP_DMA, &unmap);
    } else {
        struct vfiopy_iommu_ioas_unmap unmap = {
            .size = sizeof(unmap), .ioas_id = target->ioas, .iova = iova, .length = target->size};

        return ioctl(target->fd, VFIOPY_IOMMU_IOAS_UNMAP, &unmap);
    }
}

/* Map `batch` times the same memory at IOVAs that follow each other, unmap them again, and all that `rounds` times. */
int64_t bench_map_unmap(const struct target *target, uint32_t batch, uint32_t rounds)
{
    int64_t begin = now();

    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t i = 0; i < batch; i++) {
            if (map(target, target->iova + i * target->size) < 0)
                return -errno;
        }
        for (uint32_t i = 0; i < batch; i++) {
            if (unmap(target, target->iova + i * target->size) < 0)
                return -errno;
        }
    }
    return now() - begin;
}
