"""Offers a device on a socket: QEMU's ``vfio-user-pci``, vfiopy itself or any other client uses it as hardware."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

from vfiopy.backend import DeviceIo, Mapper
from vfiopy.errors import BusyError, StateError, VfioError, VfiopyError
from vfiopy.lives import Resource
from vfiopy.vfio_user.client_space import ClientSpace
from vfiopy.vfio_user.hangup import Guard
from vfiopy.vfio_user.listening import Listener, peer_user
from vfiopy.vfio_user.served import ServedDevice
from vfiopy.vfio_user.session import Limits, Session
from vfiopy.vfio_user.version import Capabilities

__all__ = ["Server"]

_LOG = logging.getLogger(__name__)
_MOST_EVENTS: Final = 16  # of one look; room for more is made anew for each


class Server(Resource):
    """One device on one socket, for one client at a time.

    It does nothing by itself. :meth:`start` gives it a thread, :meth:`serve` a task; in a loop of your own, watch
    :meth:`fileno` and call :meth:`step`. Any number of servers live in a process.

    When a client goes, its memory is unmapped and its interrupts are disabled; the device keeps its state, as the
    protocol has it, and the next client resets it. A client that does not keep to the protocol is let go.

    Threads: ``close`` from any, the rest from one at a time.

    Args:
        io: the device, open; taken over.
        mapper: its way to memory; taken over.
        path: of the socket to listen on; None where :meth:`attach` is to be used.
        limits: what clients may do.
        users: ids of the users whose processes may connect; None for all who can open the socket.
        guarded: have a process of its own hang up when this one is killed: see :class:`~vfiopy.vfio_user.hangup.Guard`.
    """

    _rank = -30

    def __init__(
        self,
        io: DeviceIo,
        mapper: Mapper,
        path: str | os.PathLike[str] | None = None,
        *,
        limits: Limits = Limits(),  # noqa: B008  frozen
        users: Collection[int] | None = None,
        guarded: bool = False,
    ) -> None:
        super().__init__(f"server of {io.name}" + (f" at {os.fspath(path)}" if path is not None else ""))
        self._open = False
        self.io = io
        self.path = None if path is None else Path(path)
        self._limits = limits
        self._users = users
        self._listener: Listener | None = None
        self._guard: Guard | None = None
        self._session: Session | None = None
        self._thread: threading.Thread | None = None
        self._on_close: Callable[[], object] | None = None
        self._lock = threading.RLock()  # close() against step()
        self._watched: dict[int, int] = {}
        ours = Capabilities.ours()
        self._device = ServedDevice(io, ours.max_data_xfer_size, ours.max_msg_fds)
        self._space = ClientSpace(
            mapper, self._label, max_mappings=limits.max_dma_maps, trust_files=limits.trust_files
        )
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._bell, select.EPOLLIN)
        self._open = True
        try:
            if guarded:
                self._guard = Guard()
            if self.path is not None:
                self._listener = Listener(self.path)
                self._epoll.register(self._listener.socket.fileno(), select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    # --- for event loops ---------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """An fd that is readable when :meth:`step` has something to do."""
        self.check_open()
        return self._epoll.fileno()

    @property
    def patience(self) -> float | None:
        """Seconds after which :meth:`step` is to be called even if nothing happened; None for no such time."""
        deadline = self._session.deadline if self._session else None
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    @property
    def connected(self) -> bool:
        """A client is there."""
        return self._session is not None

    @property
    def qemu_option(self) -> str:
        """The value of QEMU's ``-device`` for this socket; QEMU 10.1 or later.

        Raises:
            StateError: it listens nowhere.
        """
        if self.path is None:
            raise StateError(f"{self._label} has no path that QEMU could connect to")
        where = {"path": os.fspath(self.path.absolute()), "type": "unix"}
        return json.dumps({"driver": "vfio-user-pci", "socket": where})

    def attach(self, sock: socket.socket) -> None:
        """Take a connected socket as the client: one end of a socketpair, or what a launcher accepted.

        Raises:
            BusyError: there is a client.
        """
        with self._lock:
            self.check_open()
            if self._session is not None:
                raise BusyError("it has a client", object=self._label, hint="one client at a time")
            if self._guard is not None:
                self._guard.hold(sock)
            self._session = Session(
                sock, self._device, self._space, self._label, limits=self._limits, wake=self._ring
            )
            self._sync()

    def step(self) -> None:
        """Do what there is to do, without waiting for anything."""
        with self._lock:
            if self._open:
                self._serve(self._epoll.poll(0, _MOST_EVENTS))

    def _serve(self, events: list[tuple[int, int]]) -> None:
        """Do what epoll tells of: nearly always nothing but register accesses, and the short way for those."""
        session = self._session
        if session is not None and len(events) == 1 and events[0] == session.usual:
            try:
                if session.serve():
                    return
            except VfiopyError as error:
                self._let_go(error)
        self._do(dict(events))

    def _do(self, events: dict[int, int]) -> None:
        if self._bell in events:
            os.eventfd_read(self._bell)
        more = self._pump(events)
        if self._listener is not None and self._listener.socket.fileno() in events:
            self._accept()
        if more:
            self._ring()
        self._sync()

    def _pump(self, ready: Collection[int]) -> bool:
        if self._session is None:
            return False
        try:
            return self._session.pump(ready)
        except VfiopyError as error:
            self._let_go(error)
            return False

    def _let_go(self, error: VfiopyError) -> None:
        ordinary = isinstance(error, VfioError) and error.errno == errno.ECONNRESET
        _LOG.log(logging.INFO if ordinary else logging.WARNING, "%s: the client is let go: %s", self._label, error)
        self._end_session(str(error))

    def _accept(self) -> None:
        while self._listener is not None and (sock := self._listener.accept()) is not None:
            if self._session is not None or not self._welcome(sock):
                sock.close()  # what a second client sees: the connection ends at once
            else:
                self.attach(sock)

    def _welcome(self, sock: socket.socket) -> bool:
        if self._users is None or (user := peer_user(sock)) in self._users:
            return True
        _LOG.warning("%s: a process of user %d is turned away", self._label, user)
        return False

    def _sync(self) -> None:
        """Have epoll watch what the session waits for."""
        self._watch(self._session.interests() if self._session else {})

    def _watch(self, wanted: dict[int, int]) -> None:
        for fd in [fd for fd in self._watched if fd not in wanted]:
            del self._watched[fd]
            with suppress(OSError):  # a closed fd went by itself
                self._epoll.unregister(fd)
        for fd, events in wanted.items():
            if fd not in self._watched:
                with suppress(FileNotFoundError):
                    self._epoll.unregister(fd)
                self._epoll.register(fd, events)
            elif self._watched[fd] != events:
                self._epoll.modify(fd, events)
            self._watched[fd] = events

    def _ring(self) -> None:
        with suppress(OSError):
            os.eventfd_write(self._bell, 1)

    # --- loops -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve in a thread until :meth:`close`.

        Raises:
            StateError: it has one.
        """
        self.check_open()
        if self._thread is not None:
            raise StateError(f"{self._label} is being served already")
        # A daemon: a script that ends without close() must not hang on a device that is only software.
        self._thread = threading.Thread(target=self.run, name=self._label, daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Serve in this thread until :meth:`close` is called by another."""
        while self._open:
            events = self._wait()
            with self._lock:
                if self._open:
                    self._do(events)

    def _wait(self) -> dict[int, int]:
        """Wait for something that is no register access; those are answered meanwhile."""
        session = self._session
        if session is None or not session.is_plain:
            patience = self.patience
            return dict(self._epoll.poll(-1 if patience is None else patience, _MOST_EVENTS))
        try:
            return session.run(self._epoll.fileno(), self._lock)
        except VfiopyError as error:
            with self._lock:
                if self._session is session:
                    self._let_go(error)
            return {}

    async def serve(self) -> None:
        """Serve in this task until it is cancelled or :meth:`close` is called; without a thread."""
        self.check_open()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        timer: asyncio.TimerHandle | None = None

        def end(error: BaseException | None = None) -> None:
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        def step() -> None:  # by the loop itself: to wake a task for each register access takes longer than the access
            nonlocal timer
            if timer is not None:
                timer.cancel()
                timer = None
            try:
                self.step()
            except Exception as error:
                end(error)
                return
            session = self._session
            if session is not None and session.deadline is not None:
                timer = loop.call_later(self.patience or 0, step)

        fd = self._epoll.fileno()
        self._on_close = lambda: loop.call_soon_threadsafe(end)
        loop.add_reader(fd, step)
        try:
            step()
            if self._open:
                await ended
        finally:
            self._on_close = None
            loop.remove_reader(fd)
            if timer is not None:
                timer.cancel()

    # --- end ---------------------------------------------------------------------------------------------------------

    def _end_session(self, reason: str) -> None:
        session = self._session
        if session is not None:
            self._watch({})  # before its fds are closed
            try:
                session.close(reason)
            finally:
                self._session = None
                if self._guard is not None:
                    self._guard.drop()

    def disconnect(self) -> None:
        """Let the client go, if there is one; the next may come."""
        with self._lock:
            self._end_session("the server lets the client go")

    def _release(self) -> None:
        with self._lock:
            self._open = False
            self._end_session("the server ends")
            if self._listener is not None:
                self._listener.close()
            if self._guard is not None:
                self._guard.close()
            self.io.close()
            self._space.close()
        self._ring()
        if self._on_close is not None:
            self._on_close()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._epoll.close()
        os.close(self._bell)
