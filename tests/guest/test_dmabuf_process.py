"""d.5, scenarios 20 and 25, and a death: the exporter is in another process, or it is iommufd's own mock."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from dmabuf_support import MEM_BAR, PAGE, Child, no_dmabuf_left
from modes import EDU, IVSHMEM
from test_ioctl_mock import DMABUF_GET, DMABUF_REVOKE, Mock

import vfiopy
from vfiopy import DmaBuf, ImportState, RevokedError
from vfiopy.drivers.edu import EduDriver
from vfiopy.kernel import IoasMapper, Iommufd
from vfiopy.kernel.ioctl import DmaBufFd
from vfiopy.lives import drain_finalizers
from vfiopy.signals import Cause

Bdf = Callable[..., str]

EXPORTER = """
import json, socket, sys
import vfiopy
from vfiopy.backend import Area

line = socket.socket(fileno=0)
with vfiopy.open(sys.argv[1]) as device:
    bar = device.bars[2]
    with vfiopy.DmaBuf.of_bar(bar, Area(0x1000, 0x2000)) as buffer:
        buffer.send(line)
    while word := line.recv(16):
        answer = True
        if word == b"off":
            device.memory_enabled = False
        elif word == b"on":
            device.memory_enabled = True
        elif word == b"read":
            answer = bar.read_block(0x1000, 8, width=1).decode("latin-1")
        line.send(json.dumps(answer).encode())
