"""dma-bufs from memory, their CPU access, and sync files, against the real kernel."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from ioctl_support import PAGE

from vfiopy.errors import NotSupportedError, VfioError, WrongFdError
from vfiopy.kernel import Iommufd
from vfiopy.kernel.ioctl import DmaBufFd, DmaHeapFd, MemfdPart, SyncAccess, SyncFileFd, UdmabufFd
from vfiopy.kernel.ioctl._call import os_calls

RW = mmap.PROT_READ | mmap.PROT_WRITE
SW_SYNC = Path("/sys/kernel/debug/sync/sw_sync")
SW_SYNC_CREATE_FENCE, SW_SYNC_INC = 0xC0285700, 0x40045701


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    yield fd
    os.close(fd)


@pytest.fixture
def udmabuf() -> Iterator[UdmabufFd]:
    with UdmabufFd.open("/dev/udmabuf") as node:
        yield node


def test_memory_of_a_memfd_as_a_dma_buf(udmabuf: UdmabufFd, memfd: int) -> None:
    os.pwrite(memfd, b"first", 0)
    os.pwrite(memfd, b"third", 2 * PAGE)
    with udmabuf.create(MemfdPart(memfd, 0, 4 * PAGE)) as buffer:
        assert buffer.size == 4 * PAGE
        assert not os.get_inheritable(buffer.fileno())
        address = buffer.map(0, 4 * PAGE, RW)
        try:
            buffer.sync_start(SyncAccess.RW)
            assert ctypes.string_at(address, 5) == b"first"
            ctypes.memmove(address + PAGE, b"second", 6)
            buffer.sync_end(SyncAccess.RW)
        finally:
            assert os_calls().munmap(address, 4 * PAGE) == 0
        assert os.pread(memfd, 6, PAGE) == b"second"
        with pytest.raises(OSError, match="busy"):  # held by the dma-buf
            fcntl.fcntl(memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    parts = [MemfdPart(memfd, 2 * PAGE, PAGE), MemfdPart(memfd, 0, PAGE)]
    with udmabuf.create_list(parts) as buffer:
        assert buffer.size == 2 * PAGE
        address = buffer.map(0, 2 * PAGE, mmap.PROT_READ)
        try:
            assert ctypes.string_at(address, 5) == b"third"
            assert ctypes.string_at(address + PAGE, 5) == b"first"
        finally:
            os_calls().munmap(address, 2 * PAGE)
        with pytest.raises(NotSupportedError, match="goes past the end"):
            buffer.map(0, 3 * PAGE, RW)


def test_udmabuf_refusals(udmabuf: UdmabufFd, memfd: int) -> None:
    for part in ((memfd, 1, PAGE), (memfd, 0, 100), (memfd, 0, 0), (memfd, 4 * PAGE, PAGE)):
        with pytest.raises(VfioError, match="range must be whole pages"):
            udmabuf.create(MemfdPart(*part))
    unsealed = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    try:
        os.ftruncate(unsealed, PAGE)
        with pytest.raises(VfioError, match="sealed with F_SEAL_SHRINK"):
            udmabuf.create(MemfdPart(unsealed, 0, PAGE))
    finally:
        os.close(unsealed)
    with open(os.devnull, "rb") as null, pytest.raises(WrongFdError, match="not a memfd"):  # noqa: PTH123
        udmabuf.create(MemfdPart(null.fileno(), 0, PAGE))


def test_a_heap(tmp_path: Path) -> None:
    with DmaHeapFd.open("system") as heap:
        with pytest.raises(VfioError, match="at least one byte"):
            heap.alloc(0)
        with heap.alloc(3 * PAGE + 1) as buffer:
            assert buffer.size == 4 * PAGE
            address = buffer.map(0, 4 * PAGE, RW)
            try:
                for access in SyncAccess.READ, SyncAccess.WRITE, SyncAccess.RW:
                    buffer.sync_start(access)
                    ctypes.memset(address, access, PAGE)
                    buffer.sync_end(access)
                assert ctypes.string_at(address, 1) == b"\3"
            finally:
                os_calls().munmap(address, 4 * PAGE)
            with pytest.raises(VfioError, match="neither read nor write access was named"):
                buffer.sync_start(SyncAccess(0))
    with pytest.raises(NotSupportedError, match="there is no such heap"):
        DmaHeapFd.open("no-such-heap")


def test_names(udmabuf: UdmabufFd, memfd: int) -> None:
    with udmabuf.create(MemfdPart(memfd, 0, PAGE)) as buffer:
        buffer.set_name("ring buffer")
        assert "name:\tring buffer" in Path(f"/proc/self/fdinfo/{buffer.fileno()}").read_text()
        assert buffer.identity() == "/dmabuf:ring buffer"
        with DmaBufFd.adopt(buffer.fileno()) as copy:
            assert copy.size == PAGE
        with pytest.raises(ValueError, match="longer than 31 bytes"):
            buffer.set_name("n" * 32)


def test_iommufd_takes_neither_udmabuf_nor_heap(udmabuf: UdmabufFd, memfd: int) -> None:
    with Iommufd() as iommufd, DmaHeapFd.open("system") as heap:
        ioas = iommufd.ioas()
        for buffer in (udmabuf.create(MemfdPart(memfd, 0, PAGE)), heap.alloc(PAGE)):
            with buffer, pytest.raises(NotSupportedError, match="takes only those that vfio-pci exports") as caught:
                ioas.map_file(buffer.fileno(), 0, PAGE)
            assert "map its memfd" in caught.value.hint


# --- sync files -------------------------------------------------------------------------------------------------


class Timeline:
    """A software timeline of the kernel's sw_sync: fences that signal when it is advanced."""

    def __init__(self) -> None:
        self.fd = os.open(SW_SYNC, os.O_RDWR | os.O_CLOEXEC)

    def fence(self, value: int, name: bytes = b"fence") -> SyncFileFd:
        argument = bytearray(struct.pack("=I32si", value, name, -1))
        fcntl.ioctl(self.fd, SW_SYNC_CREATE_FENCE, argument)
        return SyncFileFd(struct.unpack_from("=i", argument, 36)[0], name.decode())

    def advance(self, by: int) -> None:
        fcntl.ioctl(self.fd, SW_SYNC_INC, struct.pack("=I", by))

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def timeline() -> Iterator[Timeline]:
    timeline = Timeline()
    yield timeline
    timeline.close()


