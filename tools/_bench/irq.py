"""(3) An interrupt's round trip, from the doorbell to the wake-up: vfiopy's waits against C with the same eventfd."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import select
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import vfiopy
from vfiopy import uapi
from vfiopy.backend import IrqIndex
from vfiopy.kernel.device_io import KernelDeviceIo

from .compiled import build
from .functions import EDU, IGB, VARIABLE, find
from .measure import Loop, compare_loops, pin_to_one_cpu
from .registry import Unavailable
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "interrupt round trip: from the doorbell to the wake-up"
NOTES = (
    "Both sides ring the same doorbell and wait for the same eventfd; acknowledging the device is not timed, waking up "
    "is. C polls and reads, as the eventfd is non-blocking. Where the interrupt comes before the wait begins, nobody "
    "sleeps: so it is with VFIO's own trigger, and with emulated devices that answer within the store. Asleep: a "
    "thread of C on another CPU rings the doorbell, 2 ms after it was told to. "
    "Wall clock, interleaved, medians, ratios by round, 3 processes."
)
WAITING, ASYNCIO = 1.5, 2.5
"""Goals: of C's time."""

# Intel 82576 datasheet, 8.8: general purpose interrupt enable, extended interrupt cause set, mask set, auto clear.
GPIE, EICS, EIMS, EIAC = 0x1514, 0x1520, 0x1524, 0x152C
GPIE_MULTIPLE_MSIX = 1 << 4
# QEMU, docs/specs/edu.rst.
FACTORIAL, STATUS, IRQ_RAISE, IRQ_ACKNOWLEDGE = 0x08, 0x20, 0x60, 0x64
STATUS_IRQ = 0x80
TRIGGER_NOW = uapi.VFIO_IRQ_SET_DATA_NONE | uapi.VFIO_IRQ_SET_ACTION_TRIGGER
DELAY = 2_000_000
"""Nanoseconds: long enough for anybody to fall asleep."""


@dataclass(frozen=True, slots=True)
class Bell:
    """A way to have a device interrupt.

    Attributes:
        name: for the table.
        device: the function.
        vector: what is signalled.
        ring: offset in BAR 0 and value of the doorbell; None for VFIO's own trigger.
        acknowledge: the same for what the device needs afterwards, or None.
        wakes: measure it also with somebody else ringing and the waiter asleep.
    """

    name: str
    device: vfiopy.Device
    vector: vfiopy.Vector
    ring: tuple[int, int] | None
    acknowledge: tuple[int, int] | None = None
    wakes: bool = False