"""


class Remote:
    """A process that has ivshmem open and sent a dma-buf of its BAR; and an edu in this one."""

    def __init__(self, importer: str, exporter: str, watch: bool) -> None:
        self.line, there = socket.socketpair()
        self.child = Child(EXPORTER, there.fileno(), exporter)
        there.close()
        self.line.settimeout(60)
        self.device = vfiopy.open(importer, backend="iommufd")
        self.space = self.device.space
        self.tables = Path(f"/sys/kernel/debug/iommu/intel/{importer}/domain_translation_struct")
        self.buffer = DmaBuf.receive(self.line, watch=False)
        self.life: vfiopy.ExporterLife | None = None
        if watch:
            # The pair was made here; a socket that the exporter connected would tell by itself (of_peer).
            self.life = vfiopy.ExporterLife.of_process(self.child.process.pid)
            DmaBuf.adopt(self.buffer.fileno(), life=self.life).close()

    def ask(self, word: str) -> object:
        import json  # noqa: PLC0415

        self.line.send(word.encode())
        return json.loads(self.line.recv(256))

    def frames(self, iova: int) -> list[int | None]:
        found = {}
        for text in self.tables.read_text().splitlines():
            key, bar, rest = text.partition(" |")
            if bar:
                found[int(key, 16)] = (int(rest.split()[-1], 16) & ((1 << 52) - 1)) // PAGE
        return [found.get(iova // PAGE + page) for page in range(2)]

    def close(self) -> None:
        self.buffer.close()
        self.device.close()
        self.line.close()
        self.child.close()
        if self.life is not None:
            self.life.close()


@contextmanager
def remote(bdf: Bdf, *, watch: bool) -> Iterator[Remote]:
    edu, ivshmem = bdf(EDU), bdf(IVSHMEM)
    with vfiopy.bind(edu), vfiopy.bind(ivshmem), no_dmabuf_left():
        it = Remote(edu, ivshmem, watch)
        try:
            yield it
        finally:
            it.close()


@pytest.mark.timeout(300)
def test_20_the_exporter_is_another_process(bdf: Bdf) -> None:
    with remote(bdf, watch=True) as it:
        resources = Path(f"/sys/bus/pci/devices/{bdf(IVSHMEM)}/resource").read_text().splitlines()
        frame = int(resources[MEM_BAR].split()[0], 16) // PAGE + 1
        buffer = it.buffer
        assert (buffer.size, buffer.exporter, buffer.ranges) == (2 * PAGE, "vfio_pci_core", None)
        imported = it.space.import_dmabuf(buffer, iova=0x400000)
        assert imported.watched
        assert imported.ranges is None
        assert imported.pin() == [None, None]
        it.space.book.unpin(0x400000, 2 * PAGE)
        assert it.frames(0x400000) == [frame, frame + 1]
        with pytest.raises(vfiopy.NotSupportedError, match="has no mmap"), buffer.cpu_access("r"):
            pass
        edu, it.device.bus_master = EduDriver(it.device), True
        with it.device.dma.bounce(b"faraway!") as source:
            edu.load(source.iova, 8)
        edu.store(imported.iova, 8)
        assert it.ask("read") == "faraway!"
        # The exporter takes its memory back, and nobody tells us.
        assert it.ask("off") is True
        assert imported.state is ImportState.LIVE
        assert it.frames(0x400000) == [None, None]
        heard: list[object] = []
        imported.on_revoked(heard.append)
        with pytest.raises(RevokedError):
            it.space.import_dmabuf(buffer)
        assert imported.state is ImportState.UNKNOWN  # the first sign
        with pytest.raises(RevokedError, match="may be dead"):
            _ = imported.iova
        with pytest.raises(RevokedError):
            imported.remap()
        assert imported.state is ImportState.REVOKED  # now we know
        assert it.ask("on") is True
        imported.remap()
        assert imported.iova == 0x400000
        assert it.frames(0x400000) == [frame, frame + 1]
        assert heard == []
        imported.unmap()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("watch", [True, False])
def test_the_exporter_dies_in_the_middle(bdf: Bdf, watch: bool) -> None:
    with remote(bdf, watch=watch) as it:
        imported = it.space.import_dmabuf(it.buffer, iova=0x400000)
        heard: list[object] = []
        imported.on_revoked(lambda one: heard.append(one.cause))
        outcome: list[BaseException] = []

        def come_and_go() -> None:
            try:
                while True:
                    it.space.import_dmabuf(it.buffer).unmap()
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=come_and_go)
        thread.start()
        time.sleep(0.5)
        assert thread.is_alive()
        os.kill(it.child.process.pid, signal.SIGKILL)
        it.child.process.wait(30)
        thread.join(30)
        assert not thread.is_alive()
        assert isinstance(outcome[0], RevokedError)
        assert it.frames(0x400000) == [None, None]
        if watch:
            assert (imported.state, imported.cause) == (ImportState.REVOKED, Cause.EXPORTER_GONE)
            assert heard == [Cause.EXPORTER_GONE]
            with pytest.raises(RevokedError, match="process that exported it has ended"):
                _ = imported.iova
        else:
            assert imported.state is ImportState.UNKNOWN
            assert heard == []
        with pytest.raises(RevokedError):
            imported.remap()
        assert imported.state is ImportState.REVOKED
        with pytest.raises(RevokedError):
            it.space.import_dmabuf(it.buffer)
        imported.unmap()
        it.space.book.verify()
        outcome.clear()


@pytest.mark.timeout(300)
def test_a_peer_that_connected_is_watched_by_itself(bdf: Bdf, tmp_path: Path) -> None:
    program = (
        "import socket, sys, vfiopy; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "vfiopy.DmaBuf.allocate(4096).send(s); s.recv(1)"
    )
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "line"))
    listener.listen()
    with listener, no_dmabuf_left(), open(os.devnull, "rb") as null:  # noqa: PTH123
        child = Child(program, null.fileno(), tmp_path / "line")
        connection, _ = listener.accept()
        with connection, DmaBuf.receive(connection) as buffer:
            assert buffer.exporter == "udmabuf"
            with buffer.cpu_access("w") as array:  # memory: the mapping works from anywhere
                array[0] = 1
            del array
            drain_finalizers()
            assert buffer.origin.watched
            buffer.origin.look()
            assert not buffer.origin.signals.over
            child.process.kill()
            child.process.wait(30)
            buffer.origin.look()
            assert buffer.origin.signals.absent is Cause.EXPORTER_GONE
            connection.close()
        child.close()


def test_messages_without_a_dma_buf() -> None:
    here, there = socket.socketpair()
    with here, there:
        there.send(b"nothing")
        with pytest.raises(vfiopy.VfioError, match="no file descriptor"):
            DmaBuf.receive(here)
        socket.send_fds(there, [b"x"], [0])
        with pytest.raises(vfiopy.VfioError, match="not a dma-buf"):
            DmaBuf.receive(here)
        there.close()
        with pytest.raises(ConnectionError):
            DmaBuf.receive(here)


def test_25_the_mock() -> None:
    calls = Mock.open("/dev/iommu")
    calls.test(DMABUF_GET, 0, struct.pack("=II", 4 * PAGE, os.O_RDWR | os.O_CLOEXEC))
    links = {int(entry.name): str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()}
    fd = next(number for number, target in links.items() if "dmabuf" in target)

    def revoke(on: int) -> None:
        calls.test(DMABUF_REVOKE, 0, struct.pack("=iI", fd, on))

    with vfiopy.AddressSpace("mock") as space, DmaBuf(DmaBufFd(fd, "mock")) as buffer:
        space.add_mapper(IoasMapper(Iommufd(calls)))
        one = space.import_dmabuf(buffer)
        two = space.import_dmabuf(buffer, offset=PAGE, size=PAGE)
        revoke(1)
        assert [one.state, two.state] == 2 * [ImportState.LIVE]
        with pytest.raises(RevokedError):
            space.import_dmabuf(buffer)
        assert [one.state, two.state] == 2 * [ImportState.UNKNOWN]
        assert not one.watched
        revoke(0)
        three = space.import_dmabuf(buffer)
        one.remap()
        assert [each.state.value for each in (one, two, three)] == ["live", "unknown", "live"]
        two.remap()
        for each in (one, two, three):
            each.check()
            each.unmap()
        space.book.verify()
