"""What a namespace keeps its data in: an image file, or memory. To the kernel both are files, sparse where empty."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from vfiopy.errors import BusyError, VfioError

__all__ = ["Backing"]

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10  # linux/falloc.h
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_MOST_VIEWS = 1024  # IOV_MAX
_ZEROES = bytes(1 << 16)


class _File:
    """A descriptor that is closed with the last reference: while a call uses it, its number is nobody else's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        weakref.finalize(self, os.close, fd)


class Backing:
    """A file of fixed size, read and written at byte offsets.

    Threads: any; the kernel serialises.

    Args:
        fd: the file, which is closed with this object.
        size: bytes.
        name: for messages.
        read_only: it is never written.
    """

    def __init__(self, fd: int, size: int, name: str, *, read_only: bool = False) -> None:
        self._file: _File | None = _File(fd)
        self.size = size
        self.name = name
        self.read_only = read_only

    @classmethod
    def memory(cls, size: int) -> Backing:
        """Take memory of this process, zeroed; pages are allocated when they are written."""
        fd = os.memfd_create("vfiopy-nvme", os.MFD_CLOEXEC)
        try:
            _lengthen(fd, size, "memory")
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, size, "memory")

    @classmethod
    def image(cls, path: str | os.PathLike[str], *, size: int | None = None, read_only: bool = False) -> Backing:
        """Open an image file or a block device, locked against others who lock (flock).

        Args:
            path: of the file.
            size: bytes; a file that does not exist is made so long, sparse. None: it has to exist.
            read_only: open it so; several may then share it.

        Raises:
            BusyError: somebody else serves it.
            VfioError: it cannot be opened, or has another size.
        """
        name = os.fspath(path)
        fd, made = _opened(name, read_only=read_only, make=size is not None and not read_only)
        try:
            _lock(fd, name, shared=read_only)
            return cls(fd, _sized(fd, name, size), name, read_only=read_only)
        except BaseException:
            os.close(fd)
            if made:
                Path(name).unlink()
            raise

    def close(self) -> None:
        """Close the file, once what is reading and writing it has ended. Idempotent."""
        self._file = None

    @property
    def closed(self) -> bool:
        """It was closed."""
        return self._file is None

    def _opened(self) -> _File:
        file = self._file
        if file is None:
            raise OSError(errno.EBADF, "the image is closed")
        return file

    @property
    def fd(self) -> int:
        """The file; raises OSError where it is closed."""
        return self._opened().fd

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill the views, in order.

        Raises:
            OSError: EIO where the file ends before, and whatever the kernel says.
        """
        file = self._opened()
        _transfer(os.preadv, file.fd, views, offset)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write what the views show, in order; raises as :meth:`read` does."""
        file = self._opened()
        _transfer(os.pwritev, file.fd, views, offset)

    def zero(self, offset: int, size: int, *, deallocate: bool) -> None:
        """Have a range read as zeroes, and give its space up if asked and if the file system can.

        Raises:
            OSError: whatever the kernel says.
        """
        file = self._opened()
        mode = _KEEP_SIZE | (_PUNCH_HOLE if deallocate else _ZERO_RANGE)
        if not size or _fallocate(file.fd, mode, offset, size):
            return
        end = offset + size
        for start in range(offset, end, len(_ZEROES)):
            with memoryview(_ZEROES)[: min(len(_ZEROES), end - start)] as view:
                self.write([view], start)

    def discard(self, offset: int, size: int) -> None:
        """Give a range's space up, if the file system can: it reads as zeroes then, and else as before.

        Raises:
            OSError: whatever the kernel says.
        """
        file = self._opened()
        if size:
            _fallocate(file.fd, _KEEP_SIZE | _PUNCH_HOLE, offset, size)

    def sync(self) -> None:
        """Have the data on the disk; raises OSError."""
        file = self._opened()
        if not self.read_only:
            os.fdatasync(file.fd)


def _opened(name: str, *, read_only: bool, make: bool) -> tuple[int, bool]:
    """Open an image; whether it was made. O_NONBLOCK: a FIFO is refused, and not waited for."""
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            return os.open(name, flags), False
        except FileNotFoundError:
            if not make:
                raise
        return os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o644), True
    except OSError as error:
        hint = ""
        if error.errno == errno.ENOENT and not make:
            hint = "leave read-only out to have it made" if read_only else "give a size to have it made"
        raise VfioError("the image cannot be opened", errno=error.errno, object=name, call="open", hint=hint) from error


def _lock(fd: int, name: str, *, shared: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            "the image is in use by another process",
            object=name,
            hint="end that one, or open the image read-only in both",
        ) from None
    except OSError as error:
        raise VfioError(
            "the image cannot be locked", errno=error.errno, object=name, call="flock", hint="have it on a local disk"
        ) from error


def _lengthen(fd: int, size: int, name: str) -> None:
    try:
        os.ftruncate(fd, size)
    except (OSError, OverflowError) as error:
        number = error.errno if isinstance(error, OSError) else errno.EFBIG
        raise VfioError(f"{size} bytes cannot be had", errno=number, object=name, call="ftruncate") from error


def _sized(fd: int, name: str, size: int | None) -> int:
    status = os.fstat(fd)
    found = os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else status.st_size
    if not stat.S_ISBLK(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise VfioError("an image is a file or a block device", errno=errno.EINVAL, object=name)
    if size is not None and not found and stat.S_ISREG(status.st_mode):
        _lengthen(fd, size, name)
        return size
    if size is not None and size != found:
        raise VfioError(
            f"the image has {found} bytes, not {size}", errno=errno.EINVAL, object=name, hint="leave the size out"
        )
    return found


def _transfer(call: Callable[[int, list[memoryview], int], int], fd: int, views: Sequence[memoryview], at: int) -> None:
    pending, first = list(views), 0
    while first < len(pending):
        done = call(fd, pending[first : first + _MOST_VIEWS], at)
        if not done:
            raise OSError(errno.EIO, "the image is shorter than it was")
        at += done
        while first < len(pending) and done >= len(pending[first]):
            done -= len(pending[first])
            first += 1
        if done:
            pending[first] = pending[first][done:]


@cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int, offset: int, size: int) -> bool:
    """Call fallocate(2), which Python does not have with a mode; whether the file system can do it."""
    number = errno.EINTR
    while number == errno.EINTR:  # a signal of somebody else's
        if not _libc().fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(size)):
            return True
        number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number))
