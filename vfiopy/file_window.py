"""Parts of files mapped into this process by address: BARs that are shared memory, and the memory of a peer."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import weakref
from functools import cache
from typing import Any

from vfiopy.errors import AlignmentError, VfioError

__all__ = ["FileWindow", "sealed_memfd"]

_PAGE = mmap.PAGESIZE
_MAP_FIXED = 0x10  # linux/mman.h; Python's mmap module cannot replace a mapping in place
_MADV_DONTFORK = 10
_MAP_FAILED = (1 << 8 * ctypes.sizeof(ctypes.c_void_p)) - 1


class FileWindow:
    """A mapped part of a file, shared. ``bool(window)`` means mapped; a window that is dropped is unmapped.

    Args:
        fd: of the file; may be closed afterwards, unless :meth:`show` is to be used.
        offset: bytes from the file's start, whole pages.
        size: bytes, whole pages.
        writable: map it for writing too.
        inherit: forked children have it too.
        owner: kept alive for as long as the window.

    Raises:
        AlignmentError: offset or size is not a whole number of pages.
        VfioError: the kernel does not map it.
    """

    def __init__(
        self,
        fd: int,
        offset: int,
        size: int,
        *,
        writable: bool = True,
        inherit: bool = True,
        owner: object = None,
    ) -> None:
        if offset % _PAGE or size % _PAGE:
            raise AlignmentError(
                f"{size:#x} bytes at offset {offset:#x} are not whole pages of {_PAGE} bytes",
                object="file window",
            )
        self._fd = fd
        self._offset = offset
        self._owner = owner
        self._protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self.size = size
        self.address = _map(0, size, self._protection, 0, fd, offset)
        self._unmap = weakref.finalize(self, _libc().munmap, self.address, size)
        self._unmap.atexit = False  # threads may be using it until the very end
        if not inherit:
            _libc().madvise(self.address, size, _MADV_DONTFORK)
        self._shown = True

    def show(self, on: bool) -> None:
        """Show the file, or what a BAR is that does not decode: pages whose access is a SIGBUS."""
        if on == self._shown or not self._unmap.alive:
            return
        if on:
            _map(self.address, self.size, self._protection, _MAP_FIXED, self._fd, self._offset)
        else:
            empty = sealed_memfd("vfiopy-nothing", 0)
            try:
                _map(self.address, self.size, self._protection, _MAP_FIXED, empty, 0)
            finally:
                os.close(empty)
        self._shown = on

    def close(self) -> None:
        """Unmap. Idempotent."""
        self._unmap()

    def __bool__(self) -> bool:
        return self._unmap.alive


def sealed_memfd(name: str, size: int) -> int:
    """Make a memfd that can neither shrink nor grow: a peer that maps it can rely on its size. Returns its fd."""
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
    libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    return libc


def _map(address: int, size: int, protection: int, flags: int, fd: int, offset: int) -> int:
    where: int = _libc().mmap(address, size, protection, mmap.MAP_SHARED | flags, fd, offset)
    if where == _MAP_FAILED:
        raise VfioError(
            f"{size:#x} bytes of a file could not be mapped", errno=ctypes.get_errno(), call="mmap", object=f"fd {fd}"
        )
    return where
