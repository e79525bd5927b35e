"""Peer to peer: the BAR of one device as memory for the others of a space, by the road that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from vfiopy.backend import Area, BarPort, BookReader, DeviceWindow, Prot, RegionIndex, TellingIo
from vfiopy.dma.imported import ImportedMemory, check_there
from vfiopy.dma.importing import import_dmabuf
from vfiopy.dma.imports import DmaBufMapping, ImportingSpace
from vfiopy.dma.memory import PAGE_SIZE, page_range
from vfiopy.dmabuf import DmaBuf
from vfiopy.dmabuf.origin import BarOrigin
from vfiopy.errors import (
    MemoryKindError,
    NotSupportedError,
    PciAddressError,
    RevokedError,
)
from vfiopy.pci import Function
from vfiopy.pci.p2p import PeerPath, peer_path

if TYPE_CHECKING:
    from vfiopy.mmio import Region

__all__ = ["peer"]

_COMMAND = 0x04
_COMMAND_MEMORY = 1 << 1


def peer(
    space: ImportingSpace,
    region: Region,
    part: tuple[int, int | None],
    prot: Prot,
    place: dict[str, Any],
    *,
    devices: Sequence[str],
    never_revoked: bool,
) -> DmaBufMapping:
    """See :meth:`vfiopy.AddressSpace.peer`.

    Args:
        space: where.
        region: the BAR.
        part: offset and size in bytes, None for the rest.
        prot: what devices may do.
        place: ``iova``, ``limit`` and ``alignment`` of ``AddressSpace.map()``.
        devices: names of the devices in the space.
        never_revoked: type1's road is accepted.
    """
    port: object = region.slow
    if not isinstance(port, BarPort) or not isinstance(port.io, TellingIo) or port.index > RegionIndex.BAR5:
        raise NotSupportedError(
            "this is not the BAR of a device", object=region.name, hint="pass device.bars[n] of an open device"
        )
    area = _part(region, *part)
    if not port.io.read(RegionIndex.CONFIG, _COMMAND, 2)[0] & _COMMAND_MEMORY:
        raise RevokedError(
            "the device does not decode memory now, so nothing is behind its BARs",
            object=region.name,
            hint="device.memory_enabled = True",
        )
    paths = partial(_paths, port.io.name, devices)
    by_address = space.by_address()
    software = [mapper for mapper in by_address if isinstance(mapper, BookReader)]
    if len(by_address) > len(software) and not never_revoked:
        names = ", ".join(mapper.name for mapper in by_address if mapper not in software)
        raise MemoryKindError(
            f"{names} can reach a BAR only through its mapping in this process, which the kernel never takes back: "
            "after a reset or a close of the device, DMA goes on to wherever the BAR was",
            object=region.name,
            hint="open the devices with backend='iommufd', or accept that with never_revoked=True",
        )
    if by_address:
        return _by_address(space, region, area, prot, place, paths, listens=len(by_address) == len(software))
    with DmaBuf.of_bar(region, area) as buffer:
        return import_dmabuf(space, buffer, (0, None), prot, place, paths)


def _part(region: Region, offset: int, size: int | None) -> Area:
    if region.size < PAGE_SIZE:
        raise NotSupportedError(
            f"a BAR of {region.size} bytes, less than a page of {PAGE_SIZE}, cannot be mapped for DMA",
            object=region.name,
            hint="the rest of its page may belong to another device",
        )
    return page_range(region.name, region.size, offset, size)


def _by_address(
    space: ImportingSpace,
    region: Region,
    area: Area,
    prot: Prot,
    place: dict[str, Any],
    paths: Callable[[], Sequence[PeerPath]],
    *,
    listens: bool,
) -> DmaBufMapping:
    """The old road: the BAR's mapping in this process, which is held, so that its device cannot be closed under it."""
    port: Any = region.slow
    origin = BarOrigin(port.io.signals, region, port.index, (area,))
    hold = region.hold(area.offset, area.size, label=f"peer memory of address space '{space.name}'")
    memory = ImportedMemory(origin)
    physical = origin.ranges[0].offset if origin.ranges else 0
    window = DeviceWindow(port.index, area.offset, area.size, -1, hold.address, (memory, hold), 0, physical)
    try:
        with origin.signals.lock:
            check_there(origin)  # decode may have gone off since we looked
            mapping = space.map_window(window, prot, **place)
            if listens:
                memory.mapped(mapping, space)
                origin.signals.listen(memory)
    except BaseException:
        hold.release()  # the traceback would keep it
        raise
    return DmaBufMapping(space, mapping, memory, paths)


def _paths(target: str, devices: Sequence[str]) -> tuple[PeerPath, ...]:
    """How each device of the space reaches the target; none for devices that are software."""
    found = []
    with suppress(PciAddressError):
        end = Function(target)
        for name in devices:
            with suppress(PciAddressError):
                found.append(peer_path(Function(name), end))
    return tuple(found)
