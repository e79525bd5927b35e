"""A device's regions: what of them is mapped, what goes through the backend, and how both end."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from vfiopy.backend import Area, BurstIo, DeviceIo, RegionFlag, RegionInfo, Window, region_name
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.errors import AddressRangeError, NotSupportedError
from vfiopy.mmio import Region
from vfiopy.observing import Observer

__all__ = ["RegionPort", "Regions", "mappable_areas"]


class RegionPort:
    """Register access through the backend: for what is not, or cannot be, mapped.

    Attributes:
        io: the device.
        index: the region's index.
    """

    def __init__(self, io: DeviceIo, index: int) -> None:
        self.io = io
        self.index = index

    def read(self, offset: int, width: int) -> int:
        """Read ``width`` bytes as one access."""
        return int.from_bytes(self.io.read(self.index, offset, width), "little")

    def write(self, offset: int, width: int, value: int) -> None:
        """Write ``width`` bytes as one access."""
        self.io.write(self.index, offset, value.to_bytes(width, "little"))

    def write_burst(self, offset: int, width: int, step: int, data: bytes) -> None:
        """Do one write of ``width`` bytes after another, ``step`` bytes apart."""
        if isinstance(self.io, BurstIo):
            self.io.write_burst(self.index, offset, width, step, data)
            return
        for number, at in enumerate(range(0, len(data), width)):
            self.io.write(self.index, offset + number * step, data[at : at + width])


def mappable_areas(info: RegionInfo, msix: Area | None) -> list[Area]:
    """Return the parts of a region that may be mapped: whole pages, sorted.

    Args:
        info: the region.
        msix: where the MSI-X table lies in it, to leave its pages out; None to map them too.
    """
    if RegionFlag.MMAP not in info.flags or not info.size:
        return []
    areas = list(info.sparse) if info.sparse is not None else [Area(0, info.size)]
    if msix is not None:
        first = msix.offset & -PAGE_SIZE
        last = (msix.offset + msix.size + PAGE_SIZE - 1) & -PAGE_SIZE
        areas = [piece for area in areas for piece in _cut(area, first, last)]
    # What is cut off is whole pages. A piece of one is only a BAR smaller than that, and VFIO says if it may be mapped.
    return sorted(areas)


def _cut(area: Area, first: int, last: int) -> Iterator[Area]:
    """Yield what is left of an area without ``[first, last)``."""
    end = area.offset + area.size
    if first > area.offset:
        yield Area(area.offset, min(first, end) - area.offset)
    if last < end:
        begin = max(last, area.offset)
        yield Area(begin, end - begin)


class Regions:
    """The regions of one device by index, opened on first use: ``device.bars[0]``.

    Threads: may be shared.

    Attributes:
        observer: who is told of regions that are opened, or None.

    Args:
        io: the device.
        limit: number of regions that this object offers.
        msix_tables: BAR index → where the MSI-X table lies in it.
        map_msix: map the pages of the MSI-X table too (only sensible for looking at it).
    """

    def __init__(
        self, io: DeviceIo, limit: int, msix_tables: dict[int, Area], *, map_msix: bool = False
    ) -> None:
        self._io = io
        self._limit = limit
        self._msix = {} if map_msix else msix_tables
        self._open: dict[int, tuple[Region, list[Window]]] = {}
        self.observer: Observer | None = None
        self._lock = threading.RLock()  # or two threads open a region twice, and the windows of one of them go under it

    def info(self, index: int) -> RegionInfo:
        """Describe a region; size 0 where the device does not have it."""
        self._check(index)
        return self._io.region_info(index)

    def _check(self, index: int) -> None:
        if not 0 <= index < self._limit:
            raise AddressRangeError(
                f"there is no region {index}; it has indexes 0 to {self._limit - 1}", object=self._io.name
            )

    def __len__(self) -> int:
        return self._limit

    def __iter__(self) -> Iterator[Region]:
        """Iterate over the regions that the device has, opening each."""
        for index in range(self._limit):
            if self.info(index).size:
                yield self[index]

    def __contains__(self, index: int) -> bool:
        return 0 <= index < self._limit and self.info(index).size > 0

    def __getitem__(self, index: int) -> Region:
        """Open a region.

        Raises:
            AddressRangeError: no such index.
            NotSupportedError: the device does not have this region.
        """
        entry = self._open.get(index)
        if entry is None:
            with self._lock:
                entry = self._open.get(index)
                if entry is None:
                    entry = self._open[index] = self._open_region(index)
        return entry[0]

    def _open_region(self, index: int) -> tuple[Region, list[Window]]:
        info = self.info(index)
        name = f"{self._io.name} {region_name(index)}"
        if not info.size:
            names = [region_name(i) for i in range(self._limit) if self._io.region_info(i).size]
            present = ", ".join(names) or "no region at all"
            raise NotSupportedError(
                f"the device has no {region_name(index)}", object=self._io.name, hint=f"it has {present}"
            )
        windows: list[Window] = []
        pieces: list[tuple[int, int, int]] = []
        region: Region | None = None
        try:
            for area in mappable_areas(info, self._msix.get(index)):
                window = self._io.map_region(index, area.offset, area.size)
                windows.append(window)
                pieces.append((area.offset, window.address, area.size))
            region = Region(
                name=name,
                size=info.size,
                windows=pieces,
                slow=RegionPort(self._io, index),
                readable=RegionFlag.READ in info.flags,
                writable=RegionFlag.WRITE in info.flags,
            )
            if self.observer is not None:
                self.observer.region_opened(index, region)
        except BaseException:
            if region is not None:
                region.close()
            for window in windows:
                window.close()
            raise
        return region, windows

    def opened(self) -> list[tuple[int, Region]]:
        """Return the regions that are open, with their indexes; opens none."""
        with self._lock:
            return [(index, region) for index, (region, _) in self._open.items()]

    def close(self) -> None:
        """Close all regions.

        Raises:
            BusyError: a numpy view or a hold on an address is alive; nothing is unmapped then.
        """
        with self._lock:
            # Those that are held first: when they refuse, the others are as they were.
            for region, _ in sorted(self._open.values(), key=lambda entry: not entry[0].holds):
                region.close()
            for _, windows in self._open.values():
                for window in windows:
                    window.close()
            self._open.clear()
