"""The one door to the kernel: every system call of :mod:`vfiopy.kernel` goes through :class:`Syscalls`.

A test replaces the whole protocol with :func:`replaced` and so can script answers, count open files, or fail
the n-th call. Methods return what the kernel returned: a result of at least 0, or ``-errno``. None of them
raises for what the kernel refuses; naming the error is the business of the layer above, which knows call and
object.

A new fd is never answered but put into a list, and the list belongs to its owner before the call is made. The call and
the putting are one step of the interpreter (``into.extend(map(native function, ...))``), so that no KeyboardInterrupt
gets between the kernel's fd and its owner.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from vfiopy._shim import ffi, lib

__all__ = [
    "KernelSyscalls",
    "Syscalls",
    "address_of",
    "dirty_bitmap",
    "os_calls",
    "replaced",
    "restarted",
]


_NO_FD: Final = -4096  # below every -errno; see native/shim/shim.cdef.h


class Syscalls(Protocol):
    """The system calls that this package makes."""

    def open(self, path: str, flags: int, into: list[int]) -> int:
        """open(2), always with O_CLOEXEC."""

    def close(self, fd: int) -> int:
        """close(2)."""

    def duplicate(self, fd: int, into: list[int]) -> int:
        """fcntl(2) F_DUPFD_CLOEXEC."""

    def identity(self, fd: int) -> str:
        """What the fd is: a node's name below /dev (``"vfio/12"``), else the text of its /proc link."""

    def ioctl(self, fd: int, number: int, argument: bytearray | None) -> int:
        """ioctl(2) with a structure that the kernel may read and write."""

    def ioctl_fd(self, fd: int, number: int, argument: bytearray | None, at: int, into: list[int]) -> int:
        """ioctl(2) that answers with an fd, or with none: its result or, with ``at`` >= 0, the int there."""

    def ioctl_value(self, fd: int, number: int, value: int) -> int:
        """ioctl(2) whose third argument is a number."""

    def pread(self, fd: int, buffer: bytearray, offset: int) -> int:
        """pread(2) into all of ``buffer``."""

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2)."""

    def read(self, fd: int, buffer: bytearray) -> int:
        """read(2) into ``buffer``."""

    def write(self, fd: int, data: bytes) -> int:
        """write(2)."""

    def seek_end(self, fd: int) -> int:
        """lseek(2) to the end: the size of what the fd stands for."""

    def mmap(self, fd: int, offset: int, size: int, protection: int, alignment: int) -> int:
        """mmap(2) MAP_SHARED at an address congruent to ``offset`` modulo ``alignment`` (a power of two)."""

    def munmap(self, address: int, size: int) -> int:
        """munmap(2)."""


class KernelSyscalls:
    """The real ones."""

    def open(self, path: str, flags: int, into: list[int]) -> int:
        """open(2)."""
        return _result(lambda: into.extend(map(os.open, (path,), (flags | os.O_CLOEXEC,))))

    def close(self, fd: int) -> int:
        """close(2). Linux frees the number whatever close returns, so it is never tried twice."""
        return _result(lambda: os.close(fd))

    def duplicate(self, fd: int, into: list[int]) -> int:
        """os.dup() sets O_CLOEXEC."""
        return _result(lambda: into.extend(map(os.dup, (fd,))))

    def identity(self, fd: int) -> str:
        """Ask sysfs by device number, because the path that opened a node says nothing (containers, renamed
        nodes).
        """
        try:
            status = os.fstat(fd)
            if stat.S_ISCHR(status.st_mode):
                number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
                for line in Path(f"/sys/dev/char/{number}/uevent").read_text("utf-8").splitlines():
                    if line.startswith("DEVNAME="):
                        return line.removeprefix("DEVNAME=")
            return str(Path(f"/proc/self/fd/{fd}").readlink())
        except OSError:
            return ""

    def ioctl(self, fd: int, number: int, argument: bytearray | None) -> int:
        """ioctl(2) with the GIL released."""
        pointer = ffi.NULL if argument is None else ffi.from_buffer(argument)
        return int(lib.vfiopy_ioctl(fd, number, pointer))

    def ioctl_fd(self, fd: int, number: int, argument: bytearray | None, at: int, into: list[int]) -> int:
        """ioctl(2) with the GIL released. What is negative in ``into`` is no fd, should an interrupt leave it there."""
        pointer = ffi.NULL if argument is None else ffi.from_buffer(argument)
        into.extend(map(lib.vfiopy_ioctl_fd, (fd,), (number,), (pointer,), (at,)))
        if into[-1] >= 0:
            return 0
        result = into.pop()
        return 0 if result == _NO_FD else result

    def ioctl_value(self, fd: int, number: int, value: int) -> int:
        """ioctl(2) with the GIL released."""
        return int(lib.vfiopy_ioctl_value(fd, number, value))

    def pread(self, fd: int, buffer: bytearray, offset: int) -> int:
        """pread(2)."""
        return _result(lambda: os.preadv(fd, [buffer], offset))

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        """pwrite(2)."""
        return _result(lambda: os.pwrite(fd, data, offset))

    def read(self, fd: int, buffer: bytearray) -> int:
        """read(2)."""
        return _result(lambda: os.readv(fd, [buffer]))

    def write(self, fd: int, data: bytes) -> int:
        """write(2)."""
        return _result(lambda: os.write(fd, data))

    def seek_end(self, fd: int) -> int:
        """lseek(2)."""
        return _result(lambda: os.lseek(fd, 0, os.SEEK_END))

    def mmap(self, fd: int, offset: int, size: int, protection: int, alignment: int) -> int:
        """mmap(2) over an aligned reservation, so that the kernel can use huge page-table entries."""
        return int(lib.vfiopy_mmap_aligned(fd, offset, size, protection, alignment))

    def munmap(self, address: int, size: int) -> int:
        """munmap(2)."""
        return int(lib.vfiopy_munmap(address, size))


def _result(call: Callable[[], int | None]) -> int:
    try:
        return call() or 0
    except OSError as error:
        return -(error.errno or errno.EIO)


_REAL: Final[Syscalls] = KernelSyscalls()
_current: list[Syscalls] = [_REAL]


def os_calls() -> Syscalls:
    """Return the system calls in force: the kernel's, or what a test put in their place."""
    return _current[-1]


@contextmanager
def replaced(calls: Syscalls) -> Iterator[Syscalls]:
    """Put ``calls`` in place of the kernel's inside a ``with`` block. For tests; not for threads."""
    _current.append(calls)
    try:
        yield calls
    finally:
        _current.pop()


def restarted(call: Callable[[], int], *also: int) -> int:
    """Run ``call`` again while it says EINTR (or one of ``also``).

    Between two attempts Python runs its signal handlers, so Ctrl-C still works.
    """
    while True:
        result = call()
        if result >= 0 or -result not in (errno.EINTR, *also):
            return result


def address_of(buffer: bytearray) -> int:
    """Virtual address of a buffer, for structures that point at it. Keep it alive over the call."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def dirty_bitmap(size: int, page_size: int) -> bytearray:
    """Room for one bit for each ``page_size`` bytes of ``size``, in whole 64-bit words.

    Raises ValueError for a page size that is not a power of two: type1 counts its zero bits unchecked.
    """
    if page_size <= 0 or page_size & (page_size - 1):
        raise ValueError(f"page size {page_size:#x} is not a power of two")
    pages = (size + page_size - 1) // page_size
    return bytearray((pages + 63) // 64 * 8)
