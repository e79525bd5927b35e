"""DMA_UNMAP that asks which pages the device has written, at both ends."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_support import BUS_MASTER, MEMORY, Everything
from vfio_user_support import PAGE, RawClient, memfd, nothing_left, raw_client, serving

import vfiopy
from vfiopy import uapi, vfio_user
from vfiopy.backend import Prot
from vfiopy.drivers.edu import EduDriver
from vfiopy.emulated import Edu
from vfiopy.errors import ProtocolError, VfioError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.wire import Command, UnmapFlag

BASE = 0x10_0000
DIRTY = int(UnmapFlag.GET_DIRTY_BITMAP)
SET, GET = uapi.VFIO_DEVICE_FEATURE_SET, uapi.VFIO_DEVICE_FEATURE_GET
REPORT = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
START, STOP = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
EVERYTHING = struct.pack("=QII", PAGE, 0, 0)


@pytest.fixture
def device() -> Everything:
    return Everything()


@pytest.fixture(autouse=True)
def _nothing_left(device: Everything) -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def server(device: Everything) -> Iterator[Server]:
    with serving(device) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    with raw_client(server) as connected:
        connected.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        yield connected


def start_log(client: RawClient) -> Any:
    return client.ask(Command.FEATURE, wire.FEATURE.pack(24, SET | START) + EVERYTHING)


def question(
    iova: int, size: int, *, page: int = PAGE, length: int = 8, argsz: int | None = None, flags: int = DIRTY
) -> bytes:
    head = wire.DMA_UNMAP.pack(40 + length if argsz is None else argsz, flags, iova, size)
    return head + wire.DIRTY_BITMAP.pack(page, length)


def pages(reply: bytes) -> list[int]:
    bits = int.from_bytes(reply[40:], "little")
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def test_the_reply_says_what_was_written(client: RawClient, device: Everything) -> None:
    fd = memfd(70 * PAGE)
    client.fds.append(fd)
    client.map(BASE, 70 * PAGE, fd)
    device.dma_write(BASE, b"before the log")
    start_log(client)
    device.dma_write(BASE + 3 * PAGE - 1, b"12")
    device.dma_read(BASE + 8 * PAGE, 4)
    device.dma_write(BASE + 69 * PAGE, b"1")
    asked = question(BASE, 70 * PAGE, length=24)  # one word more than it needs
    reply = client.ask(Command.DMA_UNMAP, asked)
    assert reply[:40] == asked
    assert len(reply) == 64
    assert pages(reply) == [2, 3, 69]
    # it is unmapped, and what was told is told no more
    client.map(BASE, 70 * PAGE)
    assert pages(client.ask(Command.DMA_UNMAP, question(BASE, 70 * PAGE, page=1 << 20))) == []


def test_what_is_written_until_the_very_end_is_told(client: RawClient, device: Everything) -> None:
    fd = memfd(4 * PAGE)
    client.fds.append(fd)
    client.map(BASE, 4 * PAGE, fd)
    start_log(client)
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with device.dma(BASE + PAGE, 8, Prot.RW) as views:
            entered.set()
            assert leave.wait(10)
            views[0][:] = b"at last!"

    worker = threading.Thread(target=work)
    worker.start()
    assert entered.wait(5)
    number = client.send(Command.DMA_UNMAP, question(BASE, 4 * PAGE))
    leave.set()
    assert pages(bytes(client.reply(number).payload)) == [1]
    worker.join()


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        (question(BASE, PAGE, page=0), "EINVAL"),
        (question(BASE, PAGE, page=2048), "EINVAL"),
        (question(BASE, PAGE, page=3 * PAGE), "EINVAL"),
        (question(BASE, PAGE, length=0), "EINVAL"),
        (question(BASE, PAGE, length=12), "EINVAL"),
        (question(BASE, 65 * PAGE), "EINVAL"),
        (question(BASE, PAGE, argsz=47), "EINVAL"),
        (question(BASE, PAGE, length=(1 << 20) + 8), "E2BIG"),
        (question(BASE, PAGE, length=(1 << 64) - 8, argsz=0xFFFF_FFFF), "E2BIG"),
        (question(0, 0, flags=DIRTY | UnmapFlag.ALL), "EINVAL"),
        (question(BASE, PAGE, flags=0), "EINVAL"),
        (question(BASE, PAGE)[:24], "EINVAL"),
        (question(BASE, 0), "EINVAL"),
        (question(BASE, PAGE, flags=DIRTY | 8), "EINVAL"),
    ],
)
def test_questions_that_cannot_be(client: RawClient, device: Everything, asked: bytes, error: str) -> None:
    client.map(BASE, PAGE)
    start_log(client)
    assert client.ask(Command.DMA_UNMAP, asked) == error
    assert client.map(BASE, PAGE) == "EEXIST"  # nothing was unmapped
    assert not device.faults


def test_without_the_log_nothing_is_unmapped(server: Server) -> None:
    with raw_client(server) as client:
        client.map(BASE, PAGE)
        assert client.ask(Command.DMA_UNMAP, question(BASE, PAGE)) == "EINVAL"
        assert isinstance(start_log(client), bytes)
        client.ask(Command.FEATURE, wire.FEATURE.pack(8, SET | STOP))
        assert client.ask(Command.DMA_UNMAP, question(BASE, PAGE)) == "EINVAL"
        assert client.map(BASE, PAGE) == "EEXIST"
        assert isinstance(start_log(client), bytes)


def test_the_log_ends_with_its_client(server: Server) -> None:
    for _ in range(2):
        with raw_client(server) as client:
            assert isinstance(start_log(client), bytes)  # EINVAL where it is on
        while server.connected:
            threading.Event().wait(0.001)


def report(client: RawClient, argsz: int, length: int) -> Any:
    payload = wire.FEATURE.pack(argsz, GET | REPORT) + wire.DMA_REPORT.pack(BASE, length, PAGE)
    return client.ask(Command.FEATURE, payload)


def test_a_report_that_does_not_fit_forgets_nothing(client: RawClient, device: Everything) -> None:
    fd = memfd(PAGE)
    client.fds.append(fd)
    client.map(BASE, PAGE, fd)
    start_log(client)
    device.dma_write(BASE, b"1")
    for argsz in (8, 32, 32 + 7):
        assert report(client, argsz, PAGE) == wire.FEATURE.pack(40, GET | REPORT)
    assert report(client, 40, PAGE)[32:] == bytes([1]) + bytes(7)
    assert report(client, 40, PAGE)[32:] == bytes(8)
    assert report(client, 7, PAGE) == "EINVAL"
    assert report(client, 0xFFFF_FFFF, PAGE << 24) == "EINVAL"  # a bitmap of more than 1 MiB


def test_a_large_report_reaches_the_client(tmp_path: Path) -> None:
    card = Edu(delay=(0.0, 0.0))
    with serving(card, tmp_path / "socket"), vfiopy.open(f"vfio-user:{tmp_path / 'socket'}") as far:
        far.bus_master = True
        with far.dma.allocate(PAGE) as buffer:
            far.io.feature(START, SET, EVERYTHING)
            EduDriver(far).store(buffer.iova, 16)
            length = 1 << 30  # 32 KiB of bitmap: more than the client's first guess of a reply's size
            answer = far.io.feature(REPORT, GET, wire.DMA_REPORT.pack(buffer.iova, length, PAGE))
            assert answer[24:] == b"\1" + bytes((32 << 10) - 1)


def test_the_clients_side(tmp_path: Path) -> None:
    card = Edu(delay=(0.0, 0.0))
    told: list[tuple[int, int, int, bytes]] = []
    path = tmp_path / "socket"
    space = vfiopy.AddressSpace("dirty")
    with serving(card, path), space:
        io, mapper = vfio_user.connect(path)
        with vfiopy.Device(io, mapper, space, owns_space=False) as device:
            device.bus_master = True
            driver = EduDriver(device)
            io.feature(START, SET, EVERYTHING)
            mapper.tell_dirty(lambda *words: told.append(words))
            with device.dma.allocate(8 * PAGE) as buffer:
                driver.store(buffer.iova + 5 * PAGE, 16)
                iova = buffer.iova
            assert told == [(iova, 8 * PAGE, PAGE, bytes([1 << 5]) + bytes(7))]
            io.feature(STOP, SET, b"")
            kept = device.dma.allocate(PAGE)
            with pytest.raises(VfioError):
                kept.free()
            mapper.tell_dirty(None)
            kept.free()
            assert len(told) == 1


def test_large_ranges_have_large_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    mapper = vfio_user.VfioUserMapper("test")
    told: list[tuple[int, int, int, bytes]] = []
    mapper.tell_dirty(lambda *words: told.append(words))
    requests: list[bytes] = []

    class Peer:
        alive = True
        peer = vfio_user.version.Capabilities(max_data_xfer_size=64)
        cut = 0

        def request(self, command: Command, *parts: bytes, detail: str) -> Any:
            requests.append(b"".join(parts))
            length = wire.DIRTY_BITMAP.unpack(parts[1]).size
            return type("Reply", (), {"payload": bytearray(40 + length - self.cut)})

    peer = Peer()
    monkeypatch.setattr(mapper, "_connection", peer)
    mapper.unmap(BASE, 1 << 30)  # 64 bytes are 512 bits
    assert wire.DIRTY_BITMAP.unpack(requests[0], 24) == (2 << 20, 64)
    assert told == [(BASE, 1 << 30, 2 << 20, bytes(64))]
    peer.cut = 1
    with pytest.raises(ProtocolError):
        mapper.unmap(BASE, 1 << 30)


def test_a_log_that_fails_when_all_is_done_says_everything(
    server: Server, client: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    """The memory is unmapped by then: an error would say that it is not."""
    client.map(BASE, 5 * PAGE)
    start_log(client)
    server.io.feature(STOP, SET, b"")  # somebody else's doing
    assert pages(client.ask(Command.DMA_UNMAP, question(BASE, 5 * PAGE, length=16))) == [0, 1, 2, 3, 4]
    assert isinstance(client.map(BASE, 5 * PAGE), bytes)
    assert "dirty" in caplog.text
