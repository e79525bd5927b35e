"""What no emulated IOMMU can do, on iommufd's own mock: nesting, dirty tracking, faults, vIOMMUs, revocable dma-bufs.

Op numbers and structures are those of drivers/iommu/iommufd/iommufd_test.h, which is not part of the UAPI.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from ioctl_support import PAGE, Memory

from vfiopy import uapi
from vfiopy.backend import Prot
from vfiopy.errors import (
    BusyError,
    MemoryKindError,
    NotSupportedError,
    OverlapError,
    PinnedError,
    RevokedError,
    VfioError,
)
from vfiopy.kernel.ioctl import DmaBufFd, IommufdFd
from vfiopy.kernel.ioctl._call import os_calls

IOMMU_TEST_CMD = 0x3BA0
MOCK_DOMAIN, CREATE_ACCESS, ACCESS_PAGES, MOCK_REPLACE, DIRTY = 2, 5, 7, 10, 13
TRIGGER_IOPF, TRIGGER_VEVENT, DMABUF_GET, DMABUF_REVOKE = 15, 17, 22, 23
SELFTEST_DATA, SELFTEST = 0xDEAD, 0xDEADBEEF
VEVENTQ_SELFTEST = 0xBEEFBEEF
APERTURE = 1 << 24
MOCK_PAGE = 2048


class Mock(IommufdFd):
    """An iommufd with the mock's ioctl."""

    def test(self, op: int, object_id: int = 0, payload: bytes = b"") -> bytearray:
        argument = bytearray(struct.pack("=4I", 72, op, object_id, 0) + payload.ljust(56, b"\0"))
        result = self._ioctl("IOMMU_TEST_CMD", IOMMU_TEST_CMD, argument, f"op {op}")
        return bytearray(result.to_bytes(4, "little")) + argument[16:]

    def device(self, ioas: int) -> tuple[int, int, int]:
        """Make a mock device: ids of device, HWPT and the bound object."""
        answer = self.test(MOCK_DOMAIN, ioas)
        standard, hwpt, bound = struct.unpack_from("=3I", answer, 4)
        return standard, hwpt, bound


@pytest.fixture
def mock() -> Iterator[Mock]:
    with Mock.open("/dev/iommu") as mock:
        yield mock


@pytest.fixture
def memory() -> Iterator[Memory]:
    with Memory(64 * PAGE) as memory:
        yield memory


def test_hw_info(mock: Mock) -> None:
    _, _, device = mock.device(mock.ioas_alloc())
    info = mock.get_hw_info(device)
    assert info.type == 0xFEEDBEEF
    assert struct.unpack("=II", info.data)[1] == 0xDEADBEEF
    assert info.capabilities & uapi.IOMMU_HW_CAP_DIRTY_TRACKING


def test_auto_iova_and_small_alignment(mock: Mock, memory: Memory) -> None:
    ioas = mock.ioas_alloc()
    mock.device(ioas)
    ranges, alignment = mock.ioas_iova_ranges(ioas)
    assert alignment == MOCK_PAGE
    assert ranges == ((APERTURE, (1 << 31) - 1),)
    iova = mock.ioas_map(ioas, memory.address, 3 * MOCK_PAGE, Prot.RW)
    assert iova >= APERTURE
    assert mock.ioas_unmap(ioas, iova, 3 * MOCK_PAGE) == 3 * MOCK_PAGE