def test_fences(timeline: Timeline) -> None:
    with timeline.fence(1, b"one") as first, timeline.fence(2, b"two") as second:
        with first.merge(second, "both") as both:
            info = both.file_info()
            assert info.name == "both"
            assert info.status == 0
            assert len(info.fences) in (1, 2)  # fences of one timeline are merged into the later
            assert info.fences[0].driver_name == "sw_sync"
            assert not both.wait(0.01)
            timeline.advance(1)
            assert first.wait(1)
            assert first.file_info().status == 1
            assert not both.wait(0.01)
            both.set_deadline(0)
            timeline.advance(1)
            assert both.wait(1)
            assert all(fence.timestamp_ns > 0 for fence in both.file_info().fences)
        with open(os.devnull, "rb") as null:  # noqa: PTH123
            impostor = SyncFileFd(os.dup(null.fileno()), "null")
            with impostor, pytest.raises(WrongFdError, match="the second fd is not a sync file"):
                first.merge(impostor)


def test_fences_of_a_dma_buf(timeline: Timeline, udmabuf: UdmabufFd, memfd: int) -> None:
    with udmabuf.create(MemfdPart(memfd, 0, PAGE)) as buffer, timeline.fence(1) as fence:
        with buffer.export_sync_file(SyncAccess.RW) as before:
            assert before.wait(0)
        buffer.import_sync_file(fence, SyncAccess.WRITE)
        with buffer.export_sync_file(SyncAccess.READ) as exported:
            assert not exported.wait(0.01)
            timeline.advance(1)
            assert exported.wait(1)
        with pytest.raises(VfioError):
            buffer.export_sync_file(SyncAccess(0))
