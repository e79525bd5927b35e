"""The server over real sockets, with a client that says exactly what it is told to: every command, right and wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from emulated_support import Everything, eventfd, taken, wait_for
from vfio_user_support import (
    BOOL,
    EVENTFD,
    NONE,
    PAGE,
    QEMU_VERSION,
    RawClient,
    at_once,
    memfd,
    nothing_left,
    open_fds,
    raw_client,
    serving,
)

from vfiopy import emulated
from vfiopy.backend import IrqAction
from vfiopy.emulated import Edu, Msi
from vfiopy.errors import BusyError, NotSupportedError, StateError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.wire import Command

MASK, UNMASK, TRIGGER = (int(action) for action in IrqAction)
BUS_MASTER = 4


@pytest.fixture
def device() -> Everything:
    return Everything()


@pytest.fixture(autouse=True)
def _nothing_left(device: Everything) -> Iterator[None]:
    with nothing_left(at_once):
        yield


@pytest.fixture
def server(device: Everything) -> Iterator[Server]:
    with serving(device) as started:
        yield started


@pytest.fixture
def client(server: Server) -> Iterator[RawClient]:
    with raw_client(server) as connected:
        yield connected


# --- VERSION ---------------------------------------------------------------------------------------------------------


def test_the_reply_fits_into_qemus_buffer(client: RawClient) -> None:
    assert len(client.version) <= len(QEMU_VERSION)
    assert client.version.startswith(b"\0\0\0\0{")
    assert client.version.endswith(b"}\0")


def test_version_twice(client: RawClient) -> None:
    assert client.ask(Command.VERSION, QEMU_VERSION) == "EINVAL"
    assert client.read(7, 0, 2) == b"\x36\x1b"


@pytest.mark.parametrize("version", [b"", b"\1\0\0\0{}\0", b"\0\0\0\0{", b"\0\0\0\0[]\0"])
def test_a_bad_version_ends_it(server: Server, version: bytes) -> None:
    with raw_client(server, greet=False) as client:
        assert client.ask(Command.VERSION, version) == "EINVAL"
        assert client.gone()
    with raw_client(server) as client:
        assert client.read(7, 0, 2) == b"\x36\x1b"


@pytest.mark.parametrize("command", [Command.GET_INFO, Command.RESET, Command.DMA_UNMAP])
def test_nothing_comes_before_version(server: Server, command: Command) -> None:
    with raw_client(server, greet=False) as client:
        assert client.ask(command, bytes(wire.COMMANDS[command].form.size if wire.COMMANDS[command].form else 0)) == (
            "EINVAL"
        )
        assert client.gone()


@pytest.mark.parametrize(("minor", "answer"), [(0, 0), (1, 1), (2, 2), (9, 2)])
def test_the_lower_minor_version_counts(server: Server, minor: int, answer: int) -> None:
    with raw_client(server, greet=False) as client:
        assert client.ask(Command.VERSION, struct.pack("=HH", 0, minor))[:4] == struct.pack("=HH", 0, answer)


# --- what the device is ----------------------------------------------------------------------------------------------


def test_info(client: RawClient) -> None:
    assert client.ask(Command.GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0)) == wire.DEVICE_INFO.pack(16, 3, 9, 5)


def region(client: RawClient, index: int, argsz: int = 4096) -> wire.RegionInfoRecord:
    return wire.REGION_INFO.unpack(
        client.ask(Command.GET_REGION_INFO, wire.REGION_INFO.pack(argsz, 0, index, 0, 0, 0))
    )


def test_regions(client: RawClient) -> None:
    assert region(client, 0)[1:] == (3, 0, 0, 0x1000, 0)
    assert not client.fds
    assert region(client, 2) == (40, 0xF, 2, 32, 0x4000, 0)
    assert os.fstat(client.fds[0]).st_size == 0x4000
    assert region(client, 7)[1:] == (3, 7, 0, 4096, 0)
    assert region(client, 8).size == 0


def test_a_region_that_does_not_fit_is_asked_for_again(client: RawClient) -> None:
    assert region(client, 2, 32) == (40, 0x7, 2, 0, 0x4000, 0)
    assert not client.fds


def test_irq_info(client: RawClient) -> None:
    answers = [client.ask(Command.GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, index, 0)) for index in range(5)]
    assert [wire.IRQ_INFO.unpack(answer).vectors for answer in answers] == [1, 4, 8, 1, 1]


def test_io_fds(client: RawClient) -> None:
    assert client.ask(Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(4096, 0, 0, 0)) == wire.IO_FDS.pack(16, 0, 0, 0)


@pytest.mark.parametrize(
    ("command", "payload"),
    [
        (Command.GET_INFO, wire.DEVICE_INFO.pack(15, 0, 0, 0)),
        (Command.GET_REGION_INFO, wire.REGION_INFO.pack(31, 0, 0, 0, 0, 0)),
        (Command.GET_REGION_INFO, wire.REGION_INFO.pack(4096, 0, 9, 0, 0, 0)),
        (Command.GET_REGION_INFO, wire.REGION_INFO.pack(4096, 0, 0xFFFF_FFFF, 0, 0, 0)),
        (Command.GET_IRQ_INFO, wire.IRQ_INFO.pack(15, 0, 0, 0)),
        (Command.GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, 5, 0)),
        (Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(15, 0, 0, 0)),
        (Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(16, 1, 0, 0)),
        (Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(16, 0, 0, 1)),
        (Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(16, 0, 99, 0)),
    ],
)
def test_bad_questions(client: RawClient, command: Command, payload: bytes) -> None:
    assert client.ask(command, payload) == "EINVAL"


@pytest.mark.parametrize("command", list(Command))
def test_bad_lengths(client: RawClient, command: Command) -> None:
    rule = wire.COMMANDS[command]
    fixed = rule.form.size if rule.form else 0
    bad = "EINVAL" if rule.from_client else "ENOSYS"
    if fixed:
        assert client.ask(command, bytes(fixed - 1)) == bad
    if rule.tail is wire.Tail.NONE:
        assert client.ask(command, bytes(fixed + 1)) == bad
    with eventfd() as fd:
        if not rule.fds:
            assert client.ask(command, bytes(fixed), [fd]) == bad
    assert client.read(7, 0, 2) == b"\x36\x1b"


@pytest.mark.parametrize("command", [0, 14, 19, 999])
def test_unknown_commands(client: RawClient, command: int) -> None:
    assert client.ask(command, b"whatever") == "ENOSYS"


# --- registers -------------------------------------------------------------------------------------------------------


def test_register_accesses_keep_their_width(client: RawClient, device: Everything) -> None:
    assert client.read(0, 8, 4) == b"\x88\x77\x66\x55"
    assert client.write(0, 16, b"\1\2") is None
    assert device.accesses == [("read", 0, 8, 4), ("write", 0, 16, 2, 0x0201)]


def test_accesses_that_cannot_be(client: RawClient, device: Everything) -> None:
    for index, offset, size in ((0, 0xFFF, 2), (0, 1 << 63, 4), (0, (1 << 64) - 1, 4), (1, 0, 4), (9, 0, 4)):
        assert client.read(index, offset, size) == "EINVAL"
        assert client.write(index, offset, bytes(size)) == "EINVAL"
    assert client.read(0, 0, (1 << 20) + 1) == "E2BIG"
    for wrong in (3, 5):
        assert client.ask(Command.REGION_WRITE, wire.REGION_ACCESS.pack(0, 0, wrong) + bytes(4)) == "EINVAL"
    assert client.read(0, 0, 0) == b""
    assert not device.accesses


def test_posted_writes_come_before_what_follows(client: RawClient, device: Everything) -> None:
    for value in range(50):
        client.post(0, 0, struct.pack("=I", value))
    client.post(99, 0, bytes(4))  # nobody hears of what is wrong with it
    client.read(0, 4, 4)
    assert [access[-1] for access in device.accesses] == [*range(50), 4]


def test_write_multi(client: RawClient, device: Everything) -> None:
    def pack(*writes: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
        head = wire.WRITE_MULTI.pack(len(writes) if count is None else count)
        return head + b"".join(wire.WRITE.pack(*write) for write in writes)

    two = pack((0, 0, 4, b"abcdefgh"), (8, 0, 8, b"12345678"))
    assert client.ask(Command.REGION_WRITE_MULTI, two) == wire.WRITE_MULTI.pack(2)
    assert [access[1:4] for access in device.accesses] == [(0, 0, 4), (0, 8, 8)]
    for bad in (pack(count=1), pack((0, 0, 9, b"")), pack(count=1 << 63), two + b"x"):
        assert client.ask(Command.REGION_WRITE_MULTI, bad) == "EINVAL"
    assert len(device.accesses) == 2


def test_a_handler_that_raises_is_its_clients_error(client: RawClient, device: Everything) -> None:
    def read(bar: int, offset: int, width: int) -> int:
        if offset == 4:
            return device.dma_read(0, 4)[0]
        raise RuntimeError("the device's own bug")

    device.read = read  # type: ignore[method-assign]
    assert client.read(0, 0, 4) == "EIO"
    assert client.read(0, 4, 4) == "EIO"
    assert client.read(7, 0, 2) == b"\x36\x1b"


def test_reset(client: RawClient, device: Everything) -> None:
    before = device.resets
    assert client.ask(Command.RESET) == b""
    assert device.resets == before + 1


def test_reset_of_what_has_none() -> None:
    with serving(Edu()) as server, raw_client(server) as client:
        assert client.ask(Command.RESET) == "EINVAL"


def test_features(client: RawClient) -> None:
    get = 1 << 16
    for number, flags, answer in ((1, get, "ENOTTY"), (4, get, "ENOTTY"), (1, 0, "EINVAL"), (1, 1 << 19, "EINVAL")):
        assert client.ask(Command.FEATURE, wire.FEATURE.pack(4096, number | flags)) == answer
    assert client.ask(Command.MIG_DATA_READ, wire.MIGRATION_DATA.pack(4096, 16)) == "EINVAL"


def test_migration_data() -> None:
    with serving(Edu()) as server, raw_client(server) as client:

        def read(argsz: int, size: int) -> object:
            return client.ask(Command.MIG_DATA_READ, wire.MIGRATION_DATA.pack(argsz, size))

        def write(size: int, data: bytes) -> object:
            return client.ask(Command.MIG_DATA_WRITE, wire.MIGRATION_DATA.pack(8 + len(data), size) + data)

        def move(state: int, argsz: int = 16) -> object:
            payload = wire.FEATURE.pack(argsz, 2 | 1 << 17) + struct.pack("=Ii", state, -1)
            return client.ask(Command.FEATURE, payload)

        assert move(3) == wire.FEATURE.pack(16, 2 | 1 << 17) + struct.pack("=Ii", 3, -1)
        assert read(15, 8) == "EINVAL"
        assert read(1 << 30, (1 << 20) + 1) == "E2BIG"
        assert read(16, 8) == wire.MIGRATION_DATA.pack(16, 8) + b"vfiopy01"
        rest = read(1 << 20, 1 << 19)
        assert isinstance(rest, bytes)
        assert wire.MIGRATION_DATA.unpack(rest) == (len(rest), len(rest) - 8)
        assert read(16, 8) == wire.MIGRATION_DATA.pack(8, 0)
        assert isinstance(move(4), bytes)
        assert write(9, b"12345678") == "EINVAL"
        assert write(8, b"12345678") == b""
        assert move(1) == "EINVAL"


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_msix_vectors(client: RawClient, device: Everything) -> None:
    client.write(7, 4, struct.pack("=H", BUS_MASTER | 2))
    with eventfd() as one, eventfd() as two:
        assert client.set_irqs(2, EVENTFD, count=2) == b""  # QEMU begins with taking vectors away
        assert client.set_irqs(2, EVENTFD, count=2, fds=[one, two]) == b""
        device.interrupt(1)
        assert (taken(one), taken(two, 5)) == (0, 1)
        assert client.set_irqs(2, NONE, count=2) == b""
        assert (taken(one, 5), taken(two, 5)) == (1, 1)
        assert client.set_irqs(2, BOOL, count=2, data=b"\0\1") == b""
        assert (taken(one), taken(two, 5)) == (0, 1)
        assert client.set_irqs(2, EVENTFD, start=1) == b""
        device.interrupt(1)
        assert client.set_irqs(2, NONE, count=0) == b""
        device.interrupt(0)
        assert (taken(one), taken(two)) == (0, 0)


class ManyMessages(Everything):
    capabilities = (Msi(vectors=32),)


def test_more_msi_vectors_than_fds_in_a_message() -> None:
    device = ManyMessages()
    with serving(device) as server, raw_client(server) as client, ExitStack() as stack:
        client.write(7, 4, struct.pack("=H", BUS_MASTER | 2))
        fds = [stack.enter_context(eventfd()) for _ in range(32)]
        assert client.set_irqs(1, EVENTFD, count=16, fds=fds[:16]) == b""
        assert client.set_irqs(1, EVENTFD, start=16, count=16, fds=fds[16:]) == b""
        device.interrupt(3)
        device.interrupt(20)
        assert [number for number, fd in enumerate(fds) if taken(fd)] == [3, 20]
        assert client.set_irqs(1, NONE, count=0) == b""
        assert client.set_irqs(1, EVENTFD, count=2, fds=fds[:2]) == b""
        assert client.set_irqs(1, EVENTFD, start=2, count=1, fds=fds[2:3]) == "EINVAL"  # MSI does not grow


def test_intx_is_masked_by_itself(client: RawClient, device: Everything) -> None:
    with eventfd() as fd:
        assert client.set_irqs(0, EVENTFD, fds=[fd]) == b""
        device.interrupt()
        assert taken(fd, 5) == 1
        device.interrupt()
        assert taken(fd) == 0
        assert client.set_irqs(0, NONE, action=UNMASK) == b""
        assert taken(fd, 5) == 1


@pytest.mark.parametrize(
    ("index", "flags", "start", "count", "fds", "data"),
    [
        (9, EVENTFD, 0, 1, 1, b""),
        (2, EVENTFD, 8, 1, 1, b""),
        (2, EVENTFD, 0xFFFF_FFFF, 2, 2, b""),
        (2, EVENTFD, 0, 2, 1, b""),
        (2, EVENTFD, 0, 1, 2, b""),
        (2, NONE, 0, 1, 1, b""),
        (2, EVENTFD | NONE, 0, 1, 1, b""),
        (2, 0, 0, 1, 0, b""),
        (2, NONE | MASK, 0, 1, 0, b""),  # with TRIGGER: two actions
        (2, NONE | 64, 0, 1, 0, b""),
        (2, BOOL, 0, 2, 0, b"\1"),
        (2, NONE, 0, 1, 0, b"\1"),
        (2, NONE, 0, 1, 0, b""),  # not enabled
    ],
)
def test_bad_set_irqs(
    client: RawClient, index: int, flags: int, start: int, count: int, fds: int, data: bytes
) -> None:
    with eventfd() as fd:
        assert client.set_irqs(index, flags, start, count, [fd] * fds, data) == "EINVAL"


def test_a_full_and_blocking_eventfd_does_not_stop_the_server(client: RawClient) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    client.fds.append(fd)
    assert client.set_irqs(2, EVENTFD, fds=[fd]) == b""
    os.eventfd_write(fd, (1 << 64) - 2)
    os.set_blocking(fd, True)  # its flags are the client's too
    client.send(Command.SET_IRQS, wire.SET_IRQS.pack(20, NONE | IrqAction.TRIGGER, 2, 0, 1))
    try:
        assert not client.receive(3).is_error
    finally:
        os.eventfd_read(fd)  # or the server would never end
    assert client.set_irqs(2, NONE) == b""
    assert os.eventfd_read(fd) == 1


def test_what_is_no_eventfd_is_refused(client: RawClient) -> None:
    fd = memfd(PAGE)
    assert client.set_irqs(2, EVENTFD, fds=[fd]) == "EINVAL"
    os.close(fd)


def test_a_client_that_never_reads_its_eventfd_stops_nobody(client: RawClient, device: Everything) -> None:
    client.write(7, 4, struct.pack("=H", BUS_MASTER | 2))
    fd = os.eventfd(0, os.EFD_CLOEXEC)  # blocking
    assert client.set_irqs(2, EVENTFD, fds=[fd]) == b""
    os.eventfd_write(fd, (1 << 64) - 2)
    done = threading.Thread(target=lambda: device.interrupt(0), daemon=True)
    done.start()
    done.join(5)
    assert not done.is_alive()
    os.close(fd)


# --- life cycle ------------------------------------------------------------------------------------------------------


def test_what_a_client_leaves_is_taken_away(server: Server, device: Everything) -> None:
    fds = open_fds()
    fd = memfd(16 * PAGE)
    with raw_client(server) as client:
        client.map(0, 16 * PAGE, fd)
        client.map(1 << 32, PAGE)
        client.write(7, 4, struct.pack("=H", BUS_MASTER | 2))
        client.write(7, 0x3C, b"\7")
        with eventfd() as event:
            client.set_irqs(2, EVENTFD, fds=[event])
    os.close(fd)
    wait_for(lambda: not server.connected)
    assert open_fds() == fds
    assert len(server._space.book) == 0
    assert not device.config.msix_enabled
    with raw_client(server) as client:  # the device keeps its state
        assert client.read(7, 0x3C, 1) == b"\7"


def test_one_client_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "one.sock"
    with serving(Edu(), path) as server:
        with socket.socket(socket.AF_UNIX) as one, socket.socket(socket.AF_UNIX) as two:
            one.connect(os.fspath(path))
            first = RawClient(one)
            two.connect(os.fspath(path))
            assert RawClient(two, greet=False).gone()
            assert first.read(0, 0, 4) == b"\xed\0\0\1"
            with pytest.raises(BusyError):
                server.attach(two)
        with socket.socket(socket.AF_UNIX) as three:  # the first has gone, even if nobody has noticed yet
            three.connect(os.fspath(path))
            assert RawClient(three).read(0, 0, 4) == b"\xed\0\0\1"


def test_garbage_ends_its_connection_and_nothing_else(server: Server) -> None:
    for garbage in (bytes(16), b"\xff" * 64, wire.HEADER.pack(1, 2, 15, 0, 0), wire.HEADER.pack(1, 9, 32, 7, 0)):
        with raw_client(server) as client:
            client.socket.send(garbage)
            assert client.gone()
        wait_for(lambda: not server.connected)
    with raw_client(server) as client:
        client.channel.send(5, Command.DMA_READ, 1, [bytes(16)])  # an answer that nobody asked for
        assert client.gone()


def test_half_closed_sockets(server: Server) -> None:
    with raw_client(server) as client:
        client.send(Command.REGION_READ, wire.REGION_ACCESS.pack(0, 7, 2))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.receive().payload[16:] == b"\x36\x1b"
        assert client.gone()
    wait_for(lambda: not server.connected)
    with raw_client(server) as client:
        client.socket.shutdown(socket.SHUT_RD)
        client.send(Command.REGION_READ, wire.REGION_ACCESS.pack(0, 7, 2))
        wait_for(lambda: not server.connected)


def test_a_client_that_does_not_read_its_replies(server: Server) -> None:
    with raw_client(server) as client:
        question = wire.REGION_ACCESS.pack(0, 7, 4096)
        count = 6000  # with replies of 24 MiB
        for _ in range(count):
            client.channel.send(1, Command.REGION_READ, 0, [question])
        assert server._session is not None
        waiting = server._session._channel

        def full() -> bool:
            client.channel.flush()
            return waiting.queued > 8 << 20

        wait_for(full)
        time.sleep(0.05)
        client.channel.flush()
        assert waiting.queued < (8 << 20) + 8192  # it has stopped to listen
        for _ in range(count):
            assert len(client.receive().payload) == 16 + 4096
            client.channel.flush()


def test_closing_the_server_ends_the_client(device: Everything) -> None:
    with serving(device) as server, raw_client(server) as client:
        server.close()
        assert client.gone()
        with pytest.raises(Exception, match="closed"):
            server.fileno()


def test_many_devices_in_one_event_loop() -> None:
    async def main() -> list[bytes]:
        servers = [Server(*emulated.connect(Edu())) for _ in range(5)]
        tasks = [asyncio.create_task(server.serve()) for server in servers]
        answers = []
        for server in servers:
            ours, theirs = socket.socketpair()
            server.attach(theirs)
            client = await asyncio.to_thread(RawClient, ours)
            answers.append(await asyncio.to_thread(client.read, 0, 0, 4))
            client.close()
        for server in servers[:3]:
            server.close()
        await asyncio.gather(*tasks[:3])
        for task in tasks[3:]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in servers:
            server.close()
        await asyncio.get_running_loop().shutdown_default_executor()
        return answers

    assert asyncio.run(main()) == [b"\xed\0\0\1"] * 5


def test_in_a_loop_of_ones_own() -> None:
    io, mapper = emulated.connect(Edu())
    with Server(io, mapper) as server:
        ours, theirs = socket.socketpair()
        server.attach(theirs)
        client = RawClient(ours, greet=False)
        client.send(Command.VERSION, QEMU_VERSION)
        server.step()
        assert client.receive(0.0).is_reply
        server.start()
        with pytest.raises(StateError, match="already"):
            server.start()
        client.close()


def test_a_mapper_that_can_do_nothing_is_refused() -> None:
    class Nobody(emulated.EmulatedMapper):
        attach_book = None  # type: ignore[assignment]

    io, _ = emulated.connect(Edu())
    mapper = Nobody("nobody")
    del Nobody.attach_book
    with io:

        class Plain:
            name, kernel_target = "plain", None

        with pytest.raises(NotSupportedError, match="plain"):
            Server(io, Plain())  # type: ignore[arg-type]
    mapper.close()
