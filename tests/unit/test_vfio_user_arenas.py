"""DMA buffers for a server that takes few mappings: many in a few arenas, and what that means for other memory."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from vfio_user_support import PAGE, open_fds, serving

import vfiopy
from vfiopy import emulated, vfio_user
from vfiopy.backend import IovaRange, Prot
from vfiopy.drivers.edu import BUFFER_SIZE, EduDriver
from vfiopy.emulated import Edu
from vfiopy.vfio_user.arena import Arenas
from vfiopy.vfio_user.server import Server

FEW = vfio_user.Limits(max_dma_maps=16)
MIB = 1 << 20


@pytest.fixture
def card() -> Edu:
    return Edu(delay=(0.0, 0.0005))


@pytest.fixture
def server(card: Edu, tmp_path: Path) -> Iterator[Server]:
    with serving(card, tmp_path / "socket", limits=FEW) as server:
        yield server


@pytest.fixture
def device(server: Server) -> Iterator[vfiopy.Device]:
    with vfiopy.open(f"vfio-user:{server.path}") as device:
        device.bus_master = True
        yield device


def mappings(server: Server) -> list[tuple[int, int]]:
    """What the server has: first IOVAs and sizes."""
    return [(one.iova, one.size) for one in server._space.book.mappings()]


def check(driver: EduDriver, buffer: np.ndarray, iova: int, number: int) -> None:
    buffer[:BUFFER_SIZE] = np.arange(number, number + BUFFER_SIZE) % 251
    driver.load(iova, BUFFER_SIZE)
    driver.store(iova, 8, offset=100)
    assert np.array_equal(buffer[:8], buffer[100:108])


def test_thousands_of_buffers_in_few_mappings(server: Server, device: vfiopy.Device) -> None:
    driver = EduDriver(device)
    buffers = [device.dma.allocate(PAGE) for _ in range(3000)]
    large = [device.dma.allocate(20 * MIB) for _ in range(5)]
    assert len({buffer.iova for buffer in buffers + large}) == 3005
    assert max(buffer.iova for buffer in buffers) < 1 << 28  # what the card reaches
    assert len(mappings(server)) <= 4
    for number in range(0, 3000, 500):
        check(driver, buffers[number], buffers[number].iova, number)
    check(driver, large[-1], large[-1].iova, 7)
    for buffer in buffers + large:
        buffer.free()
    assert mappings(server) == []


def test_a_freed_buffer_is_empty_again(server: Server, device: vfiopy.Device, card: Edu) -> None:
    keeps = device.dma.allocate(PAGE)
    first = device.dma.allocate(PAGE)
    first[:] = 7
    iova = first.iova
    first.free()
    del first
    again = device.dma.allocate(PAGE)
    assert again.iova == iova
    assert not again.any()
    with card.host.access(iova, 4, Prot.RW) as views:
        views[0][:] = b"seen"
    assert bytes(again[:4]) == b"seen"
    assert len(mappings(server)) == 1
    keeps.free()
    again.free()


def test_other_memory_takes_a_mapping_each_and_no_more_than_there_are(server: Server, device: vfiopy.Device) -> None:
    buffer = device.dma.allocate(PAGE)
    with mmap.mmap(-1, 32 * PAGE) as memory:
        view = np.frombuffer(memory, dtype="u1")
        others = [device.dma.map(view[number * PAGE : (number + 1) * PAGE]) for number in range(15)]
        assert len(mappings(server)) == 16
        with pytest.raises(vfiopy.NoSpaceError, match=r"takes 16 mappings.*\n.*allocate") as caught:
            device.dma.map(view[16 * PAGE : 17 * PAGE])
        del caught
        more = device.dma.allocate(PAGE)  # in the arena there is room
        others.pop().unmap()
        others.append(device.dma.map(view[16 * PAGE : 17 * PAGE]))
        for mapping in others:
            mapping.unmap()
        more.free()
        buffer.free()
        assert mappings(server) == []
        del view


def test_nothing_else_is_mapped_into_an_arena(device: vfiopy.Device, server: Server) -> None:
    buffer = device.dma.allocate(PAGE)
    with mmap.mmap(-1, PAGE) as memory:
        with pytest.raises(vfiopy.OverlapError, match=r"arena of DMA buffers.*\n.*another IOVA"):
            device.dma.map(memory, iova=buffer.iova + PAGE)
        mapping = device.dma.map(memory)  # the book's choice is elsewhere
        start, size = next(one for one in mappings(server) if one[0] <= buffer.iova < one[0] + one[1])
        assert not start <= mapping.iova < start + size
        mapping.unmap()
    buffer.free()


def test_buffers_with_an_iova_of_their_own(server: Server, device: vfiopy.Device) -> None:
    driver = EduDriver(device)
    one = device.dma.allocate(PAGE, iova=0x10000)  # its arena would begin below 0: by itself
    two = device.dma.allocate(PAGE)
    three = device.dma.allocate(PAGE, iova=0x20000)  # its arena is elsewhere
    assert len(mappings(server)) == 3
    for number, buffer in enumerate((one, two, three)):
        check(driver, buffer, buffer.iova, number)
        buffer.free()
    assert mappings(server) == []


def test_a_reach_of_less_than_an_arena(server: Server, device: vfiopy.Device) -> None:
    device.dma.bits = 24
    buffers = [device.dma.allocate(PAGE) for _ in range(10)]
    assert all(buffer.iova + PAGE <= 1 << 24 for buffer in buffers)
    assert len(mappings(server)) == 10  # no room for an arena's window: each by itself
    for buffer in buffers:
        buffer.free()


def test_two_devices_share_buffers(server: Server, tmp_path: Path) -> None:
    second = Edu(delay=(0.0, 0.0005))
    with (
        serving(second, tmp_path / "second", limits=FEW) as other,
        vfiopy.AddressSpace("shared") as space,
        vfiopy.open(f"vfio-user:{server.path}", space=space) as one,
    ):
        early = [one.dma.allocate(PAGE) for _ in range(100)]
        with vfiopy.open(f"vfio-user:{other.path}", space=space) as two:
            late = [two.dma.allocate(PAGE) for _ in range(100)]
            assert len(mappings(server)) == len(mappings(other)) == 1
            for device in (one, two):
                device.bus_master = True
                driver = EduDriver(device)
                check(driver, early[50], early[50].iova, 5)
                check(driver, late[50], late[50].iova, 6)
            for buffer in early + late:
                buffer.free()
            assert mappings(server) == mappings(other) == []


def test_a_new_server_gets_the_arenas(card: Edu, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with vfiopy.AddressSpace("kept") as space:
        with serving(card, path, limits=FEW):
            device = vfiopy.open(f"vfio-user:{path}", space=space)
            buffers = [device.dma.allocate(PAGE) for _ in range(50)]
        with serving(Edu(delay=(0.0, 0.0005)), path, limits=FEW) as server:
            device.io.reconnect()  # type: ignore[attr-defined]
            assert len(mappings(server)) == 1
            device.bus_master = True
            check(EduDriver(device), buffers[33], buffers[33].iova, 3)
            device.close()


def test_a_server_of_many_mappings_gets_buffers_one_by_one(card: Edu, tmp_path: Path) -> None:
    with serving(card, tmp_path / "socket") as server, vfiopy.open(f"vfio-user:{server.path}") as device:
        buffers = [device.dma.allocate(PAGE) for _ in range(5)]
        assert [size for _, size in mappings(server)] == [PAGE] * 5
        buffers.pop().free()
        assert len(mappings(server)) == 4


def test_refused_arenas_leave_nothing(tmp_path: Path) -> None:
    before = open_fds()
    io, mapper = emulated.connect(Edu())
    with Server(io, mapper, tmp_path / "socket", limits=FEW) as server:
        server.start()
        with vfiopy.open(f"vfio-user:{server.path}") as device:
            server._space.book.set_usable([IovaRange(0, MIB - 1)], PAGE)
            with pytest.raises(vfiopy.VfioError):
                device.dma.allocate(PAGE, iova=0x4000000)
            server._space.book.set_usable([IovaRange(0, (1 << 64) - 1)], PAGE)
            with device.dma.allocate(PAGE):
                assert len(mappings(server)) == 1
            assert mappings(server) == []
    assert open_fds() == before


def test_arenas_grow() -> None:
    arenas = Arenas()
    memories = [arenas.allocate(64 * MIB) for _ in range(12)]
    sizes = [arena.size // MIB for arena in arenas._arenas]
    assert sizes[:5] == [64, 64, 64, 64, 128]
    assert sum(sizes) >= 12 * 64
    assert len(sizes) < 9
    assert arenas.allocate(300 * MIB).size == 300 * MIB
    memories.clear()
    arenas.close()
