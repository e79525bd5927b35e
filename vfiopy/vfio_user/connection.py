"""The client's end of a connection: requests with their replies, and the server's own requests, which never wait.

Who waits for a reply reads the socket, and takes whatever else comes on it along; so a register read costs no change of
threads. A thread serves the rest of the time: the socket itself while nobody reads it, or the twin socket, where the
server has one for its own requests.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from vfiopy.errors import DeviceGoneError, ProtocolError, VfioError, VfioTimeoutError, from_errno
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message, close_fds
from vfiopy.vfio_user.version import Capabilities, decode_version, encode_version
from vfiopy.vfio_user.wire import Command, Flag

__all__ = ["Connection", "Serve"]

_LOG = logging.getLogger(__name__)
_TICK: Final = 0.2  # seconds; how long one recv may take, beside which time limits are looked at
_MOST_LATE: Final = 1024
_ONCE: Final = select.EPOLLIN | select.EPOLLONESHOT
_NEVER: Final = select.EPOLLONESHOT

Serve = Callable[[int, bytearray], tuple[bytes | bytearray, ...]]
"""Does a request of the server's (command, payload); returns the reply's parts, or raises VfioError."""


class _Call:
    """A request that waits for its reply."""

    __slots__ = ("command", "reply")

    def __init__(self, command: int) -> None:
        self.command = command
        self.reply: Message | None = None


class Connection:
    """A connection to a server, negotiated.

    Threads: any thread may ask; ``close`` is the last call.

    Args:
        sock: connected; taken over.
        label: for messages.
        serve: see :data:`Serve`; called from whichever thread reads.
        timeout: seconds for each reply.

    Attributes:
        peer: what the server can do.
        timeout: may be changed at any time.

    Raises:
        DeviceGoneError: the server hung up.
        ProtocolError: it is no vfio-user server, or of another version.
        VfioTimeoutError: it does not answer.
    """

    def __init__(self, sock: socket.socket, label: str, serve: Serve, *, timeout: float, twin: bool = True) -> None:
        self.timeout = timeout
        self.peer = Capabilities()
        self._label = label
        self._serve = serve
        offer = Capabilities.ours(twin_socket=twin)
        self._max_data = offer.max_data_xfer_size
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, int(_TICK * 1e6)))
        self._channel = Channel(sock, label, max_data=self._max_data, max_fds=offer.max_msg_fds)
        self._twin: Channel | None = None
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)  # entering the lock itself is quicker
        self._reading = False  # somebody reads the socket
        self._waiting = 0  # threads that wait for their turn
        self._calls: dict[int, _Call] = {}
        self._late: dict[int, int] = {}
        self._next = 0
        self._error: VfioError | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self._poll: select.epoll | None = None
        self._bell = -1
        try:
            self._negotiate(offer)
            self._start_serving()
        except BaseException:
            self.close()
            raise

    def _negotiate(self, offer: Capabilities) -> None:
        reply = self.request(Command.VERSION, encode_version(wire.MINOR, offer))
        try:
            _, self.peer = decode_version(reply.payload)
            twin = self.peer.twin_socket
            if twin.supported != bool(reply.fds) or (twin.supported and twin.fd_index != 0):
                raise ProtocolError("the server's twin socket is not what it says", object=self._label)
            if twin.supported and not offer.twin_socket.supported:
                raise ProtocolError("the server has a twin socket that nobody asked for", object=self._label)
            if twin.supported:
                end = socket.socket(fileno=reply.fds.pop(0))
                end.setblocking(True)
                self._twin = Channel(end, self._label, max_data=self._max_data, max_fds=0)
        finally:
            close_fds(reply.fds)

    def _start_serving(self) -> None:
        if self._twin is None:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._poll = select.epoll()
            self._poll.register(self._bell, select.EPOLLIN)
            self._poll.register(self._channel.fileno(), _ONCE)
        target = self._serve_idle if self._twin is None else self._serve_twin
        self._thread = threading.Thread(target=target, name=self._label, daemon=True)
        self._thread.start()

    # --- asking ------------------------------------------------------------------------------------------------------

    def request(
        self,
        command: Command,
        *parts: bytes,
        fds: Sequence[int] = (),
        detail: str = "",
        timeout: float | None = None,
    ) -> Message:
        """Send a request and return its reply, whose fds are the caller's.

        Args:
            command: what is asked.
            parts: of the payload.
            fds: go along.
            detail: for the error's text.
            timeout: seconds, or None for the connection's own.

        Raises:
            VfioError: the server refuses; the class says why.
            VfioTimeoutError: it did not answer in time. The connection goes on.
            DeviceGoneError: it hung up.
            ProtocolError: it did not keep to the protocol; the connection is of no use any more.
        """
        patience = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + patience
        call = _Call(command)
        with self._lock:
            self._check()
            number = self._number(call)
            mine = not self._reading
            self._reading = True
        try:
            if mine:  # before it is sent: or the thread might be woken for the reply
                self._read_in_turn(call, deadline, lambda: self._channel.send(number, command, 0, parts, fds))
            else:
                self._channel.send(number, command, 0, parts, fds)
            if call.reply is None:
                self._await(call, deadline, False)
        except DeviceGoneError as error:
            self._fail(error)
            raise
        finally:
            with self._lock:
                if self._calls.pop(number, None) is not None:
                    self._remember_late(number, command)
        reply = call.reply  # it may have come at the last moment
        if reply is None:
            raise VfioTimeoutError(
                f"the server did not answer within {patience} s{f' ({detail})' if detail else ''}",
                object=self._label,
                call=f"VFIO_USER_{command.name}",
                hint="it hangs, or is slow: device.io.timeout says how long to wait",
            )
        if reply.is_error:
            close_fds(reply.fds)
            name = f"VFIO_USER_{command.name}"
            raise from_errno(reply.error or errno.EIO, call=name, object=self._label, detail=detail)
        return reply

    def post(self, command: Command, *parts: bytes) -> None:
        """Send a request that is not answered: it is done before the next one is.

        Raises:
            DeviceGoneError: the server hung up.
            VfioTimeoutError: it takes nothing any more.
        """
        with self._lock:
            self._check()
            self._next = (self._next + 1) & 0xFFFF
            number = self._next
        try:
            if not self._channel.send(number, command, int(Flag.NO_REPLY), parts):
                self._await(None, time.monotonic() + self.timeout, False)
        except DeviceGoneError as error:
            self._fail(error)
            raise

    def _check(self) -> None:
        if self._error is not None:
            raise self._again(self._error)

    def _again(self, error: VfioError) -> VfioError:
        """Make the error anew: one that is kept would keep alive whatever the frames of its traceback hold."""
        return type(error)(
            error.meaning, errno=error.errno, object=self._label, hint=error.hint or "open the device again"
        )

    def _number(self, call: _Call) -> int:
        number = self._next
        while number in self._calls or number in self._late:
            number = (number + 1) & 0xFFFF
        self._next = (number + 1) & 0xFFFF
        self._calls[number] = call
        return number

    def _remember_late(self, number: int, command: int) -> None:
        self._late[number] = command
        while len(self._late) > _MOST_LATE:
            self._late.pop(next(iter(self._late)))

    # --- reading -----------------------------------------------------------------------------------------------------

    def _await(self, call: _Call | None, deadline: float, sent: bool) -> None:
        """Read until ``call`` has its reply, or without one until everything is sent, or until the time limit."""
        while True:
            with self._lock:
                while self._reading and not self._has_ended(call):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._waiting += 1
                    self._turn.wait(min(left, _TICK))
                    self._waiting -= 1
                if call is not None and call.reply is not None:
                    return
                self._check()
                if call is None and (sent or not self._channel.queued):
                    return
                if time.monotonic() >= deadline:
                    if call is None:
                        raise VfioTimeoutError("the server takes no more messages", object=self._label)
                    return
                if self._reading:
                    continue
                self._reading = True
            self._read_in_turn(call, deadline)

    def _has_ended(self, call: _Call | None) -> bool:
        if self._error is not None:
            return True
        return not self._channel.queued if call is None else call.reply is not None

    def _read_in_turn(
        self, call: _Call | None, deadline: float, before: Callable[[], object] | None = None
    ) -> None:
        try:
            if self._poll is not None:
                self._poll.modify(self._channel.fileno(), _NEVER)  # the thread may sleep on
            if before is not None:
                before()
            while not self._has_ended(call):
                self._read_some(deadline)
                if call is not None and call.reply is not None:
                    break
                if time.monotonic() >= deadline:
                    break
        except VfioError as error:
            self._fail(error)
            raise
        finally:
            with self._lock:
                self._reading = False
                if self._waiting:
                    self._turn.notify_all()
                if self._poll is not None and not self._closing:
                    self._poll.modify(self._channel.fileno(), _ONCE)

    def _read_some(self, deadline: float) -> None:
        """Wait for a message, or for room where something is to be sent, and deal with it."""
        channel = self._channel
        if channel.queued:
            left = max(0.0, min(deadline - time.monotonic(), _TICK))
            poll = select.poll()
            poll.register(channel.fileno(), select.POLLIN | select.POLLOUT)
            poll.poll(left * 1000)
            channel.flush()
            message = channel.receive()
        else:
            message = channel.receive(wait=True)
        if message is not None:
            self._dispatch(channel, message)

    def _dispatch(self, channel: Channel, message: Message) -> None:
        if not message.is_reply:
            self._answer(channel, message)
            return
        with self._lock:
            call = self._calls.get(message.id)
            if call is not None and call.command == message.command:
                del self._calls[message.id]
                call.reply = message
                if self._waiting:
                    self._turn.notify_all()
                return
            late = self._late.pop(message.id, None)
        close_fds(message.fds)
        if late != message.command:
            raise ProtocolError(
                f"the server answers {message.command} number {message.id}, which nobody asked", object=self._label
            )

    def _answer(self, channel: Channel, message: Message) -> None:
        """Serve a request of the server's."""
        parts: tuple[bytes | bytearray, ...] = ()
        error = 0
        try:
            wire.check_request(message.command, len(message.payload), len(message.fds), from_client=False)
            parts = self._serve(message.command, message.payload)
        except VfioError as refusal:
            _LOG.debug("%s: request %d of the server: %s", self._label, message.command, refusal)
            error = refusal.errno or errno.EIO
        except Exception:
            _LOG.exception("%s: request %d of the server", self._label, message.command)
            error = errno.EIO
        finally:
            close_fds(message.fds)
        if message.wants_reply:
            flags = Flag.REPLY | Flag.ERROR if error else Flag.REPLY
            channel.send(message.id, message.command, int(flags), parts, error=error)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _serve_twin(self) -> None:
        twin = self._twin
        assert twin is not None
        try:
            while True:
                message = twin.receive(wait=True)
                if message is not None:
                    if message.is_reply:
                        raise ProtocolError("the server answers on the twin socket", object=self._label)
                    self._answer(twin, message)
                while twin.queued and not twin.flush():
                    select.select([], [twin.fileno()], [], _TICK)
        except (VfioError, OSError, ValueError) as error:
            if not self._closing:
                self._fail(error if isinstance(error, VfioError) else DeviceGoneError(str(error), object=self._label))

    def _serve_idle(self) -> None:
        poll = self._poll
        assert poll is not None
        while not self._closing:
            poll.poll()
            with self._lock:
                while self._reading and not self._closing:
                    self._waiting += 1
                    self._turn.wait(_TICK)
                    self._waiting -= 1
                if self._closing or self._error is not None:
                    return
                self._reading = True
            try:
                self._read_what_is_there()
            except VfioError as error:
                self._fail(error)
                return
            finally:
                with self._lock:
                    self._reading = False
                    self._turn.notify_all()
            poll.modify(self._channel.fileno(), _ONCE)

    def _read_what_is_there(self) -> None:
        channel = self._channel
        while (message := channel.receive()) is not None:
            self._dispatch(channel, message)
        while channel.queued and not channel.flush() and not self._closing:
            select.select([], [channel.fileno()], [], _TICK)

    # --- end ---------------------------------------------------------------------------------------------------------

    def _fail(self, error: VfioError) -> None:
        """Remember why nothing works any more, and tell all who wait."""
        with self._lock:
            if self._error is None:
                self._error = self._again(error)
            self._turn.notify_all()

    @property
    def alive(self) -> bool:
        """No reason is known why a request should not get through."""
        return self._error is None and not self._closing

    def close(self) -> None:
        """Hang up; whoever waits gets a DeviceGoneError. Idempotent."""
        if self._closing:
            return
        self._closing = True
        self._fail(DeviceGoneError("the connection was closed", object=self._label))
        self._channel.shut()
        if self._twin is not None:
            self._twin.shut()
        if self._bell >= 0:
            os.eventfd_write(self._bell, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            while self._reading:  # it comes back at once: the socket is shut
                self._turn.wait(_TICK)
        self._channel.close()
        if self._twin is not None:
            self._twin.close()
        if self._poll is not None:
            self._poll.close()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
        for call in self._calls.values():
            if call.reply is not None:
                close_fds(call.reply.fds)
        with suppress(KeyError):
            self._calls.clear()
