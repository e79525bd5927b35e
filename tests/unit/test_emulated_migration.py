"""Migration and DMA logging of emulated devices, in the same process and through a socket."""

from __future__ import annotations

import errno
import mmap
import struct
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from emulated_support import BUS_MASTER, Everything, read32, read_config, set_command, wait_for, write32, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ways import WAYS, opened, reach

import vfiopy
from vfiopy import uapi
from vfiopy.backend import DeviceIo, MigrationStream, Prot
from vfiopy.drivers.edu import EduDriver
from vfiopy.emulated import Edu, connect
from vfiopy.errors import NotSupportedError, VfioError
from vfiopy.iova import IovaSpace

GET, SET, PROBE = (
    uapi.VFIO_DEVICE_FEATURE_GET,
    uapi.VFIO_DEVICE_FEATURE_SET,
    uapi.VFIO_DEVICE_FEATURE_PROBE,
)
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY = 0, 1, 2, 3, 4, 6
PAGE = 4096


class Saved(Everything):
    """Everything, with registers that can be saved."""

    value = b"first"

    def save(self) -> bytes:
        return self.value

    def load(self, data: bytes) -> None:
        self.value = data


def move(io: DeviceIo, state: int) -> int:
    answer = io.feature(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, SET, struct.pack("=Ii", state, -1))
    return int(struct.unpack_from("=I", answer)[0])


def state(io: DeviceIo) -> int:
    answer = io.feature(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, GET, bytes(8))
    return int(struct.unpack_from("=I", answer)[0])


def drain(io: DeviceIo, size: int = 700) -> bytes:
    assert isinstance(io, MigrationStream)
    data = b""
    while piece := io.migration_read(size):
        data += piece
        if len(piece) < size:
            break
    return data


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(VfioError) as caught:
        yield
    assert caught.value.errno == number


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_a_device_offers(way: str) -> None:
    with reach(Edu(), way) as io:
        assert struct.unpack("=Q", io.feature(uapi.VFIO_DEVICE_FEATURE_MIGRATION, GET, b"")) == (5,)
        assert state(io) == RUNNING
        for number, operation in ((1, GET), (2, GET | SET), (6, SET), (7, SET), (8, GET)):
            io.feature(number, operation | PROBE, b"")
        for number, operation in ((1, SET), (6, GET), (8, SET), (99, GET)):
            with pytest.raises(NotSupportedError):
                io.feature(number, operation | PROBE, b"")
    with reach(Everything(), way) as io, pytest.raises(NotSupportedError):
        io.feature(uapi.VFIO_DEVICE_FEATURE_MIGRATION, GET, b"")


def test_an_edu_goes_on_elsewhere(way: str) -> None:
    old, new = Edu(delay=(0.0, 0.0)), Edu(delay=(0.0, 0.0))
    with reach(old, way) as source, reach(new, way) as target:
        write32(source, 0x04, 0x1234)
        write_config(source, 0x3C, 1, 0x0B)
        set_command(source, on=BUS_MASTER)
        old.engine.pause(1.0)
        write32(source, 0x08, 7)  # it is computing when it is moved
        assert read32(source, 0x20) & 1
        move(source, STOP_COPY)
        data = drain(source)
        move(source, STOP)
        assert move(target, RESUMING) in (RESUMING, RESUMING)
        assert isinstance(target, MigrationStream)
        for start in range(0, len(data), 999):
            target.migration_write(data[start : start + 999])
        move(target, STOP)
        assert read32(target, 0x20) & 1
        move(target, RUNNING)
        wait_for(lambda: not read32(target, 0x20) & 1)
        assert read32(target, 0x08) == 5040
        assert read32(target, 0x04) == 0xFFFF_FFFF - 0x1234
        assert read_config(target, 0x3C, 1) == 0x0B
        assert read_config(target, 0x04, 2) & BUS_MASTER
        assert read32(source, 0x20) & 1  # the old one stays stopped


