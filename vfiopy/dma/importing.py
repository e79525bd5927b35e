"""Importing a dma-buf into an address space: what is checked before, and what is undone where it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vfiopy.backend import Area, DeviceWindow, Prot
from vfiopy.dma.imported import ImportedMemory
from vfiopy.dma.imports import DmaBufMapping, ImportingSpace, let_go, listen, still_away
from vfiopy.dma.memory import OwnedFd, page_range
from vfiopy.dmabuf import DmaBuf
from vfiopy.dmabuf.origin import BarOrigin, Origin
from vfiopy.errors import MemoryKindError, NotSupportedError, RevokedError

if TYPE_CHECKING:
    from vfiopy.pci.p2p import PeerPath

__all__ = ["import_dmabuf"]


def import_dmabuf(
    space: ImportingSpace,
    buffer: DmaBuf,
    part: tuple[int, int | None],
    prot: Prot,
    place: dict[str, Any],
    find_paths: Callable[[], Sequence[PeerPath]] = tuple,
) -> DmaBufMapping:
    """See :meth:`vfiopy.AddressSpace.import_dmabuf`.

    Args:
        space: where.
        buffer: what.
        part: offset and size in bytes, None for the rest.
        prot: what devices may do.
        place: ``iova``, ``limit`` and ``alignment`` of ``AddressSpace.map()``.
        find_paths: see :attr:`DmaBufMapping.paths`.
    """
    buffer.check_open()
    area = page_range(buffer.label, buffer.size, *part)
    origin = buffer.origin
    if origin.way:
        raise NotSupportedError(
            f"{buffer.label} cannot be imported: iommufd takes only what vfio-pci exports, in one range",
            object=f"address space '{space.name}'",
            call="IOMMU_IOAS_MAP_FILE",
            hint=origin.way,
        )
    by_address = space.by_address()
    if by_address:
        raise MemoryKindError(
            f"{', '.join(mapper.name for mapper in by_address)} cannot import dma-bufs",
            object=f"address space '{space.name}'",
            hint="open its devices with backend='iommufd'; space.peer(device.bars[n]) says what else there is",
        )
    origin.look()
    memory = ImportedMemory(origin)
    own = OwnedFd(buffer.fileno())  # for mappers that join later; it goes when the memory is unmapped
    window = _window(origin, area, own.fd, (memory, own))
    try:
        with origin.signals.lock:
            if origin.signals.over:
                raise RevokedError("its memory is gone for good", object=buffer.label, call="IOMMU_IOAS_MAP_FILE")
            mapping = space.map_window(window, prot, **place)
            listen(memory, mapping, space)
    except RevokedError as error:
        let_go(space, window, own)
        origin.refused()
        raise still_away(origin, error) from error
    except BaseException:
        let_go(space, window, own)
        raise
    return DmaBufMapping(space, mapping, memory, find_paths)


def _window(origin: Origin, area: Area, fd: int, owner: object) -> DeviceWindow:
    region, start, physical = -1, 0, 0
    if isinstance(origin, BarOrigin):
        region, start = origin.index, origin.areas[0].offset
        physical = origin.ranges[0].offset + area.offset if origin.ranges else 0
    return DeviceWindow(region, start + area.offset, area.size, fd, 0, owner, area.offset, physical)
