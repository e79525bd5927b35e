"""A kernel that maps, as tables: what MAP_DMA, UNMAP_DMA, IOAS_MAP and IOAS_UNMAP do, and calls that fail on order.

Native code reaches it through a C function pointer, where it would otherwise call ``ioctl()``.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from dataclasses import dataclass, field
from typing import NamedTuple

from vfiopy import uapi
from vfiopy.iova import IovaSpace

__all__ = ["LOST", "Entry", "FakeKernel", "forget_kernel"]


LOST = -1
"""Source of an entry that has no valid address."""


def forget_kernel(space: IovaSpace) -> None:
    """The kernel's objects are gone: a book that is dropped may let its memory go."""
    for row in space.kernel_mappers():
        space.remove_kernel_mapper(row[0])


class Entry(NamedTuple):
    size: int
    source: int
    """User address, or offset in the file."""


@dataclass
class FakeKernel:
    """Tables by fd. Calls number ``fail_from`` to ``fail_to``, counted from the last :meth:`fail`, do nothing."""

    tables: dict[int, dict[int, Entry]] = field(default_factory=dict)
    calls: int = 0
    fail_from: int = 0
    fail_to: int = -1
    fail_errno: int = 0

    def fail(self, first: int, last: int, number: int) -> None:
        self.calls, self.fail_from, self.fail_to, self.fail_errno = 0, first, last, number

    def _fails(self) -> bool:
        self.calls += 1
        return self.fail_from <= self.calls <= self.fail_to

    def map(self, fd: int, iova: int, entry: Entry) -> int:
        """Return 0 or an errno."""
        with self._lock:
            if self._fails():
                return self.fail_errno
            table = self.tables.setdefault(fd, {})
            if any(iova < at + other.size and at < iova + entry.size for at, other in table.items()):
                return errno.EEXIST
            table[iova] = entry
            return 0

    def unmap(self, fd: int, iova: int, size: int, *, ioas: bool) -> tuple[int, int]:
        """Return 0 or an errno, and the number of bytes."""
        with self._lock:
            if self._fails():
                return self.fail_errno, 0
            table = self.tables.setdefault(fd, {})
            inside = [at for at, entry in table.items() if iova <= at and at + entry.size <= iova + size]
            unmapped = sum(table.pop(at).size for at in inside)
            return (errno.ENOENT if ioas and not unmapped else 0), unmapped

    def move(self, fd: int, iova: int, size: int, source: int | None) -> int:
        """Take a mapping's address away (None), or give it another one."""
        with self._lock:
            if self._fails():
                return self.fail_errno
            table = self.tables.setdefault(fd, {})
            entry = table.get(iova)
            if entry is None:
                return errno.ENOENT
            if entry.size != size or (entry.source == LOST) == (source is None):
                return errno.EINVAL
            table[iova] = Entry(size, LOST if source is None else source)
            return 0

    # --- the C side ----------------------------------------------------------------------------------------------

    def __post_init__(self) -> None:
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p, use_errno=True)
        self._function = prototype(self._ioctl)
        self._lock = threading.Lock()  # of the tables, which Python keeps whole by itself only where it has a GIL

    @property
    def address(self) -> int:
        """Where native code finds it; valid as long as this object lives."""
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        return address

    def _ioctl(self, fd: int, request: int, argument: int) -> int:
        number = self._dispatch(fd, request, argument)
        ctypes.set_errno(number)
        return -1 if number else 0

    def _dispatch(self, fd: int, request: int, argument: int) -> int:
        if request == uapi.IOMMU_IOAS_CHANGE_PROCESS:
            return self.fail_errno if self._fails() else 0
        if request in {uapi.VFIO_IOMMU_UNMAP_DMA, uapi.IOMMU_IOAS_UNMAP}:
            return self._dispatch_unmap(fd, argument, ioas=request == uapi.IOMMU_IOAS_UNMAP)
        if request == uapi.VFIO_IOMMU_MAP_DMA:
            _argsz, flags, source, iova, size = struct.unpack("=IIQQQ", ctypes.string_at(argument, 32))
            if flags == uapi.VFIO_DMA_MAP_FLAG_VADDR:
                return self.move(fd, iova, size, source)
        else:  # IOMMU_IOAS_MAP and IOMMU_IOAS_MAP_FILE
            assert request in {uapi.IOMMU_IOAS_MAP, uapi.IOMMU_IOAS_MAP_FILE}
            _size, _flags, _id, _fd, source, size, iova = struct.unpack("=IIIiQQQ", ctypes.string_at(argument, 40))
        return self.map(fd, iova, Entry(size, source))

    def _dispatch_unmap(self, fd: int, argument: int, *, ioas: bool) -> int:
        _size, flags, iova, size = struct.unpack("=IIQQ", ctypes.string_at(argument, 24))
        if not ioas and flags == uapi.VFIO_DMA_UNMAP_FLAG_VADDR:
            return self.move(fd, iova, size, None)
        number, unmapped = self.unmap(fd, iova, size, ioas=ioas)
        if not number:
            ctypes.memmove(argument + 16, struct.pack("=Q", unmapped), 8)
        return number
