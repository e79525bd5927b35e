/* The kernel's two ways to map memory for a device: a VFIO container (type1) and an iommufd IOAS. */
#ifndef VFIOPY_IOVA_MAPPER_KERNEL_H
#define VFIOPY_IOVA_MAPPER_KERNEL_H

#include "space.h"

struct vfiopy_mapper_ops;

struct vfiopy_mapper {
    const struct vfiopy_mapper_ops *ops;
    vfiopy_ioctl ioctl;
    int fd;
    uint32_t object; /* IOAS id */
    uint32_t token;  /* 0: the slot is free */
    uint32_t calls;  /* under way */
    bool leaving;
    enum vfiopy_mapper_kind kind;
};

/* Both return 0 or an errno, and the name of the ioctl that said so. */
struct vfiopy_mapper_ops {
    int (*map)(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping, const char **call);
    int (*unmap)(const struct vfiopy_mapper *mapper, struct vfiopy_range range, uint64_t *unmapped,
                 const char **call);
    /* The memory keeps its pins and its IOVA while its address is not valid, and then gets another one. */
    int (*lose_address)(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping, const char **call);
    int (*set_address)(const struct vfiopy_mapper *mapper, const struct vfiopy_mapping *mapping, const char **call);
    /* All of the mapper's memory belongs to the calling process from now on. */
    int (*change_process)(const struct vfiopy_mapper *mapper, const char **call);
};

/* NULL for an unknown kind. */
const struct vfiopy_mapper_ops *vfiopy_mapper_ops_of(enum vfiopy_mapper_kind kind);

int vfiopy_system_ioctl(int fd, unsigned long request, void *argument);

#endif
