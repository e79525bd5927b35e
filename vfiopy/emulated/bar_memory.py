"""A BAR that is memory: one memfd, mapped here and by whoever maps the BAR."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from functools import cache
from typing import Any

from vfiopy.errors import AlignmentError, VfioError

__all__ = ["BarMemory", "MemoryWindow"]

_PAGE = mmap.PAGESIZE
_MAP_FIXED = 0x10  # linux/mman.h; Python's mmap module cannot replace a mapping in place
_MAP_FAILED = (1 << 8 * ctypes.sizeof(ctypes.c_void_p)) - 1


class BarMemory:
    """The memory behind a shared BAR.

    Attributes:
        fd: the memfd, sealed against shrinking: a peer that maps it can rely on its size.
        size: bytes.
        view: the memory, for the device's own code.
    """

    def __init__(self, size: int) -> None:
        if size % _PAGE:
            raise ValueError(f"a shared BAR is a whole number of pages of {_PAGE} bytes, not {size:#x}")
        self.size = size
        self.fd = _memfd("vfiopy-bar", size)
        weakref.finalize(self, os.close, self.fd)
        self.view = memoryview(mmap.mmap(self.fd, size))


class MemoryWindow:
    """A mapped part of a shared BAR. ``bool(window)`` means mapped.

    Raises:
        AlignmentError: offset or size is not a whole number of pages.
    """

    def __init__(self, memory: BarMemory, offset: int, size: int) -> None:
        if offset % _PAGE or size % _PAGE:
            raise AlignmentError(
                f"{size:#x} bytes at offset {offset:#x} are not whole pages of {_PAGE} bytes",
                object="BAR window",
            )
        self._memory = memory
        self._offset = offset
        self.size = size
        self.address = _map(0, size, 0, memory.fd, offset)
        self._unmap = weakref.finalize(self, _libc().munmap, self.address, size)
        self._shown = True

    def show(self, on: bool) -> None:
        """Show the memory, or what a BAR is that does not decode: pages whose access is a SIGBUS."""
        if on == self._shown or not self._unmap.alive:
            return
        if on:
            _map(self.address, self.size, _MAP_FIXED, self._memory.fd, self._offset)
        else:
            empty = _memfd("vfiopy-nothing", 0)
            try:
                _map(self.address, self.size, _MAP_FIXED, empty, 0)
            finally:
                os.close(empty)
        self._shown = on

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._unmap()

    def __bool__(self) -> bool:
        return self._unmap.alive


def _memfd(name: str, size: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except BaseException:
        os.close(fd)
        raise
    return fd


@cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_size_t
    libc.mmap.argtypes = [
        ctypes.c_size_t,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.munmap.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    return libc


def _map(address: int, size: int, flags: int, fd: int, offset: int) -> int:
    where: int = _libc().mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | flags, fd, offset)
    if where == _MAP_FAILED:
        raise VfioError("a shared BAR could not be mapped", errno=ctypes.get_errno(), call="mmap")
    return where
