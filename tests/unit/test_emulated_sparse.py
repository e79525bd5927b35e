"""A BAR that is memory in parts, and registers elsewhere: what is mapped, and what comes to the device's handlers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from emulated_support import Patchwork
from ways import WAYS, opened, reach

from vfiopy.backend import Area, DeviceIo, RegionFlag
from vfiopy.emulated import Bar
from vfiopy.errors import NotSupportedError

PAGE = 4096
AREAS = (Area(PAGE, 2 * PAGE), Area(6 * PAGE, PAGE))


@pytest.fixture
def device() -> Patchwork:
    return Patchwork()


@pytest.fixture(params=WAYS)
def io(device: Patchwork, request: pytest.FixtureRequest) -> Iterator[DeviceIo]:
    with reach(device, request.param) as io:
        yield io


def test_the_areas_are_announced(io: DeviceIo) -> None:
    info = io.region_info(2)
    assert info.sparse == AREAS
    assert RegionFlag.MMAP in info.flags
    assert io.region_info(0).sparse is None


def test_only_areas_can_be_mapped(io: DeviceIo, device: Patchwork) -> None:
    window = io.map_region(2, 2 * PAGE, PAGE)
    window.close()
    for offset, size in ((0, PAGE), (0, 8 * PAGE), (2 * PAGE, 2 * PAGE), (3 * PAGE, 4 * PAGE), (5 * PAGE, PAGE)):
        with pytest.raises(NotSupportedError):
            io.map_region(2, offset, size)
    assert not device.accesses


def test_accesses_outside_of_the_areas_are_the_devices(io: DeviceIo, device: Patchwork) -> None:
    io.write(2, PAGE, b"inside")
    assert device.memories[2].view[PAGE : PAGE + 6] == b"inside"
    assert io.read(2, PAGE, 6) == b"inside"
    assert not device.accesses
    io.write(2, 4, b"\1\2\3\4")
    assert io.read(2, 3 * PAGE, 2) == b"\x34\x12"
    io.read(2, PAGE - 4, 8)  # half and half
    assert device.accesses == [
        ("write", 2, 4, 4, 0x04030201),
        ("read", 2, 3 * PAGE, 2),
        ("read", 2, PAGE - 4, 4),
    ]
    assert not any(device.memories[2].view[:PAGE])


@pytest.mark.parametrize("way", WAYS)
def test_a_driver_sees_one_bar(way: str, device: Patchwork) -> None:
    with opened(device, way) as far:
        bar = far.bars[2]
        device.accesses.clear()
        bar.write32(PAGE + 8, 0xABCD)
        assert bar.read32(PAGE + 8) == 0xABCD
        assert not device.accesses
        assert device.memories[2].view[PAGE + 8 : PAGE + 12] == b"\xcd\xab\0\0"
        bar.write32(8, 5)
        assert bar.read16(0) == 0x1234
        assert device.accesses == [("write", 2, 8, 4, 5), ("read", 2, 0, 2)]


@pytest.mark.parametrize(
    "areas",
    [
        (),
        (Area(0, 100),),
        (Area(8, PAGE),),
        (Area(PAGE, 0),),
        (Area(0, 16 * PAGE),),
        (Area(2 * PAGE, PAGE), Area(0, PAGE)),
        (Area(0, 2 * PAGE), Area(PAGE, PAGE)),
        (Area(-PAGE, 2 * PAGE),),
    ],
)
def test_areas_that_cannot_be(areas: tuple[Area, ...]) -> None:
    with pytest.raises(ValueError, match="area"):
        Bar(8 * PAGE, shared=True, areas=areas)


def test_registers_have_no_areas() -> None:
    with pytest.raises(ValueError, match="shared"):
        Bar(8 * PAGE, areas=AREAS)
