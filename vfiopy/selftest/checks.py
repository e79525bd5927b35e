"""The checks. Each takes an open device and raises when something is not as it has to be.

None of them reads or writes a register of the device itself: a read can have side effects that only the device's
driver knows. What is exercised is what VFIO owns: configuration space, mappings, interrupts, reset.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vfiopy.backend import Prot, RegionFlag
from vfiopy.device import Device, Interrupt
from vfiopy.dma import HUGE_2M
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.errors import (
    ClosedError,
    IovaRangeError,
    MemlockError,
    MemoryKindError,
    NotMappedError,
    NotSupportedError,
    OverlapError,
)

__all__ = ["CHECKS", "Check", "CheckError", "Facts", "SkipCheckError"]

Facts = dict[str, Any]
Check = Callable[[Device], Facts | None]
MAX_VECTORS = 16


class CheckError(Exception):
    """Something is not as it has to be."""


class SkipCheckError(Exception):
    """The device does not have what this check needs."""


def require(condition: object, what: str) -> None:
    """Fail the check unless the condition holds."""
    if not condition:
        raise CheckError(what)


def refuses(error: type[BaseException], what: str, call: Callable[[], object]) -> None:
    """Fail the check unless the call raises this error."""
    try:
        call()
    except error:
        return
    raise CheckError(f"{what} was not refused")


def identity(device: Device) -> Facts:
    """Configuration space answers, and says the same twice."""
    vendor, product = device.config.vendor, device.config.device
    require(vendor != 0xFFFF, "configuration space reads as all ones: the device does not answer")
    require((vendor, product) == (device.config.vendor, device.config.device), "IDs change between two reads")
    return {
        "vendor": f"{vendor:04x}",
        "device": f"{product:04x}",
        "class": f"{device.config.class_code:06x}",
        "capabilities": [type(capability).__name__ for capability in device.config.capabilities()],
        "extended_capabilities": [type(item).__name__ for item in device.config.extended_capabilities()],
    }


def bus_master(device: Device) -> None:
    """Bus mastering is off at open, can be switched on, and off again."""
    require(not device.bus_master, "bus mastering is on although nobody asked for it")
    device.bus_master = True
    try:
        require(device.bus_master, "bus mastering cannot be switched on")
    finally:
        device.bus_master = False
    require(not device.bus_master, "bus mastering cannot be switched off")


def bars(device: Device) -> Facts:
    """Every BAR that can be mapped is mapped; one that cannot is reached by pread and pwrite."""
    found = {}
    for index in range(6):
        info = device.bars.info(index)
        if not info.size:
            continue
        region = device.bars[index]
        require(region.size == info.size, f"BAR {index} has {region.size} bytes, the kernel says {info.size}")
        found[str(index)] = {"size": info.size, "mappable": RegionFlag.MMAP in info.flags}
    if not found:
        raise SkipCheckError("the device has no BARs")
    return found


def map_one_page(device: Device) -> Facts:
    """A page maps, is found, cannot be mapped over, unmaps once and only once."""
    space = device.space
    with mmap.mmap(-1, PAGE_SIZE) as page:
        mapping = space.map(page)
        require(mapping.iova, "IOVA 0 was given out")
        found = space.find(mapping.iova + PAGE_SIZE - 1)
        require(found is not None and found.iova == mapping.iova, "the mapping is not found by its last byte")
        with mmap.mmap(-1, PAGE_SIZE) as other:
            refuses(OverlapError, "an overlapping mapping", lambda: space.map(other, iova=mapping.iova))
        at = mapping.iova
        mapping.unmap()
        refuses(ClosedError, "a second unmap through the handle", mapping.unmap)
        refuses(NotMappedError, "a second unmap by IOVA", lambda: space.unmap(at))
        require(space.find(at) is None, "the mapping is found after it went")
    return {"iova": hex(at)}


def map_big(device: Device) -> Facts:
    """2 MiB and 16 MiB map in one piece."""
    times = {}
    for size in (HUGE_2M, 8 * HUGE_2M):
        buffer = device.dma.allocate(size)
        begin = time.perf_counter()
        buffer.free()
        times[f"unmap {size >> 20} MiB"] = f"{(time.perf_counter() - begin) * 1e6:.0f} us"
    return times


def bad_maps(device: Device) -> None:
    """What cannot work is refused before the kernel sees it."""
    space = device.space
    refuses(MemoryKindError, "mapping bytes", lambda: space.map(b"x" * PAGE_SIZE))
    refuses(ValueError, "half a page", lambda: space.map(bytearray(PAGE_SIZE // 2)))
    with mmap.mmap(-1, PAGE_SIZE) as page, mmap.mmap(-1, PAGE_SIZE, prot=mmap.PROT_READ) as fixed:
        last = space.usable_ranges()[-1].last
        if last < (1 << 64) - 1:
            refuses(IovaRangeError, "an IOVA beyond the IOMMU's reach", lambda: space.map(page, iova=last + 1))
        refuses(MemoryKindError, "write access to read-only memory", lambda: space.map(fixed))
        space.map(fixed, prot=Prot.READ).unmap()


def last_page(device: Device) -> Facts:
    """The very last IOVA page works: arithmetic that ends one beyond it would wrap."""
    last = device.space.usable_ranges()[-1].last
    with mmap.mmap(-1, PAGE_SIZE) as page:
        mapping = device.space.map(page, iova=last + 1 - PAGE_SIZE)
        require(mapping.last == last, "the mapping does not end at the last IOVA")
        mapping.unmap()
    return {"last": hex(last)}


def many_maps(device: Device) -> Facts:
    """Maps and unmaps 256 pages one by one; prints the cost."""
    with mmap.mmap(-1, PAGE_SIZE) as page:
        count = 256
        begin = time.perf_counter()
        for _ in range(count):
            device.space.map(page).unmap()
        each = (time.perf_counter() - begin) / count
    return {"map+unmap 4 KiB": f"{each * 1e6:.1f} us"}


def _vectors(interrupt: Interrupt) -> Facts:
    if not interrupt.count:
        raise SkipCheckError("the device does not have it")
    count = min(interrupt.count, MAX_VECTORS)
    try:
        for _ in range(2):
            for vector in interrupt.enable(count):
                require(vector.take() == 0, f"vector {vector.number} fired before it was triggered")
                vector.trigger()
                require(vector.wait(1.0) == 1, f"vector {vector.number} did not fire exactly once")
            interrupt.disable()
    finally:
        interrupt.disable()
    return {"vectors": interrupt.count, "tested": count}


def msi(device: Device) -> Facts:
    """Up to 16 MSI vectors: silent before, exactly one event per software trigger, twice over."""
    return _vectors(device.irqs.msi)


def msix(device: Device) -> Facts:
    """Up to 16 MSI-X vectors: silent before, exactly one event per software trigger, twice over."""
    return _vectors(device.irqs.msix)


def intx(device: Device) -> None:
    """INTx fires on a software trigger and can be masked and unmasked."""
    line = device.irqs.intx
    if not line.count:
        raise SkipCheckError("the device does not have it")
    try:
        (vector,) = line.enable()
        vector.trigger()
        require(vector.wait(1.0) >= 1, "INTx did not fire")
        line.mask()
        line.unmask()
    finally:
        line.disable()


def reset(device: Device) -> None:
    """The function resets, and comes back with the same IDs and bus mastering off."""
    if not device.can_reset:
        raise SkipCheckError("the device has no function reset")
    before = device.config.read32(0)
    try:
        device.reset()
    except NotSupportedError as error:
        raise SkipCheckError(str(error)) from error
    require(device.config.read32(0) == before, "the IDs differ after the reset")
    require(not device.bus_master, "bus mastering is on after the reset")


def locked_memory(device: Device) -> Facts:
    """Memory charged to this process goes back to what it was when the mapping goes."""
    before = _charged()
    try:
        buffer = device.dma.allocate(HUGE_2M)
    except MemlockError as error:
        raise SkipCheckError(str(error)) from error
    during = _charged()
    buffer.free()
    after = _charged()
    require(after == before, f"VmLck and VmPin were {before} kB and are {after} kB")
    return {"charged while mapped (VmLck, VmPin in kB)": [now - then for now, then in zip(during, before, strict=True)]}


def _charged() -> tuple[int, ...]:
    with Path("/proc/self/status").open(encoding="ascii", errors="replace") as status:
        lines = dict(line.split(":", 1) for line in status if line.startswith(("VmLck", "VmPin")))
    return tuple(int(lines[key].split()[0]) for key in ("VmLck", "VmPin") if key in lines)


def _named(*checks: Check) -> Iterator[tuple[str, Check]]:
    for check in checks:
        yield check.__name__.replace("_", " "), check


CHECKS: dict[str, Check] = dict(
    _named(
        identity,
        bus_master,
        bars,
        map_one_page,
        map_big,
        bad_maps,
        last_page,
        many_maps,
        locked_memory,
        msi,
        msix,
        intx,
        reset,
    )
)
