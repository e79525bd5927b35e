"""A served device's DMA: into shared files, by messages, and while the client takes the memory away."""

from __future__ import annotations

import gc
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from emulated_support import BUS_MASTER, MEMORY, Everything, wait_for
from vfio_user_support import PAGE, RawClient, memfd, nothing_left, open_fds, raw_client, serving

from vfiopy.backend import Prot
from vfiopy.errors import DeviceGoneError, NotMappedError, StateError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.session import Limits
from vfiopy.vfio_user.wire import Command, Flag, UnmapFlag

LIMITS = Limits(unmap_timeout=0.5, request_timeout=2.0)
BASE = 0x10_0000


@pytest.fixture
def device() -> Everything:
    return Everything()


@pytest.fixture(autouse=True)
def _nothing_left(device: Everything) -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def server(device: Everything) -> Iterator[Server]:
    with serving(device, limits=LIMITS) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    with raw_client(server) as connected:
        connected.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        yield connected


class Work(threading.Thread):
    """What a device does on its own, with what came of it."""

    def __init__(self, call: object, *arguments: object) -> None:
        super().__init__(daemon=True)
        self.call, self.arguments = call, arguments
        self.result: object = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call(*self.arguments)  # type: ignore[operator]
        except Exception as error:
            self.result = error

    def outcome(self) -> object:
        self.join(10)
        assert not self.is_alive()
        return self.result


# --- shared files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def guest() -> Iterator[tuple[int, mmap.mmap]]:
    fd = memfd(64 * PAGE)
    with mmap.mmap(fd, 64 * PAGE) as memory:
        yield fd, memory
    os.close(fd)


def mapped_files() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:guest" in line]


def test_memory_that_is_shared(client: RawClient, device: Everything, guest: tuple[int, mmap.mmap]) -> None:
    fd, memory = guest
    assert client.map(BASE, 2 * PAGE, fd, 4 * PAGE) == b""
    device.dma_write(BASE + PAGE - 2, b"abcd")
    assert memory[5 * PAGE - 2 : 5 * PAGE + 2] == b"abcd"
    memory[4 * PAGE : 4 * PAGE + 4] = b"1234"
    assert device.dma_read(BASE, 4) == b"1234"
    assert client.unmap(BASE, 2 * PAGE) == wire.DMA_UNMAP.pack(24, 0, BASE, 2 * PAGE)
    with pytest.raises(NotMappedError):
        device.dma_read(BASE, 4)


def test_read_only_memory(client: RawClient, device: Everything, guest: tuple[int, mmap.mmap]) -> None:
    assert client.map(BASE, PAGE, guest[0], flags=1) == b""
    assert device.dma_read(BASE, 4) == bytes(4)
    with pytest.raises(NotMappedError):
        device.dma_write(BASE, b"no")


def test_one_file_is_mapped_once_and_its_fds_are_closed(
    client: RawClient, device: Everything, server: Server, guest: tuple[int, mmap.mmap]
) -> None:
    fd, memory = guest
    fds, before = len(open_fds()), len(mapped_files())
    for number in range(1000):  # as QEMU does for each page that its IOMMU maps
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        assert client.map(BASE + number * PAGE, PAGE, again, number % 64 * PAGE) == b""
        os.close(again)
    assert len(mapped_files()) == before + 1
    assert len(open_fds()) == fds
    assert len(server._space.files) == 1
    device.dma_write(BASE + 999 * PAGE, b"last")
    assert memory[999 % 64 * PAGE :][:4] == b"last"
    assert client.unmap(0, 0, int(UnmapFlag.ALL)) == wire.DMA_UNMAP.pack(24, 2, 0, 0)
    gc.collect()
    assert len(mapped_files()) == before
    assert len(server._space.files) == 0


def test_a_file_that_grows(client: RawClient, device: Everything) -> None:
    fd = memfd(PAGE)
    client.map(BASE, PAGE, fd)
    os.ftruncate(fd, 2 * PAGE)
    assert client.map(BASE + PAGE, PAGE, fd, PAGE) == b""
    device.dma_write(BASE + PAGE - 2, b"abcd")
    assert os.pread(fd, 4, PAGE - 2) == b"abcd"
    os.close(fd)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_file_that_may_shrink_is_not_mapped_unless_asked_for(device: Everything, trusted: bool) -> None:
    fd = memfd(2 * PAGE, sealed=False)
    with serving(device, limits=Limits(trust_files=trusted)) as server, raw_client(server) as client:
        client.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        assert client.map(BASE, 2 * PAGE, fd) == b""
        assert bool(mapped_files()) == trusted
        device.dma_write(BASE + PAGE - 2, b"abcd")
        assert os.pread(fd, 4, PAGE - 2) == b"abcd"
        assert device.dma_read(BASE + PAGE - 1, 2) == b"bc"
        if not trusted:
            os.ftruncate(fd, PAGE)
            with pytest.raises(NotMappedError, match="shorter"):
                device.dma_read(BASE + PAGE, 4)
    os.close(fd)


