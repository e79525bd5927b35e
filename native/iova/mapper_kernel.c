#include "mapper_kernel.h"

#include <errno.h>
#include <sys/ioctl.h>

#include "internal.h"
#include "uapi/vfiopy_uapi.h"

int vfiopy_system_ioctl(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument);
}

/* 0 or an errno. An interrupted map or unmap has done nothing and is tried again. */
static int call(const struct vfiopy_mapper *mapper, unsigned long request, void *argument)
{
    int result;

    do
        result = mapper->ioctl(mapper->fd, request, argument);
    while (result < 0 && errno == EINTR);
    return result < 0 ? errno : 0;
}

static uint64_t size_of(const struct vfiopy_mapping *mapping)
{
    return mapping->iova.last - mapping->iova.first + 1;
}

static int type1_map(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping, const char **name)
{
    struct vfiopy_vfio_iommu_type1_dma_map map = {
        .argsz = sizeof(map),
        .flags = (mapping->prot & VFIOPY_PROT_READ ? VFIOPY_VFIO_DMA_MAP_FLAG_READ : 0) |
                 (mapping->prot & VFIOPY_PROT_WRITE ? VFIOPY_VFIO_DMA_MAP_FLAG_WRITE : 0),
        .vaddr = mapping->address.first,
        .iova = mapping->iova.first,
        .size = size_of(mapping),
    };

    *name = "VFIO_IOMMU_MAP_DMA";
    return call(mapper, VFIOPY_VFIO_IOMMU_MAP_DMA, &map);
}

static int type1_unmap(const struct vfiopy_mapper *mapper, struct vfiopy_range range, uint64_t *unmapped,
                       const char **name)
{
    struct vfiopy_vfio_iommu_type1_dma_unmap unmap = {
        .argsz = sizeof(unmap),
        .iova = range.first,
        .size = range.last - range.first + 1,
    };
    int error;

    *name = "VFIO_IOMMU_UNMAP_DMA";
    error = call(mapper, VFIOPY_VFIO_IOMMU_UNMAP_DMA, &unmap);
    *unmapped = error ? 0 : unmap.size;
    return error;
}

static int type1_lose_address(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                              const char **name)
{
    struct vfiopy_vfio_iommu_type1_dma_unmap unmap = {
        .argsz = sizeof(unmap),
        .flags = VFIOPY_VFIO_DMA_UNMAP_FLAG_VADDR,
        .iova = mapping->iova.first,
        .size = size_of(mapping),
    };

    *name = "VFIO_IOMMU_UNMAP_DMA";
    return call(mapper, VFIOPY_VFIO_IOMMU_UNMAP_DMA, &unmap);
}

static int type1_set_address(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                             const char **name)
{
    struct vfiopy_vfio_iommu_type1_dma_map map = {
        .argsz = sizeof(map),
        .flags = VFIOPY_VFIO_DMA_MAP_FLAG_VADDR,
        .vaddr = mapping->address.first,
        .iova = mapping->iova.first,
        .size = size_of(mapping),
    };

    *name = "VFIO_IOMMU_MAP_DMA";
    return call(mapper, VFIOPY_VFIO_IOMMU_MAP_DMA, &map);
}

static int type1_change_process(const struct vfiopy_mapper *mapper, const char **name)
{
    (void)mapper;
    *name = "IOMMU_IOAS_CHANGE_PROCESS";
    return EOPNOTSUPP; /* the new process takes over each mapping with an address of its own */
}

static int ioas_try_map(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping, const char **name)
{
    uint32_t flags = VFIOPY_IOMMU_IOAS_MAP_FIXED_IOVA |
                     (mapping->prot & VFIOPY_PROT_READ ? VFIOPY_IOMMU_IOAS_MAP_READABLE : 0) |
                     (mapping->prot & VFIOPY_PROT_WRITE ? VFIOPY_IOMMU_IOAS_MAP_WRITEABLE : 0);
    struct vfiopy_iommu_ioas_map map = {
        .size = sizeof(map),
        .flags = flags,
        .ioas_id = mapper->object,
        .user_va = mapping->address.first,
        .length = size_of(mapping),
        .iova = mapping->iova.first,
    };

    if (mapping->fd >= 0) {
        struct vfiopy_iommu_ioas_map_file file = {
            .size = sizeof(file),
            .flags = flags,
            .ioas_id = mapper->object,
            .fd = mapping->fd,
            .start = mapping->fd_offset,
            .length = size_of(mapping),
            .iova = mapping->iova.first,
        };
        int error = call(mapper, VFIOPY_IOMMU_IOAS_MAP_FILE, &file);

        /* Kernels before 6.13 have no such call; a file that is mapped here can go by its address. */
        if (error != ENOTTY || mapping->kind != VFIOPY_FILE || !mapping->address_known) {
            *name = "IOMMU_IOAS_MAP_FILE";
            return error;
        }
    }
    *name = "IOMMU_IOAS_MAP";
    return call(mapper, VFIOPY_IOMMU_IOAS_MAP, &map);
}

static int ioas_unmap(const struct vfiopy_mapper *mapper, struct vfiopy_range range, uint64_t *unmapped,
                      const char **name)
{
    struct vfiopy_iommu_ioas_unmap unmap = {
        .size = sizeof(unmap),
        .ioas_id = mapper->object,
        .iova = range.first,
        .length = range.last - range.first + 1,
    };
    int error;

    *name = "IOMMU_IOAS_UNMAP";
    error = call(mapper, VFIOPY_IOMMU_IOAS_UNMAP, &unmap);
    *unmapped = error ? 0 : unmap.length;
    return error;
}

static int ioas_map(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping, const char **name)
{
    int error = ioas_try_map(mapper, mapping, name);

    /* EFAULT may mean that the answer could not be written, after the mapping was made. The range is ours alone. */
    if (error == EFAULT) {
        struct vfiopy_range range = {mapping->iova.first, mapping->iova.last};
        const char *ignored;
        uint64_t unmapped;

        ioas_unmap(mapper, range, &unmapped, &ignored);
    }
    return error;
}

/* The kernel knows a file's pages without an address; anything else it cannot move. */
static int ioas_move_address(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping,
                             const char **name)
{
    (void)mapper;
    *name = "IOMMU_IOAS_MAP";
    return mapping->fd >= 0 ? 0 : EOPNOTSUPP;
}

static int ioas_change_process(const struct vfiopy_mapper *mapper, const char **name)
{
    struct vfiopy_iommu_ioas_change_process change = {.size = sizeof(change)};

    *name = "IOMMU_IOAS_CHANGE_PROCESS";
    return call(mapper, VFIOPY_IOMMU_IOAS_CHANGE_PROCESS, &change);
}

static const struct vfiopy_mapper_ops type1_ops = {
    type1_map, type1_unmap, type1_lose_address, type1_set_address, type1_change_process,
};
static const struct vfiopy_mapper_ops ioas_ops = {
    ioas_map, ioas_unmap, ioas_move_address, ioas_move_address, ioas_change_process,
};

const struct vfiopy_mapper_ops *vfiopy_mapper_ops_of(enum vfiopy_mapper_kind kind)
{
    switch (kind) {
    case VFIOPY_MAPPER_TYPE1:
        return &type1_ops;
    case VFIOPY_MAPPER_IOAS:
        return &ioas_ops;
    }
    return NULL;
}
