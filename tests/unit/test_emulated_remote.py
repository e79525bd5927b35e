"""DMA of emulated devices to memory that has to be asked for: registers and resets go on meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from emulated_support import BUS_MASTER, Everything, read32, set_command, wait_for

from vfiopy.backend import Prot, RemoteMemory
from vfiopy.emulated import Edu, EmulatedDeviceIo, PciDevice, connect
from vfiopy.errors import DeviceGoneError, NotMappedError
from vfiopy.iova import KIND_REMOTE, IovaSpace

PAGE = 4096
BASE = 0x10000


class Far(RemoteMemory):
    """Pages behind a door that can be shut."""

    def __init__(self, pages: int = 2) -> None:
        super().__init__(pages * PAGE, True)
        self.data = bytearray(pages * PAGE)
        self.asked = threading.Event()
        self.door = threading.Event()
        self.door.set()
        self.lost = False

    def _pass(self) -> None:
        self.asked.set()
        assert self.door.wait(10)
        if self.lost:
            raise DeviceGoneError("nobody answers")

    def read(self, offset: int, size: int) -> bytes:
        self._pass()
        return bytes(self.data[offset : offset + size])

    def write(self, offset: int, data: bytes | bytearray) -> None:
        self._pass()
        self.data[offset : offset + len(data)] = data


def plug(device: PciDevice, far: Far) -> EmulatedDeviceIo:
    io, mapper = connect(device)
    book = IovaSpace("test")
    book.set_usable([(0, (1 << 64) - 1)], PAGE)
    mapper.attach_book(book)
    book.map(far, 0, far.size, int(Prot.RW), BASE, kind=KIND_REMOTE)
    set_command(io, on=BUS_MASTER)
    return io


@pytest.fixture
def far() -> Far:
    return Far()


@pytest.fixture
def device() -> Everything:
    return Everything()


@pytest.fixture
def io(device: Everything, far: Far) -> Iterator[EmulatedDeviceIo]:
    with plug(device, far) as opened:
        yield opened


def test_both_ways_and_views(io: EmulatedDeviceIo, device: Everything, far: Far) -> None:
    device.dma_write(BASE + PAGE - 2, b"abcd")
    assert far.data[PAGE - 2 : PAGE + 2] == b"abcd"
    assert device.dma_read(BASE + PAGE - 1, 2) == b"bc"
    with device.dma(BASE, 8, Prot.RW) as views:
        views[0][2:4] = b"xy"
    assert far.data[:8] == b"\0\0xy\0\0\0\0"
    with device.dma(BASE, 8, Prot.READ) as views:
        assert views[0].readonly


def test_a_fault_where_nobody_answers(io: EmulatedDeviceIo, device: Everything, far: Far) -> None:
    far.lost = True
    for attempt in (lambda: device.dma_read(BASE, 4), lambda: device.dma_write(BASE, b"1234")):
        with pytest.raises(NotMappedError, match="nobody answers"):
            attempt()
    assert [fault.write for fault in device.faults] == [False, True]


def test_registers_answer_while_work_waits(io: EmulatedDeviceIo, device: Everything, far: Far) -> None:
    far.door.clear()
    results: list[bytes] = []
    device.later(lambda: results.append(device.dma_read(BASE, 4)), delay=0.0)
    assert far.asked.wait(5)
    answer: list[int] = []
    reader = threading.Thread(target=lambda: answer.append(read32(io, 0)), daemon=True)
    reader.start()
    reader.join(5)
    assert answer  # or the pump of a server would wait for a reply that only it can read
    far.door.set()
    wait_for(lambda: results)
    assert not device.errors


def test_a_reset_ends_work_that_waits(io: EmulatedDeviceIo, device: Everything, far: Far) -> None:
    far.door.clear()
    after: list[str] = []

    def work() -> None:
        try:
            device.dma_write(BASE, b"late")
        except Exception:
            after.append("caught")
        after.append("went on")

    device.later(work, delay=0.0)
    assert far.asked.wait(5)
    io.reset()
    far.door.set()
    done = threading.Event()
    device.later(done.set, delay=0.0)
    assert done.wait(5)
    assert after == []
    assert not device.errors
    assert not device.faults


def test_edu_by_remote_memory(far: Far) -> None:
    card = Edu(delay=(0.0, 0.0))
    far.data[:64] = bytes(range(64))
    with plug(card, far) as io:
        for offset, value in ((0x80, BASE), (0x88, 0x40000), (0x90, 64), (0x98, 1)):
            io.write(0, offset, value.to_bytes(8, "little"))
        wait_for(lambda: not read32(io, 0x98) & 1)
        for offset, value in ((0x80, 0x40000), (0x88, BASE + PAGE), (0x90, 64), (0x98, 3)):
            io.write(0, offset, value.to_bytes(8, "little"))
        wait_for(lambda: not read32(io, 0x98) & 1)
    assert far.data[PAGE : PAGE + 64] == bytes(range(64))
