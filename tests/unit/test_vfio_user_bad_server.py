"""The client when things go wrong in the middle: nothing leaks, nobody waits for nothing, the rest goes on."""

from __future__ import annotations

import errno
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest
from emulated_support import Everything, wait_for
from vfio_user_support import PAGE, FakeServer, nothing_left, open_fds, plain, reply, serving

import vfiopy
from vfiopy import vfio_user
from vfiopy.backend import FileMemory, Prot
from vfiopy.emulated import Edu
from vfiopy.vfio_user import turns, wire
from vfiopy.vfio_user.channel import Channel, Message, close_fds
from vfiopy.vfio_user.mapper import _Entry
from vfiopy.vfio_user.version import Capabilities, encode_version
from vfiopy.vfio_user.wire import Command, Flag


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left(wait_for):
        yield


def test_fds_of_an_answer_with_nonsense_behind_it_are_closed() -> None:
    def script(channel: Channel, message: Message) -> None:
        if not plain(channel, message):
            answer = wire.HEADER.pack(message.id, message.command, 32, int(Flag.REPLY), 0)
            nonsense = wire.HEADER.pack(999, message.command, 16, int(Flag.REPLY), 0)
            socket.send_fds(channel._socket, [answer], [channel.fileno()])
            channel._socket.send(bytes(16) + nonsense)  # behind the fds, so that it is read in one piece

    io, mapper = FakeServer(script).connect()
    before = open_fds()
    try:
        with pytest.raises(vfiopy.ProtocolError, match="nobody asked"):
            io.read(0, 0, 4)
        assert open_fds() == before
    finally:
        io.close()
        mapper.close()


def test_a_reconnect_that_fails_is_hung_up(tmp_path: Path) -> None:
    """Or the server would have a client for good, and turn away who tries again."""
    path = tmp_path / "socket"
    with vfiopy.AddressSpace("kept") as space:
        with serving(Edu(), path):
            device = vfiopy.open(f"vfio-user:{path}", space=space)
            buffers = [device.dma.allocate(PAGE) for _ in range(2)]
        assert isinstance(device.io, vfio_user.VfioUserDeviceIo)
        with serving(Edu(), path, limits=vfio_user.Limits(max_dma_maps=1)) as server:
            with pytest.raises(vfiopy.VfioError):
                device.io.reconnect()
            wait_for(lambda: not server.connected)
        with serving(Edu(), path):
            device.io.reconnect()
            device.close()
        del buffers, device


def test_a_doorbell_of_a_server_that_is_gone(tmp_path: Path) -> None:
    from test_vfio_user_doorbells import Bells  # noqa: PLC0415

    with serving(Bells(), tmp_path / "socket") as server:
        io, mapper = vfio_user.connect(tmp_path / "socket")
        assert io.ring_by_eventfd(0) == 16
        server.disconnect()
        try:
            wait_for(lambda: not io.connection.alive)
            with pytest.raises(vfiopy.DeviceGoneError):
                io.write(0, 0x100, b"\x05\0\0\0")
        finally:
            io.close()
            mapper.close()


def test_an_fd_that_is_not_open_costs_one_request_only(tmp_path: Path) -> None:
    with serving(Everything(), tmp_path / "socket"):
        io, mapper = vfio_user.connect(tmp_path / "socket")
        try:
            with pytest.raises(vfiopy.VfioError, match="file descriptors cannot be passed") as caught:
                mapper.map(0x10_0000, FileMemory(1 << 20, 0, PAGE, True, 0, None), Prot.RW)  # no number of any fd
            assert caught.value.errno == errno.EBADF
            assert not mapper._entries
            assert io.read(7, 0, 2) == b"\x36\x1b"
        finally:
            io.close()
            mapper.close()


def test_a_signal_handler_may_close() -> None:
    def script(channel: Channel, message: Message) -> None:
        plain(channel, message)

    io, mapper = FakeServer(script).connect(timeout=5.0)

    def handler(number: int, frame: FrameType | None) -> None:
        io.close()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(vfiopy.DeviceGoneError):
            io.read(0, 0, 4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    mapper.close()


def test_nonsense_on_the_twin_socket_ends_every_wait() -> None:
    ours, theirs = socket.socketpair()

    def script(channel: Channel, message: Message) -> None:
        if message.command == Command.VERSION:
            offer = encode_version(0, Capabilities.ours(twin_socket=True, fd_index=0))
            reply(channel, message, offer, [theirs.fileno()])
        elif not plain(channel, message):
            ours.send(wire.HEADER.pack(1, Command.DMA_READ, 16, int(Flag.REPLY), 0))

    io, mapper = FakeServer(script).connect(timeout=5.0)
    begin = time.monotonic()
    try:
        with pytest.raises((vfiopy.ProtocolError, vfiopy.DeviceGoneError)):
            io.read(0, 0, 4)
        assert time.monotonic() - begin < 2
    finally:
        io.close()
        mapper.close()
        ours.close()
        theirs.close()


def test_a_server_that_asks_and_never_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are not kept without end."""
    size, most = 1 << 20, 4 << 20
    monkeypatch.setattr(turns, "_MOST_QUEUED", most)

    def script(channel: Channel, message: Message) -> None:
        if not plain(channel, message) and message.command == Command.REGION_READ:
            for number in range(20):
                channel.send(number, Command.DMA_READ, 0, [wire.DMA_ACCESS.pack(0x10_0000, size)])
            time.sleep(1)

    io, mapper = FakeServer(script).connect(timeout=5.0, twin=False)
    memory = mapper.allocate(size)
    assert memory is not None
    mapper._insert(_Entry(0x10_0000, size, Prot.RW, memory))
    try:
        with pytest.raises(vfiopy.ProtocolError, match="takes no answers"):
            io.read(0, 0, 4)
        assert io.connection._channel.queued <= most + size + 100
    finally:
        io.close()
        mapper.close()
    del memory


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("maps", [65535, 16])
def test_a_mapping_that_nobody_waits_for_is_taken_back(interrupted: bool, maps: int) -> None:
    """The server may have done it, or does it yet; its IOVA, and its memory, are for others."""
    seen: list[Message] = []

    def script(channel: Channel, message: Message) -> None:
        if message.command == Command.VERSION:
            reply(channel, message, encode_version(0, Capabilities(max_msg_fds=16, max_dma_maps=maps)))
        elif not plain(channel, message):
            close_fds(message.fds)
            seen.append(message)

    io, mapper = FakeServer(script).connect(timeout=5.0 if interrupted else 0.3)
    memory = mapper.allocate(PAGE)
    assert memory is not None

    def handler(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        if interrupted:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt if interrupted else vfiopy.VfioTimeoutError):
            mapper.map(32 << 20, memory, Prot.RW)
        wait_for(lambda: len(seen) == 2)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        io.close()
        mapper.close()
    asked, taken_back = wire.DMA_MAP.unpack(seen[0].payload), wire.DMA_UNMAP.unpack(seen[1].payload)
    assert [message.command for message in seen] == [Command.DMA_MAP, Command.DMA_UNMAP]
    assert not seen[1].wants_reply
    assert (taken_back.address, taken_back.size) == (asked.address, asked.size)
    del memory


def test_a_server_that_transfers_next_to_nothing() -> None:
    """A page of dirty bits has 8 bytes, whatever its pages are: there is no end to making them larger."""

    def script(channel: Channel, message: Message) -> None:
        offer = encode_version(0, Capabilities(max_msg_fds=16, max_data_xfer_size=7))
        reply(channel, message, offer)

    with pytest.raises(vfiopy.ProtocolError, match="max_data_xfer_size"):
        FakeServer(script).connect()
