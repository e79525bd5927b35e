"""CPU access to a dma-buf: through its exporter, shared, and between SYNC START and END."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vfiopy._shim import lib
from vfiopy.dmabuf.origin import BarOrigin, Origin
from vfiopy.errors import AddressRangeError, AlignmentError, NotSupportedError, RevokedError
from vfiopy.kernel.ioctl import DmaBufFd, SyncAccess
from vfiopy.lives import retire
from vfiopy.mmio import numpy_view

__all__ = ["access_of", "cpu_access"]

_ACCESS = {"r": SyncAccess.READ, "w": SyncAccess.WRITE, "rw": SyncAccess.RW}


class Shared(Protocol):
    """What of a :class:`vfiopy.DmaBuf` is needed here."""

    calls: DmaBufFd
    origin: Origin

    @property
    def label(self) -> str:
        """For messages."""

    @property
    def size(self) -> int:
        """Bytes."""


def access_of(mode: str) -> SyncAccess:
    """Turn ``"r"``, ``"w"`` or ``"rw"`` into what the kernel calls it."""
    try:
        return _ACCESS[mode]
    except KeyError:
        raise ValueError(f"access is 'r', 'w' or 'rw', not {mode!r}") from None


@contextmanager
def cpu_access(
    buffer: Shared, mode: str, offset: int, size: int | None, dtype: npt.DTypeLike, flags: int
) -> Iterator[npt.NDArray[Any]]:
    """See :meth:`vfiopy.DmaBuf.cpu_access`."""
    access = access_of(mode)
    if flags != mmap.MAP_SHARED:
        raise NotSupportedError(
            "a dma-buf is mapped MAP_SHARED or not at all: what is written to a private copy never reaches the device",
            object=buffer.label,
            hint="leave flags out",
        )
    length = buffer.size - offset if size is None else size
    if offset < 0 or length <= 0 or offset + length > buffer.size:
        raise AddressRangeError(
            f"{length} bytes at offset {offset:#x} are not inside its {buffer.size:#x} bytes", object=buffer.label
        )
    element: np.dtype[Any] = np.dtype(dtype)
    if length % element.itemsize:
        raise AlignmentError(
            f"{length:#x} bytes are not a whole number of items of {element.itemsize} bytes ({element})",
            object=buffer.label,
            hint="pass size=, or an element type whose size divides it",
        )
    array = _bar_array(buffer, offset, length, element) or _mapped_array(buffer, access, offset, length, element)
    buffer.calls.sync_start(access)  # begins again after EINTR and EAGAIN; waits for fences that are in the way
    try:
        yield array[0]
    finally:
        buffer.calls.sync_end(access)


def _bar_array(buffer: Shared, offset: int, size: int, element: np.dtype[Any]) -> list[npt.NDArray[Any]]:
    """The BAR itself, through its device: vfio-pci's dma-bufs have no mmap."""
    origin = buffer.origin
    if not isinstance(origin, BarOrigin):
        return []
    absent = origin.signals.absent
    if absent is not None:
        raise RevokedError(
            f"the memory of {origin.signals.name} is away: {absent.value}",
            object=buffer.label,
            hint="touching it would be a bus error; switch memory decode on (device.memory_enabled = True)",
        )
    if len(origin.areas) != 1:
        raise NotSupportedError(
            "it is made of several ranges, which do not follow each other in any mapping",
            object=buffer.label,
            hint=f"numpy_view() of {origin.region.name} takes one range at a time",
        )
    return [numpy_view(origin.region, origin.areas[0].offset + offset, size // element.itemsize, element)]


def _mapped_array(
    buffer: Shared, access: SyncAccess, offset: int, size: int, element: np.dtype[Any]
) -> list[npt.NDArray[Any]]:
    skip = offset % mmap.PAGESIZE
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if SyncAccess.WRITE in access else 0)
    address = buffer.calls.map(offset - skip, size + skip, protection)
    whole = np.asarray(_Pages(address, size + skip, SyncAccess.WRITE not in access))
    return [whole[skip:].view(element)]


class _Pages:
    """Owner of a mapping; it goes when the last array over it does, so that no view ever dangles."""

    def __init__(self, address: int, size: int, read_only: bool) -> None:
        self._address = address
        self._size = size
        self._read_only = read_only
        self._pid = os.getpid()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._address, self._read_only), "version": 3}

    def __del__(self) -> None:
        if self._pid == os.getpid():
            retire(partial(lib.vfiopy_munmap, self._address, self._size))
