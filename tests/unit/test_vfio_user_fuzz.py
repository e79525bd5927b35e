"""Malformed messages of every kind: the server answers each request once or ends the connection, and lives on."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from emulated_support import Everything
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vfio_user_support import PAGE, memfd, open_fds, raw_client, serving

from vfiopy.errors import DeviceGoneError, ProtocolError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, close_fds
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.session import Limits
from vfiopy.vfio_user.wire import Command

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Everything(), limits=Limits(unmap_timeout=0.2, request_timeout=0.2)) as started:
        yield started


numbers = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 24, 32, 40, PAGE, PAGE + 1, 1 << 20, 1 << 31]),
    st.sampled_from([(1 << 32) - 1, 1 << 32, (1 << 63), (1 << 64) - PAGE, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)
EDGES = {"H": 16, "I": 32, "Q": 64}


@st.composite
def payloads(draw: st.DrawFn, command: int) -> bytes:
    """Mostly of the command's own shape, with interesting numbers in its fields."""
    rule = wire.COMMANDS.get(command)
    if rule is None or rule.form is None or draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=80))
    codes = rule.form._struct.format[1:]
    fields = [draw(numbers) & ((1 << EDGES[code]) - 1) for code in codes]
    body = rule.form.pack(*fields)
    tail = draw(st.binary(max_size=40)) if rule.tail is wire.Tail.DATA or draw(st.integers(0, 9)) == 0 else b""
    return body + tail


@st.composite
def requests(draw: st.DrawFn) -> tuple[int, bytes, int]:
    command = draw(st.one_of(st.sampled_from(list(Command)), st.integers(0, 0xFFFF)))
    return command, draw(payloads(command)), draw(st.sampled_from([0, 0, 0, 1, 2, 16]))


def survives(server: Server) -> None:
    for _ in range(2000):
        if not server.connected:
            break
        threading.Event().wait(0.001)
    with raw_client(server) as client:
        assert client.read(7, 0, 2) == b"\x36\x1b"
    for _ in range(2000):
        if not server.connected:
            break
        threading.Event().wait(0.001)


@settings(suppress_health_check=SLOW, max_examples=150)
@given(st.lists(requests(), max_size=12), st.booleans())
def test_any_requests(server: Server, asked: list[tuple[int, bytes, int]], greet: bool) -> None:
    fd = memfd(4 * PAGE)
    with raw_client(server, greet=greet) as client:
        for command, payload, count in asked:
            try:
                number = client.send(command, payload, [fd] * count)
                message = client.reply(number)
            except (DeviceGoneError, ConnectionError):
                assert not greet or command == Command.VERSION
                break
            assert message.command == command
            close_fds(message.fds)
    os.close(fd)
    survives(server)


@settings(suppress_health_check=SLOW, max_examples=100)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes(server: Server, data: bytes, greet: bool) -> None:
    with raw_client(server, greet=greet) as client, suppress(BrokenPipeError, ConnectionError):
        client.socket.send(data)
    survives(server)


headers = st.builds(
    wire.HEADER.pack,
    st.integers(0, 3),
    st.one_of(st.sampled_from(list(Command)), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, 64), st.integers(0, (1 << 32) - 1)),
    st.sampled_from([0, 1, 2, 0x10, 0x20, 0x21, 0x31, 0xFFFF_FFFF]),
    st.integers(0, 200),
)


@settings(suppress_health_check=SLOW, max_examples=150)
@given(st.lists(st.tuples(headers, st.binary(max_size=40)), max_size=6))
def test_any_headers(server: Server, messages: list[tuple[bytes, bytes]]) -> None:
    with raw_client(server) as client, suppress(BrokenPipeError, ConnectionError):
        for header, body in messages:
            client.socket.send(header + body)
    survives(server)


@settings(suppress_health_check=SLOW, max_examples=100)
@given(st.lists(st.tuples(st.binary(max_size=60), st.integers(0, 6)), max_size=8))
def test_a_channel_takes_any_bytes_and_fds(pieces: list[tuple[bytes, int]]) -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    channel = Channel(ours, "test", max_data=64, max_fds=3)
    fd = os.eventfd(0)
    try:
        for data, count in pieces:
            if data:
                socket.send_fds(theirs, [data], [fd] * count) if count else theirs.send(data)
            with suppress(ProtocolError, DeviceGoneError):
                while message := channel.receive():
                    close_fds(message.fds)
    finally:
        channel.close()
        theirs.close()
        os.close(fd)
    assert open_fds() == before
