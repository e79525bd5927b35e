"""Who reads the client's socket: one thread at a time, for all that wait.

Native code asks, and reads, where nobody else does (native/ext/wire_client.c). What is here is the rest: those who wait
for a reply that another thread reads, or for their turn, and what becomes of messages that whoever read them did not
wait for.
"""

from __future__ import annotations

import errno
import logging
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from vfiopy.errors import DeviceGoneError, ProtocolError, VfioError, VfioTimeoutError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message, close_fds
from vfiopy.vfio_user.wire import Command, Flag

__all__ = ["ONCE", "TICK", "Serve", "Turns"]

_LOG = logging.getLogger(__name__)
TICK: Final = 0.2
"""Seconds; how long one recv may take, beside which time limits are looked at."""
ONCE: Final = select.EPOLLIN | select.EPOLLONESHOT
"""What the thread that serves an idle connection waits for."""
_NEVER: Final = select.EPOLLONESHOT
_MOST_QUEUED: Final = 64 << 20  # bytes of answers that the server may leave unread

Serve = Callable[[int, bytearray], tuple[bytes | bytearray, ...]]
"""Does a request of the server's (command, payload); returns the reply's parts, or raises VfioError."""


class _Call:
    """A request that waits for its reply."""

    __slots__ = ("command", "reply")

    def __init__(self, command: int) -> None:
        self.command = command
        self.reply: Message | None = None


