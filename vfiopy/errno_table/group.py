"""Rows for containers and groups. Sources: drivers/vfio/{container,group,vfio_iommu_type1}.c."""

from __future__ import annotations

import errno
from typing import Final

from vfiopy.errno_table.meaning import Meaning

__all__ = ["CONTAINER", "GROUP"]

_NO_INTREMAP: Final = Meaning(
    "PermissionDeniedError",
    "the platform has no interrupt remapping, so a device could forge any interrupt",
    "switch interrupt remapping on (firmware; intel-iommu needs intremap=on in QEMU), or accept the risk "
    "with the module parameter vfio_iommu_type1.allow_unsafe_interrupts=1 (under iommufd: "
    "iommufd.allow_unsafe_interrupts=1)",
)
_MEMLOCK: Final = Meaning(
    "MemlockError",
    "RLIMIT_MEMLOCK does not allow to pin this much memory (or the kernel has run out)",
    "raise the limit (ulimit -l, LimitMEMLOCK=, /etc/security/limits.conf), or give the process CAP_IPC_LOCK",
)

CONTAINER: Final[dict[str, dict[int, Meaning]]] = {
    "open VFIO container": {
        errno.ENOENT: Meaning(
            "NotSupportedError", "there is no VFIO container node", "load vfio-pci (modprobe vfio-pci)"
        ),
        errno.ENODEV: Meaning("NotSupportedError", "VFIO is not loaded", "load vfio-pci (modprobe vfio-pci)"),
    },
    "VFIO_SET_IOMMU": {
        errno.EINVAL: Meaning(
            "VfioError",
            "the container has no group yet, or its IOMMU model has been chosen already",
            "the order is: VFIO_GROUP_SET_CONTAINER, then VFIO_SET_IOMMU once, then map",
        ),
        errno.ENODEV: Meaning(
            "NotSupportedError",
            "no IOMMU driver in this kernel offers the model, or the container holds a no-IOMMU group",
            "load vfio_iommu_type1; VFIO_CHECK_EXTENSION says what there is",
        ),
        errno.EPERM: _NO_INTREMAP,
        errno.EFAULT: Meaning(
            "VfioError", "memory that was mapped earlier has vanished from the process", "unmap it first"
        ),
        errno.ENOMEM: _MEMLOCK,
    },
    "VFIO_IOMMU_GET_INFO": {
        errno.ENODEV: Meaning("VfioError", "no IOMMU model has been chosen", "call VFIO_SET_IOMMU first"),
        errno.EINVAL: Meaning("VfioError", "no IOMMU model has been chosen", "call VFIO_SET_IOMMU first"),
    },
    "VFIO_IOMMU_MAP_DMA": {
        errno.EINVAL: Meaning(
            "IovaRangeError",
            "the range is outside of the usable IOVAs (they leave out the MSI window and other reserved "
            "ranges), or IOVA, address or size is not a multiple of the IOMMU's smallest page, or neither "
            "read nor write was asked for",
            "take IOVAs from the usable ranges and keep to whole pages",
        ),
        errno.EEXIST: Meaning(
            "OverlapError",
            "the IOVA range overlaps one that is mapped",
            "unmap the other one first, or choose another IOVA",
        ),
        errno.ENOENT: Meaning("NotMappedError", "there is no invalidated mapping to give a new address to", ""),
        errno.EOVERFLOW: Meaning("IovaRangeError", "address or IOVA plus size goes beyond 64 bits", ""),
        errno.ENOSPC: Meaning(
            "NoSpaceError",
            "the container has as many mappings as the kernel allows (65535 unless changed)",
            "map fewer and larger ranges, or raise the module parameter vfio_iommu_type1.dma_entry_limit",
        ),
        errno.ENOMEM: _MEMLOCK,
        errno.EFAULT: Meaning(
            "MemoryKindError",
            "the memory cannot be pinned: not mapped in this process, read-only while the device is to "
            "write it, or memory that only its driver may touch (a BAR under iommufd, a udmabuf, a DMA heap)",
            "for a BAR under iommufd export a dma-buf and map that; for a udmabuf map its memfd",
        ),
        errno.ENODEV: Meaning("VfioError", "no IOMMU model has been chosen, or the process that mapped is gone", ""),
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "this container has no IOMMU, so nothing can be mapped",
            "without an IOMMU a device must be given physical addresses",
        ),
    },
    "VFIO_IOMMU_UNMAP_DMA": {
        errno.EINVAL: Meaning(
            "NotMappedError",
            "the range cuts a mapping in two, or is not a multiple of the IOMMU's smallest page",
            "unmap exactly what was mapped",
        ),
        errno.ENOENT: Meaning(
            "NotMappedError",
            "the range holds no mapping, or cuts one in two; mappings below that place are unmapped by now",
            "unmap exactly what was mapped",
        ),
        errno.EOVERFLOW: Meaning("IovaRangeError", "IOVA plus size goes beyond 64 bits", ""),
        errno.EBUSY: Meaning(
            "BusyError",
            "the mapping is in use inside the kernel (a mediated device, or a change in progress)",
            "close the mediated device first, or try again",
        ),
        errno.EDEADLK: Meaning(
            "PinnedError",
            "a driver inside the kernel did not let go of the pages after 100 requests",
            "close the device that uses them",
        ),
    },
    "VFIO_IOMMU_DIRTY_PAGES": {
        errno.EACCES: Meaning(
            "NotSupportedError", "dirty tracking needs the type1v2 model", "open with backend='type1v2'"
        ),
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "iommufd as a container has no dirty tracking",
            "use an HWPT with dirty tracking, or backend='type1v2'",
        ),
        errno.EINVAL: Meaning(
            "VfioError",
            "tracking is not started, or the range cuts a mapping, or the page size is not the IOMMU's smallest",
            "start tracking, and ask for whole mappings with the smallest page size",
        ),
    },
}

