"""One socket: whole messages with their file descriptors in, whole messages out, and nothing that was not checked.

A message goes out with one ``sendmsg``, fds with its first byte: libvfio-user wants it so. What comes in may be cut
anywhere. It is read ahead, as much as there is: ``native/wire/`` says how fds find the message that they belong to.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from vfiopy._native import Wire
from vfiopy.errors import DeviceGoneError, ProtocolError, VfioError, VfioTimeoutError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.hangup import hang_up

__all__ = ["Channel", "Message", "close_fds"]

_HEADER_SIZE: Final = wire.HEADER.size
_ROOM: Final = 4096  # beside the data of the largest access
# Plain numbers: an IntFlag costs a microsecond with each operation
_REPLY: Final = int(wire.Flag.REPLY)
_NO_REPLY_WANTED: Final = int(wire.Flag.REPLY | wire.Flag.NO_REPLY)
_ERROR: Final = int(wire.Flag.ERROR)
_GONE: Final = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
_BAD_FDS: Final = (errno.EBADF, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS)
# enum vfiopy_wire_result, native/wire/wire.h, and what native/ext/wire_object.h adds
_ERRNO, _ENDED, _ENDED_INSIDE, _FDS, _SIZE, _FLAGS, _TIMEOUT = 0, 2, 3, 4, 5, 6, 100


def close_fds(fds: list[int]) -> None:
    """Close what is in the list, and empty it."""
    while fds:
        os.close(fds.pop())


class Message:
    """A message that came in.

    Attributes:
        id, command, flags, error: of the header.
        payload: what follows it.
        fds: what came along. Who wants one takes it out of the list; the rest is closed by who read the message.
    """

    __slots__ = ("command", "error", "fds", "flags", "id", "payload")

    def __init__(self, header: tuple[int, ...], payload: bytearray, fds: list[int]) -> None:
        self.id, self.command, _, self.flags, self.error = header
        self.payload = payload
        self.fds = fds

    @property
    def is_reply(self) -> bool:
        """It answers a request."""
        return self.flags & _REPLY != 0

    @property
    def wants_reply(self) -> bool:
        """It is a request that is to be answered."""
        return not self.flags & _NO_REPLY_WANTED

    @property
    def is_error(self) -> bool:
        """It is a reply that says no."""
        return self.flags & _ERROR != 0


def _fault(label: str, most: int, max_fds: int, kind: int, value: int) -> VfioError:
    """Make the exception for what the native part says of a socket."""
    if kind == _FDS:
        return ProtocolError(
            f"the peer sent more than {max_fds} file descriptors, or this process cannot open that many",
            object=label,
            hint="ulimit -n says how many files a process may have open",
        )
    if kind == _SIZE:
        return ProtocolError(
            f"the peer announces a message of {value} bytes; {_HEADER_SIZE} to {most} are possible", object=label
        )
    if kind == _FLAGS:
        return ProtocolError(f"the peer sent a message with flags {value:#x}", object=label)
    if kind == _TIMEOUT:
        return VfioTimeoutError(f"no answer to command {value} came in time", object=label)
    if kind == _ERRNO and value not in _GONE:
        return _failure(label, value)
    return DeviceGoneError(
        f"the peer closed the connection{' in the middle of a message' if kind == _ENDED_INSIDE else ''}",
        errno=errno.ECONNRESET,
        object=label,
        hint="the other process ended, or gave up on this one",
    )


def _failure(label: str, value: int) -> VfioError:
    if value in _BAD_FDS:
        return VfioError(
            "a message was not sent: its file descriptors cannot be passed",
            errno=value,
            object=label,
            hint="are they open? ulimit -n says how many files a process may have open, and may pass at a time",
        )
    return DeviceGoneError(f"the socket fails: {os.strerror(value)}", errno=value, object=label)


def _told(
    fault: Callable[[VfioError], VfioError], make: Callable[[int, int], VfioError], kind: int, value: int
) -> VfioError:
    return fault(make(kind, value))


class Channel:
    """A connected socket.

    Threads: one thread at a time receives, any number send.

    Args:
        sock: taken over.
        label: for messages.
        max_data: the most bytes of data that a message may bring.
        max_fds: the most fds that a message may bring.

        fault: is told of each error before it is raised, and may put another in its place.

    Attributes:
        wire: the native part.
    """

    def __init__(
        self,
        sock: socket.socket,
        label: str,
        *,
        max_data: int,
        max_fds: int = 16,
        fault: Callable[[VfioError], VfioError] | None = None,
    ) -> None:
        most = max_data + _ROOM + _HEADER_SIZE
        make: Callable[[int, int], VfioError] = partial(_fault, label, most, max_fds)
        self.wire = Wire(sock.fileno(), most, max_fds, make if fault is None else partial(_told, fault, make), Message)
        self._socket = sock

    def fileno(self) -> int:
        """The socket's fd; -1 after close."""
        return self._socket.fileno()

    @property
    def queued(self) -> int:
        """Bytes that wait for room in the socket."""
        return self.wire.queued

    def receive(self, *, wait: bool = False) -> Message | None:
        """Return the next message, or None where it is not all there yet.

        Messages that came together with one that was returned are here already: ask until None, before anything waits
        for the socket.

        Args:
            wait: block for as long as the socket's own time limit says, for each piece.

        Raises:
            DeviceGoneError: the peer closed the socket.
            ProtocolError: it sent what is no message; the stream is of no use any more.
        """
        return self.wire.receive(wait)

    def send(
        self,
        number: int,
        command: int,
        flags: int,
        parts: Sequence[bytes | bytearray | memoryview] = (),
        fds: Sequence[int] = (),
        error: int = 0,
    ) -> bool:
        """Send a message, or queue what the socket does not take; return whether all of it is gone.

        The caller's fds may be closed when this returns.

        Raises:
            DeviceGoneError: the peer closed the socket.
            VfioError: (EBADF, EMFILE, ETOOMANYREFS) the fds cannot be passed; nothing was sent.
        """
        return self.wire.send(number, command, flags, error, parts, fds)

    def flush(self) -> bool:
        """Send what is queued, as far as the socket takes it; return whether nothing is left."""
        return self.wire.flush()

    def shut(self) -> None:
        """End the conversation, so that whoever waits in it returns; the fd stays open."""
        with suppress(OSError):  # the peer may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and every fd that nobody took. Idempotent."""
        self.wire.close()
        hang_up(self._socket)
