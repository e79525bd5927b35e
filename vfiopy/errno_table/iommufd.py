"""Rows for /dev/iommu. Sources: drivers/iommu/iommufd/."""

from __future__ import annotations

import errno
from typing import Final

from vfiopy.errno_table.meaning import Meaning

__all__ = ["IOMMUFD"]

_MEMLOCK: Final = Meaning(
    "MemlockError",
    "RLIMIT_MEMLOCK does not allow to pin this much memory (or the kernel has run out); iommufd counts all "
    "of the user's processes together",
    "raise the limit (ulimit -l, LimitMEMLOCK=, /etc/security/limits.conf), give the process CAP_IPC_LOCK, "
    "or as root set IOMMU_OPTION_RLIMIT_MODE to 1, which counts per process",
)
_OVERLAP: Final = Meaning(
    "OverlapError",
    "the IOVA range overlaps one that is mapped",
    "unmap the other one first, or choose another IOVA",
)
_BAD_RANGE: Final = Meaning(
    "IovaRangeError",
    "the range is outside of the usable IOVAs (they leave out the MSI window and other reserved ranges), or "
    "IOVA, address or size is not a multiple of the IOAS's alignment, or neither read nor write was asked "
    "for",
    "take IOVAs from the usable ranges and keep to whole pages",
)
_NO_HOLE: Final = Meaning(
    "NoSpaceError", "no free IOVA range is large enough", "unmap something, or map in smaller pieces"
)
_OVERFLOW: Final = Meaning("IovaRangeError", "IOVA or address plus size goes beyond 64 bits", "")

