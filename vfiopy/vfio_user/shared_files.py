"""Files that a client passes as its memory: each mapped once, however often it is passed.

A client with an IOMMU of its own sends one DMA_MAP with a fresh fd for each page of 4 KiB: 16,384 of them for 64 MiB. A
file is known by its device and inode, mapped whole and once, and the fds are closed.

A file that its owner can make shorter would end this process by SIGBUS in the middle of an access. So only files that
are sealed against that are mapped; others are read and written by ``pread`` and ``pwrite``.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import weakref
from typing import Final

from vfiopy.backend import HostMemory, RemoteMemory
from vfiopy.errors import VfioError
from vfiopy.file_window import FileWindow

__all__ = ["SharedFiles"]

_LARGEST: Final = 1 << 46  # bytes; a sparse file may be of any size
_PAGE: Final = mmap.PAGESIZE


class SharedFiles:
    """The files of one client.

    Threads: one at a time.

    Args:
        trusted: map files that are not sealed too. The client can then end this process.
    """

    def __init__(self, *, trusted: bool = False) -> None:
        self._trusted = trusted
        self._windows: weakref.WeakValueDictionary[tuple[int, int, bool], FileWindow] = weakref.WeakValueDictionary()
        self._kept: weakref.WeakValueDictionary[tuple[int, int, bool], _KeptFile] = weakref.WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._windows) + len(self._kept)

    def memory(self, fd: int, offset: int, size: int, *, writable: bool, by_calls: bool) -> HostMemory | RemoteMemory:
        """Return what reaches a range of the file; ``fd`` may be closed afterwards.

        Args:
            fd: as received.
            offset: bytes from the file's start, whole pages.
            size: bytes, whole pages.
            writable: for writing too.
            by_calls: do not map it, whatever it is.

        Raises:
            VfioError: (EINVAL) no plain file, or the range is not inside of it; (EACCES) not open for that;
                (ENOMEM) it cannot be mapped.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise VfioError("memory is passed as a plain file (a memfd), and this is none", errno=errno.EINVAL)
        if offset + size > status.st_size or status.st_size > _LARGEST:
            raise VfioError(
                f"bytes {offset:#x} to {offset + size:#x} are not inside of a file of {status.st_size:#x} bytes",
                errno=errno.EINVAL,
            )
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if mode == os.O_WRONLY or (writable and mode != os.O_RDWR):
            raise VfioError("the file is not open for what the device may do with it", errno=errno.EACCES)
        key = (status.st_dev, status.st_ino, writable)
        if by_calls or not (self._trusted or _is_sealed(fd)):
            return _FileCalls(self._keep(key, fd), offset, size, writable)
        window = self._window(key, fd, status.st_size & -_PAGE)
        return HostMemory(window.address + offset, size, writable, window)

    def _window(self, key: tuple[int, int, bool], fd: int, size: int) -> FileWindow:
        window = self._windows.get(key)
        if window is None or window.size < size:  # it may have grown: who has the old window keeps it
            window = self._windows[key] = FileWindow(fd, 0, size, writable=key[2], inherit=False)
        return window

    def _keep(self, key: tuple[int, int, bool], fd: int) -> _KeptFile:
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _KeptFile(fd)
        return kept


def _is_sealed(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # of a file system without seals
        return False


class _KeptFile:
    """A duplicate of an fd, closed with its last user."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)
        weakref.finalize(self, os.close, self.fd).atexit = False


class _FileCalls(RemoteMemory):
    """A range of a file that is not mapped."""

    def __init__(self, file: _KeptFile, offset: int, size: int, writable: bool) -> None:
        super().__init__(size, writable)
        self._file = file
        self._offset = offset

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes."""
        data = b""
        while len(data) < size:
            try:
                piece = os.pread(self._file.fd, size - len(data), self._offset + offset + len(data))
            except OSError as error:
                raise VfioError("the client's file cannot be read", errno=error.errno, call="pread") from error
            if not piece:
                raise VfioError("the client's file has become shorter", errno=errno.EFAULT, call="pread")
            data += piece
        return data

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Write bytes."""
        done = 0
        while done < len(data):
            try:
                done += os.pwrite(self._file.fd, memoryview(data)[done:], self._offset + offset + done)
            except OSError as error:
                raise VfioError("the client's file cannot be written", errno=error.errno, call="pwrite") from error
