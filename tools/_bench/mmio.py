"""(1) One 32-bit register access from Python: Region against everything else that can reach a mapping."""

from __future__ import annotations

import ctypes
import gc
import mmap

import numpy as np

from vfiopy._shim import lib
from vfiopy.mmio import Region

from .measure import Statement, compare, pin_to_one_cpu
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "32-bit register access from Python"
NOTES = (
    "Plain memory stands for the BAR: this is the cost of the call; a real bus adds its own (a read from a PCIe device "
    "takes 0.5-2 µs). CPU time without the loop's own. Interleaved, medians, 3 processes. "
    'Only "exact" promises one access of the right width; the other remarks are what trapping each access has shown.'
)

GOAL = 1.0  # of memoryview.cast("I"), on a build with the GIL
SIZE = mmap.PAGESIZE
INDEX = 2
OFFSET = 4 * INDEX
# A register's value as one meets it: fits into one digit of Python's int, and is not among the cached small ones.
VALUE = 0x12345678
# Half of all 32-bit values need a second digit (status registers like to have bit 31 set).
LARGE = 0xDEADBEEF

EXACT = "exact"
BY_LUCK = "right by luck"


class _Python:
    """What one would write by hand: a Python class around a memoryview, with checks."""

    def __init__(self, view: memoryview) -> None:
        self._view = view.cast("I")
        self._size = view.nbytes

    def read32(self, offset: int) -> int:
        if offset < 0 or offset + 4 > self._size:
            raise IndexError(offset)
        if offset & 3:
            raise ValueError(offset)
        return self._view[offset >> 2]

    def write32(self, offset: int, value: int) -> None:
        if offset < 0 or offset + 4 > self._size:
            raise IndexError(offset)
        if offset & 3:
            raise ValueError(offset)
        self._view[offset >> 2] = value


class Slow:
    """A slow path that does nothing, for the cost of getting there."""

    def read(self, _offset: int, _width: int) -> int:
        """Read nothing."""
        return VALUE

    def write(self, _offset: int, _width: int, _value: int) -> None:
        """Write nothing."""


def _reads(memory: mmap.mmap, address: int, region: Region, value: int) -> list[Statement]:
    view = memoryview(memory).cast("I")
    view[INDEX] = value
    word = ctypes.c_uint32.from_address(address + OFFSET)
    array = np.frombuffer(memory, np.uint32)
    names = {"r": region, "read": region.read32, "v": view, "a": array, "w": word, "p": address + OFFSET}
    names |= {"lib_read": lib.vfiopy_mmio_read32, "o": OFFSET, "i": INDEX, "python": _Python(memoryview(memory))}
    return [
        Statement("memoryview.cast('I')[i]", "v[i]", names, baseline=True, remark=BY_LUCK),
        Statement("region.read32(offset)", "r.read32(o)", names, goal=GOAL, remark=EXACT),
        Statement("read = region.read32; read(offset)", "read(o)", names, remark=EXACT),
        Statement("region.read32_relaxed(offset)", "r.read32_relaxed(o)", names, remark=EXACT),
        Statement("ctypes c_uint32.value", "w.value", names, remark=BY_LUCK),
        Statement("numpy array[i] (a numpy scalar)", "a[i]", names, remark=BY_LUCK),
        Statement("numpy array.item(i)", "a.item(i)", names, remark=BY_LUCK),
        Statement("Python class around memoryview", "python.read32(o)", names, remark=BY_LUCK),
        Statement("cffi function read32(address)", "lib_read(p)", names, remark=EXACT),
    ]


def _writes(memory: mmap.mmap, address: int, region: Region, value: int) -> list[Statement]:
    view = memoryview(memory).cast("I")
    word = ctypes.c_uint32.from_address(address + OFFSET)
    array = np.frombuffer(memory, np.uint32)
    names = {"r": region, "write": region.write32, "v": view, "a": array, "w": word, "p": address + OFFSET}
    names |= {"lib_write": lib.vfiopy_mmio_write32, "o": OFFSET, "i": INDEX, "x": value}
    names |= {"python": _Python(memoryview(memory))}
    return [
        Statement("memoryview.cast('I')[i] = x", "v[i] = x", names, baseline=True, remark=BY_LUCK),
        Statement("region.write32(offset, x)", "r.write32(o, x)", names, goal=GOAL, remark=EXACT),
        Statement("write = region.write32; write(offset, x)", "write(o, x)", names, remark=EXACT),
        Statement("region.write32_relaxed(offset, x)", "r.write32_relaxed(o, x)", names, remark=EXACT),
        Statement("ctypes c_uint32.value = x", "w.value = x", names, remark="reads before it writes"),
        Statement("numpy array[i] = x", "a[i] = x", names, remark=BY_LUCK),
        Statement("Python class around memoryview", "python.write32(o, x)", names, remark=BY_LUCK),
        Statement("cffi function write32(address, x)", "lib_write(p, x)", names, remark=EXACT),
    ]


def _other_paths(address: int) -> list[Statement]:
    def make(**arguments: object) -> Region:
        return Region("benchmark", SIZE, [(0, address, SIZE)], **arguments)  # type: ignore[arg-type]

    big, slow, traced = make(byteorder="big"), Region("benchmark", SIZE, slow=Slow()), make()
    traced.set_trace(lambda *_: None)
    names = {"r": make(), "big": big, "slow": slow, "traced": traced, "o": OFFSET}
    return [
        Statement("open, little-endian", "r.read32(o)", names),
        Statement("open, big-endian", "big.read32(o)", names),
        Statement("slow path (an empty Python method)", "slow.read32(o)", names),
        Statement("traced (an empty Python function)", "traced.read32(o)", names),
        Statement("poll32 that matches at once", "r.poll32(o, 0, 0, 1.0)", names),
        Statement("read_block of 64 registers", "r.read_block(0, 64)", names),
        Statement("read_fifo of 64 registers", "r.read_fifo(0, 64)", names),
    ]


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    pin_to_one_cpu()
    rounds, seconds = (3, 0.0005) if quick else (15, 0.01)
    with mmap.mmap(-1, SIZE) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        region = Region("benchmark", SIZE, [(0, address, SIZE)])
        rows = compare(f"read {VALUE:#x}", _reads(memory, address, region, VALUE), rounds=rounds, seconds=seconds)
        rows += compare(f"read {LARGE:#x}", _reads(memory, address, region, LARGE), rounds=rounds, seconds=seconds)
        rows += compare(f"write {VALUE:#x}", _writes(memory, address, region, VALUE), rounds=rounds, seconds=seconds)
        rows += compare(f"write {LARGE:#x}", _writes(memory, address, region, LARGE), rounds=rounds, seconds=seconds)
        rows += compare("paths of Region, read", _other_paths(address), rounds=rounds, seconds=seconds)
        region.close()
        del anchor
        gc.collect()  # without a GIL compiled statements, which hold views of the memory, go only with a collection
    return rows