IOMMUFD: Final[dict[str, dict[int, Meaning]]] = {
    "open iommufd": {
        errno.ENOENT: Meaning(
            "NotSupportedError",
            "there is no /dev/iommu: the kernel has no iommufd, or its module is not loaded",
            "modprobe iommufd, or use backend='type1v2'",
        ),
        errno.EACCES: Meaning(
            "PermissionDeniedError",
            "this user may not open /dev/iommu",
            "give the user access with a udev rule or chown; in a container allow the device",
        ),
    },
    "IOMMU_DESTROY": {
        errno.EBUSY: Meaning(
            "BusyError",
            "another object or an attached device still uses it",
            "destroy HWPTs before their IOAS, and close or detach devices before either",
        ),
    },
    "IOMMU_IOAS_MAP": {
        errno.EINVAL: _BAD_RANGE,
        errno.EEXIST: _OVERLAP,
        errno.ENOSPC: _NO_HOLE,
        errno.EOVERFLOW: _OVERFLOW,
        errno.ENOMEM: _MEMLOCK,
        errno.EFAULT: Meaning(
            "MemoryKindError",
            "the memory cannot be pinned: not mapped in this process, read-only while the device is to "
            "write it, or memory that only its driver may touch (a BAR, a udmabuf, a DMA heap)",
            "is it a PCI BAR? export a dma-buf and map that; for a udmabuf map its memfd",
        ),
    },
    "IOMMU_IOAS_MAP_FILE": {
        errno.EINVAL: Meaning(
            "MemoryKindError",
            "the file is not a memfd, the range goes past its end, or the IOVA range is not usable or not aligned",
            "pass a memfd (or a dma-buf of a BAR) that is large enough, whole pages, and an IOVA from the "
            "usable ranges",
        ),
        errno.EEXIST: _OVERLAP,
        errno.ENOSPC: _NO_HOLE,
        errno.EOVERFLOW: _OVERFLOW,
        errno.ENOMEM: _MEMLOCK,
        errno.EBADF: Meaning("WrongFdError", "the file's fd is not open", ""),
        errno.EOPNOTSUPP: Meaning(
            "NotSupportedError",
            "this dma-buf is not one that iommufd can import: it takes only those that vfio-pci exports, "
            "made of one range",
            "for a udmabuf map its memfd; memory of a DMA heap or a GPU cannot be mapped; export one range per dma-buf",
        ),
        errno.ENODEV: Meaning(
            "RevokedError",
            "the exporter has taken the memory back: its memory decode is off, it is being reset, in low "
            "power, or closed",
            "enable memory decode in the exporter's PCI_COMMAND and import again; after a close export anew",
        ),
        errno.EPERM: Meaning("PermissionDeniedError", "the file does not allow writing", "map it with READ only"),
    },
    "IOMMU_IOAS_COPY": {
        errno.ENOENT: Meaning("NotMappedError", "the source range is not mapped, in part or in full", ""),
        errno.EPERM: Meaning(
            "PermissionDeniedError",
            "write access was asked for a copy of a mapping of read-only memory",
            "copy with READ only",
        ),
        errno.EINVAL: _BAD_RANGE,
        errno.EEXIST: _OVERLAP,
        errno.ENOSPC: _NO_HOLE,
        errno.EOVERFLOW: _OVERFLOW,
        errno.ENOMEM: _MEMLOCK,
    },
    "IOMMU_IOAS_UNMAP": {
        errno.ENOENT: Meaning(
            "NotMappedError",
            "the range holds no mapping, or cuts one in two; mappings below that place are unmapped by now",
            "unmap exactly what was mapped",
        ),
        errno.EBUSY: Meaning(
            "BusyError",
            "a mapping of the range is being made or removed, or a hardware queue uses it",
            "try again",
        ),
        errno.EDEADLK: Meaning(
            "PinnedError",
            "a driver inside the kernel did not let go of the pages after 100 requests; new pins there are refused now",
            "close the device that uses them",
        ),
        errno.EINVAL: Meaning("IovaRangeError", "the size is 0", ""),
        errno.EOVERFLOW: _OVERFLOW,
    },
    "IOMMU_IOAS_ALLOW_IOVAS": {
        errno.EINVAL: Meaning("IovaRangeError", "a range has fewer than two addresses, or two ranges overlap", ""),
        errno.EADDRINUSE: Meaning(
            "IovaRangeError",
            "a range holds a reserved one of an attached device",
            "stay within the usable ranges",
        ),
    },
    "IOMMU_IOAS_IOVA_RANGES": {
        errno.EMSGSIZE: Meaning("VfioError", "the number of ranges makes no sense", ""),
    },
    "IOMMU_IOAS_CHANGE_PROCESS": {
        errno.EINVAL: Meaning(
            "NotSupportedError",
            "something other than a memfd is mapped; only memfds can change hands",
            "map memfds by fd only",
        ),
        errno.EBUSY: Meaning("BusyError", "a mapping is in the making", "try again"),
    },
    "IOMMU_IOAS_NOIOMMU_GET_PA": {
        errno.ENOENT: Meaning("NotMappedError", "the IOVA is not mapped", ""),
        errno.EOPNOTSUPP: Meaning(
            "NotSupportedError",
            "this kernel has no IOAS for devices without an IOMMU",
            "use Linux 7.3 or later",
        ),
        errno.EPERM: Meaning("PermissionDeniedError", "physical addresses are told only to CAP_SYS_RAWIO", ""),
    },
    "IOMMU_OPTION_RLIMIT_MODE": {
        errno.EPERM: Meaning(
            "PermissionDeniedError", "changing how memory is counted needs CAP_SYS_RESOURCE", "run as root"
        ),
        errno.EBUSY: Meaning("BusyError", "there are objects already", "set it right after opening /dev/iommu"),
        errno.EINVAL: Meaning("VfioError", "the value must be 0 (per user) or 1 (per process)", ""),
    },
    "IOMMU_OPTION_HUGE_PAGES": {
        errno.EINVAL: Meaning(
            "VfioError",
            "the value must be 0 or 1, and 0 comes too late once something is mapped for a device",
            "",
        ),
    },
    "IOMMU_VFIO_IOAS": {
        errno.ENODEV: Meaning(
            "VfioError",
            "this iommufd has no IOAS for VFIO groups yet",
            "put a group into it, or set one with vfio_ioas_set()",
        ),
    },
    "IOMMU_HWPT_ALLOC": {
        errno.EINVAL: Meaning(
            "VfioError",
            "the parent does not exist or is not what this kind of HWPT is made from, or data and data type "
            "do not match",
            "",
        ),
        errno.EOPNOTSUPP: Meaning(
            "NotSupportedError",
            "the device's IOMMU does not have what the flags ask for",
            "get_hw_info() says what it has; nesting and dirty tracking are rare",
        ),
        errno.ENOENT: Meaning(
            "VfioError", "the device or fault queue id does not exist (mediated devices have none)", ""
        ),
        errno.EADDRINUSE: Meaning(
            "IovaRangeError",
            "what is mapped in the IOAS collides with a reserved range of this device",
            "unmap it first",
        ),
        errno.EIO: Meaning("VfioError", "the stream table entry is not legal", ""),
    },
    "IOMMU_HWPT_SET_DIRTY_TRACKING": {
        errno.EOPNOTSUPP: Meaning(
            "NotSupportedError",
            "the HWPT was not made for dirty tracking, or the IOMMU has none",
            "allocate it with IOMMU_HWPT_ALLOC_DIRTY_TRACKING",
        ),
    },
    "IOMMU_HWPT_GET_DIRTY_BITMAP": {
        errno.EOPNOTSUPP: Meaning(
            "NotSupportedError",
            "the HWPT was not made for dirty tracking, or the IOMMU has none",
            "allocate it with IOMMU_HWPT_ALLOC_DIRTY_TRACKING",
        ),
        errno.EINVAL: Meaning("AlignmentError", "IOVA and length must be multiples of the page size", ""),
    },
    "IOMMU_HWPT_INVALIDATE": {
        errno.EINVAL: Meaning(
            "VfioError", "the object takes no invalidation, or a request is not of the kind that it takes", ""
        ),
        errno.EIO: Meaning("VfioError", "the IOMMU refuses a command", ""),
    },
    "IOMMU_FAULT_QUEUE_ALLOC": {},
    "IOMMU_VIOMMU_ALLOC": {
        errno.EOPNOTSUPP: Meaning("NotSupportedError", "the device's IOMMU cannot be shared out this way", ""),
        errno.EINVAL: Meaning(
            "VfioError", "the HWPT is not a nesting parent", "allocate it with IOMMU_HWPT_ALLOC_NEST_PARENT"
        ),
    },
    "IOMMU_VDEVICE_ALLOC": {
        errno.EEXIST: Meaning(
            "OverlapError", "the device, or this virtual id, has a vDEVICE in the vIOMMU already", ""
        ),
        errno.EINVAL: Meaning("VfioError", "the device is behind another IOMMU than the vIOMMU", ""),
    },
    "IOMMU_VEVENTQ_ALLOC": {
        errno.EEXIST: Meaning("OverlapError", "the vIOMMU has a queue of this type already", ""),
        errno.EINVAL: Meaning("VfioError", "the depth must be from 1 to 2**19", ""),
    },
    "IOMMU_HW_QUEUE_ALLOC": {
        errno.EFAULT: Meaning("MemoryKindError", "the queue's memory is not physically contiguous", "use a huge page"),
        errno.ERANGE: Meaning("IovaRangeError", "the queue does not fit what is mapped at its IOVA", ""),
        errno.EEXIST: Meaning("OverlapError", "there is a queue of this index already", ""),
    },
    "read fault queue": {
        errno.EINVAL: Meaning("VfioError", "a group of faults is larger than the buffer", "read more faults at once"),
        errno.ESPIPE: Meaning("VfioError", "the size is not a multiple of a fault's", ""),
    },
    "write fault queue": {
        errno.EINVAL: Meaning("VfioError", "no group of faults waits for an answer with this cookie", ""),
    },
    "read event queue": {
        errno.EINVAL: Meaning(
            "VfioError", "the buffer is smaller than one event", "pass the size of this queue's records"
        ),
        errno.EOVERFLOW: Meaning("VfioError", "events were lost because nobody read them in time", "read on"),
    },
    "mmap of an iommufd": {
        errno.ENXIO: Meaning(
            "VfioError", "the vIOMMU offers no such page", "use exactly the offset and length that it said"
        ),
        errno.EPERM: Meaning("PermissionDeniedError", "the page cannot be mapped executable", ""),
    },
}
