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
from functools import partial
from typing import Final

from vfiopy.errors import DeviceGoneError, ProtocolError, VfioError, VfioTimeoutError, from_errno
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message, close_fds
from vfiopy.vfio_user.version import Capabilities, decode_version, encode_version
from vfiopy.vfio_user.wire import Command, Flag

__all__ = ["Connection", "Serve"]

_LOG = logging.getLogger(__name__)
_TICK: Final = 0.2  # seconds; how long one recv may take, beside which time limits are looked at
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

    Raises:
        DeviceGoneError: the server hung up.
        ProtocolError: it is no vfio-user server, or of another version.
        VfioTimeoutError: it does not answer.
    """

    def __init__(self, sock: socket.socket, label: str, serve: Serve, *, timeout: float, twin: bool = True) -> None:
        self.peer = Capabilities()
        self._label = label
        self._serve = serve
        offer = Capabilities.ours(twin_socket=twin)
        self._max_data = offer.max_data_xfer_size
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, int(_TICK * 1e6)))
        self._channel = Channel(sock, label, max_data=self._max_data, max_fds=offer.max_msg_fds, fault=self._found)
        # The native part has the turns, the ids, and the quick road: who finds nobody reading asks by one call.
        self._wire = self._channel.wire
        self._wire.use(self._dispatch, self._turn_over, -1)
        self._wire.usable = True
        self.timeout = timeout
        self._twin: Channel | None = None
        self._lock = threading.Lock()
        self._turn = threading.Condition(self._lock)  # entering the lock itself is quicker
        self._calls: dict[int, _Call] = {}
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

    @property
    def timeout(self) -> float:
        """Seconds for each reply; may be assigned at any time."""
        return self._wire.timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._wire.timeout = seconds

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
            self._wire.use(self._dispatch, self._turn_over, self._poll.fileno())
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
        try:
            reply = self._wire.exchange(command, parts, fds, patience)
            if reply is None:
                reply = self._exchange(command, parts, fds, patience)
        except VfioTimeoutError:
            raise self._unanswered(command, patience, detail) from None
        return self._accepted(reply, command, detail)

    def _found(self, error: VfioError) -> VfioError:
        """Hear of an error of the socket before it is raised."""
        if isinstance(error, VfioTimeoutError):
            return self._unanswered(Command.REGION_READ, self.timeout, "")  # request() says more
        self._fail(error)
        return error

    def _unanswered(self, command: Command, patience: float, detail: str) -> VfioTimeoutError:
        return VfioTimeoutError(
            f"the server did not answer within {patience} s{f' ({detail})' if detail else ''}",
            object=self._label,
            call=f"VFIO_USER_{command.name}",
            hint="it hangs, or is slow: device.io.timeout says how long to wait",
        )

    def _accepted(self, reply: Message, command: Command, detail: str) -> Message:
        """Raise what an error reply means."""
        if reply.is_error:
            close_fds(reply.fds)
            name = f"VFIO_USER_{command.name}"
            raise from_errno(reply.error or errno.EIO, call=name, object=self._label, detail=detail)
        return reply

    @property
    def read_quickly(self) -> Callable[[int, int, int], bytes | Message | None]:
        """Does REGION_READ (region, offset, size) by one native call; :meth:`read_region` goes on with its result."""
        return self._wire.read

    def read_region(self, region: int, offset: int, size: int, found: bytes | Message | None = None) -> bytes:
        """Do REGION_READ of at most what the server allows at once; raises as :meth:`request` does.

        Args:
            region: index.
            offset: bytes.
            size: bytes.
            found: what :attr:`read_quickly` returned, where that was not the data: a refusal, or that others read.
        """
        if found is None:
            found = self.request(Command.REGION_READ, wire.REGION_ACCESS.pack(offset, region, size))
        if isinstance(found, bytes):
            return found
        reply = self._accepted(found, Command.REGION_READ, "")
        if len(reply.payload) != wire.REGION_ACCESS.size + size or reply.fds:
            close_fds(reply.fds)
            raise ProtocolError(
                f"the server's answer is malformed: {len(reply.payload)} bytes for a read of {size}",
                object=self._label,
            )
        return bytes(memoryview(reply.payload)[wire.REGION_ACCESS.size :])

    @property
    def post_quickly(self) -> Callable[[int, int, bytes], bool | None]:
        """Does REGION_WRITE (region, offset, data) without a reply by one native call; see :meth:`post_write`."""
        return self._wire.post

    def post_write(self, region: int, offset: int, data: bytes, gone: bool | None = None) -> None:
        """Do REGION_WRITE without a reply: it is done before the next request is.

        Args:
            region: index.
            offset: bytes.
            data: of the write.
            gone: what :attr:`post_quickly` returned, where that was not True: it waits for room, or is not sent.

        Raises:
            DeviceGoneError: the server hung up.
            VfioTimeoutError: it takes nothing any more.
        """
        if gone is None:
            self.post(Command.REGION_WRITE, wire.REGION_ACCESS.pack(offset, region, len(data)), data)
        else:
            self._await(None, time.monotonic() + self.timeout)

    def post(self, command: Command, *parts: bytes) -> None:
        """Send any request that is not answered; raises as :meth:`post_write` does."""
        self._check()
        number = self._wire.claim()
        self._wire.release(number)  # no reply will come
        if not self._channel.send(number, command, int(Flag.NO_REPLY), parts):
            self._await(None, time.monotonic() + self.timeout)

    def _check(self) -> None:
        if self._error is not None:
            raise self._again(self._error)

    def _again(self, error: VfioError) -> VfioError:
        """Make the error anew: one that is kept would keep alive whatever the frames of its traceback hold."""
        return type(error)(
            error.meaning, errno=error.errno, object=self._label, hint=error.hint or "open the device again"
        )

    # --- while somebody else reads -----------------------------------------------------------------------------------

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
                if self._take_turn(min(left, _TICK), partial(self._has_ended, call)):
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
            self._watch(_ONCE)
            self._wire.give_turn()

    def _watch(self, events: int) -> None:
        if self._poll is not None and not self._closing:
            self._poll.modify(self._channel.fileno(), events)

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
            try:
                while not self._take_turn(_TICK, self._is_over):
                    if self._is_over():
                        return
                self._read_what_is_there()
            except VfioError:
                return
            finally:
                self._wire.give_turn()
            self._watch(_ONCE)

    def _is_over(self) -> bool:
        return self._closing or self._error is not None

    def _read_what_is_there(self) -> None:
        self._read_what_is_here()
        while self._channel.queued and not self._channel.flush() and not self._closing:
            select.select([], [self._channel.fileno()], [], _TICK)

    # --- end ---------------------------------------------------------------------------------------------------------

    def _fail(self, error: VfioError) -> None:
        """Remember why nothing works any more, and tell all who wait."""
        with self._lock:
            if self._error is None:
                self._error = self._again(error)
            self._wire.usable = False
            self._turn.notify_all()

    @property
    def alive(self) -> bool:
        """No reason is known why a request should not get through."""
        return not self._is_over()

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
        while not self._wire.take_turn():  # who has it comes back at once: the socket is shut
            time.sleep(0.001)
        self._channel.close()
        if self._twin is not None:
            self._twin.close()
        if self._poll is not None:
            self._poll.close()
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
        for call in list(self._calls.values()):
            if call.reply is not None:
                close_fds(call.reply.fds)
        self._calls.clear()
