"""Rows for dma-bufs, heaps, udmabuf and sync files. Sources: drivers/dma-buf/."""

from __future__ import annotations

import errno
from typing import Final

from vfiopy.errno_table.meaning import Meaning

__all__ = ["OTHER"]

_UDMABUF: Final = {
    errno.EBADFD: Meaning("WrongFdError", "the fd is not open, or not a memfd", "pass an fd of os.memfd_create()"),
    errno.EINVAL: Meaning(
        "VfioError",
        "the memfd must be sealed with F_SEAL_SHRINK and without F_SEAL_WRITE, and the range must be whole "
        "pages inside of it and of udmabuf's limits (module parameters list_limit, size_limit_mb)",
        "os.memfd_create(..., os.MFD_ALLOW_SEALING), then fcntl F_ADD_SEALS with F_SEAL_SHRINK",
    ),
}

OTHER: Final[dict[str, dict[int, Meaning]]] = {
    "open DMA heap": {
        errno.ENOENT: Meaning(
            "NotSupportedError",
            "there is no such heap",
            "ls /dev/dma_heap shows what there is; the kernel needs DMABUF_HEAPS_SYSTEM",
        ),
    },
    "open udmabuf node": {
        errno.ENOENT: Meaning("NotSupportedError", "the kernel has no udmabuf", "modprobe udmabuf"),
    },
    "UDMABUF_CREATE": _UDMABUF,
    "UDMABUF_CREATE_LIST": _UDMABUF,
    "DMA_HEAP_IOCTL_ALLOC": {
        errno.EINVAL: Meaning("VfioError", "the heap refuses the size", "ask for at least one byte"),
        errno.ENOMEM: Meaning("VfioError", "the heap has no memory of this size left", "ask for less"),
    },
    "DMA_BUF_IOCTL_SYNC": {
        errno.EINVAL: Meaning(
            "VfioError",
            "neither read nor write access was named, or the end of an access came before its start",
            "",
        ),
    },
    "DMA_BUF_SET_NAME": {
        errno.EBUSY: Meaning("BusyError", "the dma-buf is attached to a device", "name it first"),
    },
    "mmap dma-buf": {
        errno.EINVAL: Meaning(
            "NotSupportedError",
            "the exporter has no mmap (a dma-buf of a PCI BAR never has), or the range goes past the end",
            "for a BAR map it through its device; for a udmabuf map its memfd",
        ),
    },
    "SYNC_IOC_MERGE": {
        errno.ENOENT: Meaning("WrongFdError", "the second fd is not a sync file", ""),
    },
    "dup": {
        errno.EBADF: Meaning("WrongFdError", "the file descriptor is not open", ""),
    },
}