def test_a_file_that_is_to_be_read_and_written(client: RawClient, device: Everything) -> None:
    fd = memfd(PAGE)
    assert client.map(BASE, PAGE, fd, flags=3 | 8) == b""
    assert not mapped_files()
    device.dma_write(BASE, b"ok")
    assert os.pread(fd, 2, 0) == b"ok"
    os.close(fd)


def test_files_that_are_refused(client: RawClient, tmp_path: Path) -> None:
    fd = memfd(2 * PAGE)
    for offset, size in ((PAGE, 2 * PAGE), (1 << 40, PAGE), ((1 << 64) - PAGE, PAGE), (12, PAGE)):
        assert client.map(BASE, size, fd, offset) == "EINVAL"
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert client.map(BASE, PAGE, reader) == "EACCES"
    assert client.map(BASE, PAGE, reader, flags=1) == b""
    writer = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    os.ftruncate(writer, PAGE)
    assert client.map(2 * BASE, PAGE, writer, flags=2) == "EACCES"
    left, right = socket.socketpair()
    assert client.map(2 * BASE, PAGE, left.fileno()) == "EINVAL"
    folder = os.open(tmp_path, os.O_RDONLY)
    assert client.map(2 * BASE, PAGE, folder, flags=1) == "EINVAL"
    huge = os.memfd_create("huge")
    os.ftruncate(huge, 1 << 47)
    assert client.map(2 * BASE, PAGE, huge) == "EINVAL"
    for one in (fd, reader, writer, folder, huge):
        os.close(one)
    left.close()
    right.close()


@pytest.mark.parametrize(
    ("address", "size", "flags"),
    [
        (BASE, 0, 3),
        (BASE + 1, PAGE, 3),
        (BASE, PAGE + 1, 3),
        ((1 << 64) - PAGE, 2 * PAGE, 3),
        (BASE, PAGE, 0),
        (BASE, PAGE, 16 | 3),
    ],
)
def test_maps_that_cannot_be(client: RawClient, address: int, size: int, flags: int) -> None:
    assert client.map(address, size, flags=flags) == "EINVAL"


def test_the_last_page_can_be_mapped(client: RawClient) -> None:
    last = (1 << 64) - PAGE
    assert client.map(last, PAGE) == b""
    assert client.map(0, PAGE) == b""
    assert client.unmap(last, PAGE) == wire.DMA_UNMAP.pack(24, 0, last, PAGE)


def test_overlaps(client: RawClient) -> None:
    assert client.map(BASE, 4 * PAGE) == b""
    for address, size in ((BASE, 4 * PAGE), (BASE + PAGE, PAGE), (BASE - PAGE, 2 * PAGE), (BASE + 3 * PAGE, 2 * PAGE)):
        assert client.map(address, size) == "EEXIST"


def test_unmaps(client: RawClient) -> None:
    client.map(BASE, 4 * PAGE)
    assert client.unmap(BASE, 2 * PAGE) == "ENOENT"  # cuts it in two
    assert client.unmap(BASE, 0) == "EINVAL"
    assert client.unmap((1 << 64) - PAGE, 2 * PAGE) == "EINVAL"
    assert client.unmap(0, PAGE, int(UnmapFlag.ALL)) == "EINVAL"
    assert client.unmap(BASE, 4 * PAGE, 4) == "EINVAL"
    # nothing there: as for type1, that is fine
    assert client.unmap(1 << 40, PAGE) == wire.DMA_UNMAP.pack(24, 0, 1 << 40, PAGE)
    assert client.unmap(BASE - PAGE, 6 * PAGE) == wire.DMA_UNMAP.pack(24, 0, BASE - PAGE, 6 * PAGE)
    assert client.map(BASE, PAGE) == b""


def test_too_many_maps(device: Everything) -> None:
    with serving(device, limits=Limits(max_dma_maps=16)) as server, raw_client(server) as client:
        assert b'"max_dma_maps":16' in client.version
        assert [client.map(number * PAGE, PAGE) for number in range(17)] == [b""] * 16 + ["ENOSPC"]


# --- by messages -----------------------------------------------------------------------------------------------------


def test_reading_by_message(client: RawClient, device: Everything) -> None:
    client.map(BASE, PAGE)
    work = Work(device.dma_read, BASE + 16, 8)
    request = client.request()
    assert (request.command, request.payload) == (Command.DMA_READ, wire.DMA_ACCESS.pack(BASE + 16, 8))
    client.answer(request, bytes(request.payload) + b"12345678")
    assert work.outcome() == b"12345678"


