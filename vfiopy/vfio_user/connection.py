"""The client's end of a connection: requests with their replies, and the server's own requests, which never wait.

Who waits for a reply reads the socket, and takes whatever else comes on it along; so a register read costs no change of
threads. A thread serves the rest of the time: the socket itself while nobody reads it, or the twin socket, where the
server has one for its own requests.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence

from vfiopy.errors import DeviceGoneError, ProtocolError, VfioError, VfioTimeoutError, from_errno
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message, close_fds
from vfiopy.vfio_user.turns import ONCE, TICK, Serve, Turns
from vfiopy.vfio_user.version import Capabilities, decode_version, encode_version
from vfiopy.vfio_user.wire import Command, Flag

__all__ = ["Connection", "Serve"]



class Connection(Turns):
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
        offer = Capabilities.ours(twin_socket=twin)
        self._max_data = offer.max_data_xfer_size
        super().__init__(sock, label, serve, max_data=self._max_data, max_fds=offer.max_msg_fds)
        self.timeout = timeout
        self._twin: Channel | None = None
        self._thread: threading.Thread | None = None
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
            self._poll.register(self._channel.fileno(), ONCE)
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
                    select.select([], [twin.fileno()], [], TICK)
        except (VfioError, OSError, ValueError) as error:
            if not self._closing:
                self._fail(error if isinstance(error, VfioError) else DeviceGoneError(str(error), object=self._label))
                self._channel.shut()  # or who reads there would wait to the end of its patience

    def _serve_idle(self) -> None:
        poll = self._poll
        assert poll is not None
        while not self._closing:
            poll.poll()
            try:
                while not self._take_turn(TICK, self._is_over):
                    if self._is_over():
                        return
                self._read_what_is_there()
            except VfioError:
                return
            finally:
                self._wire.give_turn()
            self._watch(ONCE)

    def _read_what_is_there(self) -> None:
        self._read_what_is_here()
        while self._channel.queued and not self._channel.flush() and not self._closing:
            select.select([], [self._channel.fileno()], [], TICK)

    # --- end ---------------------------------------------------------------------------------------------------------

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
        # Who has the turn comes back at once: the socket is shut. This thread has it in a signal handler.
        while not (self._wire.has_turn() or self._wire.take_turn()):
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
