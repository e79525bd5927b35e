#!/usr/bin/env python3
"""Coverage-guided fuzzing of what parses a peer's bytes, at both ends of vfio-user. Needs atheris.

    python tests/fuzz/vfio_user.py -runs=1000000 [FOLDER]
    python tests/fuzz/vfio_user.py keep FOLDER

The first byte of an input chooses the parser, the rest is what the peer says. Whatever it says is understood or refused
by a VfioError; everything else is a crash. Inputs that crashed are kept as tests in tests/unit/test_vfio_user_fuzz.py.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).with_name("corpus.txt")
sys.path[:0] = [os.fspath(ROOT), os.fspath(ROOT / "tests" / "unit")]

# It would name each module that it looks into.
with redirect_stderr(io.StringIO()), atheris.instrument_imports(include=["vfiopy.vfio_user", "vfiopy.emulated"]):
    from emulated_support import Everything

    from vfiopy import emulated, uapi
    from vfiopy.emulated import Edu
    from vfiopy.emulated.dirty_log import DirtyLog
    from vfiopy.emulated.migration import RESUMING, Migration
    from vfiopy.errors import VfioError
    from vfiopy.vfio_user import VfioUserMapper, wire
    from vfiopy.vfio_user.channel import Channel, Message, close_fds
    from vfiopy.vfio_user.client_space import ClientSpace
    from vfiopy.vfio_user.dma_requests import DmaRequests, _Waiting
    from vfiopy.vfio_user.doorbells import ServedDoorbells, decode_io_fds
    from vfiopy.vfio_user.region_info import decode_region_info
    from vfiopy.vfio_user.served import ServedDevice
    from vfiopy.vfio_user.version import Capabilities, decode_version, encode_version

MAX_DATA = 4096
Parser = Callable[[bytes], object]


class Ends:
    """Both ends without a socket in between, and what of them looks at bytes."""

    def __init__(self) -> None:
        io, mapper = emulated.connect(Everything(manual=True))
        self.space = ClientSpace(mapper, "fuzz", max_mappings=64, trust_files=False)
        self.served = ServedDevice(io, MAX_DATA, 16)
        everything = struct.pack("=QII", 4096, 0, 0)
        self.served.log.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, uapi.VFIO_DEVICE_FEATURE_SET, everything)
        self.requests = DmaRequests(lambda *_: None, "fuzz", max_data=MAX_DATA, timeout=0.0)
        self.client = VfioUserMapper("fuzz")
        self.device = Edu(manual=True)
        self.near, _ = emulated.connect(self.device)
        self.log = DirtyLog("fuzz")
        self.parsers: list[Parser] = [
            decode_version,
            decode_region_info,
            self.serve,
            self.serve,
            self.map,
            self.unmap,
            self.answer,
            self.dma,
            self.migrate,
            self.report,
            self.frame,
            lambda data: decode_io_fds(data, [], 0),
            lambda data: ServedDoorbells(io).reply(data, 16),
            self.exchange,
            self.accesses,
        ]

    def serve(self, data: bytes) -> None:
        """A request, as the server takes it."""
        command, payload = data[0] if data else 0, bytearray(data[1:])
        wire.check_request(command, len(payload), 0, from_client=True)
        handler = self.served.commands.get(command)
        if handler is not None:
            handler(payload, [])

    def map(self, data: bytes) -> None:
        """DMA_MAP."""
        wire.check_request(wire.Command.DMA_MAP, len(data), 0, from_client=True)
        if len(self.space.book) > 32:
            self.space.clear(0.0)
        self.space.map(data, [], self.requests)

    def unmap(self, data: bytes) -> None:
        """DMA_UNMAP."""
        wire.check_request(wire.Command.DMA_UNMAP, len(data), 0, from_client=True)
        dirty = self.served.log.question(data)
        closing, _, _ = self.space.begin_unmap(data)
        if closing.ready():
            closing.finish()
        if dirty is not None:
            self.served.log.answer(dirty)

    def answer(self, data: bytes) -> None:
        """A reply to a request that the server made."""
        command = 11 + (data[0] & 1 if data else 0)
        waiting = _Waiting(command, 0, 7)
        self.requests._waiting[7] = waiting
        header = wire.Header(7, command, 16 + len(data), 1, 0)
        self.requests.answer(Message(header, bytearray(data[1:]), []))

    def dma(self, data: bytes) -> None:
        """A request of the server's, as the client takes it."""
        command = 11 + (data[0] & 1 if data else 0)
        wire.check_request(command, len(data[1:]), 0, from_client=False)
        self.client.serve(command, bytearray(data[1:]))

    def migrate(self, data: bytes) -> None:
        """A device's state."""
        migration = Migration(self.device)
        migration.state = RESUMING
        migration.write(migration._head() + data if len(data) & 1 else data)
        migration.move(1)

    def report(self, data: bytes) -> None:
        """DMA logging."""
        number = 6 + (data[0] % 3 if data else 0)
        self.log.note(int.from_bytes(data[1:5], "little"), 4096)
        self.log.feature(number, (data[0] >> 4) << 16 if data else 0, data[1:])

    def exchange(self, data: bytes) -> None:
        """What a server says while a client waits for the answer to a read."""
        ours, theirs = socket.socketpair()
        channel = Channel(ours, "fuzz", max_data=64)
        try:
            if data:
                theirs.send(data)
            theirs.shutdown(socket.SHUT_WR)
            channel.wire.use(lambda message: close_fds(message.fds), lambda: None, -1)
            channel.wire.timeout, channel.wire.usable = 1.0, True
            while (found := channel.wire.read(0, 0, 4)) is not None:
                assert isinstance(found, Message) or len(found) == 4
        finally:
            channel.close()
            theirs.close()

    def accesses(self, data: bytes) -> None:
        """What a client says, as the native part of the server takes it."""
        ours, theirs = socket.socketpair()
        channel = Channel(ours, "fuzz", max_data=4096)
        try:
            if data:
                theirs.send(data)
            theirs.close()
            while found := channel.wire.serve(self.near.read, self.near.write, 8, 1 << 20):
                if isinstance(found, tuple) and not isinstance(found[1], VfioError):
                    raise found[1]
        finally:
            channel.close()
            theirs.close()

    def frame(self, data: bytes) -> None:
        """The stream itself."""
        ours, theirs = socket.socketpair()
        channel = Channel(ours, "fuzz", max_data=64)
        try:
            if data:
                theirs.send(data)
            theirs.close()
            while message := channel.receive():
                close_fds(message.fds)
        finally:
            channel.close()
            theirs.close()


