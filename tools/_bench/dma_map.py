"""(2) Memory mapped for a device and unmapped again: vfiopy's roads against a C loop of bare ioctls."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import struct
import time
from collections.abc import Callable, Sequence

import numpy as np

import vfiopy
from vfiopy import uapi
from vfiopy.dma import HUGE_2M, allocate_pages
from vfiopy.iova import MAPPER_TYPE1

from .compiled import build
from .functions import vfio_function
from .measure import Loop, compare_loops, pin_to_one_cpu
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "map and unmap the same memory for a device"
NOTES = (
    "The C loop maps the same memory at the same IOVA through the same fd with ready-made structures; vfiopy finds the "
    "IOVA, keeps the book, holds the buffer, lets other threads run, and checks. One map and one unmap are one "
    "execution. Wall clock, interleaved, medians, ratios by round, 3 processes."
)

BACKENDS = ("type1v2", "iommufd")
BATCH = 64
PAGE = mmap.PAGESIZE
SIZES = {"4 KiB": PAGE, "2 MiB": HUGE_2M, "64 MiB": 64 << 20}
ONE_BY_ONE, BATCHED, LARGE = 1.5, 1.25, 1.1
"""Goals: of the C loop's time."""


class _Target(ctypes.Structure):
    """``struct target`` of c/dma_map.c."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("fd", ctypes.c_int32),
        ("ioas", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("iova", ctypes.c_uint64),
    )


def _c_loop(target: _Target, batch: int) -> Callable[[int], float]:
    function = build("dma_map").bench_map_unmap
    function.restype = ctypes.c_int64
    function.argtypes = (ctypes.POINTER(_Target), ctypes.c_uint32, ctypes.c_uint32)

    def run(count: int) -> float:
        nanoseconds = function(target, batch, max(1, count // batch))
        if nanoseconds < 0:
            raise OSError(-nanoseconds, "the C loop failed")
        return float(nanoseconds) * count / (max(1, count // batch) * batch)

    return run


def _raw_ioctls(target: _Target) -> Callable[[int], float]:
    """What one would write by hand: fcntl.ioctl on structures that were packed before the loop."""
    if target.kind == MAPPER_TYPE1:
        do, undo = uapi.VFIO_IOMMU_MAP_DMA, uapi.VFIO_IOMMU_UNMAP_DMA
        what = bytearray(struct.pack("=IIQQQ", 32, 3, target.address, target.iova, target.size))
        where = bytearray(struct.pack("=IIQQ", 24, 0, target.iova, target.size))
    else:
        do, undo = uapi.IOMMU_IOAS_MAP, uapi.IOMMU_IOAS_UNMAP
        what = bytearray(struct.pack("=IIIIQQQ", 40, 7, target.ioas, 0, target.address, target.size, target.iova))
        where = bytearray(struct.pack("=IIQQ", 24, target.ioas, target.iova, target.size))
    ioctl, fd = fcntl.ioctl, target.fd

    def run(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            ioctl(fd, do, what)
            ioctl(fd, undo, where)
        return time.perf_counter_ns() - begin

    return run


def _friendly(space: vfiopy.AddressSpace, buffer: object) -> Callable[[int], float]:
    def run(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            mapping = space.map(buffer)  # type: ignore[arg-type]
            mapping.unmap()
        return time.perf_counter_ns() - begin

    return run


def _device(device: vfiopy.Device, buffer: object) -> Callable[[int], float]:
    def run(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            with device.dma.map(buffer):  # type: ignore[arg-type]
                pass
        return time.perf_counter_ns() - begin

    return run


def _book(space: vfiopy.AddressSpace, memory: vfiopy.HostMemory) -> Callable[[int], float]:
    book, address, size = space.book, memory.address, memory.size

    def run(count: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(count):
            iova = book.map(memory, address, size, 3)
            book.unmap(iova)
        return time.perf_counter_ns() - begin

    return run


def _batched(space: vfiopy.AddressSpace, buffers: Sequence[object]) -> Callable[[int], float]:
    def run(count: int) -> float:
        rounds = max(1, count // len(buffers))
        begin = time.perf_counter_ns()
        for _ in range(rounds):
            mappings = space.map_many(buffers)  # type: ignore[arg-type]
            space.unmap_many(mappings)
        return (time.perf_counter_ns() - begin) * count / (rounds * len(buffers))

    return run


def _target(device: vfiopy.Device, memory: vfiopy.HostMemory) -> _Target:
    """Where the book puts this memory, so that both sides use the same place in the IOMMU's tables."""
    (mapper,) = device.space.mappers
    goes_to = mapper.kernel_target
    assert goes_to is not None
    with device.space.map(memory) as mapping:
        return _Target(goes_to.kind, goes_to.fd, goes_to.object_id, memory.address, memory.size, mapping.iova)


def _memory(size: int) -> tuple[vfiopy.HostMemory, object]:
    """Memory that is there, as a mapper takes it and as a user has it."""
    if size > PAGE:
        memory = allocate_pages(size)
        return memory, np.asarray(memory.owner)
    buffer = mmap.mmap(-1, size)
    array = np.frombuffer(buffer, "u1")
    array[:] = 0
    return vfiopy.HostMemory(array.ctypes.data, size, True, buffer), buffer


def _one_by_one(device: vfiopy.Device, size: int) -> list[Loop]:
    memory, buffer = _memory(size)
    target = _target(device, memory)
    goal = ONE_BY_ONE if size == PAGE else LARGE
    loops = [
        Loop("C: two ioctls", _c_loop(target, 1), baseline=True),
        Loop("space.map(buffer); mapping.unmap()", _friendly(device.space, buffer), goal=goal),
        Loop("space.book.map(...); space.book.unmap(iova)", _book(device.space, memory), goal=goal),
    ]
    if size == PAGE:
        array = np.frombuffer(buffer, "u1")  # type: ignore[call-overload]
        loops += [
            Loop("the same, with a numpy array", _friendly(device.space, array)),
            Loop("with device.dma.map(buffer): pass", _device(device, buffer)),
            Loop("fcntl.ioctl by hand", _raw_ioctls(target), remark="no book, IOVA or lifetime"),
        ]
    return loops


def _many(device: vfiopy.Device) -> list[Loop]:
    memory, buffer = _memory(PAGE)
    space = device.space
    return [
        Loop(f"C: {BATCH} maps, then {BATCH} unmaps", _c_loop(_target(device, memory), BATCH), baseline=True),
        Loop("space.map_many(buffers); space.unmap_many(...)", _batched(space, [buffer] * BATCH), goal=BATCHED),
        Loop("the same, with HostMemory", _batched(space, [memory] * BATCH)),
    ]


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    pin_to_one_cpu()
    rounds, seconds = (3, 0.001) if quick else (25, 0.01)
    rows: list[Row] = []
    with vfio_function() as address:
        for backend in BACKENDS:
            with vfiopy.open(address, backend=backend) as device:
                for label, size in SIZES.items():
                    loops = _one_by_one(device, size)
                    rows += compare_loops(f"{backend}, {label}", loops, rounds=rounds, seconds=seconds)
                loops = _many(device)
                rows += compare_loops(f"{backend}, {BATCH} x 4 KiB", loops, rounds=rounds, seconds=seconds)
    return rows