def test_dirty_tracking(mock: Mock, memory: Memory) -> None:
    ioas = mock.ioas_alloc()
    mock.set_option(uapi.IOMMU_OPTION_HUGE_PAGES, 0, ioas)  # a big page is dirty as a whole
    standard, _, device = mock.device(ioas)
    hwpt = mock.hwpt_alloc(device, ioas, uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING)
    mock.test(MOCK_REPLACE, standard, struct.pack("=I", hwpt))
    iova = mock.ioas_map(ioas, memory.address, memory.size, Prot.RW)
    mock.hwpt_set_dirty_tracking(hwpt, True)
    pages = memory.size // PAGE
    marks = bytearray(pages // 8)
    for page in (0, 5, 33, pages - 1):
        marks[page // 8] |= 1 << page % 8
    # op DIRTY: flags, iova, length, page size, bitmap, out count
    from vfiopy.kernel.ioctl._call import address_of  # noqa: PLC0415

    payload = struct.pack("=I4x5Q", 0, iova, memory.size, PAGE, address_of(marks), 0)
    answer = mock.test(DIRTY, hwpt, payload)
    assert struct.unpack_from("=Q", answer, 4 + 40)[0] == 4
    assert mock.hwpt_get_dirty_bitmap(hwpt, iova, memory.size, PAGE, clear=False) == marks
    assert mock.hwpt_get_dirty_bitmap(hwpt, iova, memory.size, PAGE) == marks
    assert not any(mock.hwpt_get_dirty_bitmap(hwpt, iova, memory.size, PAGE))
    mock.hwpt_set_dirty_tracking(hwpt, False)


@pytest.fixture
def nest(mock: Mock) -> tuple[int, int, int, int]:
    """IOAS, mock device, its bound id, and a nesting parent."""
    ioas = mock.ioas_alloc()
    standard, _, device = mock.device(ioas)
    return ioas, standard, device, mock.hwpt_alloc(device, ioas, uapi.IOMMU_HWPT_ALLOC_NEST_PARENT)


def selftest_hwpt() -> bytes:
    return struct.pack("=II", 0xBADBEEF, 0)


def test_nesting_and_invalidation(mock: Mock, nest: tuple[int, int, int, int]) -> None:
    ioas, standard, device, parent = nest
    child = mock.hwpt_alloc(device, parent, data_type=SELFTEST_DATA, data=selftest_hwpt())
    with pytest.raises(VfioError, match="parent does not exist or is not what"):
        mock.hwpt_alloc(device, child, data_type=SELFTEST_DATA, data=selftest_hwpt())
    mock.hwpt_invalidate(child, SELFTEST, [])
    mock.hwpt_invalidate(child, SELFTEST, [struct.pack("=II", 0, 1), struct.pack("=II", 1, 0)])
    with pytest.raises(VfioError, match="1 of 3 requests done"):
        mock.hwpt_invalidate(child, SELFTEST, [struct.pack("=II", 0, n) for n in (1, 99, 2)])
    with pytest.raises(BusyError):
        mock.destroy(parent)
    mock.test(MOCK_REPLACE, standard, struct.pack("=I", child))
    with pytest.raises(BusyError):
        mock.destroy(child)
    mock.test(MOCK_REPLACE, standard, struct.pack("=I", ioas))
    mock.destroy(child)
    mock.destroy(parent)


def test_page_faults(mock: Mock, nest: tuple[int, int, int, int]) -> None:
    _, standard, device, parent = nest
    number, queue = mock.fault_queue_alloc()
    with queue:
        child = mock.hwpt_alloc(device, parent, data_type=SELFTEST_DATA, data=selftest_hwpt(), fault_id=number)
        mock.test(MOCK_REPLACE, standard, struct.pack("=I", child))
        read, write = uapi.IOMMU_PGFAULT_PERM_READ, uapi.IOMMU_PGFAULT_PERM_WRITE
        for success in (True, False):
            mock.test(TRIGGER_IOPF, 0, struct.pack("=4IQ", device, 0x99, 2, read | write, 0xDEADBEAF))
            (fault,) = queue.read()
            assert fault.device_id == device
            assert fault.last
            assert (fault.group, fault.perm) == (2, read | write)
            queue.respond(fault.cookie, success=success)
            with pytest.raises(VfioError, match="no group of faults waits"):
                queue.respond(fault.cookie, success=success)
        with pytest.raises(BusyError):
            mock.destroy(number)


def test_viommu(mock: Mock, nest: tuple[int, int, int, int]) -> None:
    ioas, standard, device, parent = nest
    with pytest.raises(NotSupportedError, match="cannot be shared out this way"):
        mock.viommu_alloc(0, device, parent)
    plain = mock.hwpt_alloc(device, ioas)
    with pytest.raises(VfioError, match="not a nesting parent"):
        mock.viommu_alloc(SELFTEST, device, plain)
    data = bytearray(struct.pack("=IIQQ", 0x1234, 0, 0, 0))
    viommu = mock.viommu_alloc(SELFTEST, device, parent, data)
    given, echoed, offset, length = struct.unpack("=IIQQ", data)
    assert (given, echoed) == (0x1234, 0x1234)
    assert length >= PAGE
    address = mock.map(offset, length, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(VfioError):
        mock.map(offset, 2 * length, mmap.PROT_READ)
    with pytest.raises(BusyError):
        mock.destroy(viommu)
    assert os_calls().munmap(address, length) == 0

    nested = mock.hwpt_alloc(device, viommu, data_type=SELFTEST_DATA, data=selftest_hwpt())
    vdevice = mock.vdevice_alloc(viommu, device, 0x99)
    with pytest.raises(OverlapError, match="has a vDEVICE in the vIOMMU already"):
        mock.vdevice_alloc(viommu, device, 0x99)
    mock.test(MOCK_REPLACE, standard, struct.pack("=I", nested))
    number, queue = mock.veventq_alloc(viommu, VEVENTQ_SELFTEST, 2)
    with queue:
        with pytest.raises(OverlapError, match="a queue of this type already"):
            mock.veventq_alloc(viommu, VEVENTQ_SELFTEST, 2)
        with pytest.raises(VfioError, match=r"depth must be from 1 to 2\*\*19"):
            mock.veventq_alloc(viommu, VEVENTQ_SELFTEST, 0)
        for _ in range(3):  # one more than fits
            try:
                mock.test(TRIGGER_VEVENT, 0, struct.pack("=I", device))
            except VfioError as error:
                assert error.errno == 75  # noqa: PT017  EOVERFLOW, which is what the mock says of a full queue
        events = queue.read(4)
        assert [event.data for event in events if not event.lost] == [struct.pack("=I", 0x99)] * 2
        assert [event.sequence for event in events if not event.lost] == [0, 1]
        assert events[-1].lost
        assert queue.read(4) == []
    mock.destroy(number)
    mock.test(MOCK_REPLACE, standard, struct.pack("=I", ioas))
    mock.destroy(vdevice)
    mock.destroy(nested)


def test_hardware_queue_locks_its_memory(mock: Mock, nest: tuple[int, int, int, int], memory: Memory) -> None:
    ioas, _, device, parent = nest
    viommu = mock.viommu_alloc(SELFTEST, device, parent)
    mock.ioas_map(ioas, memory.address, PAGE, Prot.RW, iova=APERTURE)
    queue = mock.hw_queue_alloc(viommu, SELFTEST, 0, APERTURE, PAGE)
    with pytest.raises(OverlapError, match="a queue of this index already"):
        mock.hw_queue_alloc(viommu, SELFTEST, 0, APERTURE, PAGE)
    with pytest.raises(BusyError, match="a hardware queue uses it"):
        mock.ioas_unmap(ioas, APERTURE, PAGE)
    mock.destroy(queue)
    assert mock.ioas_unmap(ioas, APERTURE, PAGE) == PAGE


def test_what_a_driver_in_the_kernel_pins_is_let_go_on_request(mock: Mock, memory: Memory) -> None:
    ioas = mock.ioas_alloc()
    answer = mock.test(CREATE_ACCESS, ioas, struct.pack("=II", 0, 1))
    access = struct.unpack_from("=I", answer, 4)[0]
    try:
        iova = mock.ioas_map(ioas, memory.address, 2 * PAGE, Prot.RW, iova=APERTURE)
        mock_of_access = Mock(os.dup(mock.fileno()), "x")
        mock_of_access.test(ACCESS_PAGES, access, struct.pack("=II3Q", 0, 0, iova, PAGE, memory.address))
        mock_of_access.close()
        assert mock.ioas_unmap(ioas, iova, 2 * PAGE) == 2 * PAGE
    finally:
        os.close(access)
    assert PinnedError


def test_a_revoked_dma_buf(mock: Mock) -> None:
    ioas = mock.ioas_alloc()
    mock.test(DMABUF_GET, 0, struct.pack("=II", 4 * PAGE, os.O_RDWR | os.O_CLOEXEC))
    # Linux 7.2 returns the fd, 7.3 forgets to.
    links = {int(entry.name): str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()}
    fd = next(number for number, target in links.items() if "dmabuf" in target)
    with DmaBufFd(fd, "mock dma-buf") as buffer:
        assert buffer.size == 4 * PAGE
        iova = mock.ioas_map_file(ioas, fd, 0, 4 * PAGE, Prot.RW)
        mock.test(DMABUF_REVOKE, 0, struct.pack("=iI", fd, 1))
        with pytest.raises(RevokedError, match="the exporter has taken the memory back"):
            mock.ioas_map_file(ioas, fd, 0, 4 * PAGE, Prot.RW)
        mock.test(DMABUF_REVOKE, 0, struct.pack("=iI", fd, 0))
        again = mock.ioas_map_file(ioas, fd, 0, 4 * PAGE, Prot.RW)
        assert again != iova
        with pytest.raises(MemoryKindError, match="goes past its end"):
            mock.ioas_map_file(ioas, fd, PAGE, 4 * PAGE, Prot.RW)
        assert mock.ioas_unmap(ioas, 0, (1 << 64) - 1) == 8 * PAGE
