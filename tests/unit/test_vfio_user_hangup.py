"""The end of a connection as its peer sees it: the end of the stream. A reset is what QEMU does not survive."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from emulated_support import wait_for
from vfio_user_support import QEMU_VERSION, RawClient, open_fds, raw_client, serving

from vfiopy import emulated
from vfiopy.emulated import Edu
from vfiopy.vfio_user.hangup import Guard, hang_up
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.wire import Command

SERVER = """
import sys, vfiopy
with vfiopy.serve("emulated:edu", sys.argv[1], guarded=sys.argv[2] == "guarded") as server:
    server.run()
"""


def ends(sock: socket.socket) -> bytes:
    """What still comes, up to the end."""
    sock.settimeout(10)
    data = b""
    while piece := sock.recv(4096):
        data += piece
    return data


def connected(sock: socket.socket, path: Path) -> bool:
    """Connect, once somebody listens; the path is there a moment before."""
    with suppress(FileNotFoundError, ConnectionRefusedError):
        sock.connect(str(path))
        return True
    return False


def test_nothing_is_left_unread() -> None:
    ours, theirs = socket.socketpair()
    with theirs, os.fdopen(os.open("/dev/null", os.O_RDONLY)) as file:
        socket.send_fds(theirs, [b"never read"], [file.fileno()])
        ours.send(b"last words")
        hang_up(ours)
        hang_up(ours)
        assert ends(theirs) == b"last words"


def test_a_guard_hangs_up_only_what_it_holds_at_the_end() -> None:
    with ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(2)]
        for pair in pairs:
            for end in pair:
                stack.enter_context(end)
        guard = Guard()
        guard.hold(pairs[0][0])
        guard.drop()
        guard.hold(pairs[1][0])
        for ours, theirs in pairs:
            theirs.send(b"unread")
            ours.close()
        guard.close()
        with pytest.raises(ConnectionResetError):  # Linux's own manners
            ends(pairs[0][1])
        assert ends(pairs[1][1]) == b""


@pytest.mark.parametrize("guarded", [False, True])
def test_a_server_that_ends_in_the_middle(guarded: bool) -> None:
    gc.collect()  # what earlier tests have left
    before = open_fds()
    ours, theirs = socket.socketpair()
    with ours:
        with Server(*emulated.connect(Edu()), guarded=guarded) as server:  # nobody pumps it
            server.attach(theirs)
            ours.send(QEMU_VERSION)
        assert ends(ours) == b""
    gc.collect()
    assert open_fds() == before


@pytest.mark.parametrize("way", ["guarded", "alone"])
def test_a_server_that_is_killed_in_the_middle(way: str, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with (
        subprocess.Popen([sys.executable, "-c", SERVER, str(path), way]) as process,
        socket.socket(socket.AF_UNIX) as sock,
    ):
        try:
            wait_for(lambda: connected(sock, path), timeout=20)
            client = RawClient(sock)
            process.send_signal(signal.SIGSTOP)
            client.send(Command.GET_INFO, bytes(16))
        finally:
            process.kill()
        if way == "guarded":
            assert ends(sock) == b""
        else:
            with pytest.raises(ConnectionResetError):
                ends(sock)


def test_a_guard_that_is_gone_is_missed_by_nobody(tmp_path: Path) -> None:
    with serving(Edu(), tmp_path / "socket", guarded=True) as server:
        assert server._guard is not None
        server._guard._process.kill()
        server._guard._process.wait()
        for _ in range(2):
            with raw_client(server) as client:
                assert client.read(7, 0, 2) == b"\x34\x12"
            wait_for(lambda: not server.connected)
