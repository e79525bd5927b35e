"""The object that a user holds of a dma-buf."""

from __future__ import annotations

import mmap
import os
import select
import socket
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import numpy.typing as npt

from vfiopy.backend import Area, FileMemory
from vfiopy.dmabuf import sources
from vfiopy.dmabuf.cpu import access_of, cpu_access
from vfiopy.dmabuf.fence import Fence, ready, ready_async
from vfiopy.dmabuf.info import DmaBufInfo, read_info
from vfiopy.dmabuf.life import ExporterLife
from vfiopy.dmabuf.origin import ForeignOrigin, MemoryOrigin, Origin, origin_of
from vfiopy.errors import VfioTimeoutError, WrongFdError
from vfiopy.kernel.ioctl import DeviceFd, DmaBufFd, GfxPlane, MemfdPart
from vfiopy.lives import Resource
from vfiopy.mmio import Region

__all__ = ["DmaBuf"]


class DmaBuf(Resource):
    """Memory that devices and processes share by file descriptor. Its exporter is in control of it.

    Closing the object closes its fd; what was imported before stays imported.

    Threads: may be shared.

    Attributes:
        calls: the typed fd below, with every ioctl.
        origin: where the memory comes from.
    """

    _rank = 45

    def __init__(self, calls: DmaBufFd, origin: Origin | None = None) -> None:
        """Take over a dma-buf fd."""
        self.calls = calls
        try:
            self._first = read_info(calls.fileno())
            self.origin = origin_of(self._first.inode, origin)
            super().__init__(calls.label if origin is None else f"dma-buf of {origin}")
        except BaseException:
            calls.close()
            raise

    # --- making one ----------------------------------------------------------------------------------------------

    @classmethod
    def of_bar(cls, region: Region, *areas: Area) -> Self:
        """Export a memory BAR, or parts of it (Linux 6.19).

        Args:
            region: ``device.bars[n]`` of a device that the kernel drives.
            areas: page-aligned parts (offset, size) in bytes, in the order in which they are to follow each other;
                none means all of it. Only a dma-buf of one part can be imported.

        Raises:
            NotSupportedError: no memory BAR, or a kernel or driver that cannot export; the message says which.
            AlignmentError, AddressRangeError: parts that are not whole pages inside of the BAR.
        """
        return cls(*sources.export_bar(region, areas))

    @classmethod
    def of_memfd(cls, *parts: MemfdPart) -> Self:
        """Make one of pages of memfds (udmabuf, Linux 4.20).

        Args:
            parts: (memfd, offset, size) in bytes, whole pages; the memfds are sealed with F_SEAL_SHRINK.

        Raises:
            NotSupportedError: the kernel has no udmabuf.
            VfioError: a memfd that is not sealed, or sealed against writing, or too short.
        """
        return cls(*sources.from_memfds(parts))

    @classmethod
    def allocate(cls, size: int) -> Self:
        """Make one of new memory, rounded up to pages: a sealed memfd as a udmabuf."""
        return cls(*sources.from_new_memory(size))

    @classmethod
    def of_heap(cls, size: int, heap: str = "system") -> Self:
        """Allocate from a heap: a name in /dev/dma_heap (Linux 5.6); rounded up to pages.

        Raises:
            NotSupportedError: there is no such heap; the message lists those that are there.
        """
        return cls(*sources.from_heap(size, heap))

    @classmethod
    def of_plane(cls, device: DeviceFd, plane: int = 1) -> tuple[Self, GfxPlane]:
        """The dma-buf of what a mediated device displays, and its geometry (linux/vfio.h, VFIO_DEVICE_QUERY_GFX_PLANE).

        Args:
            device: ``io.calls`` of the device.
            plane: DRM plane type: 1 primary, 2 cursor.

        Raises:
            NotSupportedError: the display is a region, or there is none.
            StateError: the plane shows nothing now.
        """
        calls, origin, geometry = sources.from_plane(device, plane)
        return cls(calls, origin), geometry

    @classmethod
    def adopt(cls, fd: int, *, life: ExporterLife | None = None) -> Self:
        """Duplicate a dma-buf's fd that came from elsewhere.

        Args:
            fd: stays the caller's.
            life: of the process that made it, so that its end is noticed. It stays the caller's to close, after
                everything that was imported from here.

        Raises:
            WrongFdError: no dma-buf.
        """
        buffer = cls(DmaBufFd.adopt(fd))
        if life is not None and isinstance(buffer.origin, ForeignOrigin):
            buffer.origin.life = life
        return buffer

    @classmethod
    def receive(cls, connection: socket.socket, *, watch: bool = True) -> Self:
        """Receive one that another process sent with :meth:`send`, over a Unix socket.

        Args:
            connection: the socket.
            watch: watch the life of the process at the other end, which is taken for the exporter. Then an import
                becomes revoked when that process ends, and not merely unknown.

        Raises:
            WrongFdError: the message carried no dma-buf.
            ConnectionError: the other end closed the socket.
        """
        message, fds, _flags, _address = socket.recv_fds(connection, 256, 1, socket.MSG_CMSG_CLOEXEC)
        with ExitStack() as received:
            for fd in fds:
                received.callback(os.close, fd)
            if not message and not fds:
                raise ConnectionResetError("the other end closed the socket before it sent a dma-buf")
            if not fds:
                raise WrongFdError(
                    "the message carried no file descriptor", object="socket", hint="send it with DmaBuf.send()"
                )
            buffer = cls.adopt(fds[0])
        if watch and isinstance(buffer.origin, ForeignOrigin) and buffer.origin.life is None:
            try:
                buffer.origin.watch(ExporterLife.of_peer(connection))
            except BaseException:
                buffer.close()
                raise
        return buffer

    def send(self, connection: socket.socket) -> None:
        """Send it to another process over a Unix socket (SCM_RIGHTS); both have it then."""
        socket.send_fds(connection, [b"dma-buf"], [self.fileno()])

    # --- what it is ----------------------------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """What messages call it."""
        return self._label

    def fileno(self) -> int:
        """The fd; still owned by this object. poll(): POLLIN when it may be read, POLLOUT when it may be written."""
        self.check_open()
        return self.calls.fileno()

    @property
    def size(self) -> int:
        """Bytes."""
        return self._first.size

    @property
    def inode(self) -> int:
        """Its inode: the same in all processes."""
        return self._first.inode

    @property
    def exporter(self) -> str:
        """The driver that made it: ``"vfio_pci_core"``, ``"udmabuf"``, a heap's name."""
        return self._first.exporter

    @property
    def info(self) -> DmaBufInfo:
        """What the kernel says of it now."""
        self.check_open()
        return read_info(self.calls.fileno())

    @property
    def name(self) -> str | None:
        """Its name in debugfs and /proc; assign at most 31 bytes."""
        return self.info.name

    @name.setter
    def name(self, name: str) -> None:
        self.check_open()
        self.calls.set_name(name)

    @property
    def ranges(self) -> tuple[Area, ...] | None:
        """Where it lies on the bus, (address, bytes) in order; None where it came from elsewhere or is no BAR."""
        return self.origin.ranges

    def backing(self) -> tuple[FileMemory, ...]:
        """The memfd memory that a udmabuf is made of: the same pages, in a form that can be mapped for DMA.

        ``space.map(buffer.backing()[0])``. Empty for anything else.
        """
        self.check_open()
        return self.origin.backing() if isinstance(self.origin, MemoryOrigin) else ()

    # --- the CPU -------------------------------------------------------------------------------------------------

    def cpu_access(
        self,
        mode: str = "rw",
        *,
        offset: int = 0,
        size: int | None = None,
        dtype: npt.DTypeLike = "u1",
        flags: int = mmap.MAP_SHARED,
    ) -> AbstractContextManager[npt.NDArray[Any]]:
        """Look at the memory, or change it, inside a ``with`` block: ``with buf.cpu_access("rw") as array``.

        Brackets the access with DMA_BUF_IOCTL_SYNC, which waits for fences and keeps caches true. The memory of a BAR
        is reached through its device, everything else through the exporter's mmap.

        Args:
            mode: ``"r"`` (the array is read-only), ``"w"`` or ``"rw"``.
            offset, size: the part, bytes; all of it by default.
            dtype: of the array, which has one dimension.
            flags: MAP_SHARED; anything else is refused.

        Raises:
            NotSupportedError: the exporter has no mmap: a BAR that another process exported, for example.
            RevokedError: a BAR whose device does not decode memory now.
            AlignmentError: the part is not a whole number of items.
        """
        self.check_open()
        return cpu_access(self, mode, offset, size, dtype, flags)

    # --- fences --------------------------------------------------------------------------------------------------

    def fence(self, mode: str) -> Fence:
        """What an access has to wait for (DMA_BUF_IOCTL_EXPORT_SYNC_FILE, Linux 6.0): ``"r"`` for the writers,
        ``"w"`` or ``"rw"`` for everybody. Signalled already where there is nothing.
        """
        self.check_open()
        return Fence(self.calls.export_sync_file(access_of(mode)))

    def add_fence(self, fence: Fence, mode: str) -> None:
        """Have others wait (DMA_BUF_IOCTL_IMPORT_SYNC_FILE, Linux 6.0): the fence's work reads (``"r"``) or writes."""
        self.check_open()
        self.calls.import_sync_file(fence.calls, access_of(mode))

    def wait(self, mode: str, timeout: float | None = None) -> None:
        """Wait until it may be read (``"r"``) or written (``"w"``, ``"rw"``) by its fences.

        Raises:
            VfioTimeoutError: not within ``timeout`` seconds.
        """
        if not ready(self.fileno(), _events(mode), timeout):
            raise self._late(mode, timeout)

    async def wait_async(self, mode: str, timeout: float | None = None) -> None:
        """As :meth:`wait`, without blocking the event loop."""
        # An fd can be watched once in an event loop: a fence of its own may be waited for by several tasks.
        with self.fence(mode) as fence:
            if not await ready_async(fence.fileno(), select.POLLIN, timeout):
                raise self._late(mode, timeout)

    def _late(self, mode: str, timeout: float | None) -> VfioTimeoutError:
        return VfioTimeoutError(f"no access '{mode}' within {timeout} s: a fence is not signalled", object=self._label)

    def _release(self) -> None:
        self.calls.close()


def _events(mode: str) -> int:
    return select.POLLIN if mode == "r" else select.POLLOUT if access_of(mode) else 0

