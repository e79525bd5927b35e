"""dma-bufs, and what makes them from memory: DMA heaps and udmabuf; and the sync files of their fences.

Sources: linux/dma-buf.h, linux/dma-heap.h, linux/udmabuf.h, linux/sync_file.h.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import NamedTuple, Self

from vfiopy import uapi
from vfiopy.kernel.ioctl._call import address_of, os_calls, restarted
from vfiopy.kernel.ioctl._fd import Fd

__all__ = [
    "DmaBufFd",
    "DmaHeapFd",
    "FenceInfo",
    "MemfdPart",
    "SyncAccess",
    "SyncFileFd",
    "SyncFileInfo",
    "UdmabufFd",
]


class SyncAccess(IntFlag):
    """DMA_BUF_SYNC_READ, _WRITE: what the CPU is going to do, or has done."""

    READ = 1
    WRITE = 2
    RW = 3


class DmaBufFd(Fd):
    """A dma-buf. What can be done with it is up to its exporter."""

    kind = "dma-buf"
    node = r"/dmabuf:.*"

    @property
    def size(self) -> int:
        """Size in bytes."""
        fd = self.fileno()
        return self._fail("lseek dma-buf", os_calls().seek_end(fd))

    def map(self, offset: int, size: int, protection: int) -> int:
        """mmap(2) MAP_SHARED; return the address. A dma-buf of a vfio-pci BAR has no mmap: map the BAR
        instead.

        Always shared: a heap accepts MAP_PRIVATE too, and what is written then never reaches the device.
        """
        fd = self.fileno()
        address = os_calls().mmap(fd, offset, size, protection, mmap.PAGESIZE)
        return self._fail("mmap dma-buf", address, f"offset {offset:#x}, size {size:#x}")

    def sync_start(self, access: SyncAccess) -> None:
        """DMA_BUF_IOCTL_SYNC: before the CPU looks at or changes the memory."""
        self._sync(uapi.DMA_BUF_SYNC_START | access, "start")

    def sync_end(self, access: SyncAccess) -> None:
        """DMA_BUF_IOCTL_SYNC: after the CPU is done with it."""
        self._sync(uapi.DMA_BUF_SYNC_END | access, "end")

    def _sync(self, flags: int, detail: str) -> None:
        argument = uapi.dma_buf_sync.new(flags=flags)
        # The header says to try again after EAGAIN as well as EINTR.
        self._ioctl("DMA_BUF_IOCTL_SYNC", uapi.DMA_BUF_IOCTL_SYNC, argument, detail, errno.EAGAIN)

    def set_name(self, name: str) -> None:
        """DMA_BUF_SET_NAME: at most 31 bytes; shown in debugfs and /proc (Linux 5.3)."""
        # The argument is the string itself, whatever the number's encoded size says.
        argument = bytearray(name.encode() + b"\0")
        if len(argument) > uapi.DMA_BUF_NAME_LEN:
            raise ValueError(f"{name!r} is longer than {uapi.DMA_BUF_NAME_LEN - 1} bytes")
        self._ioctl("DMA_BUF_SET_NAME", uapi.DMA_BUF_SET_NAME_B, argument, repr(name))

    def export_sync_file(self, access: SyncAccess) -> SyncFileFd:
        """DMA_BUF_IOCTL_EXPORT_SYNC_FILE: the fences that ``access`` would have to wait for (Linux 6.0)."""
        layout = uapi.dma_buf_export_sync_file
        argument = layout.new(flags=access, fd=-1)
        owner = SyncFileFd(None, f"sync file of {self._label}")
        call, number = "DMA_BUF_IOCTL_EXPORT_SYNC_FILE", uapi.DMA_BUF_IOCTL_EXPORT_SYNC_FILE
        return self._ioctl_fd(owner, call, number, argument, at=layout.offset("fd"))

    def import_sync_file(self, sync_file: SyncFileFd, access: SyncAccess) -> None:
        """DMA_BUF_IOCTL_IMPORT_SYNC_FILE: have later users wait for that fence (Linux 6.0)."""
        argument = uapi.dma_buf_import_sync_file.new(flags=access, fd=sync_file.fileno())
        self._ioctl("DMA_BUF_IOCTL_IMPORT_SYNC_FILE", uapi.DMA_BUF_IOCTL_IMPORT_SYNC_FILE, argument)


class DmaHeapFd(Fd):
    """/dev/dma_heap/system and its like."""

    kind = "DMA heap"
    node = r"dma_heap/.+"

    @classmethod
    def open(cls, path: str, label: str | None = None) -> Self:
        """Open a heap; a bare name means /dev/dma_heap/NAME."""
        return super().open(path if "/" in path else f"/dev/dma_heap/{path}", label)

    def alloc(self, size: int) -> DmaBufFd:
        """DMA_HEAP_IOCTL_ALLOC: allocate ``size`` bytes, rounded up to pages (Linux 5.6)."""
        layout = uapi.dma_heap_allocation_data
        argument = layout.new(len=size, fd_flags=os.O_RDWR | os.O_CLOEXEC)
        owner = DmaBufFd(None, f"dma-buf of {self._label}")
        call, number = "DMA_HEAP_IOCTL_ALLOC", uapi.DMA_HEAP_IOCTL_ALLOC
        return self._ioctl_fd(owner, call, number, argument, f"{size:#x} bytes", at=layout.offset("fd"))


class MemfdPart(NamedTuple):
    """A range of a memfd in bytes, page-aligned."""

    memfd: int
    offset: int
    size: int


class UdmabufFd(Fd):
    """/dev/udmabuf: makes dma-bufs from memfds that are sealed against shrinking."""

    kind = "udmabuf node"
    node = "udmabuf"

    def create(self, part: MemfdPart) -> DmaBufFd:
        """UDMABUF_CREATE: a range of a memfd, which needs F_SEAL_SHRINK and must not have F_SEAL_WRITE."""
        memfd, offset, size = part
        argument = uapi.udmabuf_create.new(memfd=memfd, flags=uapi.UDMABUF_FLAGS_CLOEXEC, offset=offset, size=size)
        detail = f"offset {offset:#x}, size {size:#x}"
        return self._ioctl_fd(DmaBufFd(None, "udmabuf"), "UDMABUF_CREATE", uapi.UDMABUF_CREATE, argument, detail)

    def create_list(self, parts: Sequence[MemfdPart]) -> DmaBufFd:
        """UDMABUF_CREATE_LIST: several ranges, in order (at most 1024 by default)."""
        layout, item = uapi.udmabuf_create_list, uapi.udmabuf_create_item
        argument = layout.new(item.size * len(parts), flags=uapi.UDMABUF_FLAGS_CLOEXEC, count=len(parts))
        for number, part in enumerate(parts):
            base = layout.offset("list") + number * item.size
            for field, value in zip(("memfd", "offset", "size"), part, strict=True):
                item.put(argument, field, value, base)
        owner, call = DmaBufFd(None, "udmabuf"), "UDMABUF_CREATE_LIST"
        return self._ioctl_fd(owner, call, uapi.UDMABUF_CREATE_LIST, argument, f"{len(parts)} parts")


@dataclass(frozen=True, slots=True)
class FenceInfo:
    """struct sync_fence_info. ``status``: 1 signalled, 0 active, negative: its error."""

    object_name: str
    driver_name: str
    status: int
    timestamp_ns: int


@dataclass(frozen=True, slots=True)
class SyncFileInfo:
    """struct sync_file_info. ``status`` as for a fence, of all of them together."""

    name: str
    status: int
    fences: tuple[FenceInfo, ...]


class SyncFileFd(Fd):
    """A sync file: one fence or several as an fd. poll() says when all have signalled."""

    kind = "sync file"
    node = r"anon_inode:sync_file"

    def merge(self, other: SyncFileFd, name: str = "vfiopy") -> SyncFileFd:
        """SYNC_IOC_MERGE: a sync file that waits for both; ``name`` has at most 31 bytes."""
        layout = uapi.sync_merge_data
        argument = layout.new(name=_text(name), fd2=other.fileno(), fence=-1)
        owner, at = SyncFileFd(None, name), layout.offset("fence")
        return self._ioctl_fd(owner, "SYNC_IOC_MERGE", uapi.SYNC_IOC_MERGE, argument, at=at)

    def file_info(self) -> SyncFileInfo:
        """SYNC_IOC_FILE_INFO: name, status and all fences."""
        layout, item = uapi.sync_file_info, uapi.sync_fence_info
        count = 0
        while True:
            table = bytearray(item.size * count)
            pointer = address_of(table) if count else 0
            argument = layout.new(num_fences=count, sync_fence_info=pointer)
            self._ioctl("SYNC_IOC_FILE_INFO", uapi.SYNC_IOC_FILE_INFO, argument)
            # A count of 0 asks how many there are; a sync file's fences never change after that.
            number = layout.get(argument, "num_fences")
            if number <= count or count:
                break
            count = number
        fences = tuple(
            FenceInfo(
                _string(item.get_bytes(table, "obj_name", base)),
                _string(item.get_bytes(table, "driver_name", base)),
                item.get(table, "status", base),
                item.get(table, "timestamp_ns", base),
            )
            for base in range(0, len(table), item.size)
        )
        return SyncFileInfo(_string(layout.get_bytes(argument, "name")), layout.get(argument, "status"), fences)

    def set_deadline(self, monotonic_ns: int) -> None:
        """SYNC_IOC_SET_DEADLINE: say by when it is needed, on CLOCK_MONOTONIC (Linux 6.4)."""
        argument = uapi.sync_set_deadline.new(deadline_ns=monotonic_ns)
        self._ioctl("SYNC_IOC_SET_DEADLINE", uapi.SYNC_IOC_SET_DEADLINE, argument)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all fences have signalled, at most ``timeout`` seconds; return whether they have."""
        import select  # noqa: PLC0415  needed here only

        poller = select.poll()
        poller.register(self.fileno(), select.POLLIN)
        return bool(restarted(lambda: len(poller.poll(None if timeout is None else timeout * 1000))))


def _text(text: str) -> bytes:
    encoded = text.encode()
    if len(encoded) > 31:
        raise ValueError(f"{text!r} is longer than 31 bytes")
    return encoded


def _string(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
