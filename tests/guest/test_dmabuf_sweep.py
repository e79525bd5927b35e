"""Fail each call, and each allocation in the kernel, on the way of a dma-buf: nothing is left behind or half done."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from dmabuf_support import PAGE, Peers, dmabufs, export, no_dmabuf_left
from modes import EDU, IVSHMEM
from test_ioctl_sweep import Failing

import vfiopy
from vfiopy import DmaBuf, ImportState
from vfiopy.backend import Area
from vfiopy.kernel.ioctl._call import replaced
from vfiopy.lives import drain_finalizers

Bdf = Callable[..., str]
FAILSLAB = Path("/sys/kernel/debug/failslab/ignore-gfp-wait")
MOST = 400


@pytest.fixture
def peers(bdf: Bdf) -> Iterator[Peers]:
    edu, ivshmem = bdf(EDU), bdf(IVSHMEM)
    with vfiopy.bind(edu), vfiopy.bind(ivshmem), no_dmabuf_left():
        peers = Peers(edu, ivshmem)
        yield peers
        peers.close()


def fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208  a number is wanted


def use(peers: Peers) -> None:
    """All of it that goes through our own system calls."""
    with (
        export(peers, Area(0, PAGE)) as bar,
        DmaBuf.adopt(bar.fileno()),
        DmaBuf.allocate(PAGE) as memory,
        DmaBuf.of_heap(PAGE) as heap,
    ):
        memory.name = "memory"
        for one in (bar, memory, heap):
            with one.cpu_access("rw") as array:
                array[0] = 1
            del array
        with memory.fence("rw") as fence:
            memory.add_fence(fence, "r")
        with peers.space.import_dmabuf(bar) as imported:
            peers.exporter.memory_enabled = False
            peers.exporter.memory_enabled = True
            imported.remap()


def test_each_of_our_calls_fails(peers: Peers) -> None:
    use(peers)
    drain_finalizers()
    before, known = fds(), dmabufs()
    failed: dict[str, int] = {}
    for number in range(1, MOST):
        calls = Failing(number)
        with replaced(calls):
            try:
                use(peers)
            except vfiopy.VfiopyError as error:
                for one in (error, error.__context__, error.__cause__):
                    if one is not None:
                        one.__traceback__ = None  # it would keep what was about to go
        drain_finalizers()
        peers.exporter.memory_enabled = True
        assert fds() == before, f"call {number} ({calls.failed}) failed and left a file open"
        assert dmabufs() == known, f"call {number} ({calls.failed})"
        assert not peers.space.book.mappings()
        peers.space.book.verify()
        if not calls.failed:
            break
        failed[calls.failed] = failed.get(calls.failed, 0) + 1
    else:
        pytest.fail("the sweep did not come to its end")
    assert {"ioctl", "ioctl_fd", "open", "duplicate", "mmap"} <= set(failed), failed


@contextmanager
def failing_allocation(number: int) -> Iterator[list[bool]]:
    """Have the n-th allocation of this thread in the kernel fail (Documentation/fault-injection, fail-nth)."""
    fail = Path(f"/proc/self/task/{threading.get_native_id()}/fail-nth")
    hit: list[bool] = []
    fd = os.open(fail, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.write(fd, str(number).encode())
        try:
            yield hit
        finally:
            try:
                hit.append(os.pread(fd, 16, 0).strip() == b"0")
            except OSError:
                hit.append(False)  # it hit this very call: what was to fail is over
            os.pwrite(fd, b"0", 0)
    finally:
        os.close(fd)


@pytest.mark.timeout(400)
def test_each_allocation_in_the_kernel_fails(peers: Peers) -> None:
    setting = FAILSLAB.read_text()
    FAILSLAB.write_text("N")
    errors: dict[str, int] = {}
    try:
        with export(peers, Area(0, 2 * PAGE)) as buffer:
            peers.space.import_dmabuf(buffer).unmap()
            for number in range(1, MOST):
                imported = None
                with suppress(vfiopy.VfiopyError, OSError, MemoryError), failing_allocation(number) as hit:
                    try:
                        imported = peers.space.import_dmabuf(buffer, iova=0x400000)
                    except (vfiopy.VfiopyError, OSError, MemoryError) as error:
                        name = errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__)
                        errors[name] = errors.get(name, 0) + 1
                        raise
                peers.space.book.verify()
                if imported is not None:
                    peers.check_live(imported)
                    imported.unmap()
                assert peers.is_dead(0x400000, 2 * PAGE)
                assert not peers.space.book.mappings()
                if not hit[0]:
                    break
            else:
                pytest.fail("the sweep did not come to its end")
            # And a remap, which may fail half way: it stays revoked, and the next one succeeds.
            imported = peers.space.import_dmabuf(buffer, iova=0x400000)
            for number in range(1, MOST):
                peers.exporter.memory_enabled = False
                peers.exporter.memory_enabled = True
                with suppress(vfiopy.VfiopyError, OSError, MemoryError), failing_allocation(number) as hit:
                    imported.remap()
                peers.space.book.verify()
                if imported.state is ImportState.REVOKED:
                    peers.check_dead(imported)
                    imported.remap()
                peers.check_live(imported)
                if not hit[0]:
                    break
            imported.unmap()
    finally:
        FAILSLAB.write_text(setting)
    print(f"refusals {errors}")
    assert errors.get("ENOMEM"), errors