@pytest.mark.parametrize("reply", [0, 12, 16])
def test_writing_by_message(client: RawClient, device: Everything, reply: int) -> None:
    client.map(BASE, PAGE)
    work = Work(device.dma_write, BASE, b"abcd")
    request = client.request()
    assert (request.command, request.payload) == (Command.DMA_WRITE, wire.DMA_ACCESS.pack(BASE, 4) + b"abcd")
    client.answer(request, bytes(request.payload[:reply]))
    assert work.outcome() is None


def test_large_accesses_are_cut(server: Server, device: Everything) -> None:
    with raw_client(server, greet=False) as client:
        client.ask(Command.VERSION, b'\0\0\0\0{"capabilities":{"max_data_xfer_size":4096}}\0')
        client.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        client.map(BASE, 4 * PAGE)
        work = Work(device.dma_read, BASE, 2 * PAGE + 4)
        for at, size in ((0, PAGE), (PAGE, PAGE), (2 * PAGE, 4)):
            request = client.request()
            assert wire.DMA_ACCESS.unpack(request.payload) == (BASE + at, size)
            client.answer(request, bytes(request.payload) + bytes([size & 0xFF]) * size)
        assert work.outcome() == bytes(2 * PAGE) + b"\4" * 4


def test_a_client_that_refuses_is_a_fault(client: RawClient, device: Everything) -> None:
    client.map(BASE, PAGE)
    for error in (14, 0):  # an error may come without a number
        work = Work(device.dma_read, BASE, 8)
        request = client.request()
        client.channel.send(request.id, request.command, 0x21, error=error)
        assert isinstance(work.outcome(), NotMappedError)
    assert len(device.faults) == 2


def test_a_client_that_does_not_answer_is_a_fault(device: Everything) -> None:
    limits = Limits(request_timeout=0.1)
    with serving(device, limits=limits) as server, raw_client(server) as client:
        client.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        client.map(BASE, PAGE)
        work = Work(device.dma_read, BASE, 8)
        late = client.request()
        assert "within 0.1 s" in str(work.outcome())
        client.answer(late, bytes(late.payload) + bytes(8))  # is dropped
        assert client.read(7, 0, 2) == b"\x36\x1b"
        client.answer(late, bytes(late.payload) + bytes(8))  # but only once
        assert client.gone()


@pytest.mark.parametrize(
    "payload", [b"", bytes(16), wire.DMA_ACCESS.pack(BASE, 9) + bytes(8), wire.DMA_ACCESS.pack(BASE, 8) + bytes(9)]
)
def test_a_wrong_answer_ends_it(client: RawClient, device: Everything, payload: bytes) -> None:
    client.map(BASE, PAGE)
    work = Work(device.dma_read, BASE, 8)
    client.answer(client.request(), payload)
    assert client.gone()
    assert isinstance(work.outcome(), NotMappedError)


def test_an_answer_to_another_command_ends_it(client: RawClient, device: Everything) -> None:
    client.map(BASE, PAGE)
    work = Work(device.dma_read, BASE, 8)
    request = client.request()
    client.channel.send(request.id, Command.DMA_WRITE, 1, [bytes(16)])
    assert client.gone()
    assert isinstance(work.outcome(), NotMappedError)


def test_a_client_that_goes_in_the_middle(server: Server, client: RawClient, device: Everything) -> None:
    client.map(BASE, PAGE)
    work = Work(device.dma_read, BASE, 8)
    client.request()
    client.channel.shut()
    assert isinstance(work.outcome(), NotMappedError)
    wait_for(lambda: not server.connected)


def test_registers_are_served_while_a_dma_waits(client: RawClient, device: Everything) -> None:
    client.map(BASE, PAGE)
    results: list[bytes] = []
    device.later(lambda: results.append(device.dma_read(BASE, 8)), delay=0.0)
    request = client.request()
    assert client.read(0, 0, 4) == b"\x88\x77\x66\x55"  # QEMU: reads a register first, serves DMA afterwards
    client.answer(request, bytes(request.payload) + b"12345678")
    wait_for(lambda: results == [b"12345678"])


def test_the_pump_itself_cannot_wait(client: RawClient, device: Everything, server: Server) -> None:
    client.map(BASE, PAGE)
    raised: list[Exception] = []

    def read(bar: int, offset: int, width: int) -> int:
        try:
            device.host.read(BASE, 4)
        except StateError as error:
            raised.append(error)
        return 0

    device.read = read  # type: ignore[method-assign]
    assert client.read(0, 0, 4) == bytes(4)
    assert "cannot wait" in str(raised[0])


# --- unmapping what is in use ----------------------------------------------------------------------------------------


