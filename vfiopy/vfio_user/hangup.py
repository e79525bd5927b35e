"""How a connection ends for its peer: with the end of the stream, and also where this process is killed.

A socket that is closed while something in it is unread ends with ECONNRESET for the peer. QEMU 11.1 does not survive
that (``error_setv: Assertion `*errp == NULL' failed``), and takes the guest along. So a socket is read empty before it
is closed; and a guard, a process of its own, has a duplicate and does so where the server cannot.

This file is also the guard's program. It uses nothing but the standard library, because it starts for each server.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Final

__all__ = ["Guard", "hang_up"]

_PIECE: Final = 1 << 16
_HOLD: Final = b"h"
_DROP: Final = b"d"


def hang_up(sock: socket.socket) -> None:
    """Close a connection, and leave nothing unread in it. Idempotent."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # from here on the peer can send no more
        while sock.recv(_PIECE, socket.MSG_DONTWAIT):
            pass
    sock.close()


class Guard:
    """A process that hangs up for this one when this one is killed.

    Threads: one at a time.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                command = [sys.executable, "-I", "-S", __file__, str(theirs.fileno())]
                # A session of its own: Ctrl-C is for the server, which then hangs up by itself.
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
        except BaseException:
            ours.close()
            raise
        self._socket = ours

    def hold(self, sock: socket.socket) -> None:
        """Hang this one up too, if it comes to that."""
        with suppress(OSError):  # without the guard it is as without a guard
            socket.send_fds(self._socket, [_HOLD], [sock.fileno()])

    def drop(self) -> None:
        """Forget the sockets: they are closed, or about to be."""
        with suppress(OSError):
            self._socket.send(_DROP)

    def close(self) -> None:
        """End the guard. Idempotent."""
        self._socket.close()
        self._process.wait()


def _guard(control: socket.socket) -> None:
    held: list[socket.socket] = []
    while True:
        word, fds, _, _ = socket.recv_fds(control, 1, 1)
        held += [socket.socket(fileno=fd) for fd in fds]
        if word == _DROP:
            for sock in held:
                sock.close()
            held.clear()
        elif not word:
            for sock in held:
                hang_up(sock)
            return


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.chdir("/")
    _guard(socket.socket(fileno=int(sys.argv[1])))
