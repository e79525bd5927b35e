"""Messages and file descriptors over a real socket: whole, cut anywhere, too long, too many."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiopy._native import Wire
from vfiopy.errors import DeviceGoneError, ProtocolError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message, close_fds

RIGHTS = (socket.SOL_SOCKET, socket.SCM_RIGHTS)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel]]:
    before = open_fds()
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "test", max_data=1 << 20, max_fds=4)
    yield theirs, channel
    channel.close()
    channel.close()
    theirs.close()
    assert open_fds() == before


def received(channel: Channel) -> Message:
    message = channel.receive()
    assert message is not None
    return message


def head(size: int, *, number: int = 1, command: int = 9, flags: int = 0) -> bytes:
    return wire.HEADER.pack(number, command, size, flags, 0)


def pass_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(*RIGHTS, array.array("i", fds))])


def test_both_ways(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    peer = Channel(theirs.dup(), "peer", max_data=100)
    assert channel.receive() is None
    assert peer.send(7, 9, int(wire.Flag.NO_REPLY), [b"abc", b"de"])
    assert peer.send(8, 9, int(wire.Flag.REPLY | wire.Flag.ERROR), error=5)
    one, two = received(channel), received(channel)
    assert (one.id, one.command, one.payload, one.wants_reply, one.is_reply) == (7, 9, b"abcde", False, False)
    assert (two.id, two.error, two.is_error, two.is_reply, two.wants_reply) == (8, 5, True, True, False)
    assert channel.receive() is None
    peer.close()


def test_fds_belong_to_their_message(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    peer = Channel(theirs.dup(), "peer", max_data=100)
    with ExitStack() as stack:
        mine = [os.eventfd(number) for number in range(3)]
        for fd in mine:
            stack.callback(os.close, fd)
        peer.send(1, 9, 0, [b"first"])
        peer.send(2, 9, 0, [b"second"], mine[:2])
        peer.send(3, 9, 0, [b"third"], mine[2:])
        messages = [received(channel) for _ in range(3)]
        assert [len(message.fds) for message in messages] == [0, 2, 1]
        assert not os.get_inheritable(messages[1].fds[0])
        assert os.eventfd_read(messages[2].fds[0]) == 2
        for message in messages:
            close_fds(message.fds)
    peer.close()


@settings(max_examples=30)
@given(
    st.lists(st.binary(max_size=60), min_size=1, max_size=4),
    st.lists(st.integers(1, 30), min_size=1, max_size=60),
)
def test_a_stream_cut_anywhere(payloads: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(head(16 + len(body), number=at) + body for at, body in enumerate(payloads))
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "test", max_data=100)
    found: list[Message] = []
    try:
        for cut in [*cuts, len(stream)]:
            if stream[:cut]:
                theirs.send(stream[:cut])
            stream = stream[cut:]
            while message := channel.receive():
                found.append(message)
    finally:
        channel.close()
        theirs.close()
    assert [(message.id, bytes(message.payload)) for message in found] == list(enumerate(payloads))


@pytest.mark.parametrize("size", [0, 15, 16 + (1 << 20) + 4096 + 1, 0xFFFF_FFFF])
def test_impossible_sizes_end_it(ends: tuple[socket.socket, Channel], size: int) -> None:
    theirs, channel = ends
    theirs.send(head(size))
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        channel.receive()


def test_an_unknown_type_ends_it(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    theirs.send(head(16, flags=2))
    with pytest.raises(ProtocolError, match="flags 0x2"):
        channel.receive()


@pytest.mark.parametrize("count", [5, 6, 20])
def test_too_many_fds_end_it_and_all_are_closed(ends: tuple[socket.socket, Channel], count: int) -> None:
    theirs, channel = ends
    fd = os.eventfd(0)
    pass_fds(theirs, head(16), [fd] * count)
    os.close(fd)
    with pytest.raises(ProtocolError, match="more than 4 file descriptors"):
        channel.receive()


def test_fds_with_each_piece_of_a_header_are_counted_together(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    fd = os.eventfd(0)
    pass_fds(theirs, head(16)[:4], [fd] * 3)
    pass_fds(theirs, head(16)[4:], [fd] * 3)
    os.close(fd)
    with pytest.raises(ProtocolError, match="more than 4"):
        channel.receive()


def test_fds_with_a_body_are_dropped(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    fd = os.eventfd(0)
    theirs.send(head(20))
    assert channel.receive() is None
    pass_fds(theirs, b"body", [fd])
    os.close(fd)
    assert received(channel).fds == []


def test_fds_with_a_body_that_is_read_with_its_header_are_the_messages(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    fd = os.eventfd(0)
    theirs.send(head(20))
    pass_fds(theirs, b"body", [fd])
    os.close(fd)
    message = received(channel)
    assert len(message.fds) == 1
    close_fds(message.fds)


def test_fds_find_the_last_of_several_messages_that_are_read_together(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    fd = os.eventfd(7)
    for number in range(3):
        theirs.send(head(20, number=number) + b"body")
    pass_fds(theirs, head(20, number=3) + b"body", [fd])
    theirs.send(head(20, number=4) + b"body")
    os.close(fd)
    messages = [received(channel) for _ in range(5)]
    assert [(message.id, len(message.fds)) for message in messages] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 0)]
    assert os.eventfd_read(messages[3].fds[0]) == 7
    close_fds(messages[3].fds)


def test_long_messages_between_short_ones(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    peer = Channel(theirs.dup(), "peer", max_data=100)
    bodies = [bytes([number]) * size for number, size in enumerate([3, 70_000, 5, 16_368, 16_369, 1 << 20, 0])]
    for number, body in enumerate(bodies):
        peer.send(number, 9, 0, [body])
    found = []
    while len(found) < len(bodies):
        if message := channel.receive():
            found.append((message.id, bytes(message.payload)))
        else:
            peer.flush()
    assert found == list(enumerate(bodies))
    peer.close()


@pytest.mark.parametrize("sent", [b"", b"abc", head(20), head(20) + b"ab"])
def test_a_peer_that_goes(ends: tuple[socket.socket, Channel], sent: bytes) -> None:
    theirs, channel = ends
    theirs.send(sent)
    theirs.close()
    with pytest.raises(DeviceGoneError, match="closed the connection"):
        channel.receive()
    with pytest.raises(DeviceGoneError):
        channel.send(1, 9, 0)


def test_what_the_socket_does_not_take_waits(ends: tuple[socket.socket, Channel]) -> None:
    theirs, channel = ends
    peer = Channel(theirs.dup(), "peer", max_data=1 << 20)
    bodies = [bytes([number]) * 100_000 for number in range(20)]
    fd = os.eventfd(5)
    gone = [channel.send(number, 9, 0, [body], [fd]) for number, body in enumerate(bodies)]
    os.close(fd)
    assert gone[0]
    assert not gone[-1]
    assert channel.queued > 1_000_000
    found = []
    while len(found) < len(bodies):
        if message := peer.receive():
            found.append((message.id, bytes(message.payload), len(message.fds)))
            close_fds(message.fds)
        else:
            channel.flush()
    assert found == [(number, body, 1) for number, body in enumerate(bodies)]
    assert channel.flush()
    assert channel.queued == 0
    peer.close()


def test_close_drops_what_waits(ends: tuple[socket.socket, Channel]) -> None:
    _, channel = ends
    fd = os.eventfd(0)
    for _ in range(10):
        channel.send(1, 9, 0, [bytes(100_000)], [fd])
    os.close(fd)
    assert channel.queued


@pytest.mark.parametrize("raises", [False, True])
def test_closing_while_a_message_is_made(raises: bool) -> None:
    """As a finalizer may: any Python code can run there. The message is whole, and its fds are somebody's or closed."""
    before = open_fds()
    ours, theirs = socket.socketpair()
    end = os.eventfd(0)

    def make(header: tuple[int, ...], payload: bytearray, fds: list[int]) -> Message:
        wire_end.close()
        if raises:
            raise KeyError
        return Message(header, payload, fds)

    wire_end = Wire(ours.fileno(), 1 << 16, 4, lambda kind, value: DeviceGoneError(f"{kind} {value}"), make)
    pass_fds(theirs, head(32) + b"x" * 16 + head(32), [end])
    if raises:
        with pytest.raises(KeyError):
            wire_end.receive(False)
    else:
        message = wire_end.receive(False)
        assert message is not None
        assert message.payload == b"x" * 16
        close_fds(message.fds)
    with pytest.raises(DeviceGoneError):
        wire_end.receive(False)
    theirs.close()
    ours.close()
    os.close(end)
    assert open_fds() == before