def test_unmapping_ends_a_message_under_way_at_once(client: RawClient, device: Everything) -> None:
    client.map(BASE, PAGE)
    client.map(2 * BASE, PAGE)
    work, other = Work(device.dma_read, BASE, 8), Work(device.dma_read, 2 * BASE, 8)
    requests = sorted((client.request(), client.request()), key=lambda one: wire.DMA_ACCESS.unpack(one.payload).address)
    begin = time.monotonic()
    assert client.unmap(BASE, PAGE) == wire.DMA_UNMAP.pack(24, 0, BASE, PAGE)  # although the DMA has no answer
    assert time.monotonic() - begin < LIMITS.unmap_timeout
    assert isinstance(work.outcome(), NotMappedError)
    for request in requests:  # the answers may come all the same
        client.answer(request, bytes(request.payload) + b"12345678")
    assert other.outcome() == b"12345678"
    assert client.read(7, 0, 2) == b"\x36\x1b"


def hold(device: Everything, entered: threading.Event, leave: threading.Event) -> None:
    with device.dma(BASE, 8, Prot.RW) as views:
        entered.set()
        assert leave.wait(10)
        views[0][:] = b"in time!"


def test_unmapping_waits_for_views_and_serves_in_order(
    client: RawClient, device: Everything, guest: tuple[int, mmap.mmap]
) -> None:
    fd, memory = guest
    client.map(BASE, PAGE, fd)
    client.map(2 * BASE, PAGE)
    entered, leave = threading.Event(), threading.Event()
    work = Work(hold, device, entered, leave)
    assert entered.wait(5)
    number = client.send(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, 0, BASE, PAGE))
    second = client.send(Command.REGION_READ, wire.REGION_ACCESS.pack(0, 7, 2))
    other = Work(device.dma_read, 2 * BASE, 8)  # answers are taken meanwhile
    request = client.request()
    client.answer(request, bytes(request.payload) + b"12345678")
    assert other.outcome() == b"12345678"
    with pytest.raises(NotMappedError):  # no new pins
        device.dma_read(BASE, 4)
    leave.set()
    assert not client.reply(number).is_error
    assert client.reply(second).payload[16:] == b"\x36\x1b"
    assert work.outcome() is None
    assert memory[:8] == b"in time!"


def test_unmapping_gives_up_in_time(client: RawClient, device: Everything, guest: tuple[int, mmap.mmap]) -> None:
    client.map(BASE, PAGE, guest[0])
    entered, leave = threading.Event(), threading.Event()
    work = Work(hold, device, entered, leave)
    assert entered.wait(5)
    assert client.unmap(BASE, PAGE) == "EBUSY"
    leave.set()
    assert work.outcome() is None
    assert client.unmap(BASE, PAGE) == wire.DMA_UNMAP.pack(24, 0, BASE, PAGE)


def test_a_client_that_floods_while_unmap_waits(device: Everything, guest: tuple[int, mmap.mmap]) -> None:
    with serving(device, limits=Limits(unmap_timeout=10.0)) as server, raw_client(server) as client:
        client.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        client.map(BASE, PAGE, guest[0])
        entered, leave = threading.Event(), threading.Event()
        work = Work(hold, device, entered, leave)
        assert entered.wait(5)
        client.send(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, 0, BASE, PAGE))
        for _ in range(20):
            client.send(Command.REGION_WRITE, bytes(1 << 20))
        with pytest.raises(DeviceGoneError):
            wait_for(client.channel.flush)
        leave.set()
        work.outcome()


def _flood_with_nothing(client: RawClient, fd: int) -> None:
    many = wire.HEADER.pack(9, Command.RESET, 16, int(Flag.NO_REPLY), 0) * 4096
    client.socket.settimeout(5)
    for _ in range(20):
        client.socket.sendall(many)


def _flood_with_fds(client: RawClient, fd: int) -> None:
    before = len(open_fds())
    for _ in range(60):
        client.send(Command.SET_IRQS, bytes(20), [fd] * 16)
        assert len(open_fds()) < before + 400


@pytest.mark.parametrize("flood", [_flood_with_nothing, _flood_with_fds])
def test_a_client_that_floods_with_next_to_nothing(
    device: Everything, guest: tuple[int, mmap.mmap], flood: Callable[[RawClient, int], None]
) -> None:
    """Messages without payload, and fds, which are everybody's in the process, are counted too."""
    with serving(device, limits=Limits(unmap_timeout=10.0)) as server, raw_client(server) as client:
        client.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        client.map(BASE, PAGE, guest[0])
        entered, leave = threading.Event(), threading.Event()
        work = Work(hold, device, entered, leave)
        assert entered.wait(5)
        client.send(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, 0, BASE, PAGE))
        with suppress(DeviceGoneError, BrokenPipeError):  # it may be noticed before all is sent
            flood(client, guest[0])
        assert client.gone(5)
        leave.set()
        work.outcome()
