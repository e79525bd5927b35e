"""The seam's DeviceIo over emulated devices: regions, accesses, switches."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_support import (
    BUS_MASTER,
    COMMAND,
    INTX_DISABLE,
    MEMORY,
    Everything,
    read32,
    read_config,
    set_command,
    write32,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ways import WAYS, reach

from vfiopy.backend import DeviceIo, Mapper, RegionFlag
from vfiopy.emulated import Edu, connect, create, device_names
from vfiopy.errors import (
    AccessError,
    AddressRangeError,
    AlignmentError,
    DeviceGoneError,
    DeviceNotFoundError,
    NotSupportedError,
    StateError,
)

RW = RegionFlag.READ | RegionFlag.WRITE


@pytest.fixture
def device() -> Everything:
    return Everything(manual=True)


@pytest.fixture(params=WAYS)
def io(device: Everything, request: pytest.FixtureRequest) -> Iterator[DeviceIo]:
    with reach(device, request.param) as io:
        yield io


@pytest.fixture(params=WAYS)
def edu(request: pytest.FixtureRequest) -> Iterator[DeviceIo]:
    with reach(Edu(), request.param) as io:
        yield io


# --- what it is --------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert "edu" in device_names()
    assert isinstance(create("edu"), Edu)
    with pytest.raises(DeviceNotFoundError, match=r"no emulated device 'edo'.*\n.*there are: edu"):
        connect("edo")


def test_it_is_a_device_io_and_its_mapper_a_mapper() -> None:
    io, mapper = connect("edu")
    seam: DeviceIo = io
    other: Mapper = mapper
    with io:
        assert isinstance(seam, DeviceIo)
        assert (io.name, io.backend) == ("emulated:edu", "emulated")
        assert other.kernel_target is None
        assert other.ranges() == [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)]
        assert other.traits().page_sizes == 0x4020_1000
    mapper.close()


def test_info(io: DeviceIo, edu: DeviceIo) -> None:
    assert (edu.info().num_regions, edu.info().num_irqs) == (9, 5)
    assert not edu.info().can_reset
    assert io.info().can_reset


def test_regions_of_edu(edu: DeviceIo) -> None:
    regions = [edu.region_info(index) for index in range(9)]
    assert [region.size for region in regions] == [1 << 20, 0, 0, 0, 0, 0, 0, 256, 0]
    assert regions[0].flags == RW
    assert regions[7].flags == RW
    assert regions[1].flags == 0
    for index in (-1, 9):
        with pytest.raises(AddressRangeError, match=f"no region {index}"):
            edu.region_info(index)


def test_regions_of_everything(io: DeviceIo) -> None:
    assert io.region_info(2).flags == RW | RegionFlag.MMAP
    assert io.region_info(2).msix_mappable
    assert not io.region_info(0).msix_mappable
    assert io.region_info(3).size == 0  # the upper half of BAR 2
    assert io.region_info(7).size == 4096


# --- accesses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_an_aligned_access_is_one_access(io: DeviceIo, device: Everything, width: int) -> None:
    assert io.read(0, 0x18, width) == 0x1122334455667788.to_bytes(8, "little")[:width]
    io.write(0, 0x18, b"\xa5" * width)
    assert device.accesses == [
        ("read", 0, 0x18, width),
        ("write", 0, 0x18, width, int.from_bytes(b"\xa5" * width, "little")),
    ]


def test_other_accesses_become_the_widest_aligned_ones(io: DeviceIo, device: Everything) -> None:
    io.read(0, 0x1, 0x12)
    assert [access[2:] for access in device.accesses] == [
        (1, 1),
        (2, 2),
        (4, 4),
        (8, 8),
        (0x10, 2),
        (0x12, 1),
    ]
    device.accesses.clear()
    io.write(0, 6, bytes(range(4)))
    assert device.accesses == [("write", 0, 6, 2, 0x0100), ("write", 0, 8, 2, 0x0302)]


@pytest.mark.parametrize(
    ("index", "offset", "size"),
    [
        (0, 0x1000, 1),
        (0, 0xFFF, 2),
        (0, -1, 1),
        (1, 0, 4),
        (6, 0, 4),
        (8, 0, 1),
        (9, 0, 1),
        (7, 4096, 1),
    ],
)
def test_accesses_outside_are_refused(io: DeviceIo, index: int, offset: int, size: int) -> None:
    with pytest.raises(AddressRangeError):
        io.read(index, offset, size)
    with pytest.raises(AddressRangeError):
        io.write(index, offset, bytes(size))


@settings(deadline=None)
@given(st.integers(0, 0x1100), st.binary(min_size=1, max_size=40))
def test_a_write_gives_the_device_every_byte_once(offset: int, data: bytes) -> None:
    device = Everything(manual=True)
    io, _ = connect(device)
    with io:
        if offset + len(data) > 0x1000:
            with pytest.raises(AccessError):
                io.write(0, offset, data)
        else:
            io.write(0, offset, data)
            seen = b""
            at = offset
            for _, _, where, width, value in device.accesses:
                assert where == at
                assert at % width == 0  # type: ignore[operator]
                seen += value.to_bytes(width, "little")  # type: ignore[attr-defined]
                at += width  # type: ignore[operator]
            assert seen == data


def test_opened_as_vfio_pci_leaves_it(edu: DeviceIo) -> None:
    command = read_config(edu, COMMAND, 2)
    assert command & MEMORY
    assert not command & (BUS_MASTER | INTX_DISABLE)
    assert read_config(edu, 0x10, 4) & ~0xF


def test_decode_off_is_device_gone(edu: DeviceIo) -> None:
    set_command(edu, off=MEMORY)
    with pytest.raises(DeviceGoneError, match="memory decode is off") as caught:
        read32(edu, 0)
    assert caught.value.errno == errno.EIO
    assert "memory_enabled" in caught.value.hint
    with pytest.raises(DeviceGoneError):
        write32(edu, 4, 1)
    assert read_config(edu, 0, 2) == 0x1234  # configuration space goes on answering
    set_command(edu, on=MEMORY)
    assert read32(edu, 0) == 0x010000ED


def test_d3hot_is_device_gone(io: DeviceIo) -> None:
    write_config(io, 0x44, 2, 3)
    with pytest.raises(DeviceGoneError, match="not in D0"):
        read32(io, 0)
    write_config(io, 0x44, 2, 0)
    read32(io, 0)


# --- shared BARs -------------------------------------------------------------------------------------------------


def test_shared_bar_is_the_same_memory_for_all(io: DeviceIo, device: Everything) -> None:
    window = io.map_region(2, 0x1000, 0x1000)
    assert window.size == 0x1000
    view = (ctypes.c_ubyte * window.size).from_address(window.address)
    io.write(2, 0x1004, b"\x11\x22\x33\x44")
    assert bytes(view[4:8]) == b"\x11\x22\x33\x44"
    view[0] = 0x99
    assert device.memories[2].view[0x1000] == 0x99
    assert io.read(2, 0x1000, 1) == b"\x99"
    assert device.accesses == []
    window.close()
    window.close()


def test_registers_cannot_be_mapped(edu: DeviceIo, io: DeviceIo) -> None:
    with pytest.raises(NotSupportedError, match=r"served by (code|messages)"):
        edu.map_region(0, 0, 4096)
    with pytest.raises(AddressRangeError):
        io.map_region(2, 0x3000, 0x2000)
    with pytest.raises(AlignmentError, match="whole pages"):
        io.map_region(2, 0x800, 0x1000)


def resident(address: int) -> str:
    """What a page of this process is mapped from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        first, last = (int(part, 16) for part in fields[0].split("-"))
        if first <= address < last:
            return fields[5]
    return ""


