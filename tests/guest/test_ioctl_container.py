"""Container ioctls against the real kernel: every errno that can be produced says what it means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from ioctl_fixtures import needs_type1
from ioctl_support import PAGE, Memory, as_nobody, bound, lab_machine, opened, set_driver
from modes import NVME

from vfiopy import kernel, pci, uapi
from vfiopy.backend import MemoryKind
from vfiopy.errors import (
    IovaRangeError,
    MemoryKindError,
    NotBoundError,
    NotMappedError,
    NotSupportedError,
    NotViableError,
    OverlapError,
    VfioError,
)
from vfiopy.kernel.ioctl import ContainerFd, GroupFd, IommufdFd

Bdf = Callable[..., str]
RW = uapi.VFIO_DMA_MAP_FLAG_READ | uapi.VFIO_DMA_MAP_FLAG_WRITE
VADDR = uapi.VFIO_DMA_MAP_FLAG_VADDR


# --- type1 ------------------------------------------------------------------------------------------------------


def test_info(container: ContainerFd) -> None:
    info = container.iommu_get_info()
    assert info.page_sizes & PAGE
    assert container.check_extension(uapi.VFIO_UPDATE_VADDR)
    assert info.ranges is not None
    assert len(info.ranges) == 2
    assert info.ranges[0].last == 0xFEDFFFFF  # the MSI window begins
    assert info.ranges[1].first == 0xFEF00000
    assert info.dma_avail == 65535
    assert info.migration is not None
    assert info.migration.page_sizes == PAGE


def test_dma_avail_counts(container: ContainerFd, memory: Memory) -> None:
    container.map_dma(memory.address, 0x10000, PAGE, RW)
    container.map_dma(memory.address, 0x20000, PAGE, RW)
    assert container.iommu_get_info().dma_avail == 65533
    assert container.unmap_all() == 2 * PAGE
    assert container.iommu_get_info().dma_avail == 65535


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("misaligned iova", IovaRangeError, "multiple of the IOMMU's smallest page"),
        ("misaligned size", IovaRangeError, "multiple of the IOMMU's smallest page"),
        ("misaligned address", IovaRangeError, "multiple of the IOMMU's smallest page"),
        ("no rights", IovaRangeError, "neither read nor write"),
        ("msi window", IovaRangeError, "MSI window"),
        ("beyond aperture", IovaRangeError, "usable IOVAs"),
        ("wrap", IovaRangeError, "beyond 64 bits"),
        ("overlap", OverlapError, "overlaps one that is mapped"),
        ("no memory there", MemoryKindError, "cannot be pinned"),
        ("no such mapping to move", NotMappedError, "no invalidated mapping"),
    ],
)
def test_map_refusals(container: ContainerFd, memory: Memory, what: str, kind: type[VfioError], says: str) -> None:
    base = 0x100000
    container.map_dma(memory.address, base, 2 * PAGE, RW)
    arguments = {
        "misaligned iova": (memory.address, 1, PAGE, RW),
        "misaligned size": (memory.address, 0, 100, RW),
        "misaligned address": (memory.address + 1, 0, PAGE, RW),
        "no rights": (memory.address, 0, PAGE, 0),
        "msi window": (memory.address, 0xFEE00000, PAGE, RW),
        "beyond aperture": (memory.address, 1 << 57, PAGE, RW),
        "wrap": (memory.address, (1 << 64) - PAGE, 2 * PAGE, RW),
        "overlap": (memory.address, base + PAGE, PAGE, RW),
        "no memory there": (1 << 40, 0, PAGE, RW),
        "no such mapping to move": (memory.address, 0x900000, PAGE, VADDR),
    }[what]
    with pytest.raises(kind, match=says) as caught:
        container.map_dma(*arguments)
    assert caught.value.object == "/dev/vfio/vfio"
    assert f"iova {arguments[1]:#x}" in str(caught.value)
    assert container.unmap_all() == 2 * PAGE


def test_read_only_memory_cannot_be_mapped_for_writing(container: ContainerFd) -> None:
    import mmap  # noqa: PLC0415

    with Memory(PAGE) as memory:
        memory.map.madvise(mmap.MADV_WILLNEED)
        libc = __import__("ctypes").CDLL(None, use_errno=True)
        assert libc.mprotect(__import__("ctypes").c_void_p(memory.address), PAGE, mmap.PROT_READ) == 0
        with pytest.raises(MemoryKindError, match="read-only while the device is to write it"):
            container.map_dma(memory.address, 0, PAGE, RW)
        container.map_dma(memory.address, 0, PAGE, uapi.VFIO_DMA_MAP_FLAG_READ)
        assert container.unmap_all() == PAGE


def test_unmap_bisecting_is_refused_and_changes_nothing(container: ContainerFd, memory: Memory) -> None:
    container.map_dma(memory.address, 0x10000, 4 * PAGE, RW)
    container.map_dma(memory.address, 0x20000, PAGE, RW)
    for iova, size in ((0x11000, PAGE), (0x10000, 2 * PAGE), (0x12000, 0x10000), (0x8000, 0x9000)):
        with pytest.raises(NotMappedError, match="cuts a mapping in two"):
            container.unmap_dma(iova, size)
    assert container.unmap_dma(0x8000, 0x20000) == 5 * PAGE


def test_unmap_of_a_hole_is_zero(container: ContainerFd) -> None:
    assert container.unmap_dma(0x10000, PAGE) == 0
    assert container.unmap_all() == 0
    with pytest.raises(IovaRangeError, match="beyond 64 bits"):
        container.unmap_dma((1 << 64) - PAGE, 2 * PAGE)
    with pytest.raises(NotMappedError, match="multiple"):
        container.unmap_dma(1, PAGE)


@needs_type1
def test_type1_v1_unmaps_whole_mappings(edu: str, memory: Memory) -> None:
    with opened(edu, "type1") as (_, mapper):
        assert isinstance(mapper, kernel.ContainerMapper)
        calls = mapper.container.calls
        calls.map_dma(memory.address, 0x10000, 4 * PAGE, RW)
        assert calls.unmap_dma(0x11000, PAGE) == 0
        assert calls.unmap_dma(0x10000, PAGE) == 4 * PAGE
        assert isinstance(calls, ContainerFd)
        with pytest.raises(NotSupportedError, match="dirty tracking needs the type1v2 model"):
            calls.dirty_pages_start()


def test_move_a_mapping_to_another_address(container: ContainerFd, memory: Memory) -> None:
    container.map_dma(memory.address, 0x10000, PAGE, RW)
    assert container.unmap_dma(0x10000, PAGE, uapi.VFIO_DMA_UNMAP_FLAG_VADDR) == PAGE
    with pytest.raises(NotMappedError):
        container.unmap_dma(0x10000, PAGE, uapi.VFIO_DMA_UNMAP_FLAG_VADDR)  # invalid already
    container.map_dma(memory.address, 0x10000, PAGE, VADDR)
    assert container.unmap_all() == PAGE


def test_while_a_mapping_moves_no_group_can_join(bdf: Bdf, container: ContainerFd, memory: Memory) -> None:
    other = bdf(NVME)
    with bound(other), GroupFd.open(f"/dev/vfio/{pci.function(other).iommu_group}") as second:
        container.map_dma(memory.address, 0x10000, PAGE, RW)
        container.unmap_dma(0x10000, PAGE, uapi.VFIO_DMA_UNMAP_FLAG_VADDR)
        with pytest.raises(NotViableError, match="a mapping of the container is being moved"):
            second.set_container(container)
        container.map_dma(memory.address, 0x10000, PAGE, VADDR)
        second.set_container(container)
        second.unset_container()
        container.unmap_all()


def test_dirty_tracking(container: ContainerFd, memory: Memory) -> None:
    container.map_dma(memory.address, 0x10000, 8 * PAGE, RW)
    with pytest.raises(VfioError, match="tracking is not started"):
        container.dirty_pages_get(0x10000, 8 * PAGE, PAGE)
    container.dirty_pages_start()
    container.dirty_pages_start()
    # vfio-pci cannot tell what the device wrote: all of it counts.
    assert container.dirty_pages_get(0x10000, 8 * PAGE, PAGE) == bytes([0xFF]) + bytes(7)
    with pytest.raises(VfioError, match="cuts a mapping"):
        container.dirty_pages_get(0x10000, 4 * PAGE, PAGE)
    assert container.unmap_dma_dirty(0x10000, 8 * PAGE, PAGE) == (8 * PAGE, bytes([0xFF]) + bytes(7))
    container.dirty_pages_stop()


@needs_type1
def test_memlock(edu: str) -> None:
    """As nobody with a small limit: the node is opened before rights are dropped, as a launcher would."""
    size = 64 * PAGE
    with opened(edu, "type1v2") as (_, mapper), Memory(size) as memory:
        assert isinstance(mapper, kernel.ContainerMapper)
        number = mapper.container.fileno()

        def work() -> None:
            with Memory(size) as mine:
                ContainerFd.adopt(number, "/dev/vfio/vfio").map_dma(mine.address, 0x100000, size, RW)

        text = as_nobody(work, memlock=4 * PAGE)
        assert text.startswith("MemlockError: /dev/vfio/vfio: VFIO_IOMMU_MAP_DMA: RLIMIT_MEMLOCK does not allow")
        assert "ulimit -l" in text
        assert f"size {size:#x}" in text
        mapper.container.calls.map_dma(memory.address, 0x100000, size, RW)  # root may
        assert mapper.unmap(0x100000, size) == size


@needs_type1
def test_entry_limit(edu: str) -> None:
    limit = Path("/sys/module/vfio_iommu_type1/parameters/dma_entry_limit")
    before = limit.read_text()
    limit.write_text("16")
    try:
        with opened(edu, "type1v2") as (_, mapper), Memory(PAGE) as memory:
            assert isinstance(mapper, kernel.ContainerMapper)
            assert mapper.traits().max_mappings == 16
            calls = mapper.container.calls
            for number in range(16):
                calls.map_dma(memory.address, number << 16, PAGE, RW)
            with pytest.raises(VfioError, match="dma_entry_limit"):
                calls.map_dma(memory.address, 1 << 30, PAGE, RW)
            assert calls.unmap_all() == 16 * PAGE
    finally:
        limit.write_text(before)


@pytest.mark.parametrize("mode", ["type1v2", "type1"])
def test_a_container_that_is_iommufd_says_so(mode: str, edu: str) -> None:
    with opened(edu, mode) as (_, mapper):
        assert isinstance(mapper, kernel.ContainerMapper)
        assert mapper.container.compat is (lab_machine() == "compat")
        assert (MemoryKind.MMIO in mapper.traits().memory) is not mapper.container.compat


# --- iommufd in a container's place -----------------------------------------------------------------------------


def test_compat_differs_where_the_table_says_so(edu: str, group: GroupFd, memory: Memory) -> None:
    with IommufdFd.open("/dev/iommu") as iommufd, iommufd.as_container() as container:
        with pytest.raises(VfioError, match="no IOAS for VFIO groups yet"):
            iommufd.vfio_ioas_get()
        group.set_container(container)
        container.set_iommu(uapi.VFIO_TYPE1v2_IOMMU)
        with group.get_device_fd(edu):
            ioas = iommufd.vfio_ioas_get()
            info = container.iommu_get_info()
            assert info.ranges == iommufd.ioas_iova_ranges(ioas).ranges
            assert info.dma_avail == 0xFFFFFFFF
            assert info.migration is None
            container.map_dma(memory.address, 0x10000, 4 * PAGE, RW)
            assert container.unmap_dma(0x90000, PAGE) == 0  # unlike IOMMU_IOAS_UNMAP
            for iova, size in ((0x11000, PAGE), (0x10000, PAGE)):
                with pytest.raises(NotMappedError, match="holds no mapping, or cuts one in two"):
                    container.unmap_dma(iova, size)
            with pytest.raises(VfioError):
                container.unmap_dma(0x10000, 4 * PAGE, uapi.VFIO_DMA_UNMAP_FLAG_VADDR)
            assert container.unmap_all() == 4 * PAGE
        group.unset_container()


def test_unbound_sibling_function_is_not_ours(edu: str) -> None:
    set_driver(edu, None)
    try:
        with pytest.raises(NotBoundError, match="bound to no driver"):
            kernel.connect(edu)
    finally:
        set_driver(edu, "vfio-pci")