def test_a_driver_does_not_notice(way: str) -> None:
    """The driver's memory and interrupts are announced to the new device, as a hypervisor would do it."""
    old, new = Edu(delay=(0.0, 0.0)), Edu(delay=(0.0, 0.0))
    with opened(old, way) as first, opened(new, way) as second:
        first.bus_master = True
        driver = EduDriver(first)
        with first.dma.allocate(PAGE) as buffer:
            buffer[:4] = (1, 2, 3, 4)
            driver.load(buffer.iova, 4)
        assert isinstance(first.io, MigrationStream)
        assert isinstance(second.io, MigrationStream)
        move(first.io, STOP_COPY)
        move(second.io, RESUMING)
        second.io.migration_write(drain(first.io))
        move(second.io, RUNNING)
        driver = EduDriver(second)
        with second.dma.allocate(PAGE) as buffer:
            driver.store(buffer.iova, 4)
            assert buffer[:4].tolist() == [1, 2, 3, 4]


def test_precopy_sends_memory_first_and_what_changed_afterwards(way: str) -> None:
    old, new = Saved(), Saved()
    with reach(old, way) as source, reach(new, way) as target:
        old.memories[2].view[0:4] = b"1111"
        old.memories[2].view[0x3000:0x3004] = b"gone"
        move(source, PRE_COPY)
        early = drain(source)
        assert drain(source) == b""
        write32(source, 0, 1)  # it runs
        old.memories[2].view[0x1000:0x1004] = b"2222"
        old.memories[2].view[0x3000:0x3004] = bytes(4)
        old.value = b"second"
        move(source, STOP_COPY)
        late = drain(source)
        assert len(early) > 2 * PAGE
        assert late.count(b"1111") == 0
        new.memories[2].view[0x2000:0x2004] = b"junk"
        move(target, RESUMING)
        assert isinstance(target, MigrationStream)
        target.migration_write(early + late)
        move(target, RUNNING)
    assert new.value == b"second"
    assert bytes(new.memories[2].view) == bytes(old.memories[2].view)


ARCS = {
    (STOP, RUNNING): [],
    (RUNNING, STOP_COPY): [],
    (RUNNING, RESUMING): [],
    (PRE_COPY, STOP): [],
    (STOP_COPY, RUNNING): [],
    (PRE_COPY, RESUMING): [],
    (STOP_COPY, RESUMING): [],
    (PRE_COPY, STOP_COPY): [],
    (RUNNING, PRE_COPY): [],
    (STOP, PRE_COPY): [],
}


@pytest.mark.parametrize(("start", "end"), list(ARCS))
def test_ways_between_states(start: int, end: int) -> None:
    io, _ = connect(Edu())
    with io:
        move(io, start)
        assert move(io, end) == end
        assert state(io) == end


@pytest.mark.parametrize(
    ("start", "end"), [(STOP_COPY, PRE_COPY), (RUNNING, ERROR), (RUNNING, 5), (STOP, 7), (RUNNING, 99)]
)
def test_ways_that_there_are_not(start: int, end: int, way: str) -> None:
    with reach(Edu(), way) as io:
        move(io, start)
        with refused(errno.EINVAL):
            move(io, end)
        assert state(io) == start


def test_stopped_means_that_nothing_happens(way: str) -> None:
    card = Edu(delay=(0.0, 0.0))
    with reach(card, way) as io:
        move(io, STOP)
        write32(io, 0x08, 5)
        assert not card.engine.step() if card.engine.manual else card.engine.pending == 1
        assert read32(io, 0x20) & 1
        move(io, RUNNING)
        wait_for(lambda: read32(io, 0x08) == 120)


def test_a_reset_ends_a_migration(way: str) -> None:
    device = Saved()
    with reach(device, way) as io:
        move(io, STOP_COPY)
        io.reset()
        assert state(io) == RUNNING
        done: list[int] = []
        device.later(lambda: done.append(1), delay=0.0)
        wait_for(lambda: done)


