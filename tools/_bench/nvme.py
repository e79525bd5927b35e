"""(8) Reading a disk that is a Python object: from Linux in a guest, and by vfiopy's own driver."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random

import vfiopy
from vfiopy.drivers import nvme
from vfiopy.emulated.nvme import Namespace, Nvme

from .measure import Loop, compare_loops, pin_to_one_cpu
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "4 KiB reads of an emulated NVMe disk"
NOTES = (
    "Random 4 KiB reads, whole round trips; reads per second are in the remark. Linux's driver: O_DIRECT in the lab's "
    "guest, QEMU's own controller against the one that 'vfiopy serve nvme' emulates on the host (tools/lab run "
    "--machine vfio-user -- .venv/bin/python tools/bench nvme); with 8 threads, the time of all divided by their "
    "reads. vfiopy's driver, outside of it: its controller in the same process, and in another one behind a socket. "
    "Interleaved, medians."
)

SIZE = 4096
SPAN = 32 << 20
THREADS = 8
PCI = Path("/sys/bus/pci/devices")
GUEST = (("QEMU's controller", "0000:00:06.0"), ("vfiopy serve nvme", "0000:00:11.0"))
PATIENCE = 20.0


def _offsets() -> Callable[[], int]:
    random = Random(8)
    return lambda: random.randrange(SPAN // SIZE) * SIZE


# --- Linux's driver, in the guest ------------------------------------------------------------------------------------


def _one_by_one(fd: int) -> Callable[[int], float]:
    buffer, offset = mmap.mmap(-1, SIZE), _offsets()

    def run(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            os.preadv(fd, [buffer], offset())
        return time.perf_counter_ns() - begin

    return run


def _together(fd: int, pool: ThreadPoolExecutor) -> Callable[[int], float]:
    each = [_one_by_one(fd) for _ in range(THREADS)]

    def run(count: int) -> float:
        share = -(-count // THREADS)
        begin = time.perf_counter_ns()
        for job in [pool.submit(one, share) for one in each]:
            job.result()
        return (time.perf_counter_ns() - begin) * count / (share * THREADS)

    return run


def _in_guest(rounds: int, seconds: float) -> list[Row]:
    disks = {}
    for name, address in GUEST:
        for path in (PCI / address).glob("nvme/nvme*/nvme*n1"):
            disks[name] = Path("/dev", path.name)
    if len(disks) != len(GUEST):
        return []
    rows: list[Row] = []
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(THREADS))
        fds = {name: os.open(disk, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC) for name, disk in disks.items()}
        for fd in fds.values():
            stack.callback(os.close, fd)
        ways: dict[str, Callable[[int], Callable[[int], float]]] = {
            "Linux's driver, one at a time": _one_by_one,
            f"Linux's driver, {THREADS} threads": lambda fd: _together(fd, pool),
        }
        for group, way in ways.items():
            loops = [Loop(name, way(fd), baseline=name == GUEST[0][0]) for name, fd in fds.items()]
            rows += compare_loops(group, loops, rounds=rounds, seconds=seconds)
    return rows


# --- vfiopy's driver -------------------------------------------------------------------------------------------------


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    path = folder / "nvme.sock"
    command = [sys.executable, "-m", "vfiopy", "serve", "nvme", "--size", str(SPAN), "--socket", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + PATIENCE
            while not path.exists() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            yield f"vfio-user:{path}"
        finally:
            process.terminate()


def _reading(stack: ExitStack, device: vfiopy.Device) -> Callable[[int], float]:
    disk = stack.enter_context(nvme.Controller(device)).namespace(1)
    buffer = stack.enter_context(device.dma.allocate(SIZE))
    offset, read, block = _offsets(), disk.read, disk.block_size

    def run(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            read(offset() // block, into=buffer)
        return time.perf_counter_ns() - begin

    return run


def _by_ourselves(rounds: int, seconds: float) -> list[Row]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfiopy-")))
        card = Nvme([Namespace.memory(SPAN)])
        stack.callback(card.close)
        near = stack.enter_context(vfiopy.open(card))
        far = stack.enter_context(vfiopy.open(stack.enter_context(_served(folder))))
        loops = [
            Loop("in the same process", _reading(stack, near), baseline=True),
            Loop("behind a socket, in another process", _reading(stack, far)),
        ]
        return compare_loops("vfiopy's driver, one at a time", loops, rounds=rounds, seconds=seconds)


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    rounds, seconds = (3, 0.001) if quick else (25, 0.05)
    rows = _in_guest(rounds, seconds)
    if not rows:
        pin_to_one_cpu()
        rows = _by_ourselves(rounds, seconds)
    return [replace(row, remark=f"{1e6 / row.value:.0f} reads/s") for row in rows]
