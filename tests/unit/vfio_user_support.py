"""Clients and servers of vfio-user that do only what they are told, for tests of the other side."""

from __future__ import annotations

import errno
import gc
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vfiopy import emulated, uapi, vfio_user
from vfiopy.backend import IrqAction
from vfiopy.emulated import PciDevice
from vfiopy.errors import VfioError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import Channel, Message
from vfiopy.vfio_user.server import Server
from vfiopy.vfio_user.session import Limits
from vfiopy.vfio_user.version import Capabilities, encode_version
from vfiopy.vfio_user.wire import Command, Flag

QEMU_VERSION = (
    b"\0\0\0\0"
    b'{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"max_data_xfer_size":1048576,'
    b'"migration":{"max_bitmap_size":268435456,"pgsize":4096},"write_multiple":true}}\0'
)
PAGE = 4096
LIMITS = Limits()
EVENTFD, NONE, BOOL = (
    uapi.VFIO_IRQ_SET_DATA_EVENTFD,
    uapi.VFIO_IRQ_SET_DATA_NONE,
    uapi.VFIO_IRQ_SET_DATA_BOOL,
)


def open_fds() -> set[str]:
    """What is open, by number and target."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except OSError:
            continue
    return {item for item in found if Path("/proc/self/fd", item.split()[0]).exists()}


@contextmanager
def nothing_left(threads: Callable[[Callable[[], bool]], object] | None = None) -> Iterator[None]:
    """What is open afterwards was open before.

    Args:
        threads: what to do with the question whether there are as many threads as before; None does not ask.
    """
    gc.collect()
    fds, count = open_fds(), threading.active_count()
    yield
    gc.collect()  # a device and its memory are a circle
    if threads is not None:
        threads(lambda: threading.active_count() == count)
    assert open_fds() == fds


def at_once(condition: Callable[[], bool]) -> None:
    """For :func:`nothing_left`: there is nothing to wait for."""
    assert condition()


class RawClient:
    """Messages by hand. ``ask`` returns the errno of an error reply, or the payload."""

    def __init__(self, sock: socket.socket, *, greet: bool = True) -> None:
        self.socket = sock
        self.channel = Channel(sock, "raw client", max_data=1 << 20)
        self.number = 0
        self.fds: list[int] = []
        self.requests: list[Message] = []
        if greet:
            self.version = self.ask(Command.VERSION, QEMU_VERSION)

    def send(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0) -> int:
        self.number = (self.number + 1) & 0xFFFF
        self.channel.send(self.number, command, flags, [payload], fds)
        return self.number

    def receive(self, timeout: float = 10.0) -> Message:
        end = time.monotonic() + timeout
        while True:
            message = self.channel.receive()
            if message is not None:
                return message
            assert select.select([self.socket], [], [], max(0.0, end - time.monotonic()))[0], "no message came"

    def reply(self, number: int) -> Message:
        """The reply to a request; requests of the server's that come first are put aside."""
        while True:
            message = self.receive()
            if message.is_reply:
                assert message.id == number
                return message
            self.requests.append(message)

    def request(self) -> Message:
        """The server's next request."""
        return self.requests.pop(0) if self.requests else self.receive()

    def answer(self, request: Message, payload: bytes = b"", error: int = 0) -> None:
        flags = Flag.REPLY | (Flag.ERROR if error else 0)
        self.channel.send(request.id, request.command, int(flags), [payload], error=error)

    def ask(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Any:
        message = self.reply(self.send(command, payload, fds))
        assert message.command == command
        self.fds += message.fds
        if message.is_error:
            assert not message.payload
            return errno.errorcode[message.error]
        return bytes(message.payload)

    # --- commands ------------------------------------------------------------------------------------------------

    def map(self, address: int, size: int, fd: int | None = None, offset: int = 0, flags: int = 3) -> Any:
        payload = wire.DMA_MAP.pack(32, flags, offset, address, size)
        return self.ask(Command.DMA_MAP, payload, [] if fd is None else [fd])

    def unmap(self, address: int, size: int, flags: int = 0) -> Any:
        return self.ask(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(24, flags, address, size))

    def read(self, region: int, offset: int, size: int) -> Any:
        found = self.ask(Command.REGION_READ, wire.REGION_ACCESS.pack(offset, region, size))
        return found[16:] if isinstance(found, bytes) else found

    def write(self, region: int, offset: int, data: bytes) -> Any:
        head = wire.REGION_ACCESS.pack(offset, region, len(data))
        found = self.ask(Command.REGION_WRITE, head + data)
        return None if found == head else found

    def post(self, region: int, offset: int, data: bytes) -> None:
        payload = wire.REGION_ACCESS.pack(offset, region, len(data)) + data
        self.send(Command.REGION_WRITE, payload, flags=int(Flag.NO_REPLY))

    def set_irqs(
        self,
        index: int,
        flags: int,
        start: int = 0,
        count: int = 1,
        fds: Sequence[int] = (),
        data: bytes = b"",
        action: int = int(IrqAction.TRIGGER),
    ) -> Any:
        payload = wire.SET_IRQS.pack(20 + len(data), flags | action, index, start, count) + data
        return self.ask(Command.SET_IRQS, payload, fds)

    def gone(self, timeout: float = 10.0) -> bool:
        """Whether the server has closed the connection; what it said before is dropped."""
        end = time.monotonic() + timeout
        while select.select([self.socket], [], [], max(0.0, end - time.monotonic()))[0]:
            try:
                if not self.socket.recv(65536):
                    return True
            except ConnectionResetError:
                return True
        return False

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.channel.close()


@contextmanager
def serving(device: PciDevice, path: Path | None = None, limits: Limits = LIMITS, **options: Any) -> Iterator[Server]:
    """A server of a device, in a thread."""
    io, mapper = emulated.connect(device)
    with Server(io, mapper, path, limits=limits, **options) as server:
        server.start()
        yield server


@contextmanager
def raw_client(server: Server, *, greet: bool = True) -> Iterator[RawClient]:
    """A client over a socketpair."""
    ours, theirs = socket.socketpair()
    server.attach(theirs)
    client = RawClient(ours, greet=greet)
    try:
        yield client
    finally:
        client.close()


def memfd(size: int, *, sealed: bool = True) -> int:
    import fcntl  # noqa: PLC0415

    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


Script = Callable[[Channel, Message], None]


class FakeServer(threading.Thread):
    """Answers each message as a script says, until the client goes."""

    def __init__(self, script: Script) -> None:
        super().__init__(daemon=True)
        self.client, ours = socket.socketpair()
        self.channel = Channel(ours, "fake", max_data=1 << 20)
        ours.settimeout(10)
        self.script = script
        self.start()

    def run(self) -> None:
        try:
            while True:
                message = self.channel.receive(wait=True)
                if message is not None:
                    self.script(self.channel, message)
        except (VfioError, OSError):
            pass
        finally:
            self.channel.close()

    def connect(self, **options: object) -> tuple[vfio_user.VfioUserDeviceIo, vfio_user.VfioUserMapper]:
        return vfio_user.connect(self.client, **options)  # type: ignore[arg-type]


def reply(channel: Channel, message: Message, payload: bytes = b"", fds: list[int] | None = None) -> None:
    channel.send(message.id, message.command, int(Flag.REPLY), [payload], fds or [])


def greet(channel: Channel, message: Message) -> None:
    reply(channel, message, encode_version(0, Capabilities(max_msg_fds=16)))


def plain(channel: Channel, message: Message) -> bool:
    """Answer as a device without configuration space does; False for what it leaves to others."""
    if message.command == Command.VERSION:
        greet(channel, message)
    elif message.command == Command.GET_INFO:
        reply(channel, message, wire.DEVICE_INFO.pack(16, 0, 9, 5))
    elif message.command == Command.GET_REGION_INFO:
        index = wire.REGION_INFO.unpack(message.payload).region
        size = 0x1000 if index == 0 else 0
        reply(channel, message, wire.REGION_INFO.pack(32, 3, index, 0, size, 0))
    else:
        return False
    return True
