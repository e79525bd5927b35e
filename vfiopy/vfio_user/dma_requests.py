"""A server's own requests: DMA_READ and DMA_WRITE, for memory that the client did not share."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from vfiopy.backend import RemoteMemory
from vfiopy.errors import DeviceGoneError, ProtocolError, StateError, VfioError, VfioTimeoutError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Message

__all__ = ["ClientMemory", "DmaRequests"]

_MOST_LATE = 1024  # ids of answers that nobody waits for any more
_REPLY_SIZES = (0, 12, 16)  # of DMA_WRITE: QEMU 10.2, the specification's table, everybody else

Send = Callable[[int, int, tuple[bytes, ...]], None]
"""Sends a request: id, command, payload."""


class _Waiting:
    """A request that is under way."""

    __slots__ = ("command", "done", "error", "first", "last", "payload")

    def __init__(self, command: int, first: int, last: int) -> None:
        self.command = command
        self.first = first
        self.last = last
        self.done = threading.Event()
        self.error: VfioError | None = None
        self.payload = bytearray()


class DmaRequests:
    """Requests to one client, and their answers.

    Threads: any thread but the one that reads the socket asks; that one hands the answers in.

    Args:
        send: puts a request on the socket.
        label: for messages.
        max_data: the most bytes of data that the client takes in one request.
        timeout: seconds that the client has for each answer.
    """

    def __init__(self, send: Send, label: str, *, max_data: int, timeout: float) -> None:
        self._send = send
        self._label = label
        self._max_data = max_data
        self.timeout = timeout
        self._lock = threading.Lock()
        self._next = 0
        self._waiting: dict[int, _Waiting] = {}
        self._late: dict[int, int] = {}
        self._barred = range(0)
        self._reason = ""
        self._over = ""
        self.pump_thread = 0
        """The thread that reads answers, and must not wait for one."""

    def read(self, address: int, size: int) -> bytearray:
        """Read memory of the client.

        Raises:
            VfioError: the client refuses, is gone, or unmaps the memory meanwhile.
            VfioTimeoutError: it does not answer.
        """
        data = bytearray()
        for at in range(address, address + size, self._max_data):
            length = min(self._max_data, address + size - at)
            head = wire.DMA_ACCESS.pack(at, length)
            reply = self._ask(wire.Command.DMA_READ, at, length, (head,))
            data += memoryview(reply)[wire.DMA_ACCESS.size :]
        return data

    def write(self, address: int, data: bytes | bytearray) -> None:
        """Write memory of the client; raises as :meth:`read` does."""
        for start in range(0, len(data), self._max_data):
            piece = bytes(data[start : start + self._max_data])
            head = wire.DMA_ACCESS.pack(address + start, len(piece))
            self._ask(wire.Command.DMA_WRITE, address + start, len(piece), (head, piece))

    def _ask(self, command: int, address: int, size: int, parts: tuple[bytes, ...]) -> bytearray:
        if threading.get_ident() == self.pump_thread:
            raise StateError(f"{self._label}: the thread that serves the socket cannot wait for its client's memory")
        waiting = _Waiting(command, address, address + size - 1)
        with self._lock:
            if self._over:
                raise DeviceGoneError(self._over, object=self._label)
            if self._barred.start < address + size and address < self._barred.stop:
                raise VfioError(self._reason, errno=errno.EFAULT, object=self._label)
            number = self._number(waiting)
        try:
            self._send(number, command, parts)
            answered = waiting.done.wait(self.timeout)
        finally:
            with self._lock:
                if self._waiting.pop(number, None) is not None:
                    self._remember_late(number, command)
        if waiting.error is not None:
            raise waiting.error
        if not answered:
            raise VfioTimeoutError(
                f"the client did not answer {wire.Command(command).name} within {self.timeout} s", object=self._label
            )
        return waiting.payload

    def _number(self, waiting: _Waiting) -> int:
        while self._next in self._waiting or self._next in self._late:
            self._next = (self._next + 1) & 0xFFFF
        number = self._next
        self._next = (number + 1) & 0xFFFF
        self._waiting[number] = waiting
        return number

    def _remember_late(self, number: int, command: int) -> None:
        self._late[number] = command
        while len(self._late) > _MOST_LATE:
            self._late.pop(next(iter(self._late)))

    # --- from the pump -----------------------------------------------------------------------------------------------

    def answer(self, message: Message) -> None:
        """Take a reply of the client's.

        Raises:
            ProtocolError: nobody asked for it, or it is not an answer to what was asked.
        """
        with self._lock:
            if self._late.get(message.id) == message.command:
                del self._late[message.id]
                return
            waiting = self._waiting.get(message.id)
            if waiting is None or waiting.command != message.command:
                raise ProtocolError(
                    f"the client answers {message.command} number {message.id}, which nobody asked", object=self._label
                )
            if message.is_error:
                number = message.error or errno.EIO
                waiting.error = VfioError("the client refuses the access", errno=number, object=self._label)
            else:
                self._check(message, waiting)
                waiting.payload = message.payload
            del self._waiting[message.id]
            waiting.done.set()

    def _check(self, message: Message, waiting: _Waiting) -> None:
        size = waiting.last - waiting.first + 1
        if message.command == wire.Command.DMA_WRITE:
            good = len(message.payload) in _REPLY_SIZES
        else:
            good = len(message.payload) == wire.DMA_ACCESS.size + size
            good = good and wire.DMA_ACCESS.unpack(message.payload).size == size
        if not good:
            raise ProtocolError(
                f"the client answers a {wire.Command(message.command).name} of {size} bytes with "
                f"{len(message.payload)} bytes of payload",
                object=self._label,
                hint="QEMU before 11 lays these messages out wrongly; share memory with it (memory-backend-memfd)",
            )

    def bar(self, first: int, last: int, reason: str) -> None:
        """End every request that touches ``[first, last]``, now and until :meth:`unbar`. Late answers are dropped."""
        with self._lock:
            self._barred, self._reason = range(first, last + 1), reason
            self._fail(first, last, reason)

    def unbar(self) -> None:
        """Let requests go anywhere again."""
        with self._lock:
            self._barred = range(0)

    def _fail(self, first: int, last: int, reason: str) -> None:
        for number, waiting in list(self._waiting.items()):
            if waiting.first <= last and first <= waiting.last:
                del self._waiting[number]
                self._remember_late(number, waiting.command)
                waiting.error = VfioError(reason, errno=errno.EFAULT, object=self._label)
                waiting.done.set()

    def close(self, reason: str) -> None:
        """End all requests, now and later."""
        with self._lock:
            self._over = reason
            self._fail(0, (1 << 64) - 1, reason)


class ClientMemory(RemoteMemory):
    """Memory of the client that came without an fd."""

    def __init__(self, requests: DmaRequests, address: int, size: int, writable: bool) -> None:
        super().__init__(size, writable)
        self._requests = requests
        self._address = address

    def read(self, offset: int, size: int) -> bytearray:
        """Read bytes: see :meth:`DmaRequests.read`."""
        return self._requests.read(self._address + offset, size)

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Write bytes: see :meth:`DmaRequests.write`."""
        self._requests.write(self._address + offset, data)