def seeds(folder: Path) -> None:
    """Write inputs that are understood."""
    version = encode_version(2, Capabilities.ours(twin_socket=True, fd_index=0))
    region = bytes.fromhex("40000000 0f000000 02000000 20000000 0040000000000000 0000000000000000".replace(" ", ""))
    sparse = bytes.fromhex("0100010000000000 0100000000000000 0000000000000000 0010000000000000".replace(" ", ""))
    inputs = [bytes([0]) + version, bytes([1]) + region + sparse]
    for command, rule in wire.COMMANDS.items():
        size = rule.form.size if rule.form else 0
        inputs += [bytes([2, command]) + bytes(size), bytes([2, command]) + bytes([64]) * size]
    inputs.append(bytes([4]) + wire.DMA_MAP.pack(32, 3, 0, 0x10000, 0x1000))
    inputs.append(bytes([5]) + wire.DMA_UNMAP.pack(24, 0, 0x10000, 0x1000))
    inputs.append(bytes([5]) + wire.DMA_UNMAP.pack(48, 1, 0x10000, 0x1000) + wire.DIRTY_BITMAP.pack(0x1000, 8))
    inputs.append(bytes([7, 0]) + wire.DMA_ACCESS.pack(0x10000, 4))
    inputs.append(bytes([10]) + wire.HEADER.pack(1, 2, 20, 0, 0) + b"body")
    inputs += [bytes.fromhex(line) for line in CORPUS.read_text().splitlines() if not line.startswith("#")]
    head, access = wire.HEADER.pack, wire.REGION_ACCESS.pack
    inputs.append(bytes([13]) + head(0, 9, 36, 1, 0) + access(0, 0, 4) + b"data")
    write = head(2, 10, 36, 16, 0) + access(4, 0, 4) + b"data"
    inputs.append(bytes([14]) + head(1, 9, 32, 0, 0) + access(0, 0, 4) + write)
    for number, one in enumerate(inputs):
        (folder / f"seed{number}").write_bytes(one)


def keep(folder: Path) -> None:
    """Write what a folder holds into the corpus: minimise it first, by libFuzzer's ``-merge=1 FOLDER OTHERS...``."""
    found = {path.read_bytes() for path in folder.iterdir() if not path.name.startswith("seed")}
    lines = [data.hex() for data in sorted(found, key=lambda data: (data[:1], len(data), data))]
    title = "# Inputs that reach something new, in hex: see keep() in vfio_user.py."
    CORPUS.write_text("\n".join([title, *lines, ""]))


def main() -> None:
    """Fuzz until the limit that is given to libFuzzer."""
    if sys.argv[1:2] == ["keep"]:
        keep(Path(sys.argv[2]))
        return
    ends = Ends()

    def one(data: bytes) -> None:
        if data:
            with suppress(VfioError):
                ends.parsers[data[0] % len(ends.parsers)](data[1:])

    arguments = list(sys.argv)
    if not any(not word.startswith("-") for word in arguments[1:]):
        arguments.append(tempfile.mkdtemp(prefix="vfiopy-corpus-"))
    seeds(Path(next(word for word in arguments[1:] if not word.startswith("-"))))
    atheris.Setup(arguments, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