class _Bell(ctypes.Structure):
    """``struct bell`` of c/irq.c."""

    _fields_ = (
        ("ring", ctypes.c_void_p),
        ("acknowledge", ctypes.c_void_p),
        ("ring_value", ctypes.c_uint32),
        ("acknowledge_value", ctypes.c_uint32),
        ("eventfd", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("vector", ctypes.c_int32),
        ("polls", ctypes.c_int32),
    )


def _in_c(bell: Bell, address: int, *, polls: bool) -> _Bell:
    return _Bell(
        ring=address + bell.ring[0] if bell.ring else None,
        ring_value=bell.ring[1] if bell.ring else 0,
        acknowledge=address + bell.acknowledge[0] if bell.acknowledge else None,
        acknowledge_value=bell.acknowledge[1] if bell.acknowledge else 0,
        eventfd=bell.vector.for_backend(),
        device=_device_fd(bell),
        index=_index(bell),
        vector=bell.vector.number,
        polls=polls,
    )


def _device_fd(bell: Bell) -> int:
    return cast("KernelDeviceIo", bell.device.io).fileno()


def _index(bell: Bell) -> IrqIndex:
    return IrqIndex.MSIX if bell.device.irqs.msix.enabled else IrqIndex.MSI


def _c_function(name: str, argument: ctypes.Structure) -> Callable[[int], float]:
    function = getattr(build("irq"), name)
    function.restype = ctypes.c_int64
    function.argtypes = (ctypes.c_void_p, ctypes.c_uint32)

    def run(count: int) -> float:
        nanoseconds = function(ctypes.byref(argument), count)
        if nanoseconds < 0:
            raise OSError(-nanoseconds, "the C loop failed")
        return float(nanoseconds)

    return run


def _c_loop(bell: Bell, address: int, *, polls: bool) -> Callable[[int], float]:
    fd = bell.vector.for_backend()
    loop = _c_function("bench_irq", _in_c(bell, address, polls=polls))

    def run(count: int) -> float:
        os.set_blocking(fd, not polls)
        try:
            return loop(count)
        finally:
            os.set_blocking(fd, False)

    return run


class _Ringer(ctypes.Structure):
    """``struct ringer`` of c/irq.c."""

    _fields_ = (
        ("bell", _Bell),
        ("told", ctypes.c_int32),
        ("delay", ctypes.c_uint32),
        ("rung", ctypes.c_int64),
        ("end", ctypes.c_int),
        ("thread", ctypes.c_ulong),
    )


def _ways(bell: Bell) -> tuple[Callable[[], object], Callable[[], object]]:
    """How Python rings and acknowledges."""
    write = bell.device.bars[0].write32 if bell.ring else None

    def nothing() -> None: ...

    # What vector.trigger() does, without its checks: it is the wait that is measured.
    set_irqs = bytearray(struct.pack("=IIIII", 20, TRIGGER_NOW, _index(bell), bell.vector.number, 1))
    ring: Callable[[], object] = partial(fcntl.ioctl, _device_fd(bell), uapi.VFIO_DEVICE_SET_IRQS, set_irqs)
    acknowledge: Callable[[], object] = nothing
    if write is not None and bell.ring is not None:
        offset, value = bell.ring
        ring = lambda: write(offset, value)  # noqa: E731
    if write is not None and bell.acknowledge is not None:
        where, what = bell.acknowledge
        acknowledge = lambda: write(where, what)  # noqa: E731
    return ring, acknowledge


def _waiting(bell: Bell, wait: Callable[[], object]) -> Callable[[int], float]:
    ring, acknowledge = _ways(bell)
    now = time.perf_counter_ns

    def run(count: int) -> float:
        total = 0
        for _ in range(count):
            begin = now()
            ring()
            wait()
            total += now() - begin
            acknowledge()
        return total

    return run


def _asleep(bell: Bell, ringer: _Ringer, wait: Callable[[], object]) -> Callable[[int], float]:
    _, acknowledge = _ways(bell)
    now, tell, told = time.perf_counter_ns, os.eventfd_write, ringer.told

    def run(count: int) -> float:
        total = 0
        for _ in range(count):
            tell(told, 1)
            wait()
            total += now() - ringer.rung
            acknowledge()
        return total

    return run


def _asleep_in_loop(
    bell: Bell, ringer: _Ringer, runner: asyncio.Runner, wait: Callable[[], object]
) -> Callable[[int], float]:
    _, acknowledge = _ways(bell)
    now, tell, told = time.perf_counter_ns, os.eventfd_write, ringer.told

    async def scenario(count: int) -> float:
        total = 0
        for _ in range(count):
            tell(told, 1)
            await wait()  # type: ignore[misc]
            total += now() - ringer.rung
            acknowledge()
        return total

    return lambda count: runner.run(scenario(count))


def _by_hand(fd: int) -> Callable[[], object]:
    poll = select.poll()
    poll.register(fd, select.POLLIN)

    def wait() -> None:
        poll.poll(1000)
        os.eventfd_read(fd)

    return wait


def _in_loop(bell: Bell, runner: asyncio.Runner, wait: Callable[[], object]) -> Callable[[int], float]:
    ring, acknowledge = _ways(bell)
    now = time.perf_counter_ns

    async def scenario(count: int) -> float:
        total = 0
        for _ in range(count):
            begin = now()
            ring()
            await wait()  # type: ignore[misc]
            total += now() - begin
            acknowledge()
        return total

    return lambda count: runner.run(scenario(count))


def _in_loop_by_hand(fd: int) -> Callable[[], object]:
    async def wait() -> None:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(fd, ready.set)
        await ready.wait()
        loop.remove_reader(fd)
        os.eventfd_read(fd)

    return wait


@contextmanager
def _ringing(bell: Bell, address: int) -> Iterator[_Ringer]:
    library = build("irq")
    told = os.eventfd(0, os.EFD_CLOEXEC)
    ringer = _Ringer(bell=_in_c(bell, address, polls=True), told=told, delay=DELAY)
    try:
        if error := library.bench_ringer_start(ctypes.byref(ringer)):
            raise OSError(-error, "no thread for the ringer")
        try:
            yield ringer
        finally:
            library.bench_ringer_stop(ctypes.byref(ringer))
    finally:
        os.close(told)


def _rows_asleep(bell: Bell, rounds: int, seconds: float) -> list[Row]:
    vector, fd = bell.vector, os.dup(bell.vector.for_backend())
    with ExitStack() as stack:
        stack.callback(os.close, fd)
        runner = stack.enter_context(asyncio.Runner())
        hold = bell.device.bars[0].hold(label="benchmark")
        stack.callback(hold.release)
        ringer = stack.enter_context(_ringing(bell, hold.address))
        by_hand = _asleep_in_loop(bell, ringer, runner, _in_loop_by_hand(fd))
        loops = [
            Loop("C: poll(), read()", _c_function("bench_irq_asleep", ringer), baseline=True),
            Loop("vector.wait()", _asleep(bell, ringer, vector.wait), goal=WAITING),
            Loop("await vector.wait_async()", _asleep_in_loop(bell, ringer, runner, vector.wait_async), goal=ASYNCIO),
            Loop("select.poll(), os.eventfd_read() by hand", _asleep(bell, ringer, _by_hand(fd))),
            Loop("loop.add_reader(), asyncio.Event by hand", by_hand),
        ]
        # Most of a round is the ringer's delay, and that is not counted.
        return compare_loops(f"{bell.name}, asleep", loops, rounds=rounds, seconds=seconds / 5)


def _rows(bell: Bell, rounds: int, seconds: float) -> list[Row]:
    vector, fd = bell.vector, bell.vector.for_backend()
    with ExitStack() as stack:
        runner = stack.enter_context(asyncio.Runner())
        # An event loop has one reader for an fd, and the vector's own stays there between its waits.
        by_hand = os.dup(fd)
        stack.callback(os.close, by_hand)
        hold = bell.device.bars[0].hold(label="benchmark") if bell.ring else None
        if hold is not None:
            stack.callback(hold.release)
        address = hold.address if hold is not None else 0
        loops = [
            Loop("C: poll(), read()", _c_loop(bell, address, polls=True), baseline=True),
            Loop("vector.wait()", _waiting(bell, vector.wait), goal=WAITING),
            Loop("vector.wait(timeout=1.0)", _waiting(bell, lambda: vector.wait(timeout=1.0))),
            Loop("await vector.wait_async()", _in_loop(bell, runner, vector.wait_async), goal=ASYNCIO),
            Loop("C: read() that blocks", _c_loop(bell, address, polls=False)),
            Loop("select.poll(), os.eventfd_read() by hand", _waiting(bell, _by_hand(fd))),
            Loop("loop.add_reader(), asyncio.Event by hand", _in_loop(bell, runner, _in_loop_by_hand(by_hand))),
        ]
        return compare_loops(bell.name, loops, rounds=rounds, seconds=seconds)


@contextmanager
def _igb(address: str) -> Iterator[list[Bell]]:
    with vfiopy.open(address) as device:
        device.bus_master = True
        (vector,) = device.irqs.msix.enable(1)
        bar = device.bars[0]
        bar.write32(GPIE, GPIE_MULTIPLE_MSIX)
        bar.write32(EIAC, 1)  # the cause clears itself with the message: nothing is to be acknowledged
        bar.write32(EIMS, 1)
        yield [
            Bell("82576 (igb), MSI-X, cause set by register", device, vector, (EICS, 1), wakes=True),
            Bell("82576 (igb), MSI-X, VFIO's own trigger", device, vector, None),
        ]


@contextmanager
def _edu(address: str) -> Iterator[list[Bell]]:
    with vfiopy.open(address) as device:
        device.bus_master = True
        (vector,) = device.irqs.msi.enable(1)
        device.bars[0].write32(STATUS, STATUS_IRQ)
        acknowledge = (IRQ_ACKNOWLEDGE, 0xFFFF_FFFF)
        yield [
            Bell("edu, MSI, raised by register", device, vector, (IRQ_RAISE, 2), acknowledge, wakes=True),
            Bell("edu, MSI, after work in a thread of QEMU's", device, vector, (FACTORIAL, 5), acknowledge),
        ]


@contextmanager
def _any(address: str) -> Iterator[list[Bell]]:
    with vfiopy.open(address) as device:
        kind = device.irqs.msix if device.irqs.msix.count else device.irqs.msi
        (vector,) = kind.enable(1)
        yield [Bell(f"{kind.name}, VFIO's own trigger", device, vector, None)]


def _sources() -> list[tuple[str, Callable[[str], contextmanager[list[Bell]]]]]:  # type: ignore[valid-type]
    if named := os.environ.get(VARIABLE):
        function = vfiopy.function(named)
        return [(named, {IGB: _igb, EDU: _edu}.get((function.vendor, function.device), _any))]
    return [(address, way) for kind, way in ((IGB, _igb), (EDU, _edu)) if (address := find(kind)) is not None]


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    sources = _sources()
    if not sources:
        raise Unavailable(
            f"it needs a PCI function of your own that is bound to vfio-pci ({VARIABLE}=0000:01:00.0), or the lab: "
            "tools/lab run -- .venv/bin/python tools/bench"
        )
    pin_to_one_cpu()
    rounds, seconds = (3, 0.001) if quick else (25, 0.01)
    rows: list[Row] = []
    for address, way in sources:
        with ExitStack() as stack:
            if VARIABLE not in os.environ:
                stack.enter_context(vfiopy.bind(address))
            bells: list[Bell] = stack.enter_context(way(address))
            for bell in bells:
                rows += _rows(bell, rounds, seconds)
                if bell.wakes:
                    rows += _rows_asleep(bell, rounds, seconds)
    return rows
