"""Mapped memory as software sees it that stands in a device's place: views of any kind of memory, for a moment."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from vfiopy.backend import DeviceWindow, FileMemory, Prot, RemoteMemory
from vfiopy.errors import MemoryKindError, VfioError
from vfiopy.mmio import Region

__all__ = ["LostMemoryError", "view_of"]


class LostMemoryError(VfioError):
    """Memory that is somebody else's stopped answering while it was written."""


def view_of(address: int, length: int, memory: object, prot: Prot) -> AbstractContextManager[memoryview]:
    """Give a view of a part of a mapping that ends with the block.

    Of a BAR and of remote memory the view is a copy, which goes back at the end of the block.

    Args:
        address: of the part; where the memory has none in this process, the offset of the part in it.
        length: bytes.
        memory: what is mapped.
        prot: read-only without WRITE.

    Raises:
        MemoryKindError: a BAR that is not mapped here.
        LostMemoryError: at the end of the block, what was written did not get where it belongs.
        VfioError: it cannot be read.
    """
    if isinstance(memory, RemoteMemory):
        return _remote_view(memory, address, length, prot)
    if isinstance(memory, DeviceWindow):
        if not memory.address:
            raise MemoryKindError(
                "a BAR that this process has not mapped is out of reach for a device that is software"
            )
        return _bar_view(address, length, prot)
    if isinstance(memory, FileMemory) and not memory.address:
        return _file_view(memory.fd, memory.offset + address, length, prot)
    return _memory_view(address, length, prot)


@contextmanager
def _memory_view(address: int, length: int, prot: Prot) -> Iterator[memoryview]:
    whole = memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
    with whole if Prot.WRITE in prot else whole.toreadonly() as view:
        yield view


@contextmanager
def _file_view(fd: int, offset: int, length: int, prot: Prot) -> Iterator[memoryview]:
    skip = offset % mmap.ALLOCATIONGRANULARITY
    access = mmap.ACCESS_WRITE if Prot.WRITE in prot else mmap.ACCESS_READ
    with (
        mmap.mmap(fd, skip + length, access=access, offset=offset - skip) as mapped,
        memoryview(mapped) as whole,
        whole[skip:] as view,
    ):
        yield view


@contextmanager
def _bar_view(address: int, length: int, prot: Prot) -> Iterator[memoryview]:
    """Copy to and fro: registers take accesses of a width, and a BAR that goes away must not end the process."""
    width = 4 if address % 4 == length % 4 == 0 else 1
    skip = address % 8  # a region wants offsets and addresses aligned alike
    region = Region("peer's BAR", skip + length, [(skip, address, length)])
    try:
        reads = Prot.READ in prot
        copy = bytearray(region.read_block(skip, length // width, width)) if reads else bytearray(length)
        with memoryview(copy) as whole:
            yield whole if Prot.WRITE in prot else whole.toreadonly()
        if Prot.WRITE in prot:
            _write_back(region, skip, copy, width)
    finally:
        region.close()


def _write_back(region: Region, offset: int, data: bytearray, width: int) -> None:
    try:
        region.write_block(offset, data, width)
    except VfioError as error:
        raise LostMemoryError(error.meaning) from error


@contextmanager
def _remote_view(memory: RemoteMemory, offset: int, length: int, prot: Prot) -> Iterator[memoryview]:
    copy = bytearray(memory.read(offset, length)) if Prot.READ in prot else bytearray(length)
    with memoryview(copy) as whole:
        yield whole if Prot.WRITE in prot else whole.toreadonly()
    if Prot.WRITE in prot:
        try:
            memory.write(offset, copy)
        except VfioError as error:
            raise LostMemoryError(error.meaning) from error
