"""What may be mapped as it is, what is refused, and that a refusal keeps nothing."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

import vfiopy
from vfiopy import AlignmentError, HostMemory, MemoryKindError, Prot
from vfiopy.dma.memory import PAGE_SIZE, file_memory, memory_of


@pytest.fixture
def page():
    with mmap.mmap(-1, 2 * PAGE_SIZE) as area:
        yield area


def test_an_mmap_is_taken_as_it_is(page: mmap.mmap) -> None:
    memory = memory_of(page, Prot.RW)
    assert isinstance(memory, HostMemory)
    assert (memory.size, memory.writable) == (2 * PAGE_SIZE, True)
    assert memory.address % PAGE_SIZE == 0
    memory.owner.release()


def test_a_page_aligned_slice_is_taken(page: mmap.mmap) -> None:
    with memoryview(page) as whole, whole[PAGE_SIZE:] as half:
        memory = memory_of(half, Prot.RW)
        assert memory.size == PAGE_SIZE
        memory.owner.release()


@pytest.mark.parametrize("data", [b"x" * PAGE_SIZE, "text"])
def test_immutable_objects_are_refused_with_the_way_that_works(data: object) -> None:
    with pytest.raises(MemoryKindError, match=r"immutable .*\n.*allocate\(\).*bounce\(\)") as caught:
        memory_of(data, Prot.READ)
    assert isinstance(caught.value, TypeError)


def test_what_has_no_buffer_is_refused() -> None:
    with pytest.raises(MemoryKindError, match="int object: this object has no buffer"):
        memory_of(5, Prot.READ)


@pytest.mark.parametrize(("offset", "size"), [(8, PAGE_SIZE), (0, PAGE_SIZE - 8), (0, 0)])
def test_half_pages_are_refused(page: mmap.mmap, offset: int, size: int) -> None:
    with (
        memoryview(page) as whole,
        whole[offset : offset + size] as part,
        pytest.raises(AlignmentError, match="not whole pages of 4096 bytes; the rest of its first or last page"),
    ):
        memory_of(part, Prot.RW)


def test_strided_arrays_are_refused() -> None:
    with pytest.raises(MemoryKindError, match="not contiguous"):
        memory_of(np.zeros((64, 128), dtype="u1")[:, ::2], Prot.RW)


def test_read_only_memory_may_be_read_but_not_written() -> None:
    with mmap.mmap(-1, PAGE_SIZE, prot=mmap.PROT_READ) as area:
        with pytest.raises(MemoryKindError, match=r"read-only, but the device is to be given write access\n.*READ"):
            memory_of(area, Prot.RW)
        memory_of(area, Prot.READ).owner.release()


def test_memfd_ranges(tmp_path: object) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 * PAGE_SIZE)
    with mmap.mmap(fd, 2 * PAGE_SIZE, offset=PAGE_SIZE) as area:
        memory = file_memory(fd, 2 * PAGE_SIZE, offset=PAGE_SIZE, mapped=area)
        assert memory.address
        assert memory.fd != fd
        assert not os.get_inheritable(memory.fd)
        with pytest.raises(AlignmentError, match="the mapping has 0x2000 bytes, the range 0x1000"):
            file_memory(fd, PAGE_SIZE, mapped=area)
        duplicate = memory.fd
        del memory
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(duplicate)
    for kwargs, text in [
        ({"size": 5 * PAGE_SIZE}, "the file ends at 0x4000\n.*ftruncate"),
        ({"size": 100}, "size 0x64 is not a multiple of the page size 0x1000\n.*0x1000"),
        ({"size": PAGE_SIZE, "offset": 1}, "file offset 0x1 is not"),
    ]:
        with pytest.raises(AlignmentError, match=text):
            file_memory(fd, **kwargs)
    os.close(fd)


def test_a_refused_map_does_not_keep_the_buffer_exported(page: mmap.mmap) -> None:
    with vfiopy.open("emulated:edu") as device:
        first = device.dma.map(page)
        with mmap.mmap(-1, PAGE_SIZE) as other:
            with pytest.raises(vfiopy.OverlapError) as caught:
                device.dma.map(other, iova=first.iova)
            # the traceback is alive, and yet the buffer can be closed
            other.close()
        assert str(caught.value)
        first.unmap()
        page.resize(PAGE_SIZE)
