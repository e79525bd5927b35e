"""Watching the process that exported a dma-buf; real processes and sockets."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vfiopy import ExporterLife, MemfdPart
from vfiopy.dma.imported import ImportedMemory, ImportState
from vfiopy.dmabuf.info import DmaBufInfo, parse_info
from vfiopy.dmabuf.origin import ForeignOrigin, MemoryOrigin, origin_of
from vfiopy.errors import VfioError
from vfiopy.signals import Cause

SLEEP = [sys.executable, "-S", "-c", "import sys; print(1, flush=True); sys.stdin.read()"]


@pytest.fixture
def child() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(SLEEP, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        yield child
        child.kill()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_process(child: subprocess.Popen[str]) -> None:
    with ExporterLife.of_process(child.pid) as life:
        assert not life.over
        assert not life.wait(0.01)
        child.kill()
        assert life.wait(5)
        assert life.over
        child.wait()
        assert life.over
        with pytest.raises(VfioError, match="ended already") as caught:
            ExporterLife.of_process(child.pid)
        assert caught.value.errno == errno.ESRCH
    with pytest.raises(vfiopy_closed()):
        _ = life.over


def vfiopy_closed() -> type[Exception]:
    from vfiopy import ClosedError  # noqa: PLC0415

    return ClosedError


def test_a_pidfd_stays_the_callers(child: subprocess.Popen[str]) -> None:
    pidfd = os.pidfd_open(child.pid)
    with ExporterLife.of_pidfd(pidfd) as life:
        assert not life.over
    os.fstat(pidfd)
    os.close(pidfd)


def test_the_peer_of_a_socket() -> None:
    here, there = socket.socketpair()
    with here, there:
        pid = os.fork()
        if pid == 0:
            here.close()
            os.read(there.fileno(), 1)
            os._exit(0)
        with ExporterLife.of_peer(here) as life:  # the one that made the pair: this very process
            assert not life.over
        here.send(b"x")
        os.waitpid(pid, 0)


def test_a_socket_that_is_hung_up() -> None:
    here, there = socket.socketpair()
    with here, ExporterLife.of_socket(here) as life:
        there.send(b"still here")
        assert not life.over
        there.close()
        assert life.wait(1)


def test_in_an_event_loop(child: subprocess.Popen[str]) -> None:
    here, there = socket.socketpair()

    async def main() -> None:
        with ExporterLife.of_process(child.pid) as life, ExporterLife.of_socket(here) as line:
            waits = [asyncio.create_task(one.wait_async()) for one in (life, line)]
            await asyncio.sleep(0.02)
            assert not any(task.done() for task in waits)
            child.kill()
            there.close()
            await asyncio.wait_for(asyncio.gather(*waits), 5)

    start = time.monotonic()
    with here:
        asyncio.run(main())
    assert time.monotonic() - start < 5


def test_several_tasks_may_wait_for_one_end(child: subprocess.Popen[str]) -> None:
    async def main() -> None:
        with ExporterLife.of_process(child.pid) as life:
            waits = [asyncio.create_task(life.wait_async()) for _ in range(3)]
            await asyncio.sleep(0.02)
            waits.pop().cancel()
            await asyncio.sleep(0.02)
            child.kill()
            await asyncio.wait_for(asyncio.gather(*waits), 5)

    before = open_fds()
    asyncio.run(main())
    assert open_fds() == before


def test_a_name_does_not_forge_the_lines_of_the_kernel() -> None:
    kernel = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t7\nsize:\t4096\ncount:\t1\nexp_name:\tudmabuf\n"
    assert parse_info(kernel) == DmaBufInfo(7, 4096, 1, "udmabuf", None)
    named = parse_info(f"{kernel}name:\tx\nino:\t8\nsize:\t1\n")
    assert (named.inode, named.size, named.name) == (7, 4096, "x")


def test_memory_of_which_not_all_fds_can_be_had() -> None:
    memfd = os.memfd_create("part")
    gc.collect()  # what tests before have left
    before = open_fds()
    with pytest.raises(OSError, match="Bad file descriptor"):
        MemoryOrigin("udmabuf", "", (MemfdPart(memfd, 0, 4096), MemfdPart(-1, 0, 4096)))
    gc.collect()
    assert open_fds() == before
    os.close(memfd)


class Listening(ImportedMemory):
    """An import without a space: only its state."""

    def __init__(self, origin: ForeignOrigin) -> None:
        super().__init__(origin)
        self._space = lambda: None  # type: ignore[assignment]
        origin.signals.listen(self)

    def mark(self, state: ImportState, cause: Cause | None) -> bool:
        super().mark(state, cause)
        return True


def test_an_unwatched_exporter_leaves_doubt() -> None:
    origin = ForeignOrigin("received")
    memory = Listening(origin)
    assert not origin.watched
    origin.look()
    assert memory.state is ImportState.LIVE
    origin.refused()
    assert memory.state is ImportState.UNKNOWN


def test_a_watched_exporter_leaves_none(child: subprocess.Popen[str]) -> None:
    origin = ForeignOrigin("received")
    memory = Listening(origin)
    calls: list[int] = []
    memory.callbacks.append(lambda: calls.append(1))
    origin.watch(ExporterLife.of_process(child.pid))
    origin.look()
    assert memory.state is ImportState.LIVE
    child.kill()
    child.wait()
    origin.look()
    origin.look()
    assert (memory.state, memory.cause) == (ImportState.REVOKED, Cause.EXPORTER_GONE)
    assert calls == [1]
    origin.refused()
    assert memory.state is ImportState.REVOKED
    assert origin.signals.over


def test_one_origin_for_each_inode() -> None:
    first = origin_of(1 << 60)
    assert origin_of(1 << 60) is first
    assert origin_of((1 << 60) + 1) is not first
    mine = ForeignOrigin("mine")
    assert origin_of(1 << 60, mine) is mine
    assert origin_of(1 << 60) is mine
