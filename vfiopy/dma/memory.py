"""From what a user has in hand to a :class:`~vfiopy.backend.Memory` that a mapper can take.

A device's DMA works on whole pages. So what is mapped must *own* its pages: a buffer that starts or ends inside a
page would hand the rest of that page, with whatever else lives there, to the device. Such buffers are refused here.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from vfiopy.backend import Area, DeviceWindow, FileMemory, HostMemory, Memory, Prot, RemoteMemory
from vfiopy.errors import AddressRangeError, AlignmentError, MemoryKindError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["PAGE_SIZE", "OwnedFd", "file_memory", "let_go", "memory_of", "page_range", "round_to_pages"]

PAGE_SIZE = mmap.PAGESIZE
_READY = (HostMemory, FileMemory, DeviceWindow, RemoteMemory)


def page_range(name: str, whole: int, offset: int, size: int | None) -> Area:
    """Return the part of something of ``whole`` bytes that is meant; ``size`` None is the rest.

    Raises:
        AlignmentError: it is not whole pages.
        AddressRangeError: it is not inside.
    """
    length = whole - offset if size is None else size
    if offset % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
        raise AlignmentError(
            f"{length:#x} bytes at offset {offset:#x} are not whole pages of {PAGE_SIZE:#x} bytes", object=name
        )
    if offset < 0 or offset + length > whole:
        raise AddressRangeError(
            f"{length:#x} bytes at offset {offset:#x} reach beyond its {whole:#x} bytes", object=name
        )
    return Area(offset, length)


def round_to_pages(size: int, page: int = PAGE_SIZE) -> int:
    """Round a size in bytes up to whole pages."""
    return (size + page - 1) & ~(page - 1)


class OwnedFd:
    """A duplicate of a caller's fd, so that closing the original does not pull it away under a mapping."""

    def __init__(self, fd: int) -> None:
        self.fd = os.dup(fd)  # dup() of Python sets O_CLOEXEC

    def close(self) -> None:
        """Close it now, where nothing was mapped and a traceback would keep this object. Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)


def file_memory(fd: int, size: int, *, offset: int = 0, writable: bool = True, mapped: Any = None) -> FileMemory:
    """Describe a range of a memfd.

    Args:
        fd: the memfd; duplicated, so the caller may close it.
        size: bytes, a multiple of the page size.
        offset: bytes from the start of the file, a multiple of the page size.
        writable: whether a device may be given write access. The kernel checks neither the fd's mode nor its seals
            (linux/iommufd.h, IOMMU_IOAS_MAP_FILE), so this is the only guard there is.
        mapped: the mapping of that very range in this process (an ``mmap.mmap`` for instance), for mappers that need
            an address (VFIO type1) and for devices that are software.

    Raises:
        AlignmentError: offset or size is not a whole number of pages, or the range ends beyond the file.
        MemoryKindError: no memfd (or file of tmpfs or hugetlbfs): iommufd would take it, and refuse the next device.
    """
    _check_pages("file offset", offset)
    _check_pages("size", size)
    _check_memfd(fd)
    end = os.fstat(fd).st_size
    if offset + size > end:
        raise AlignmentError(
            f"bytes {offset:#x} to {offset + size:#x} are asked for, but the file ends at {end:#x}",
            object=f"fd {fd}",
            hint="grow the memfd with os.ftruncate() first",
        )
    address = 0
    if mapped is not None:
        view = np.frombuffer(mapped, dtype=np.uint8)
        if view.nbytes != size:
            raise AlignmentError(
                f"the mapping has {view.nbytes:#x} bytes, the range {size:#x}",
                object=f"fd {fd}",
                hint="pass the mapping of exactly this range of the file",
            )
        address = _address(view)
        _check_pages("address", address)
    owned = OwnedFd(fd)
    return FileMemory(owned.fd, offset, size, writable, address, (owned, mapped))


def _check_memfd(fd: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)  # only memory that is a file has any (fcntl(2))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise MemoryKindError(
            "it is not a memfd, nor a file of tmpfs or hugetlbfs",
            object=f"fd {fd}",
            hint="copy the data into a memfd; a dma-buf of a BAR goes in with space.import_dmabuf(DmaBuf.adopt(fd))",
        ) from None


def memory_of(thing: Memory | Buffer, prot: Prot) -> Memory:
    """Turn a buffer into :class:`HostMemory`; a ready ``Memory`` goes through, checked against ``prot``.

    Accepts whatever has the buffer protocol and is contiguous: an ``mmap.mmap``, a numpy array, a ``bytearray`` that
    happens to be page-aligned. The buffer stays exported (it cannot be resized or closed) for as long as it is mapped.

    Raises:
        MemoryKindError: ``bytes`` or another immutable object; a read-only buffer with ``Prot.WRITE``.
        AlignmentError: start or size is not a whole number of pages.
    """
    memory = thing if isinstance(thing, _READY) else _host_memory(thing)
    if Prot.WRITE in prot and not memory.writable:
        if memory is not thing:
            let_go(memory)
        raise MemoryKindError(
            "the memory is read-only, but the device is to be given write access",
            object=_describe(thing),
            hint="pass prot=Prot.READ, or memory that is writable",
        )
    return memory


def _host_memory(thing: Buffer) -> HostMemory:
    if isinstance(thing, bytes | str):
        raise MemoryKindError(
            "immutable objects share their pages with other Python objects, which a device must not reach",
            object=_describe(thing),
            hint="use allocate() and copy the data in, or bounce() for a one-shot copy",
        )
    try:
        view = memoryview(thing)
    except TypeError:
        raise MemoryKindError(
            "this object has no buffer that could be mapped",
            object=_describe(thing),
            hint="pass an mmap, a page-aligned numpy array, file_memory(), or use allocate()",
        ) from None
    if not view.c_contiguous:
        view.release()
        raise MemoryKindError(
            "the buffer is not contiguous in memory",
            object=_describe(thing),
            hint="use allocate() and copy the data in",
        )
    size = view.nbytes
    address = _address(np.frombuffer(view, dtype=np.uint8)) if size else 0
    if address % PAGE_SIZE or size % PAGE_SIZE or not size:
        view.release()
        raise AlignmentError(
            f"the buffer covers {address:#x} to {address + size:#x}, not whole pages of {PAGE_SIZE} bytes; "
            "the rest of its first or last page holds other data that the device would reach",
            object=_describe(thing),
            hint="use allocate(), or bounce() for a one-shot copy",
        )
    return HostMemory(address, size, not view.readonly, view)


def let_go(memory: Memory) -> None:
    """Give a buffer back that :func:`memory_of` exported and nobody mapped.

    Without this the traceback of the failure would keep it exported, and the caller could not close it.
    """
    if isinstance(memory.owner, memoryview):
        memory.owner.release()


def _address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _check_pages(what: str, value: int) -> None:
    if value % PAGE_SIZE or value < 0:
        raise AlignmentError(
            f"{what} {value:#x} is not a multiple of the page size {PAGE_SIZE:#x}",
            hint=f"the next multiple is {round_to_pages(value):#x}",
        )


def _describe(thing: object) -> str:
    return f"{type(thing).__name__} object"