GROUP: Final[dict[str, dict[int, Meaning]]] = {
    "open VFIO group": {
        errno.EBUSY: Meaning(
            "BusyError",
            "the group is open already, in this process or another, or one of its devices is open through its cdev",
            "a group has one opener: share it, or close the other (fuser shows who it is)",
        ),
        errno.EPERM: Meaning(
            "PermissionDeniedError",
            "a group without an IOMMU needs CAP_SYS_RAWIO, or a device cgroup forbids the node",
            "run with CAP_SYS_RAWIO; in a container allow the device",
        ),
        errno.ENOENT: Meaning(
            "NotBoundError",
            "the group has no node: none of its devices is bound to a VFIO driver, or /dev is a stale copy",
            "bind the device to vfio-pci; in a container compare /dev/vfio with the host's",
        ),
        errno.ENODEV: Meaning(
            "NotBoundError", "the group's last device is just being unbound", "bind the device to vfio-pci"
        ),
    },
    "VFIO_GROUP_GET_STATUS": {
        errno.ENODEV: Meaning(
            "DeviceGoneError", "all devices of the group are gone", "bind a device to vfio-pci again"
        ),
    },
    "VFIO_GROUP_SET_CONTAINER": {
        errno.EBADF: Meaning("WrongFdError", "the container's fd is not open", ""),
        errno.EBADFD: Meaning(
            "WrongFdError", "the fd is neither a VFIO container nor an iommufd", "open /dev/vfio/vfio"
        ),
        errno.EINVAL: Meaning(
            "VfioError",
            "the group is in a container already, or its IOMMU does not go with what the container has mapped",
            "use a container of its own for this device",
        ),
        errno.EPERM: Meaning(
            "PermissionDeniedError",
            "a driver holds the group's DMA, groups with and without an IOMMU would share a container, or "
            "the platform has no interrupt remapping",
            "bind all devices of the group to vfio-pci or to nothing; a group without an IOMMU needs "
            "CAP_SYS_RAWIO and a container of its own",
        ),
        errno.EBUSY: Meaning(
            "NotViableError",
            "a native driver still holds a device of the group, or a mapping of the container is being moved",
            "bind the other devices of the group to vfio-pci or to nothing (bridges may stay)",
        ),
        errno.ENODEV: Meaning(
            "DeviceGoneError", "all devices of the group are gone", "bind a device to vfio-pci again"
        ),
        errno.ENOMEM: _MEMLOCK,
    },
    "VFIO_GROUP_UNSET_CONTAINER": {
        errno.EINVAL: Meaning("VfioError", "the group is in no container", ""),
        errno.EBUSY: Meaning(
            "BusyError",
            "a device of the group is still open, or a BAR of it is still mapped",
            "unmap the BARs and close the devices first",
        ),
    },
    "VFIO_GROUP_GET_DEVICE_FD": {
        errno.ENODEV: Meaning(
            "NotBoundError",
            "the group has no such device, or its driver does not let it be opened",
            "check that this function itself, not only a sibling, is bound to vfio-pci",
        ),
        errno.EINVAL: Meaning(
            "VfioError",
            "the group is in no container, its IOMMU model has not been chosen, or a VF token was given "
            "that this device does not use",
            "the order is: VFIO_GROUP_SET_CONTAINER, VFIO_SET_IOMMU, then this; give a token only for SR-IOV functions",
        ),
        errno.EACCES: Meaning(
            "PermissionDeniedError",
            "the VF token is missing or not the one that the physical function set",
            "pass vf_token= with the UUID of the physical function's driver",
        ),
        errno.EPERM: Meaning(
            "NotViableError",
            "the group is not viable (a native driver holds another device of it), or it has no IOMMU and "
            "the process no CAP_SYS_RAWIO",
            "bind the other devices of the group to vfio-pci or to nothing (bridges may stay)",
        ),
        errno.EAGAIN: Meaning("BusyError", "the device is being reset", "try again"),
        errno.EBUSY: Meaning(
            "BusyError", "the device cannot be enabled: another driver holds its BARs", "see the kernel's log"
        ),
        errno.EIO: Meaning(
            "DeviceGoneError", "the device does not come up", "see the kernel's log; it may need a reset"
        ),
    },
}
