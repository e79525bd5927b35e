"""Where the memory of a dma-buf comes from: what its object and its imports have in common."""

from __future__ import annotations

import mmap
import os
import threading
from contextlib import suppress
from typing import ClassVar
from weakref import WeakValueDictionary

from vfiopy.backend import Area, FileMemory, region_name
from vfiopy.dmabuf.life import ExporterLife
from vfiopy.errors import PciAddressError, VfioError
from vfiopy.kernel.ioctl import MemfdPart
from vfiopy.mmio import Region
from vfiopy.pci import Function
from vfiopy.signals import Cause, MemorySignals

__all__ = ["BarOrigin", "ForeignOrigin", "MemoryOrigin", "Origin", "origin_of"]


class Origin:
    """Base: one for each dma-buf that this process knows, found by its inode.

    Attributes:
        signals: says when the memory goes.
        ranges: where it is on the bus, in order, as (address, bytes); None where that is not known.
    """

    _known: ClassVar[WeakValueDictionary[int, Origin]] = WeakValueDictionary()
    _finding: ClassVar[threading.Lock] = threading.Lock()  # two threads that receive one dma-buf share its origin

    def __init__(self, signals: MemorySignals, ranges: tuple[Area, ...] | None = None) -> None:
        self.signals = signals
        self.ranges = ranges

    def look(self) -> None:
        """Notice what can be noticed only by looking; called before each use."""

    def refused(self) -> None:
        """The kernel refused an import because the memory is away."""

    @property
    def watched(self) -> bool:
        """When the memory goes for good, that is noticed."""
        return True

    @property
    def way(self) -> str:
        """What can be done instead of importing it, for messages; empty where it can be imported."""
        return ""


class BarOrigin(Origin):
    """Parts of a BAR of a device that this process has open.

    Attributes:
        region: the BAR.
        index: its number.
        areas: the parts, in order.
    """

    def __init__(self, signals: MemorySignals, region: Region, index: int, areas: tuple[Area, ...]) -> None:
        if index not in signals.addresses:  # the kernel does not move BARs while the device is open
            signals.addresses[index] = _bus_address(signals.name, index)
        start = signals.addresses[index]
        ranges = None if start is None else tuple(Area(start + area.offset, area.size) for area in areas)
        super().__init__(signals, ranges)
        self.region = region
        self.index = index
        self.areas = areas

    @property
    def way(self) -> str:
        """One range only."""
        return "" if len(self.areas) == 1 else "iommufd imports one range: export each range as a dma-buf of its own"

    def __str__(self) -> str:
        return f"{self.signals.name} {region_name(self.index)}"


class MemoryOrigin(Origin):
    """Memory of this machine: a udmabuf, a heap, a graphics plane. Nobody takes it away.

    Attributes:
        parts: ranges of memfds that it is made of; this object's own fds.
    """

    def __init__(self, name: str, way: str, parts: tuple[MemfdPart, ...] = ()) -> None:
        super().__init__(MemorySignals(name))
        self._way = way
        self.parts: tuple[MemfdPart, ...] = ()
        for part in parts:  # one by one: when there are no fds left, the finalizer closes those that were made
            self.parts += (MemfdPart(os.dup(part.memfd), part.offset, part.size),)

    @property
    def way(self) -> str:
        """Such memory cannot be imported."""
        return self._way

    def backing(self) -> tuple[FileMemory, ...]:
        """The memfds' ranges, mapped in this process too, as what ``AddressSpace.map()`` takes."""
        return tuple(self._mapped(part) for part in self.parts)

    def _mapped(self, part: MemfdPart) -> FileMemory:
        import numpy as np  # noqa: PLC0415  needed here only

        pages = mmap.mmap(part.memfd, part.size, offset=part.offset)
        address = int(np.frombuffer(pages, dtype=np.uint8).__array_interface__["data"][0])
        return FileMemory(part.memfd, part.offset, part.size, True, address, (self, pages))

    def __del__(self) -> None:
        for part in getattr(self, "parts", ()):
            os.close(part.memfd)

    def __str__(self) -> str:
        return self.signals.name


class ForeignOrigin(Origin):
    """A dma-buf that another process made.

    Attributes:
        life: of that process, or None.
    """

    def __init__(self, name: str) -> None:
        super().__init__(MemorySignals(name))
        self.life: ExporterLife | None = None
        self._owned: ExporterLife | None = None

    def watch(self, life: ExporterLife) -> None:
        """Take over a life to watch; it ends with this object."""
        self.life = self._owned = life

    def __del__(self) -> None:
        owned = getattr(self, "_owned", None)
        if owned is not None:
            owned.close()

    @property
    def watched(self) -> bool:
        """Only with a life to watch."""
        return self.life is not None

    def look(self) -> None:
        """Is the exporter still there?"""
        life = self.life
        if life and not self.signals.over and life.over:
            self.signals.took(Cause.EXPORTER_GONE)

    def refused(self) -> None:
        """The memory is away: since when, and what became of older imports, nobody says."""
        self.look()
        if not self.signals.over:
            self.signals.doubt()

    def __str__(self) -> str:
        return self.signals.name


def origin_of(inode: int, made: Origin | None = None) -> Origin:
    """Remember or find the origin of a dma-buf."""
    with Origin._finding:
        found = made or Origin._known.get(inode) or ForeignOrigin(f"received dma-buf {inode}")
        Origin._known[inode] = found
    return found


def _bus_address(name: str, index: int) -> int | None:
    with suppress(PciAddressError, VfioError):
        return next((one.start for one in Function(name).resources if one.index == index), None)
    return None
