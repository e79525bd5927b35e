"""A device without an IOMMU: only on demand, with physical addresses, and honest about the cost."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
from ioctl_support import PAGE, Memory, as_nobody, linux, opened

from vfiopy import kernel, pci
from vfiopy.backend import HostMemory, Prot
from vfiopy.errors import (
    IovaRangeError,
    MemoryKindError,
    NotMappedError,
    NotSupportedError,
    OverlapError,
    PermissionDeniedError,
)
from vfiopy.kernel import NoiommuMapper
from vfiopy.kernel.ioctl import DeviceFd, GroupFd, IommufdFd
from vfiopy.kernel.physical import physical_address

pytestmark = pytest.mark.machine("noiommu")
HUGE = 2 << 20
MAP_HUGETLB = 0x40000
DMA_SOURCE, DMA_TARGET, DMA_COUNT, DMA_COMMAND = 0x80, 0x88, 0x90, 0x98  # QEMU docs/specs/edu.rst
DEVICE_BUFFER = 0x40000


@pytest.fixture
def huge() -> Iterator[HostMemory]:
    """The huge page with the lowest physical address: edu reaches 28 bits only."""
    count = int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    memory = mmap.mmap(-1, count * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_HUGETLB)
    memory[:: HUGE // 2] = bytes(2 * count)
    anchor = ctypes.c_char.from_buffer(memory)
    first = ctypes.addressof(anchor)
    pages = range(first, first + count * HUGE, HUGE)
    lowest = min(pages, key=lambda address: physical_address(address, PAGE, "x"))
    yield HostMemory(lowest, HUGE, True, memory)
    del anchor
    memory.close()


def test_nothing_opens_without_the_words(edu: str) -> None:
    for backend in (None, "type1v2", "iommufd"):
        with pytest.raises(PermissionDeniedError, match="it has no IOMMU") as caught:
            kernel.connect(edu, backend=backend)
        for cost in ("all of this machine's memory", "taints the kernel", "CAP_SYS_RAWIO", "huge pages"):
            assert cost in caught.value.hint
    with pytest.raises(NotSupportedError, match="so backend 'type1v2' cannot be used"):
        kernel.connect(edu, backend="type1v2", noiommu=True)
    assert Path("/proc/sys/kernel/tainted").read_text() != "0\n"


def test_registers_and_no_map_dma(edu: str) -> None:
    with opened(edu, noiommu=True) as (io, mapper):
        assert io.backend == "noiommu"
        assert io.read(0, 0, 4) == bytes.fromhex("ed000001")
        assert isinstance(mapper, NoiommuMapper)
        assert mapper.kernel_target is None
        with Memory(PAGE) as memory, pytest.raises(NotSupportedError, match="nothing can be mapped") as caught:
            mapper.container.calls.map_dma(memory.address, 0, PAGE, 3)
        assert "physical addresses" in caught.value.hint


def test_physical_addresses_of_huge_pages(edu: str, huge: HostMemory) -> None:
    with opened(edu, noiommu=True) as (_, mapper):
        assert isinstance(mapper, NoiommuMapper)
        place = mapper.place(huge)
        assert place % HUGE == 0
        assert place == physical_address(huge.address, PAGE, "x")
        with pytest.raises(IovaRangeError, match=f"has IOVA {place:#x}, its physical address, and no other"):
            mapper.map(0x100000, huge, Prot.RW)
        mapper.map(place, huge, Prot.RW)
        with pytest.raises(OverlapError):
            mapper.map(place, huge, Prot.RW)
        with pytest.raises(NotMappedError):
            mapper.unmap(place, PAGE)
        assert mapper.unmap(place, HUGE) == HUGE
        with Memory(PAGE) as small, pytest.raises(MemoryKindError, match="only memory of huge pages"):
            mapper.place(HostMemory(small.address, PAGE, True, small))


def test_dma_to_a_physical_address(edu: str, huge: HostMemory) -> None:
    """edu reaches 28 bits only; where the page is higher, the address is shown but no DMA is tried."""
    with opened(edu, noiommu=True) as (io, mapper):
        assert isinstance(mapper, NoiommuMapper)
        place = mapper.place(huge)
        if place + HUGE > 1 << 28:
            pytest.skip(f"the guest's huge page is at {place:#x}, beyond edu's 28 bits")
        ctypes.memmove(huge.address, b"through no IOMMU", 16)
        command = int.from_bytes(io.read(7, 4, 2), "little")
        io.write(7, 4, (command | 4).to_bytes(2, "little"))
        for source, target, direction in ((place, DEVICE_BUFFER, 1), (DEVICE_BUFFER, place + 4096, 3)):
            for register, value in ((DMA_SOURCE, source), (DMA_TARGET, target), (DMA_COUNT, 16)):
                io.write(0, register, value.to_bytes(8, "little"))
            io.write(0, DMA_COMMAND, direction.to_bytes(8, "little"))
            while int.from_bytes(io.read(0, DMA_COMMAND, 8), "little") & 1:
                pass
        assert ctypes.string_at(huge.address + 4096, 16) == b"through no IOMMU"


def test_without_cap_sys_admin_the_kernel_hides_addresses(huge: HostMemory) -> None:
    text = as_nobody(lambda: physical_address(huge.address, PAGE, "x"))
    assert text.startswith("PermissionDeniedError: x: the kernel hides physical addresses")
    assert "CAP_SYS_ADMIN" in text


def test_without_cap_sys_rawio_the_group_does_not_open(edu: str) -> None:
    node = pci.function(edu).group_node
    assert node is not None
    assert node.name.startswith("noiommu-")
    mode = node.stat().st_mode
    node.chmod(0o666)
    try:
        text = as_nobody(lambda: GroupFd.open(str(node)))
    finally:
        node.chmod(mode)
    assert text.startswith(f"PermissionDeniedError: {node}: open VFIO group")
    assert "CAP_SYS_RAWIO" in text


@pytest.mark.skipif(linux() < (7, 3), reason="cdevs of devices without an IOMMU came with Linux 7.3")
def test_iommufd_pins_and_tells_physical_addresses(edu: str, huge: HostMemory) -> None:
    """What Linux 7.3 offers beside pagemap, at ioctl level."""
    node = pci.function(edu).cdev_node
    assert node is not None
    with IommufdFd.open("/dev/iommu") as iommufd, DeviceFd.open(str(node), edu) as fd:
        assert fd.identity() == f"vfio/devices/{node.name}"
        fd.bind_iommufd(iommufd)
        ioas = iommufd.ioas_alloc()
        fd.attach_iommufd_pt(ioas)
        iova = iommufd.ioas_map(ioas, huge.address, huge.size, Prot.RW)
        place = physical_address(huge.address, PAGE, "x")
        assert iommufd.ioas_noiommu_get_pa(ioas, iova, huge.size) == (place, huge.size)
        assert iommufd.ioas_noiommu_get_pa(ioas, iova + PAGE, PAGE) == (place + PAGE, PAGE)
        with pytest.raises(NotMappedError, match="the IOVA is not mapped"):
            iommufd.ioas_noiommu_get_pa(ioas, iova + huge.size, PAGE)
        iommufd.ioas_unmap(ioas, iova, huge.size)
        fd.detach_iommufd_pt()


def test_a_cdev_without_an_iommu_is_no_way_around(edu: str) -> None:
    """Linux 7.3 gives such devices a cdev, named noiommu-vfio0: connect() must not take it for a safe one."""
    cdev = pci.function(edu).vfio_cdev
    if linux() >= (7, 3):
        assert cdev is not None
        assert cdev.startswith("noiommu-")
    with pytest.raises(PermissionDeniedError, match="it has no IOMMU"):
        kernel.connect(edu)
