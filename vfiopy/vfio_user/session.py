"""One client of a served device, from VERSION to its end: a pump that answers what it can at once, and never waits."""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, Protocol

from vfiopy.errors import ClosedError, ProtocolError, VfioError
from vfiopy.iova import IovaClosing
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message, close_fds
from vfiopy.vfio_user.client_space import ClientSpace
from vfiopy.vfio_user.dma_requests import DmaRequests
from vfiopy.vfio_user.doorbells import ServedDoorbells
from vfiopy.vfio_user.served import Reply, ServedDevice
from vfiopy.vfio_user.served_log import DirtyQuestion
from vfiopy.vfio_user.version import Capabilities, decode_version, encode_version
from vfiopy.vfio_user.wire import Command, Flag

__all__ = ["Limits", "Session"]

_LOG = logging.getLogger(__name__)
_REPLY: Final = int(Flag.REPLY)
_REFUSAL: Final = int(Flag.REPLY | Flag.ERROR)
_BATCH: Final = 64  # messages in one go, so that others in the same loop have their turn
_QUEUED: Final = 8 << 20  # bytes of replies that a client may leave unread before its requests wait
_BACKLOG: Final = 16 << 20  # bytes of requests that may come while one waits, and as how many count:
_MESSAGE_COST: Final = 512  # a message, beside its payload
_FD_COST: Final = 64 << 10  # an fd, of which a process has few


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server allows its clients.

    Attributes:
        max_dma_maps: mappings.
        unmap_timeout: seconds that DMA_UNMAP waits for pins; QEMU gives up after 5.
        request_timeout: seconds that a client has to answer DMA_READ and DMA_WRITE.
        trust_files: map memory files that their owner could make shorter, which would end this process.
    """

    max_dma_maps: int = 65535
    unmap_timeout: float = 4.0
    request_timeout: float = 5.0
    trust_files: bool = False


def _weight(message: Message) -> int:
    return _MESSAGE_COST + len(message.payload) + _FD_COST * len(message.fds)


class _Lock(Protocol):
    def acquire(self) -> bool: ...
    def release(self) -> None: ...


@dataclass(slots=True)
class _Unmap:
    """A DMA_UNMAP that waits for pins to go."""

    message: Message
    closing: IovaClosing
    deadline: float
    dirty: DirtyQuestion | None


class Session:
    """One client.

    Requests are answered in the order in which they came. While DMA_UNMAP waits for a device that uses the range, later
    requests wait too, but answers to the device's own requests are taken: it may need them to come to an end.

    Threads: one pumps; devices ask for memory from any other.

    Args:
        sock: connected; taken over.
        device: the device.
        space: its address space, empty.
        label: for messages.
        limits: what the client may do.
        wake: called by another thread than the pump's where :meth:`interests` has changed.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: ServedDevice,
        space: ClientSpace,
        label: str,
        *,
        limits: Limits,
        wake: Callable[[], None],
    ) -> None:
        self._label = label
        self._device = device
        self._space = space
        self._limits = limits
        self._wake = wake
        self._offer = Capabilities.ours(max_dma_maps=limits.max_dma_maps)
        self._channel = Channel(sock, label, max_data=self._offer.max_data_xfer_size, max_fds=self._offer.max_msg_fds)
        self._wire = self._channel.wire
        self.usual = self._channel.fileno(), select.EPOLLIN
        """What epoll says when nothing is to be done but :meth:`serve`."""
        self._read, self._write = device.io.read, device.io.write
        self._found: Message | None = None  # by serve()
        self._twin: Channel | None = None
        self._requests: DmaRequests | None = None
        self._backlog: deque[Message] = deque()
        self._backlog_bytes = 0
        self._unmap: _Unmap | None = None
        self.deadline: float | None = None
        """When :meth:`pump` is to be called at the latest, on ``time.monotonic``'s clock."""
        self._doorbells = ServedDoorbells(device.io)
        self._their_fds = 1
        self._commands: dict[int, Callable[[bytearray, list[int]], Reply]] = {
            **device.commands,
            Command.DMA_MAP: self._dma_map,
            Command.GET_REGION_IO_FDS: self._get_region_io_fds,
        }

    def interests(self) -> dict[int, int]:
        """Return what to wait for before the next :meth:`pump`: fds with the events of poll(2)."""
        found = {}
        for channel in self._channels():
            events = select.POLLOUT if channel.queued else 0
            if channel.queued <= _QUEUED:
                events |= select.POLLIN
            found[channel.fileno()] = events
        if self._unmap is not None:
            found[self._unmap.closing.fileno()] = select.POLLIN
        for fd in self._doorbells.filenos():
            found[fd] = select.POLLIN
        return found

    @property
    def negotiated(self) -> bool:
        """VERSION is done."""
        return self._requests is not None

    # --- the pump ----------------------------------------------------------------------------------------------------

    def serve(self) -> bool:
        """Answer register accesses, which is the usual work, natively. Return whether that was all.

        Where it was not, call :meth:`pump`.

        Raises:
            DeviceGoneError: the client went.
            ProtocolError: the client does not keep to the protocol; close the session.
        """
        if self._unmap is not None or self._backlog or self._found is not None or self._requests is None:
            return False
        found = self._wire.serve(self._read, self._write, _BATCH, _QUEUED)
        if found is False:
            return True
        if found is not True:
            self._sort(found)
        return False

    @property
    def is_plain(self) -> bool:
        """Nothing waits: :meth:`run` may be used."""
        return self._requests is not None and self._unmap is None and not self._backlog and self._found is None

    def run(self, poll: int, lock: _Lock) -> dict[int, int]:
        """Wait, and answer register accesses under a lock, until something else happens; return that: fds and events.

        Args:
            poll: the fd of an epoll that watches :meth:`interests`, and more.
            lock: held while accesses are done; others hold it while they change or close the session.

        Raises:
            DeviceGoneError, ProtocolError: as :meth:`serve` does.
        """
        return self._wire.run(
            self._read, self._write, _BATCH, _QUEUED, poll, lock.acquire, lock.release, self._sort
        )

    def _sort(self, found: Message | tuple[Message, BaseException]) -> None:
        """Keep a message for the pump, or answer for a handler that failed."""
        if isinstance(found, Message):
            self._found = found
            return
        message, error = found
        if not isinstance(error, Exception):  # KeyboardInterrupt, in a thread that has it
            raise error
        self._refuse(message, self._error_number(message, error))

    def pump(self, ready: Collection[int]) -> bool:
        """Do what can be done without waiting; return whether there may be more to do at once.

        Args:
            ready: the fds of :meth:`interests` on which something has happened.

        Raises:
            DeviceGoneError: the client went.
            ProtocolError: the client does not keep to the protocol; close the session.
        """
        for channel in self._channels():
            if channel.queued:
                channel.flush()
        self._finish_unmap()
        self._doorbells.ring(ready)
        for _ in range(_BATCH):
            self._work_off()
            if self._twin is not None and (answer := self._twin.receive()) is not None:
                self._take_answer(answer)
                continue
            if self._channel.queued > _QUEUED:
                return False  # who does not read gets no more answers
            if (message := self._found) is not None:
                self._found = None
            elif (message := self._channel.receive()) is None:
                return False
            self._take(message)
        return True

    def _channels(self) -> tuple[Channel, ...]:
        return (self._channel,) if self._twin is None else (self._channel, self._twin)

    def _take(self, message: Message) -> None:
        if message.is_reply:
            self._take_answer(message)
        elif self._unmap is not None or self._backlog:
            self._backlog_bytes += _weight(message)
            self._backlog.append(message)
            if self._backlog_bytes > _BACKLOG:
                raise ProtocolError("the client sends more and more while DMA_UNMAP waits", object=self._label)
        else:
            self._serve(message)

    def _work_off(self) -> None:
        while self._backlog and self._unmap is None:
            message = self._backlog.popleft()
            self._backlog_bytes -= _weight(message)
            self._serve(message)

    def _take_answer(self, message: Message) -> None:
        close_fds(message.fds)
        if not message.is_reply or self._requests is None:
            raise ProtocolError(f"the client sends message {message.command} where it must not", object=self._label)
        self._requests.answer(message)

    def _serve(self, message: Message) -> None:
        reply, error = self._try(message)
        close_fds(message.fds)
        if error:
            self._refuse(message, error)
            if not self.negotiated:
                raise ProtocolError("the client could not be understood", object=self._label)
        elif reply is not None:
            self._send(message, *reply)

    def _try(self, message: Message) -> tuple[Reply | None, int]:
        """Do what a request asks for; return the reply, if there is one now, and the error number."""
        try:
            return self._handle(message), 0
        except Exception as error:
            return None, self._error_number(message, error)

    def _error_number(self, message: Message, error: Exception) -> int:
        if isinstance(error, VfioError):
            _LOG.debug("%s: command %d: %s", self._label, message.command, error)
            return error.errno or errno.EIO
        if isinstance(error, ClosedError):
            return errno.ENODEV
        # A register handler is a user's code: what it raises is its client's EIO, and not the end of the server.
        _LOG.error("%s: command %d", self._label, message.command, exc_info=error)
        return errno.EIO

    def _handle(self, message: Message) -> Reply | None:
        """Return the reply, or None where it comes later or has gone already."""
        wire.check_request(message.command, len(message.payload), len(message.fds), from_client=True)
        if message.command == Command.VERSION:
            self._version(message)
            return None
        if not self.negotiated:
            raise wire.malformed(f"{Command(message.command).name} before VERSION")
        if message.command == Command.DMA_UNMAP:
            self._begin_unmap(message)
            return None
        handler = self._commands.get(message.command)
        if handler is None:
            raise VfioError(f"{Command(message.command).name} is not served", errno=errno.ENOTSUP)
        return handler(message.payload, message.fds)

    def _send(self, message: Message, parts: tuple[bytes, ...] = (), fds: tuple[int, ...] = ()) -> None:
        if message.wants_reply:
            self._channel.send(message.id, message.command, _REPLY, parts, fds)

    def _refuse(self, message: Message, number: int) -> None:
        if message.wants_reply:
            self._channel.send(message.id, message.command, _REFUSAL, error=number)

    # --- VERSION -----------------------------------------------------------------------------------------------------

    def _version(self, message: Message) -> None:
        if self.negotiated:
            raise wire.malformed("VERSION for the second time")
        minor, theirs = decode_version(message.payload)
        self._their_fds = theirs.max_msg_fds
        ends: tuple[socket.socket, ...] = ()
        offer = self._offer
        if theirs.twin_socket.supported and theirs.max_msg_fds:
            ends = socket.socketpair()
            offer = Capabilities.ours(twin_socket=True, fd_index=0, max_dma_maps=self._limits.max_dma_maps)
            self._twin = Channel(ends[0], self._label, max_data=offer.max_data_xfer_size, max_fds=0)
        self._requests = DmaRequests(
            self._ask,
            self._label,
            max_data=min(theirs.max_data_xfer_size, offer.max_data_xfer_size),
            timeout=self._limits.request_timeout,
        )
        self._requests.pump_thread = threading.get_ident()
        self._wire.usable = True
        reply = encode_version(min(minor, wire.MINOR), offer)
        try:
            self._send(message, (reply,), tuple(end.fileno() for end in ends[1:]))
        finally:
            for end in ends[1:]:
                end.close()

    def _ask(self, number: int, command: int, parts: tuple[bytes, ...]) -> None:
        channel = self._twin or self._channel
        if not channel.send(number, command, 0, parts):
            self._wake()

    # --- memory ------------------------------------------------------------------------------------------------------

    def _dma_map(self, payload: bytearray, fds: list[int]) -> Reply:
        assert self._requests is not None
        self._space.map(payload, fds, self._requests)
        return (), ()

    def _get_region_io_fds(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        return self._doorbells.reply(payload, self._their_fds)

    def _begin_unmap(self, message: Message) -> None:
        assert self._requests is not None
        dirty = self._device.log.question(message.payload)
        closing, first, last = self._space.begin_unmap(message.payload)
        # The client waits for the answer to this, and may answer nothing else until it has it.
        self._requests.bar(first, last, "the client takes the memory away")
        self.deadline = time.monotonic() + self._limits.unmap_timeout
        self._unmap = _Unmap(message, closing, self.deadline, dirty)
        self._finish_unmap()

    def _finish_unmap(self) -> None:
        """Look whether DMA_UNMAP can be answered."""
        unmap = self._unmap
        if unmap is None:
            return
        told: tuple[bytes, ...] = ()
        try:
            if unmap.closing.ready():
                unmap.closing.finish()
                if unmap.dirty is not None:  # now: whoever had the memory may have written it up to the end
                    told = self._device.log.answer(unmap.dirty)
                error = 0
            elif time.monotonic() < unmap.deadline:
                return
            else:
                unmap.closing.give_up()
                error = errno.EBUSY
        except VfioError as refusal:
            error = refusal.errno or errno.EIO
        self._unmap = self.deadline = None
        if self._requests is not None:
            self._requests.unbar()
        if error:
            self._refuse(unmap.message, error)
        else:
            self._send(unmap.message, (bytes(unmap.message.payload[: wire.DMA_UNMAP.size]), *told))

    # --- end ---------------------------------------------------------------------------------------------------------

    def close(self, reason: str) -> None:
        """Let the client go: nothing of its memory and none of its fds stays; the device keeps its state."""
        if self._requests is not None:
            self._requests.close(reason)
        if self._unmap is not None:
            self._unmap.closing.give_up()
            self._unmap = self.deadline = None
        for message in (*self._backlog, *([self._found] if self._found else ())):
            close_fds(message.fds)
        self._backlog.clear()
        for channel in self._channels():
            channel.close()
        self._doorbells.close()
        self._device.quiet()
        self._space.clear(self._limits.unmap_timeout)
