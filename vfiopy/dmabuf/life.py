"""Whether the process that exported a dma-buf still lives."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from contextlib import suppress
from typing import Self

from vfiopy.dmabuf.fence import ready, ready_async
from vfiopy.errors import VfioError
from vfiopy.lives import Resource

__all__ = ["ExporterLife"]

_SO_PEERPIDFD = 77  # asm-generic/socket.h, since Linux 6.5
_GLANCE = 0.05  # seconds
_CREDENTIALS = struct.Struct("3i")  # struct ucred


class ExporterLife(Resource):
    """The life of another process, which has the device open whose memory was imported.

    When that process ends, the kernel closes the device and empties the importers' page tables without a word. Make one
    from what is at hand: its pid, a pidfd, or the socket that brought the dma-buf.

    Threads: may be shared.
    """

    _rank = 60

    def __init__(self, fd: int, events: int, label: str) -> None:
        """Take over an fd on which one of ``events`` (``select.POLL*``) comes when the process ends."""
        self._fd = fd
        self._events = events
        super().__init__(label)

    @classmethod
    def of_process(cls, pid: int) -> Self:
        """Watch a process by its number, which must not have been reused: a child's, or one that just spoke.

        Raises:
            VfioError: (ESRCH) there is no such process.
        """
        try:
            return cls(os.pidfd_open(pid), select.POLLIN, f"process {pid}")
        except OSError as error:
            raise VfioError(
                "its life cannot be watched", errno=error.errno, object=f"process {pid}", call="pidfd_open",
                hint="it has ended already" if isinstance(error, ProcessLookupError) else "",
            ) from error  # fmt: skip

    @classmethod
    def of_pidfd(cls, pidfd: int) -> Self:
        """Watch a process by a pidfd, which stays the caller's."""
        return cls(os.dup(pidfd), select.POLLIN, f"process of pidfd {pidfd}")

    @classmethod
    def of_peer(cls, connection: socket.socket) -> Self:
        """Watch the process at the other end of a Unix socket, as it was when the socket was connected.

        After a fork or an exec that process may be another one than who sends now.

        Raises:
            VfioError: (ESRCH) the peer has ended already.
        """
        with suppress(OSError):  # before Linux 6.5
            pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
            return cls(pidfd, select.POLLIN, "the socket's peer")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return cls.of_process(_CREDENTIALS.unpack(credentials)[0])

    @classmethod
    def of_socket(cls, connection: socket.socket) -> Self:
        """Watch the socket itself: the exporter counts as gone when the other end is closed."""
        return cls(os.dup(connection.fileno()), select.POLLRDHUP, "the exporter's socket")

    def fileno(self) -> int:
        """For select() and event loops: readable, or hung up, when it is over."""
        self.check_open()
        return self._fd

    @property
    def over(self) -> bool:
        """It has ended. Once True, always True."""
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for its end, at most ``timeout`` seconds; return whether it came."""
        self.check_open()
        return ready(self._fd, self._events, timeout)

    async def wait_async(self) -> None:
        """Wait for its end without blocking the event loop."""
        self.check_open()
        if self._events == select.POLLIN:
            await ready_async(self._fd, select.POLLIN, None)
            return
        while not self.over:
            await asyncio.sleep(_GLANCE)  # a socket is readable for other reasons too

    def _release(self) -> None:
        os.close(self._fd)