class Turns:
    """A socket that many threads ask through, and that one at a time reads.

    Threads: any.

    Args:
        sock: connected; taken over.
        label: for messages.
        serve: see :data:`Serve`; called from whichever thread reads.
        max_data: the most bytes of data that a message may bring.
        max_fds: the most fds that a message may bring.
    """

    def __init__(self, sock: socket.socket, label: str, serve: Serve, *, max_data: int, max_fds: int) -> None:
        self._label = label
        self._serve = serve
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, int(TICK * 1e6)))
        self._channel = Channel(sock, label, max_data=max_data, max_fds=max_fds, fault=self._found)
        # The native part has the turns, the ids, and the quick road: who finds nobody reading asks by one call.
        self._wire = self._channel.wire
        self._wire.use(self._dispatch, self._turn_over, -1)
        self._wire.usable = True
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)  # entering the lock itself is quicker
        self._calls: dict[int, _Call] = {}
        self._error: VfioError | None = None
        self._closing = False
        self._poll: select.epoll | None = None

    @property
    def timeout(self) -> float:
        """Seconds for each reply; may be assigned at any time."""
        return self._wire.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._wire.timeout = seconds

    # --- errors ------------------------------------------------------------------------------------------------------

    def _found(self, error: VfioError) -> VfioError:
        """Hear of an error of the socket before it is raised."""
        if isinstance(error, VfioTimeoutError):
            return self._unanswered(Command.REGION_READ, self.timeout, "")  # request() says more
        if isinstance(error, DeviceGoneError | ProtocolError):  # others: one message was not sent
            self._fail(error)
        return error

    def _unanswered(self, command: Command, patience: float, detail: str) -> VfioTimeoutError:
        return VfioTimeoutError(
            f"the server did not answer within {patience} s{f' ({detail})' if detail else ''}",
            object=self._label,
            call=f"VFIO_USER_{command.name}",
            hint="it hangs, or is slow: device.io.timeout says how long to wait",
        )

    def _fail(self, error: VfioError) -> None:
        """Remember why nothing works any more, and tell all who wait."""
        with self._lock:
            if self._error is None:
                self._error = self._again(error)
            self._wire.usable = False
            self._turn.notify_all()

    def _is_over(self) -> bool:
        return self._closing or self._error is not None

    def _check(self) -> None:
        if self._error is not None:
            raise self._again(self._error)

    def _again(self, error: VfioError) -> VfioError:
        """Make the error anew: one that is kept would keep alive whatever the frames of its traceback hold."""
        return type(error)(
            error.meaning, errno=error.errno, object=self._label, hint=error.hint or "open the device again"
        )

    # --- waiting -----------------------------------------------------------------------------------------------------

    def _exchange(self, command: Command, parts: Sequence[bytes], fds: Sequence[int], patience: float) -> Message:
        """Ask, and wait for the reply until another thread has read it, or until the turn to read comes."""
        deadline = time.monotonic() + patience
        call = _Call(command)
        with self._lock:
            self._check()
            number = self._wire.claim()
            self._calls[number] = call
        try:
            self._channel.send(number, command, 0, parts, fds)
            self._await(call, deadline)
        except BaseException:
            if call.reply is not None:  # which nobody gets
                close_fds(call.reply.fds)
            raise
        finally:
            with self._lock:
                if self._calls.pop(number, None) is not None:
                    self._wire.late(number, command)
        if call.reply is None:  # or it came at the last moment
            raise VfioTimeoutError("no answer came in time", object=self._label)
        return call.reply

    def _await(self, call: _Call | None, deadline: float) -> None:
        """Wait until ``call`` has its reply, or without one until everything is sent, or until the time limit."""
        outer = self._wire.has_turn()  # the server's request that is being done asks for something itself
        try:
            while not self._has_ended(call):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                if self._take_turn(min(left, TICK), partial(self._has_ended, call)):
                    self._read_in_turn(call, deadline)
        except VfioError:
            if call is None or call.reply is None:
                raise
        finally:
            if not outer:
                self._wire.give_turn()
        if call is None:
            self._check()
            if self._channel.queued:
                raise VfioTimeoutError("the server takes no more messages", object=self._label)
        elif call.reply is None:
            self._check()

    def _take_turn(self, seconds: float, ended: Callable[[], bool]) -> bool:
        """Take the turn to read, or wait for a while or until that has no sense: return whether this thread has it."""
        self._wire.wait(1)
        try:
            with self._lock:
                if ended():
                    return False
                if self._wire.take_turn():
                    return True
                self._turn.wait(seconds)
                return False
        finally:
            self._wire.wait(-1)

    def _turn_over(self) -> None:
        """Nobody reads now: who waits may."""
        with self._lock:
            self._turn.notify_all()

    def _has_ended(self, call: _Call | None) -> bool:
        if self._error is not None:
            return True
        return not self._channel.queued if call is None else call.reply is not None

    def _read_in_turn(self, call: _Call | None, deadline: float) -> None:
        try:
            self._watch(_NEVER)  # the thread may sleep on
            while not self._has_ended(call) and time.monotonic() < deadline:
                self._read_some(deadline)
            self._read_what_is_here()
        finally:
            self._watch(ONCE)
            self._wire.give_turn()

    def _watch(self, events: int) -> None:
        if self._poll is not None and not self._closing:
            self._poll.modify(self._channel.fileno(), events)

    def _read_some(self, deadline: float) -> None:
        """Wait for a message, or for room where something is to be sent, and deal with it."""
        channel = self._channel
        if channel.queued:
            left = max(0.0, min(deadline - time.monotonic(), TICK))
            poll = select.poll()
            poll.register(channel.fileno(), select.POLLIN | select.POLLOUT)
            poll.poll(left * 1000)
            channel.flush()
            message = channel.receive()
        else:
            message = channel.receive(wait=True)
        if message is not None:
            self._dispatch(message)

    def _read_what_is_here(self) -> None:
        while (message := self._channel.receive()) is not None:
            self._dispatch(message)

    def _dispatch(self, message: Message) -> None:
        """Hand a message on that whoever read it was not waiting for."""
        if not message.is_reply:
            self._answer(self._channel, message)
            return
        with self._lock:
            call = self._calls.get(message.id)
            if call is not None and call.command == message.command:
                del self._calls[message.id]
                self._wire.release(message.id)
                call.reply = message
                self._turn.notify_all()
                return
        close_fds(message.fds)
        if not self._wire.take_late(message.id, message.command):
            error = ProtocolError(
                f"the server answers {message.command} number {message.id}, which nobody asked", object=self._label
            )
            self._fail(error)
            raise error

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
        if channel.queued > _MOST_QUEUED:
            overrun = ProtocolError("the server asks for more and more, and takes no answers", object=self._label)
            self._fail(overrun)
            raise overrun
        if message.wants_reply:
            flags = Flag.REPLY | Flag.ERROR if error else Flag.REPLY
            channel.send(message.id, message.command, int(flags), parts, error=error)
