"""Registers and memory of a device: the :class:`Region` type and what goes with it.

A :class:`Region` makes *exactly one* load or store of the asked width per call, by C that the compiler cannot
split, merge or repeat. Everything that Python offers by itself is right by luck or wrong: ctypes reads before
it writes, cffi and slices store twice, ``struct.pack_into`` stores zeros first.

Ordering is that of Linux's readl and writel. After a ``read*`` later accesses, to memory too, see what the
device did before it answered; before a ``write*`` everything that was stored earlier, to memory too, is
visible to the device. The ``*_relaxed`` forms are ordered only against other accesses to the same device; on
x86-64 both cost the same.

FIFO bursts (one address) and block copies (ascending addresses) keep width and order of each access; as a
whole they are ordered like one read or write. They deal in bytes as they lie on the bus, whatever the
region's byte order.

A mapped access to a device that is gone, asleep, in reset or has its memory decode off raises
:class:`~vfiopy.errors.DeviceGoneError` instead of ending the process. That is done by a SIGBUS handler,
installed when the first mapped region is made, which knows our access instructions by their address and
passes every other SIGBUS on to the handler that was there before. Code that installs a SIGBUS handler later
and does not pass signals on (``faulthandler.enable()``) displaces it; it is put back whenever a region is
made, by polls and by long bursts, or by :func:`install_fault_handler`. Accesses through an array, a buffer or
an address are *not* protected.

Threads: a Region may be shared. Single accesses are atomic against ``close()`` and ``set_state()``: once
``close()`` has returned, no access is under way and none will be; once ``set_state("slow")`` or ``("gone")`` has
returned, none that began before. On a free-threaded CPython accesses to the
same region take turns. A :class:`Hold` may be shared too, but not while it is being released.

A region of a parent raises ForkedError in a forked child.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from vfiopy._native import (
    Hold,
    Region,
    barrier,
    dma_read_barrier,
    dma_write_barrier,
    fault_count,
    fault_handler_installed,
    install_fault_handler,
    read_barrier,
    write_barrier,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "Hold",
    "Region",
    "SlowPath",
    "barrier",
    "dma_read_barrier",
    "dma_write_barrier",
    "fault_count",
    "fault_handler_installed",
    "install_fault_handler",
    "numpy_view",
    "read_barrier",
    "write_barrier",
]


class SlowPath(Protocol):
    """What serves accesses that no mapping serves: holes, unmapped regions, emulated devices.

    Each call is one access. Values are those of a little-endian register: the bytes on the bus, lowest first;
    a region of another byte order converts them.
    """

    def read(self, offset: int, width: int, /) -> int:
        """Read ``width`` (1, 2, 4, 8) bytes at ``offset`` (bytes from the start of the region)."""

    def write(self, offset: int, width: int, value: int, /) -> object:
        """Write ``value``, which fits into ``width`` bytes."""


def numpy_view(
    region: Region, offset: int = 0, count: int | None = None, dtype: npt.DTypeLike = "u1"
) -> npt.NDArray[Any]:
    """Return an array over a mapped part of a memory-like region (video memory, a controller memory buffer).

    Not for registers. What such an array does *not* promise:

    * width and number of accesses: numpy may read or write an element in pieces, twice, or many at once with
      vector instructions, which some devices and arm64 Device memory answer with a bus error that ends the
      process;
    * order: neither among the elements nor against other memory; put :func:`barrier` where it matters;
    * the region's byte order, state, trace and permission beyond read-only: give ``dtype`` a byte order
      (``"<u4"``);
    * a device that answers: when it is gone or its memory decode is off, touching the array is a SIGBUS. No
      exception.

    Even showing the array in a debugger reads the device.

    Args:
        region: the region.
        offset: bytes from its start.
        count: number of elements; None for all that are mapped in one piece from there.
        dtype: type of the elements.

    Returns:
        An array of shape ``(count,)`` that keeps the region mapped: ``region.close()`` raises BusyError until
        the array and everything that views it are gone.

    Raises:
        AddressRangeError: outside of the region.
        AccessError: not mapped in one piece.
        BufferError: the region cannot be read.
    """
    import numpy as np  # noqa: PLC0415  costs 50 ms that who only uses registers need not pay

    element: np.dtype[Any] = np.dtype(dtype)
    length = None if count is None else count * element.itemsize
    hold = region.hold(offset, length, label=f"numpy view of {element} at {offset:#x}")
    usable = hold.length // element.itemsize if count is None else count
    return np.frombuffer(memoryview(hold), dtype=element, count=usable)
