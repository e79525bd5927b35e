"""What users do wrong, and the error that each gets: its class, what it names, and its hint."""

from __future__ import annotations

import mmap
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from modes import E1000E, EDU, IGB, IVSHMEM, NVME

import vfiopy
from vfiopy.backend import HostMemory
from vfiopy.dma.memory import PAGE_SIZE

Lookup = Callable[..., str]
NOBODY = 65534


@pytest.fixture(params=["type1v2", "iommufd"])
def road(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def edu(road: str, bound_edu: str) -> Iterator[vfiopy.Device]:
    with vfiopy.open(bound_edu, backend=road) as device:
        yield device


def unprivileged(work: Callable[[], object]) -> str:
    """Run in a child without root, capabilities or the parent's open devices; return what it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        text = "nothing was raised"
        try:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            work()
        except vfiopy.VfioError as error:
            text = f"{type(error).__name__}: {error}"
        except BaseException as error:
            text = f"unexpected {error!r}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as answer:
        return answer.read().decode()


def test_wrong_address() -> None:
    with pytest.raises(vfiopy.DeviceNotFoundError, match=r"0000:00:1d.7"):
        vfiopy.open("0000:00:1d.7")
    with pytest.raises(ValueError, match="not a PCI address"):
        vfiopy.open("00:99.9.9")
    with pytest.raises(vfiopy.DeviceNotFoundError, match=r"'usb:' is not a way to reach a device\n.*emulated:edu"):
        vfiopy.open("usb:1")


def test_device_not_bound(bdf: Lookup) -> None:
    with pytest.raises(vfiopy.NotBoundError, match=r"bound to nvme, not to a VFIO driver\n  hint: .*vfio-pci"):
        vfiopy.open(bdf(NVME))


def test_unknown_backend(bdf: Lookup) -> None:
    with pytest.raises(vfiopy.NotSupportedError, match=r"there is no backend 'uio'\n.*iommufd"):
        vfiopy.open(bdf(EDU), backend="uio")


def test_group_not_viable(road: str, bdf: Lookup) -> None:
    """A sibling in the group is with a native driver: it is named with its driver; the bridge above is not blamed."""
    behind = bdf(EDU, 1)
    members = vfiopy.function(behind).group_members()
    sibling = next(one for one in members if not one.is_bridge and str(one.address) != behind)
    bridge = next(one for one in members if one.is_bridge)
    # pci-pf-stub takes any function and leaves DMA to the kernel, as native drivers do
    with vfiopy.bind(sibling, "pci-pf-stub"), vfiopy.bind(behind, force=True):
        with pytest.raises(vfiopy.NotViableError, match=rf"{sibling.address}.*pci-pf-stub") as caught:
            vfiopy.open(behind, backend=road)
        assert str(bridge.address) not in str(caught.value)
        assert caught.value.hint


def test_no_permission(road: str, bound_edu: str) -> None:
    text = unprivileged(lambda: vfiopy.open(bound_edu, backend=road))
    assert text.startswith("PermissionDeniedError: /dev/")
    assert "udev" in text or "chown" in text


def test_memlock_too_small(road: str, bound_edu: str) -> None:
    vfio = Path("/dev/vfio")
    nodes = [*vfio.glob("[0-9]*"), *(vfio / "devices").iterdir(), vfio / "vfio", Path("/dev/iommu")]
    modes = {node: node.stat().st_mode for node in nodes}
    for node in nodes:
        node.chmod(0o666)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, 64 << 10))
        with vfiopy.open(bound_edu, backend=road) as device:
            device.dma.allocate(1 << 20)

    try:
        text = unprivileged(work)
    finally:
        for node, mode in modes.items():
            node.chmod(mode)
    assert text.startswith("MemlockError: ")
    assert "RLIMIT_MEMLOCK" in text
    assert "0x100000" in text or "1048576" in text or "1.0 MiB" in text or "1 MiB" in text, text
    assert "65536" in text or "64 KiB" in text, text


def test_unaligned_and_overlapping_maps(edu: vfiopy.Device) -> None:
    with mmap.mmap(-1, 2 * PAGE_SIZE) as area, mmap.mmap(-1, PAGE_SIZE) as other:
        with (
            memoryview(area) as view,
            view[1 : 1 + PAGE_SIZE] as crooked,
            pytest.raises(vfiopy.AlignmentError, match=r"not whole pages .*\n  hint: use allocate\(\)"),
        ):
            edu.dma.map(crooked)
        with pytest.raises(vfiopy.AlignmentError, match="0x10000100"):
            edu.dma.map(area, iova=0x1000_0100)
        with edu.dma.map(area, iova=0x10_0000), pytest.raises(vfiopy.OverlapError, match="0x101000"):
            edu.dma.map(other, iova=0x10_1000)


def test_iova_beyond_the_device_or_the_iommu(edu: vfiopy.Device) -> None:
    edu.dma.bits = 28
    with mmap.mmap(-1, PAGE_SIZE) as page:
        with pytest.raises(vfiopy.IovaRangeError, match="0xfffffff"):
            edu.dma.map(page, iova=0x1000_0000)
        edu.dma.bits = 64
        with pytest.raises(vfiopy.IovaRangeError, match=r"0xfee00000"):
            edu.dma.map(page, iova=0xFEE0_0000)
        last = edu.space.usable_ranges()[-1].last
        with pytest.raises(vfiopy.IovaRangeError):
            edu.dma.map(page, iova=last + 1)


def test_bar_mapped_by_address_under_iommufd(bdf: Lookup) -> None:
    address = bdf(IVSHMEM)
    with vfiopy.bind(address), vfiopy.open(address, backend="iommufd") as device:
        with device.bars[2].hold() as hold:
            bar = HostMemory(hold.address, PAGE_SIZE, True, None)
            with pytest.raises(vfiopy.VfioError, match=r"BAR.*\n?.*dma-buf") as caught:
                device.space.map(bar)
        assert caught.value.errno == 14
        assert device.space.mappings() == []


def test_interrupt_index_out_of_range(bdf: Lookup, road: str) -> None:
    address = bdf(IGB)
    with vfiopy.bind(address), vfiopy.open(address, backend=road) as device:
        count = device.irqs.msix.count
        with pytest.raises(vfiopy.AddressRangeError, match=f"{count + 1} vectors are asked for, it has {count}"):
            device.irqs.msix.enable(count + 1)
        device.irqs.msix.enable(2)
        with pytest.raises(vfiopy.AddressRangeError, match="there is no vector 2; 0 to 1 are enabled"):
            device.irqs.msix.replace(2)


def test_reading_past_a_bar(edu: vfiopy.Device) -> None:
    with pytest.raises(vfiopy.AddressRangeError, match=r"BAR 0: read of 4 bytes at offset 0x100000 .*0x100000 bytes"):
        edu.bars[0].read32(edu.bars[0].size)
    with pytest.raises(IndexError):
        edu.config.read32(256)
    with pytest.raises(vfiopy.AccessError, match="naturally aligned"):
        edu.bars[0].read32(2)
    with pytest.raises(vfiopy.AddressRangeError, match="there is no region 6"):
        _ = edu.bars[6]


@pytest.mark.parametrize("ids", [EDU, E1000E])
def test_memory_decode_off(ids: str, road: str, bdf: Lookup) -> None:
    """A mapped access raises instead of killing the interpreter, and works again when decode is back."""
    address = bdf(ids)
    with vfiopy.bind(address), vfiopy.open(address, backend=road) as device:
        bar = device.bars[0]
        before = bar.read32(0)
        device.memory_enabled = False
        for access in (lambda: bar.read32(0), lambda: bar.write32(0, before), lambda: bar.read_block(0, 4)):
            with pytest.raises(vfiopy.DeviceGoneError, match=r"BAR 0: .*SIGBUS.*\n.*command register"):
                access()
        with pytest.raises(vfiopy.DeviceGoneError, match="decode"):
            device.io.read(0, 0, 4)
        device.memory_enabled = True
        assert bar.read32(0) == before


def test_opening_twice(road: str, bound_edu: str) -> None:
    address = bound_edu
    with vfiopy.open(address, backend=road):
        with pytest.raises(vfiopy.BusyError, match=r"0000:00:04.0.* open.*\n  hint: "):
            vfiopy.open(address, backend=road)
        other = "iommufd" if road == "type1v2" else "type1v2"
        with pytest.raises(vfiopy.VfioError, match="hint") as caught:
            vfiopy.open(address, backend=other)
        assert caught.value.errno in (16, 22)