def test_reading_and_writing_in_the_wrong_state(way: str) -> None:
    with reach(Saved(), way) as io:
        assert isinstance(io, MigrationStream)
        for wrong in (RUNNING, STOP, RESUMING):
            move(io, wrong)
            with refused(errno.EINVAL):
                io.migration_read(16)
        for wrong in (RUNNING, STOP, STOP_COPY, PRE_COPY):
            io.reset()
            move(io, wrong)
            with refused(errno.EINVAL):
                io.migration_write(b"data")


def saved() -> bytes:
    io, _ = connect(Edu())
    with io:
        move(io, STOP_COPY)
        return drain(io)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:-12],  # without its end
        lambda data: data + data[-12:],
        lambda data: data[:3] + b"x" + data[4:],
        lambda data: data.replace(b"edu", b"foo"),
        lambda data: data[:40] + data[-12:],
        lambda data: data.replace(b"\x34\x12\xe8\x11", b"\x34\x12\xe8\x12"),  # another function
        lambda data: data[:40] + struct.pack("=III", 1, 0, 4) + b"1234" + data[40:],  # memory that it has not
        lambda data: data[:40] + struct.pack("=III", 9, 0, 0) + data[40:],
        lambda data: data[:40] + struct.pack("=III", 2, 0, 0xFFFF_FFFF) + data[40:],
    ],
)
def test_what_is_loaded_is_checked(change: Any) -> None:
    io, _ = connect(Edu())
    with io:
        write32(io, 4, 0x55)
        move(io, RESUMING)
        io.migration_write(change(saved()))
        with refused(errno.EINVAL):
            move(io, RUNNING)
        assert state(io) == RESUMING
        assert read32(io, 4) == 0xFFFF_FFAA  # nothing has changed


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_stream_is_loaded_or_refused(data: st.DataObject) -> None:
    stream = bytearray(saved())
    for _ in range(data.draw(st.integers(0, 5))):
        at = data.draw(st.integers(0, len(stream) - 1))
        stream[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    io, _ = connect(Edu())
    with io:
        move(io, RESUMING)
        io.migration_write(bytes(stream))
        try:
            move(io, STOP)
        except VfioError:
            assert state(io) == RESUMING
        read32(io, 0)


@settings(max_examples=60)
@given(st.lists(st.sampled_from([STOP, RUNNING, STOP_COPY, RESUMING, PRE_COPY]), max_size=12))
def test_any_walk_through_the_states(states: list[int]) -> None:
    """Against the specification's rule: the shortest way whose inner states save nothing."""
    arcs = {
        RUNNING: {STOP, PRE_COPY},
        STOP: {RUNNING, STOP_COPY, RESUMING},
        STOP_COPY: {STOP},
        RESUMING: {STOP},
        PRE_COPY: {RUNNING, STOP_COPY},
    }

    def reachable(start: int, end: int) -> bool:
        if (start, end) == (STOP_COPY, PRE_COPY):
            return False
        queue, seen = deque([start]), {start}
        while queue:
            here = queue.popleft()
            if here == end:
                return True
            if here == start or here not in (STOP_COPY, PRE_COPY):
                queue.extend(arcs[here] - seen)
                seen |= arcs[here]
        return False

    device = Saved()
    io, _ = connect(device)
    with io:
        now = RUNNING
        for wanted in states:
            # what was received is nothing, so RESUMING can only be left by a reset
            if not reachable(now, wanted) or (now == RESUMING and wanted != RESUMING):
                with refused(errno.EINVAL):
                    move(io, wanted)
                if now == RESUMING:
                    io.reset()
                    now = RUNNING
            else:
                move(io, wanted)
                now = wanted
            assert state(io) == now


# --- DMA logging -----------------------------------------------------------------------------------------------------


def start_log(io: DeviceIo, *ranges: tuple[int, int], page: int = PAGE) -> int:
    data = struct.pack("=QII", page, len(ranges), 0) + b"".join(struct.pack("=QQ", *one) for one in ranges)
    answer = io.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, SET, data)
    return int(struct.unpack_from("=Q", answer)[0])


