"""DMA of emulated devices through the book: both ways, across borders, and every way to fault."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from emulated_support import (
    BUS_MASTER,
    Everything,
    enable_irq,
    eventfd,
    read32,
    set_command,
    taken,
    wait_for,
    write32,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiopy.backend import DeviceWindow, FileMemory, HostMemory, IrqIndex, Memory, Prot
from vfiopy.emulated import Edu, EmulatedDeviceIo, EmulatedMapper, connect
from vfiopy.errors import NotMappedError, PinnedError
from vfiopy.iova import IovaSpace

PAGE = 4096
BUFFER = 0x4_0000
SOURCE, DESTINATION, COUNT, COMMAND, IRQ_STATUS = 0x80, 0x88, 0x90, 0x98, 0x24
START, TO_RAM, IRQ_AT_END = 1, 2, 4
ANY = (1 << 64) - 1


class Ram:
    """Pages of this process at an IOVA."""

    def __init__(self, book: IovaSpace, iova: int, pages: int = 1, prot: Prot = Prot.RW) -> None:
        self.map = mmap.mmap(-1, pages * PAGE)
        self.iova = iova
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        memory = HostMemory(address, pages * PAGE, True, self.map)
        map_at(book, memory, iova, prot)


def map_at(book: IovaSpace, memory: Memory, iova: int, prot: Prot = Prot.RW) -> None:
    fd, offset = (memory.fd, memory.offset) if isinstance(memory, FileMemory) else (-1, 0)
    book.map(memory, memory.address, memory.size, int(prot), iova, ANY, 0, int(memory.kind), fd, offset)


@dataclass
class Bench:
    """A device in an address space, all by hand."""

    device: Edu
    io: EmulatedDeviceIo
    mapper: EmulatedMapper
    book: IovaSpace

    def dma(self, source: int, destination: int, count: int, command: int) -> None:
        for offset, value in ((SOURCE, source), (DESTINATION, destination), (COUNT, count), (COMMAND, command)):
            self.io.write(0, offset, value.to_bytes(8, "little"))
        if self.device.engine.manual:
            assert self.device.step()

    def load(self, iova: int, count: int, offset: int = 0) -> None:
        self.dma(iova, BUFFER + offset, count, START)

    def store(self, iova: int, count: int, offset: int = 0) -> None:
        self.dma(BUFFER + offset, iova, count, START | TO_RAM)


def make_bench(device: Edu) -> Bench:
    io, mapper = connect(device)
    book = IovaSpace("test")
    book.set_usable(mapper.ranges(), mapper.traits().page_sizes, 0)
    mapper.attach_book(book)
    set_command(io, on=BUS_MASTER)
    return Bench(device, io, mapper, book)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = make_bench(Edu(manual=True))
    yield bench
    bench.io.close()
    bench.mapper.close()
    bench.book.unmap_all(0.0)


# --- both ways ---------------------------------------------------------------------------------------------------


def test_to_the_device_and_back(bench: Bench) -> None:
    data = os.urandom(PAGE)
    source, target = Ram(bench.book, 0x10000), Ram(bench.book, 0x20000)
    source.map[:] = data
    bench.load(0x10000, PAGE)
    bench.store(0x20000, PAGE)
    assert target.map[:] == data
    assert bench.device.faults == bench.device.errors == []
    assert read32(bench.io, COMMAND) == TO_RAM  # only the start bit goes


def test_nothing_happens_before_its_time(bench: Bench) -> None:
    ram = Ram(bench.book, 0x10000)
    ram.map[:4] = b"abcd"
    for offset, value in ((SOURCE, 0x10000), (DESTINATION, BUFFER), (COUNT, 4), (COMMAND, START)):
        write32(bench.io, offset, value)
    ram.map[:4] = b"late"  # the device has not looked yet
    assert read32(bench.io, COMMAND) == START
    bench.device.step()
    bench.store(0x10800, 4)
    assert ram.map[0x800:0x804] == b"late"


def test_across_the_border_of_mappings(bench: Bench) -> None:
    low, high = Ram(bench.book, 0x10000), Ram(bench.book, 0x11000)
    low.map[-3:], high.map[:5] = b"abc", b"defgh"
    bench.load(0x10FFD, 8)
    bench.store(0x10FFD - 16, 16, 0)
    assert low.map[-19:-11] == b"abcdefgh"
    bench.store(0x10FFE, 8)
    assert low.map[-2:] + high.map[:6] == b"abcdefgh"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3 * PAGE - 1), st.integers(1, PAGE), st.integers(0, PAGE - 1))
def test_any_place_and_size(at: int, size: int, offset: int) -> None:
    """What arrives is what was sent, and nothing beside it changes."""
    size = min(size, 3 * PAGE - at, PAGE - offset)
    bench = make_bench(Edu(manual=True))
    source = Ram(bench.book, 0x100000, 3)
    pieces = [Ram(bench.book, 0x200000 + page * PAGE) for page in range(3)]
    source.map[:] = os.urandom(3 * PAGE)
    before = b"\xee" * 3 * PAGE
    for piece in pieces:
        piece.map[:] = b"\xee" * PAGE
    bench.load(0x100000 + at, size, offset)
    bench.store(0x200000 + at, size, offset)
    after = b"".join(piece.map[:] for piece in pieces)
    assert after == before[:at] + source.map[at : at + size] + before[at + size :]
    bench.io.close()
    bench.mapper.close()


def test_interrupt_at_the_end(bench: Bench) -> None:
    Ram(bench.book, 0x10000)
    with eventfd() as fd:
        enable_irq(bench.io, IrqIndex.MSI, fd)
        bench.load(0x10000, 8)
        assert taken(fd) == 0
        bench.dma(0x10000, BUFFER, 8, START | IRQ_AT_END)
        assert taken(fd) == 1
        assert read32(bench.io, IRQ_STATUS) == 0x100


def test_by_itself_with_an_interrupt() -> None:
    bench = make_bench(Edu(delay=(0.005, 0.01)))
    ram = Ram(bench.book, 0x10000)
    ram.map[:4] = b"abcd"
    with eventfd() as fd:
        enable_irq(bench.io, IrqIndex.MSI, fd)
        begin = time.monotonic()
        bench.dma(0x10000, BUFFER, 4, START | IRQ_AT_END)
        assert taken(fd, 5.0) == 1
        assert time.monotonic() - begin >= 0.005
    bench.store(0x10800, 4)
    wait_for(lambda: not read32(bench.io, COMMAND) & START)
    assert ram.map[0x800:0x804] == b"abcd"
    bench.io.close()
    bench.mapper.close()


# --- kinds of memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped_here", [True, False])
def test_file_memory(bench: Bench, mapped_here: bool) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4 * PAGE)
    window = mmap.mmap(fd, 2 * PAGE, offset=PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(window)) if mapped_here else 0
    map_at(bench.book, FileMemory(fd, PAGE, 2 * PAGE, True, address, window), 0x30000)
    window[PAGE - 2 : PAGE + 2] = b"wxyz"
    bench.load(0x30FFE, 4)
    bench.store(0x31100, 4)
    assert os.pread(fd, 4, 2 * PAGE + 0x100) == b"wxyz"
    assert bench.device.faults == []
    os.close(fd)


def test_another_devices_memory(bench: Bench) -> None:
    """Peer to peer, between two devices that are software."""
    other, _ = connect(Everything(manual=True))
    window = other.map_region(2, 0, PAGE)
    map_at(bench.book, DeviceWindow(2, 0, PAGE, -1, window.address, other), 0x40000)
    other.write(2, 0x10, b"12345678")
    bench.load(0x40010, 8)
    bench.store(0x40801, 7)
    assert other.read(2, 0x800, 9) == b"\x001234567\x00"
    set_command(other, off=2)  # its memory decode: the DMA fails, this process lives
    bench.store(0x40800, 8)
    bench.load(0x40800, 8)
    assert [(fault.iova, fault.write) for fault in bench.device.faults] == [(0x40800, True), (0x40800, False)]
    assert bench.device.errors == []
    bench.book.unmap(0x40000, 0.0)
    window.close()
    other.close()


def test_a_bar_that_is_not_mapped_here_is_a_fault(bench: Bench) -> None:
    map_at(bench.book, DeviceWindow(2, 0, PAGE, -1, 0, None), 0x40000)
    bench.load(0x40000, 8)
    assert "out of reach" in bench.device.faults[0].reason
    bench.book.unmap(0x40000, 0.0)  # and no pin is left


# --- faults ------------------------------------------------------------------------------------------------------


def expect_fault(bench: Bench, iova: int, size: int, write: bool) -> str:
    assert len(bench.device.faults) == 1
    fault = bench.device.faults[0]
    assert fault[:3] == (iova, size, write)
    assert bench.device.errors == []
    assert not read32(bench.io, COMMAND) & START
    return fault.reason


def test_outside_of_the_space(bench: Bench) -> None:
    bench.load(0x50000, 16)
    assert expect_fault(bench, 0x50000, 16, False)


def test_half_outside_moves_nothing(bench: Bench) -> None:
    ram = Ram(bench.book, 0x10000)
    bench.device._buffer[:] = b"\xaa" * PAGE
    bench.store(0x10FF0, 32)
    expect_fault(bench, 0x10FF0, 32, True)
    assert ram.map[:] == bytes(PAGE)


@pytest.mark.parametrize("prot", [Prot.READ, Prot.WRITE])
def test_against_the_protection(bench: Bench, prot: Prot) -> None:
    ram = Ram(bench.book, 0x10000, prot=prot)
    ram.map[:4] = b"keep"
    bench.device._buffer[:4] = b"mine"
    allowed, refused = (bench.load, bench.store) if prot == Prot.READ else (bench.store, bench.load)
    refused(0x10000, 4)
    expect_fault(bench, 0x10000, 4, prot == Prot.READ)
    assert (ram.map[:4], bytes(bench.device._buffer[:4])) == (b"keep", b"mine")
    allowed(0x10000, 4)
    assert len(bench.device.faults) == 1


def test_the_interrupt_comes_even_after_a_fault(bench: Bench) -> None:
    """The device has no error register: to its driver the command just ends, as in QEMU."""
    with eventfd() as fd:
        enable_irq(bench.io, IrqIndex.MSI, fd)
        bench.dma(0x50000, BUFFER, 8, START | IRQ_AT_END)
        assert taken(fd) == 1


def test_bus_mastering_off(bench: Bench) -> None:
    ram = Ram(bench.book, 0x10000)
    set_command(bench.io, off=BUS_MASTER)
    bench.device._buffer[:4] = b"mine"
    bench.store(0x10000, 4)
    assert expect_fault(bench, 0x10000, 4, True) == "bus mastering is off"
    assert ram.map[:4] == bytes(4)
    set_command(bench.io, on=BUS_MASTER)
    bench.store(0x10000, 4)
    assert ram.map[:4] == b"mine"


def test_injected_fault(bench: Bench) -> None:
    Ram(bench.book, 0x10000)
    bench.device.inject.dma_faults = 1
    bench.load(0x10000, 4)
    assert expect_fault(bench, 0x10000, 4, False) == "injected"
    bench.load(0x10000, 4)
    assert len(bench.device.faults) == 1


def test_without_a_space_everything_faults() -> None:
    device = Edu(manual=True)
    io, _ = connect(device)
    with io:
        set_command(io, on=BUS_MASTER)
        bench = Bench(device, io, _, None)  # type: ignore[arg-type]
        bench.load(0x10000, 4)
        assert expect_fault(bench, 0x10000, 4, False) == "the device is in no address space"


def test_an_iova_at_the_very_end(bench: Bench) -> None:
    bench.device.dma_mask = ANY
    bench.load(ANY, 16)
    assert "64-bit" in expect_fault(bench, ANY, 16, False)


# --- the device's own limits -------------------------------------------------------------------------------------


def test_addresses_are_cut_to_28_bits(bench: Bench) -> None:
    low, high = Ram(bench.book, 0x10000), Ram(bench.book, 0x10000 + (1 << 28))
    bench.device._buffer[:4] = b"mine"
    bench.store(0x10000 + (1 << 28), 4)
    assert low.map[:4] == b"mine"
    assert high.map[:4] == bytes(4)


def test_a_device_with_more_bits() -> None:
    bench = make_bench(Edu(manual=True, dma_bits=40))
    high = Ram(bench.book, 0x10000 + (1 << 28))
    bench.device._buffer[:4] = b"mine"
    bench.store(0x10000 + (1 << 28), 4)
    assert high.map[:4] == b"mine"
    bench.io.close()
    bench.mapper.close()


@pytest.mark.parametrize(
    ("at", "count"), [(BUFFER - 8, 8), (BUFFER, PAGE + 1), (BUFFER + PAGE - 4, 8), (BUFFER + PAGE, 1), (0, 4)]
)
def test_outside_of_the_devices_memory(bench: Bench, at: int, count: int) -> None:
    ram = Ram(bench.book, 0x10000, 2)
    ram.map[:8] = b"original"
    bench.device._buffer[:] = b"\xaa" * PAGE
    bench.dma(0x10000, at, count, START)
    bench.dma(at, 0x10000, count, START | TO_RAM)
    assert len(bench.device.errors) == 2
    assert "leaves the device's memory" in bench.device.errors[0].text
    assert bench.device.faults == []
    assert ram.map[:8] == b"original"
    assert bytes(bench.device._buffer) == b"\xaa" * PAGE
    assert not read32(bench.io, COMMAND) & START


def test_no_bytes_are_no_fault(bench: Bench) -> None:
    bench.load(0x50000, 0)
    assert bench.device.faults == bench.device.errors == []


# --- pins --------------------------------------------------------------------------------------------------------


class Holder(Everything):
    """Touches memory until it is told to stop."""

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        self.later(lambda: self.hold(value))

    def hold(self, iova: int) -> None:
        with self.dma(iova, 16, Prot.RW) as views:
            self.touching.set()
            assert self.enough.wait(5)
            views[0][:4] = b"done"

    def reset(self) -> None:
        self.touching, self.enough = threading.Event(), threading.Event()


def test_memory_stays_while_it_is_touched() -> None:
    device = Holder(delay=(0.0, 0.0))
    io, mapper = connect(device)
    book = IovaSpace("test")
    book.set_usable(mapper.ranges(), mapper.traits().page_sizes, 0)
    mapper.attach_book(book)
    set_command(io, on=BUS_MASTER)
    told: list[tuple[int, int]] = []
    device.host.on_unmap(lambda iova, size: told.append((iova, size)))
    ram = Ram(book, 0x10000)
    write32(io, 0, 0x10800)
    assert device.touching.wait(5)
    with pytest.raises(PinnedError, match="emulated:everything"):
        book.unmap(0x10000, 0.05)
    assert told
    assert told[0] == (0x10000, PAGE)
    threading.Timer(0.05, device.enough.set).start()
    assert book.unmap(0x10000, 5.0) == PAGE
    assert ram.map[0x800:0x804] == b"done"
    io.close()
    mapper.close()


def test_views_end_with_the_block_and_keep_to_the_protection(bench: Bench) -> None:
    Ram(bench.book, 0x10000)
    kept: list[memoryview] = []
    with bench.device.dma(0x10000, 8, Prot.READ) as views:
        assert views[0].readonly
        kept += views
    with pytest.raises(ValueError, match="released"):
        kept[0][0]
    bench.book.unmap(0x10000, 0.0)
    with (
        pytest.raises(NotMappedError, match="0x8 bytes at IOVA 0x10000 faults"),
        bench.device.dma(0x10000, 8, Prot.READ),
    ):
        pass


def test_closing_while_dma_is_pending_lets_everything_go() -> None:
    for _ in range(10):
        bench = make_bench(Edu(delay=(0.0, 0.001)))
        ram = Ram(bench.book, 0x10000)
        bench.store(0x10000, PAGE)
        bench.io.close()
        bench.mapper.close()
        assert bench.book.unmap_all(0.0) == PAGE
        ram.map.close()
        gc.collect()


def test_the_owner_goes_with_the_device(bench: Bench) -> None:
    owners = bench.book.stats()["owners"]
    bench.io.close()
    bench.mapper.close()
    assert bench.book.stats()["owners"] == owners - 1
