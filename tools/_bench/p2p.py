"""(5) Another device's memory: what export, import and unmap cost, and DMA straight into it against a bounce."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import vfiopy
from vfiopy import DmaBuf, uapi
from vfiopy.backend import Area
from vfiopy.drivers import nvme
from vfiopy.kernel import KernelDeviceIo

from .functions import find
from .measure import Loop, compare_loops, pin_to_one_cpu
from .registry import Unavailable
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "another device's memory: export, import, unmap; DMA into it against a bounce through host memory"
NOTES = (
    "An NVMe controller reads its disk into the BAR of ivshmem: straight, or into host memory that the CPU then copies "
    "to the BAR. Under an emulator a BAR is memory like any other, so that what is gained is one of two copies; on "
    "real hardware the CPU's writes to a BAR are the slow part. Wall clock, interleaved, medians, ratios by round."
)

CONTROLLER, TARGET = "VFIOPY_BENCH_NVME", "VFIOPY_BENCH_PEER"
NVME, IVSHMEM = (0x1B36, 0x0010), (0x1AF4, 0x1110)
PAGE = mmap.PAGESIZE
SIZES = {"4 KiB": PAGE, "2 MiB": 2 << 20, "16 MiB": 16 << 20}
TRANSFERS = {"64 KiB": 64 << 10, "1 MiB": 1 << 20}


@contextmanager
def _functions() -> Iterator[tuple[str, str]]:
    """A controller with a disk that may be read, and a device with a BAR that may be overwritten."""
    named = os.environ.get(CONTROLLER), os.environ.get(TARGET)
    if named[0] and named[1]:
        yield named[0], named[1]
        return
    controller, target = find(NVME), find(IVSHMEM)
    if controller is None or target is None:
        raise Unavailable(
            f"it needs two PCI functions of your own that are bound to vfio-pci: {CONTROLLER}=0000:01:00.0, whose disk "
            f"is read, and {TARGET}=0000:02:00.0, whose BAR 2 is overwritten; or the lab: tools/lab run -- "
            ".venv/bin/python tools/bench"
        )
    with vfiopy.bind(controller), vfiopy.bind(target):
        yield controller, target


def _timed(work: Callable[[], object]) -> Callable[[int], float]:
    def run(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            work()
        return time.perf_counter_ns() - begin

    return run


def _mapping(device: vfiopy.Device, target: vfiopy.Device, buffer: DmaBuf) -> list[Loop]:
    """Loops over the same part of the BAR; all of them import it at one IOVA."""
    space, bar, io, size = device.space, target.bars[2], target.io, buffer.size
    assert isinstance(io, KernelDeviceIo)
    goes_to = space.mappers[0].kernel_target
    assert goes_to is not None
    with space.import_dmabuf(buffer) as first:
        iova = first.iova
    fields = (40, 7, goes_to.object_id, buffer.fileno(), 0, size, iova)
    what, where = (
        bytearray(struct.pack("=IIIiQQQ", *fields)),
        bytearray(struct.pack("=IIQQ", 24, goes_to.object_id, iova, size)),
    )
    ioctl, fd = fcntl.ioctl, goes_to.fd

    def bare() -> None:
        ioctl(fd, uapi.IOMMU_IOAS_MAP_FILE, what)
        ioctl(fd, uapi.IOMMU_IOAS_UNMAP, where)

    def export() -> None:
        DmaBuf.of_bar(bar, Area(0, size)).close()

    def bare_export() -> None:
        io.calls.dma_buf(2, [Area(0, size)]).close()

    host = np.zeros(size + PAGE, np.uint8)
    skip = -host.ctypes.data % PAGE
    aligned: Any = host[skip : skip + size]
    return [
        Loop("fcntl.ioctl by hand: MAP_FILE, UNMAP", _timed(bare), baseline=True),
        Loop("space.import_dmabuf(buffer); unmap()", _timed(lambda: space.import_dmabuf(buffer, iova=iova).unmap())),
        Loop("space.peer(bar); unmap()", _timed(lambda: space.peer(bar, size=size, iova=iova).unmap())),
        Loop("DmaBuf.of_bar(bar).close()", _timed(export)),
        Loop("io.calls.dma_buf(2, ...).close()", _timed(bare_export), remark="the typed ioctl alone"),
        Loop("space.map(host memory); unmap()", _timed(lambda: space.map(aligned).unmap()), remark="pins its pages"),
    ]


def _transfer(disk: nvme.Namespace, bar: vfiopy.DmaArray, host: vfiopy.DmaArray) -> list[Loop]:
    """Loops that bring the same blocks into the BAR."""

    def bounce() -> None:
        disk.read(0, into=host)
        bar[:] = host

    return [
        Loop("read into host memory, copy to the BAR", _timed(bounce), baseline=True),
        Loop("read into the BAR", _timed(lambda: disk.read(0, into=bar)), goal=1.0, remark="peer to peer"),
        Loop("read into host memory", _timed(lambda: disk.read(0, into=host)), remark="no copy to the BAR"),
    ]


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    pin_to_one_cpu()
    rounds, seconds = (3, 0.001) if quick else (15, 0.02)
    rows: list[Row] = []
    with (
        _functions() as (controller, address),
        vfiopy.open(address) as target,
        vfiopy.open(controller, backend="iommufd") as device,
    ):
        for label, size in SIZES.items():
            with DmaBuf.of_bar(target.bars[2], Area(0, size)) as buffer:
                loops = _mapping(device, target, buffer)
                rows += compare_loops(f"map, {label}", loops, rounds=rounds, seconds=seconds)
        with nvme.Controller(device) as driver:
            disk = driver.namespace(1)
            for label, size in TRANSFERS.items():
                with device.space.peer(target.bars[2], size=size) as peer, device.dma.allocate(size) as host:
                    loops = _transfer(disk, peer.array(), host)
                    rows += compare_loops(f"disk to BAR, {label}", loops, rounds=rounds, seconds=seconds)
                del loops  # they hold a view of the BAR
    return rows