def report(io: DeviceIo, iova: int, size: int, page: int = PAGE) -> list[int]:
    answer = io.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, GET, struct.pack("=QQQ", iova, size, page))
    assert struct.unpack_from("=QQQ", answer) == (iova, size, page)
    bits = int.from_bytes(answer[24:], "little")
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def test_the_log_knows_what_dma_wrote(way: str) -> None:
    card = Edu(delay=(0.0, 0.0))
    with opened(card, way) as device:
        device.bus_master = True
        driver = EduDriver(device)
        with device.dma.allocate(16 * PAGE) as shared, mmap.mmap(-1, PAGE) as other:
            plain = device.dma.map(other)  # by messages, where there is a socket
            driver.store(shared.iova, 4)  # before the log
            assert start_log(device.io, page=1000) == PAGE  # the device takes what it can
            driver.load(shared.iova + 2 * PAGE, 4)  # reads are not logged
            driver.store(shared.iova + 5 * PAGE - 2, 4)
            driver.store(plain.iova, 1)
            assert report(device.io, shared.iova, 16 * PAGE) == [4, 5]
            assert report(device.io, shared.iova, 16 * PAGE) == []  # a report clears
            assert report(device.io, plain.iova, PAGE) == [0]
            device.io.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, SET, b"")
            with refused(errno.EINVAL):
                report(device.io, shared.iova, PAGE)
            plain.unmap()


def test_ranges_and_page_sizes() -> None:
    card = Edu()
    io, mapper = connect(card)
    book = IovaSpace("test")
    book.set_usable([(0, (1 << 64) - 1)], PAGE)
    mapper.attach_book(book)
    memory = mmap.mmap(-1, 64 * PAGE)
    book.map(vfiopy.dma.memory_of(memory, Prot.RW), _address(memory), 64 * PAGE, 3, 0x10_0000)
    with io:
        set_command(io, on=BUS_MASTER)
        assert start_log(io, (0x10_0000, 8 * PAGE), (0x12_0000, PAGE), page=8192) == 8192
        for at in (0x10_0000, 0x10_8000, 0x12_0000, 0x12_1000):
            card.dma_write(at, b"x")
        assert report(io, 0x10_0000, 64 * PAGE) == [0, 1, 32, 33]  # in pages of 8 KiB, shown as two each
        card.dma_write(0x10_3000, b"x")
        assert report(io, 0x10_0000, 64 * PAGE, 16384) == [0]
        card.dma_write(0x10_2000, b"x")
        assert report(io, 0x10_3000, PAGE) == [0]  # half a page of the log: what the other half has is kept
        assert report(io, 0x10_2000, 2 * PAGE) == [0, 1]
        assert report(io, 0x10_2000, 2 * PAGE) == []
        for bad in ((PAGE, 0, PAGE), (0, PAGE, 1000), (0, PAGE, 2048), ((1 << 64) - PAGE, 2 * PAGE, PAGE)):
            with refused(errno.EINVAL):
                report(io, *bad)
        with refused(errno.EINVAL):
            start_log(io)  # it is on already
        with refused(errno.EINVAL):
            report(io, 0, 1 << 50)
        io.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, SET, b"")
        for bad_start in (b"", struct.pack("=QII", PAGE, 1, 0), struct.pack("=QIIQQ", PAGE, 1, 0, 0, 0)):
            with refused(errno.EINVAL):
                io.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, SET, bad_start)
        assert start_log(io, page=1000) == PAGE
    mapper.close()


def _address(memory: mmap.mmap) -> int:
    import ctypes  # noqa: PLC0415

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
