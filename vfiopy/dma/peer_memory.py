"""The part of an address space that deals with the memory of other devices; and how any memory gets into the book."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vfiopy._native import SpaceBase
from vfiopy.backend import Copier, DeviceWindow, FileMemory, Mapper, Memory, Prot
from vfiopy.dma.mappers import MapperSet
from vfiopy.dma.mapping import Mapping
from vfiopy.errors import IovaRangeError, OverlapError, VfioError
from vfiopy.iova import IovaSpace
from vfiopy.lives import Resource, drain_finalizers
from vfiopy.observing import Observer

if TYPE_CHECKING:
    from vfiopy.dma.imports import DmaBufMapping
    from vfiopy.dmabuf import DmaBuf
    from vfiopy.mmio import Region

__all__ = ["ANY_IOVA", "PeerMemory"]

ANY_IOVA = (1 << 64) - 1


class PeerMemory(Resource, SpaceBase):
    """Base of :class:`vfiopy.AddressSpace`. Implements :class:`vfiopy.dma.imports.ImportingSpace`."""

    name: str
    book: IovaSpace
    _mappers: MapperSet
    _observers: tuple[Observer, ...] = ()

    @property
    def mappers(self) -> tuple[Mapper, ...]:
        """The mappers of this space, in the order in which they came."""
        return tuple(self._mappers)

    def _tell(self, kind: str, facts: dict[str, object], error: BaseException | None = None) -> None:
        for observer in self._observers:
            observer.tell(kind, facts, error)

    def _map_ready(
        self, ready: Memory, rights: Prot, iova: int | None, limit: int, alignment: int, *, transient: bool = False
    ) -> Mapping:
        if not self._observers:
            return self._map_now(ready, rights, iova, limit, alignment, transient=transient)
        facts: dict[str, object] = {"size": ready.size, "prot": rights, "memory": ready, "limit": limit}
        try:
            mapping = self._map_now(ready, rights, iova, limit, alignment, transient=transient)
        except BaseException as error:
            self._tell("map", facts, error)
            raise
        self._tell("map", {"iova": mapping.iova, **facts})
        return mapping

    def _map_now(
        self, ready: Memory, rights: Prot, iova: int | None, limit: int, alignment: int, *, transient: bool = False
    ) -> Mapping:
        self._mappers.check_kind(ready.kind)
        if iova is not None and iova < 0:  # which would mean "anywhere" below
            raise ValueError(f"iova must be an int from 0 to 2**64 - 1, not {iova}")
        if iova == 0:
            raise IovaRangeError(
                "IOVA 0 is never mapped, because to many devices a descriptor with address 0 has no buffer",
                object=self._label,
                hint="choose another IOVA, or leave the choice to the space; for a guest's memory use space.book.map()",
            )
        wanted = self._mappers.place(ready) if iova is None else iova
        arguments = _arguments(ready, rights, wanted, limit, alignment, transient=transient)
        if not self._mappers.in_python:
            mapping = self._map_memory(*arguments)
            if mapping is not None:  # else a mapper in Python joined since we looked
                return mapping
        free = wanted < 0 and not (transient and self.book.transient())
        advised = self._mappers.advise(ready, limit) if free else None
        if advised is not None and not advised & max(alignment - 1, 0):
            with suppress(OverlapError, IovaRangeError):  # then wherever there is room
                at, serial = self._mappers.map(ready, rights, _arguments(ready, rights, advised, limit, alignment))
                return Mapping(self, at, ready.size, ready.address, rights, serial)
        at, serial = self._mappers.map(ready, rights, arguments)
        return Mapping(self, at, ready.size, ready.address, rights, serial)

    def import_dmabuf(
        self,
        buffer: DmaBuf,
        *,
        offset: int = 0,
        size: int | None = None,
        iova: int | None = None,
        prot: Prot = Prot.RW,
        limit: int = ANY_IOVA,
        alignment: int = 0,
    ) -> DmaBufMapping:
        """Make the memory of a dma-buf reachable, by page frame: no page structures, no pins, no CPU (Linux 6.19).

        Args:
            buffer: what a BAR was exported as, by this process or another; it may be closed afterwards.
            offset, size: the part, bytes, whole pages; all of it by default. It may be imported several times.
            iova, prot, limit, alignment: see :meth:`map`.

        Raises:
            NotSupportedError: no BAR's dma-buf, or one of several ranges; the hint says what works instead.
            MemoryKindError: a device of the space is not on iommufd.
            RevokedError: the exporter does not decode memory now, or is closed.
            OverlapError, IovaRangeError, AlignmentError, NoSpaceError: see :meth:`map`.
        """
        from vfiopy.dma.importing import import_dmabuf  # noqa: PLC0415  above this file: it maps through it

        self.check_open()
        drain_finalizers()
        place = {"iova": iova, "limit": limit, "alignment": alignment}
        return import_dmabuf(self, buffer, (offset, size), prot, place)

    def peer(
        self,
        region: Region,
        *,
        offset: int = 0,
        size: int | None = None,
        iova: int | None = None,
        prot: Prot = Prot.RW,
        limit: int = ANY_IOVA,
        alignment: int = 0,
        never_revoked: bool = False,
    ) -> DmaBufMapping:
        """Make another device's BAR reachable, by the right road: ``space.peer(device_b.bars[2])``.

        On iommufd that is a dma-buf (Linux 6.19), which dies with its exporter. For devices that are software, and for
        type1 if you accept what that means, it is the BAR's mapping in this process; the device cannot be closed
        before it is unmapped.

        Args:
            region: ``device.bars[n]`` of an open device.
            offset, size: the part, bytes, whole pages; all of it by default.
            iova, prot, limit, alignment: see :meth:`map`.
            never_revoked: accept type1's road. The kernel does not take such a mapping back when the device is reset,
                powered down or closed.

        Returns:
            The mapping; its ``paths`` say how each device of the space gets there, through which bridges, and what
            their ACS does to it.

        Raises:
            NotSupportedError: no BAR, one smaller than a page, or a kernel or driver that cannot export it.
            MemoryKindError: a device of the space is on type1, and that was not accepted.
            RevokedError: the device does not decode memory now.
            AlignmentError, AddressRangeError, OverlapError, IovaRangeError, NoSpaceError: see :meth:`map`.
        """
        from vfiopy.dma.peer import peer  # noqa: PLC0415  as above

        self.check_open()
        drain_finalizers()
        place = {"iova": iova, "limit": limit, "alignment": alignment}
        names = [getattr(member, "name", "") for member in self._mappers.members()]
        return peer(self, region, (offset, size), prot, place, devices=names, never_revoked=never_revoked)

    def by_address(self) -> list[Mapper]:
        """The mappers that need device memory to be mapped in this process: type1, and devices that are software."""
        return self._mappers.by_address

    def map_window(self, window: DeviceWindow, prot: Prot, *, iova: int | None, limit: int, alignment: int) -> Mapping:
        """Map device memory; for :mod:`vfiopy.dma.imports`, under whose locks nothing else may run."""
        self.check_open()
        return self._map_ready(window, prot, iova, limit, alignment)

    def copy_window(
        self, window: DeviceWindow, prot: Prot, iova: int | None, copier: Copier, source: Mapper, source_iova: int
    ) -> Mapping:
        """Have the only mapper of this space share what another one has mapped; for :mod:`vfiopy.dma.imports`."""
        self.check_open()
        wanted = -1 if iova is None else iova
        arguments = (*_arguments(window, prot, wanted, ANY_IOVA, 0), True)  # the mapper has it: see the commit below
        with self.book.begin_map(*arguments) as reserved:
            try:
                copier.copy_from(source, source_iova, window.size, prot, reserved.iova)
            except VfioError as error:
                if error.errno == errno.EFAULT:  # the answer could not be written: the copy may have been made
                    with suppress(VfioError):
                        self.mappers[0].unmap(reserved.iova, window.size)
                raise
            try:
                serial = reserved.commit()  # no call: the copy is what the mapper is to have
            except BaseException:
                if reserved.serial is None:
                    self.mappers[0].unmap(reserved.iova, window.size)
                raise
            mapping = Mapping(self, reserved.iova, window.size, 0, prot, serial)
        facts = {"iova": mapping.iova, "size": mapping.size, "prot": prot, "memory": window, "limit": ANY_IOVA}
        self._tell("map", facts)
        return mapping

    def restore(self, mapping: Mapping) -> None:
        """Unmap a revoked mapping and map it again at the same IOVA; for :mod:`vfiopy.dma.imports`."""
        self.check_open()
        self.book.restore(mapping.iova, mapping.serial)


def _arguments(
    memory: Memory, prot: Prot, iova: int, limit: int, alignment: int, *, transient: bool = False
) -> tuple[Any, ...]:
    """Arguments of the book's map()."""
    physical = memory.physical if isinstance(memory, DeviceWindow) else 0
    place = (int(prot), iova, limit, alignment, int(memory.kind))
    return (memory, memory.address, memory.size, *place, *_fd_of(memory), transient, physical)


def _fd_of(memory: Memory) -> tuple[int, int]:
    if isinstance(memory, FileMemory):
        return memory.fd, memory.offset
    if isinstance(memory, DeviceWindow):
        return memory.dmabuf_fd, memory.dmabuf_offset
    return -1, 0
