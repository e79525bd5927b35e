"""One socket: whole messages with their file descriptors in, whole messages out, and nothing that was not checked.

A message goes out with one ``sendmsg``, fds with its first byte: libvfio-user wants it so. What comes in may be cut
anywhere. The header is read by itself, because the kernel hands fds out with the first byte of what they were sent
with: so they are known to belong to this message.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from vfiopy.errors import DeviceGoneError, ProtocolError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.hangup import hang_up

__all__ = ["Channel", "Message", "close_fds"]

_INT: Final = array.array("i").itemsize
_HEADER_SIZE: Final = wire.HEADER.size
_FIELDS: Final = wire.HEADER.fields
_ROOM: Final = 4096  # beside the data of the largest access
_KERNEL_FDS: Final = 253  # SCM_MAX_FD, net/scm.h
_WAITING: Final = int(socket.MSG_CMSG_CLOEXEC)
_PLAIN: Final = int(socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
# Plain numbers: an IntFlag costs a microsecond with each operation
_REPLY: Final = int(wire.Flag.REPLY)
_NO_REPLY_WANTED: Final = int(wire.Flag.REPLY | wire.Flag.NO_REPLY)
_ERROR: Final = int(wire.Flag.ERROR)
_TYPE_MASK: Final = int(wire.Flag.TYPE_MASK)
_CUT: Final = int(socket.MSG_CTRUNC)
_OUT: Final = int(socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
_GONE: Final = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.EBADF)


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


class Channel:
    """A connected socket.

    Threads: one thread at a time receives, any number send.

    Args:
        sock: taken over.
        label: for messages.

    Attributes:
        max_data: the most bytes of data that a message may bring.
        max_fds: the most fds that a message may bring.
    """

    def __init__(self, sock: socket.socket, label: str, *, max_data: int, max_fds: int = 16) -> None:
        self.max_data = max_data
        self.max_fds = max_fds
        self._room = socket.CMSG_SPACE(min(max_fds + 1, _KERNEL_FDS) * _INT)
        self._socket = sock
        self._label = label
        self._head = bytearray(wire.HEADER.size)
        self._head_view = memoryview(self._head)
        self._got = 0
        self._header: tuple[int, ...] | None = None
        self._body = bytearray()
        self._fds: list[int] = []
        self._sending = threading.Lock()
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self.queued = 0
        """Bytes that wait for room in the socket."""

    def fileno(self) -> int:
        """The socket's fd; -1 after close."""
        return self._socket.fileno()

    # --- in ----------------------------------------------------------------------------------------------------------

    def receive(self, *, wait: bool = False) -> Message | None:
        """Return the next message, or None where it is not all there yet.

        Args:
            wait: block for as long as the socket's own time limit says, for each piece.

        Raises:
            DeviceGoneError: the peer closed the socket.
            ProtocolError: it sent what is no message; the stream is of no use any more.
        """
        flags = _WAITING if wait else _PLAIN
        try:
            if self._header is None and not self._receive_header(flags):
                return None
            header = self._header
            assert header is not None
            wanted = len(self._body)
            while self._got < wanted:
                where: bytearray | memoryview = self._body if not self._got else memoryview(self._body)[self._got :]
                count = self._socket.recv_into(where, 0, flags)
                if not count:
                    raise self._ended("in the middle of a message")
                self._got += count
        except BlockingIOError:
            return None
        except OSError as error:
            if isinstance(error, DeviceGoneError | ProtocolError):
                raise
            raise self._broken(error) from error
        message = Message(header, self._body, self._fds)
        self._header, self._body, self._fds, self._got = None, bytearray(), [], 0
        return message

    def _receive_header(self, flags: int) -> bool:
        while self._got < _HEADER_SIZE:
            where = self._head_view[self._got :] if self._got else self._head_view
            count, ancillary, told, _ = self._socket.recvmsg_into([where], self._room, flags)
            if ancillary:
                self._keep_fds(ancillary)
            if told & _CUT or len(self._fds) > self.max_fds:
                raise ProtocolError(
                    f"the peer sent more than {self.max_fds} file descriptors, or this process cannot open that many",
                    object=self._label,
                    hint="ulimit -n says how many files a process may have open",
                )
            if not count:
                raise self._ended("in the middle of a header" if self._got else "")
            self._got += count
        header = _FIELDS(self._head)
        size = header[2] - _HEADER_SIZE
        if not 0 <= size <= self.max_data + _ROOM:
            raise ProtocolError(
                f"the peer announces a message of {header[2]} bytes; {wire.HEADER.size} to "
                f"{self.max_data + _ROOM + wire.HEADER.size} are possible",
                object=self._label,
            )
        if header[3] & _TYPE_MASK > _REPLY:
            raise ProtocolError(f"the peer sent a message with flags {header[3]:#x}", object=self._label)
        self._header, self._body, self._got = header, bytearray(size), 0
        return True

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % _INT])
                self._fds.extend(numbers)

    def _ended(self, where: str) -> DeviceGoneError:
        return DeviceGoneError(
            f"the peer closed the connection{' ' + where if where else ''}",
            errno=errno.ECONNRESET,
            object=self._label,
            hint="the other process ended, or gave up on this one",
        )

    def _broken(self, error: OSError) -> DeviceGoneError:
        if error.errno in _GONE:
            return self._ended("")
        return DeviceGoneError(f"the socket fails: {error.strerror}", errno=error.errno, object=self._label)

    # --- out ---------------------------------------------------------------------------------------------------------

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
        """
        size = _HEADER_SIZE
        for part in parts:
            size += len(part)
        head = wire.HEADER.pack(number, command, size, flags, error)
        with self._sending:
            if self._queue:
                self._enqueue(b"".join((head, *parts)), fds)
                return False
            try:
                done = self._sendmsg((head, *parts), fds)
            except BlockingIOError:
                self._enqueue(b"".join((head, *parts)), fds)
                return False
            if done == size:
                return True
            self._enqueue(b"".join((head, *parts))[done:], ())
            return False

    def _sendmsg(self, parts: Sequence[bytes | bytearray | memoryview], fds: Sequence[int]) -> int:
        try:
            if not fds:
                return self._socket.send(b"".join(parts), _OUT)
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            return self._socket.sendmsg(parts, ancillary, _OUT)
        except BlockingIOError:
            raise
        except OSError as error:
            raise self._broken(error) from error

    def _enqueue(self, data: bytes, fds: Sequence[int]) -> None:
        copies: list[int] = []
        try:
            for fd in fds:
                copies.append(os.dup(fd))
        except BaseException:
            close_fds(copies)
            raise
        self._queue.append((memoryview(data), copies))
        self.queued += len(data)

    def flush(self) -> bool:
        """Send what is queued, as far as the socket takes it; return whether nothing is left."""
        with self._sending:
            while self._queue:
                data, fds = self._queue[0]
                try:
                    done = self._sendmsg((data,), fds)
                except BlockingIOError:
                    return False
                close_fds(fds)
                self.queued -= done
                if done < len(data):
                    self._queue[0] = (data[done:], fds)
                else:
                    self._queue.popleft()
            return True

    # --- end ---------------------------------------------------------------------------------------------------------

    def shut(self) -> None:
        """End the conversation, so that whoever waits in it returns; the fd stays open."""
        with suppress(OSError):  # the peer may have been faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and every fd that nobody took. Idempotent."""
        hang_up(self._socket)
        close_fds(self._fds)
        with self._sending:
            while self._queue:
                close_fds(self._queue.popleft()[1])
            self.queued = 0
