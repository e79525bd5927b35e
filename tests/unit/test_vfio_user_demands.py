"""What the protocol demands of a server, command by command, and that who breaks it harms nobody else."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from emulated_support import BUS_MASTER, MEMORY, Everything, eventfd, wait_for
from vfio_user_support import (
    EVENTFD,
    NONE,
    PAGE,
    QEMU_VERSION,
    at_once,
    memfd,
    nothing_left,
    open_fds,
    raw_client,
    serving,
)

from vfiopy import emulated
from vfiopy.backend import IrqAction, IrqIndex
from vfiopy.emulated import Edu
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.session import Limits
from vfiopy.vfio_user.wire import Command

FROM_CLIENT = [command for command in Command if wire.COMMANDS[command].from_client]
WITH_ARGSZ = [
    command
    for command in FROM_CLIENT
    if (form := wire.COMMANDS[command].form) and form._make.__self__._fields[0] == "argsz"
]
BASE = 0x10_0000
FDS = Path("/proc/self/fd")


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


# --- each command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [command for command in FROM_CLIENT if command != Command.VERSION])
def test_nothing_comes_before_version(server: Server, device: Everything, command: Command) -> None:
    form = wire.COMMANDS[command].form
    with raw_client(server, greet=False) as client:
        assert client.ask(command, bytes(form.size if form else 0)) == "EINVAL"
        assert client.gone()
    assert not device.accesses


# A good request of each command that says how much room a reply has.
GOOD: dict[Command, tuple[int, ...]] = {
    Command.DMA_MAP: (32, 3, 0, BASE, PAGE),
    Command.DMA_UNMAP: (24, 0, BASE, PAGE),
    Command.GET_INFO: (16, 0, 0, 0),
    Command.GET_REGION_INFO: (32, 0, 0, 0, 0, 0),
    Command.GET_REGION_IO_FDS: (16, 0, 0, 0),
    Command.GET_IRQ_INFO: (16, 0, 0, 0),
    Command.SET_IRQS: (20, NONE | IrqAction.TRIGGER, IrqIndex.MSI, 0, 0),
    Command.FEATURE: (8, 2 | 1 << 16),
    Command.MIG_DATA_READ: (8, 0),
    Command.MIG_DATA_WRITE: (8, 0),
}


def test_there_is_a_good_request_of_each() -> None:
    assert set(GOOD) == set(WITH_ARGSZ)


@pytest.mark.parametrize("command", WITH_ARGSZ)
def test_argsz_has_room_for_the_fixed_part(command: Command) -> None:
    form = wire.COMMANDS[command].form
    assert form is not None
    with serving(Edu(delay=(0.0, 0.0))) as server, raw_client(server) as client, eventfd() as event:
        if command in (Command.MIG_DATA_READ, Command.MIG_DATA_WRITE):
            state = 4 if command == Command.MIG_DATA_WRITE else 3
            client.ask(Command.FEATURE, wire.FEATURE.pack(16, 2 | 1 << 17) + struct.pack("=Ii", state, -1))
        if command == Command.SET_IRQS:
            client.set_irqs(IrqIndex.MSI, EVENTFD, fds=[event])
        for argsz in (0, form.size - 1):
            assert client.ask(command, form.pack(argsz, *GOOD[command][1:])) == "EINVAL"
        assert isinstance(client.ask(command, form.pack(*GOOD[command])), bytes)


@pytest.mark.parametrize("command", FROM_CLIENT)
def test_fds_of_a_refused_request_are_closed(server: Server, command: Command) -> None:
    form = wire.COMMANDS[command].form
    with raw_client(server) as client, eventfd() as fd:
        before = len(list(FDS.iterdir()))
        for count in (1, 2, 16):
            client.ask(command, b"\xff" * (form.size if form else 0), [fd] * count)
        assert len(list(FDS.iterdir())) == before
        assert client.read(7, 0, 2) == b"\x36\x1b"


# --- memory of a client that has an IOMMU ----------------------------------------------------------------------------


def test_sixteen_thousand_pages_of_one_file(device: Everything) -> None:
    """64 MiB, each page a DMA_MAP with an fd of its own, as QEMU does: one mapping of the file, and no fd kept."""
    pages = 16384
    with serving(device) as server, raw_client(server) as client:
        client.write(7, 4, struct.pack("=H", BUS_MASTER | MEMORY))
        fd = memfd(pages * PAGE)
        fds = len(open_fds())
        for number in range(pages):
            again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
            number_of = pages - 1 - number  # not in the order of the file
            payload = wire.DMA_MAP.pack(32, 3, number_of * PAGE, BASE + number * PAGE, PAGE)
            client.send(Command.DMA_MAP, payload, [again])
            os.close(again)
            if number % 64 == 63:
                for asked in range(client.number - 63, client.number + 1):
                    assert not client.reply(asked & 0xFFFF).is_error
        assert len(open_fds()) == fds
        assert len(server._space.book) == pages
        assert len(server._space.files) == 1
        with mmap.mmap(fd, pages * PAGE) as memory:
            device.dma_write(BASE + 3 * PAGE - 2, b"abcd")  # over pages that lie apart in the file
            assert memory[(pages - 3) * PAGE + PAGE - 2 : (pages - 2) * PAGE] == b"ab"
            assert memory[(pages - 4) * PAGE : (pages - 4) * PAGE + 2] == b"cd"
        os.close(fd)


def test_unmapping_is_answered_before_qemu_gives_up() -> None:
    assert Limits().unmap_timeout < 5


# --- who breaks it harms nobody else ---------------------------------------------------------------------------------


def _garbage(sock: socket.socket) -> None:
    sock.send(b"\xff" * 64)


def _oversize(sock: socket.socket) -> None:
    sock.send(QEMU_MESSAGE + wire.HEADER.pack(1, Command.REGION_WRITE, (1 << 20) + 8192, 0, 0))


def _too_many_fds(sock: socket.socket) -> None:
    with eventfd() as fd:
        socket.send_fds(sock, [QEMU_MESSAGE], [fd] * 17)


def _half_closed(sock: socket.socket) -> None:
    sock.send(QEMU_MESSAGE[:20])
    sock.shutdown(socket.SHUT_WR)


def _vanished(sock: socket.socket) -> None:
    sock.send(QEMU_MESSAGE + wire.HEADER.pack(2, Command.REGION_READ, 32, 0, 0) + wire.REGION_ACCESS.pack(0, 7, 4096))
    sock.shutdown(socket.SHUT_RDWR)


def _answers_unasked(sock: socket.socket) -> None:
    sock.send(QEMU_MESSAGE + wire.HEADER.pack(7, Command.DMA_READ, 32, 1, 0) + bytes(16))


QEMU_MESSAGE = wire.HEADER.pack(1, Command.VERSION, 16 + len(QEMU_VERSION), 0, 0) + QEMU_VERSION
WAYS = [_garbage, _oversize, _too_many_fds, _half_closed, _vanished, _answers_unasked]


@contextmanager
def in_threads(cards: list[Edu]) -> Iterator[list[Server]]:
    with ExitStack() as stack:
        yield [stack.enter_context(serving(card)) for card in cards]


@contextmanager
def in_one_loop(cards: list[Edu]) -> Iterator[list[Server]]:
    """All of them as tasks of one event loop, which has a thread."""
    servers = [Server(*emulated.connect(card)) for card in cards]
    begun = threading.Event()

    async def main() -> None:
        tasks = [asyncio.create_task(server.serve()) for server in servers]
        await asyncio.sleep(0)
        begun.set()
        await asyncio.gather(*tasks)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert begun.wait(10)
        yield servers
    finally:
        for server in servers:
            server.close()
        thread.join()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__[1:])
@pytest.mark.parametrize("run", [in_threads, in_one_loop])
def test_a_bad_client_takes_nobody_along(
    run: Callable[[list[Edu]], contextmanager[list[Server]]],  # type: ignore[valid-type]
    way: Callable[[socket.socket], None],
) -> None:
    with run([Edu(), Edu()]) as (good, bad), raw_client(good) as client:  # type: ignore[attr-defined]
        ours, theirs = socket.socketpair()
        with ours:
            bad.attach(theirs)
            assert client.read(0, 0, 4) == b"\xed\0\0\1"
            way(ours)
            for _ in range(20):
                assert client.read(0, 0, 4) == b"\xed\0\0\1"
            wait_for(lambda: not bad.connected)
        with raw_client(bad) as second:
            assert second.read(0, 0, 4) == b"\xed\0\0\1"
        assert client.map(BASE, PAGE) == b""