def test_decode_off_hides_mapped_memory(io: DeviceIo) -> None:
    window = io.map_region(2, 0, 0x1000)
    io.write(2, 0, b"kept")
    assert "vfiopy-bar" in resident(window.address)
    set_command(io, off=MEMORY)
    assert "vfiopy-nothing" in resident(window.address)
    # the system call says EFAULT where a load would be a SIGBUS
    null = os.open("/dev/null", os.O_WRONLY)
    reader, writer = os.pipe()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.write(writer, ctypes.c_void_p(window.address), 4) == -1
    assert ctypes.get_errno() == errno.EFAULT
    set_command(io, on=MEMORY)
    assert libc.write(writer, ctypes.c_void_p(window.address), 4) == 4
    assert os.read(reader, 4) == b"kept"
    for fd in (null, reader, writer):
        os.close(fd)
    second = io.map_region(2, 0x1000, 0x1000)
    with pytest.raises(StateError, match="while parts of its BARs are mapped"):
        io.close()
    assert io.read(2, 0, 4) == b"kept"
    window.close()
    second.close()
    assert resident(window.address) == resident(second.address) == ""


def test_window_made_while_decode_is_off_is_hidden(io: DeviceIo) -> None:
    set_command(io, off=MEMORY)
    window = io.map_region(2, 0, 0x1000)
    assert "vfiopy-nothing" in resident(window.address)
    window.close()


def test_msix_table_belongs_to_vfio(io: DeviceIo, device: Everything) -> None:
    io.write(2, 0x2000, bytes(16))
    assert io.read(2, 0x2000, 8) == b"\xff" * 8
    assert io.read(2, 0x207C, 4) == b"\xff" * 4
    assert io.read(2, 0x2080, 4) == bytes(4)
    assert bytes(device.memories[2].view[0x2000:0x2080]) == bytes(0x80)
