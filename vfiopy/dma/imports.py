"""dma-bufs imported into an address space, and what becomes of them when the exporter takes the memory back.

An import is *live* until its exporter's device is reset, powered down, closed, or stops to decode memory. From then on
nothing is behind its IOVA, also when the memory is there again, until :meth:`DmaBufMapping.remap`. The kernel tells
nobody; :mod:`vfiopy.signals` does, for what this process does. Of an exporter in another process nothing is heard: its
imports become *unknown* at the first sign that the memory was away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, Self, cast

import numpy as np
import numpy.typing as npt

from vfiopy.backend import Area, Copier, DeviceWindow, Mapper, Prot
from vfiopy.dma.buffer import FREE_TIMEOUT, DmaArray
from vfiopy.dma.imported import ImportedMemory, ImportState, check_there
from vfiopy.dma.mapping import Mapping
from vfiopy.dma.memory import OwnedFd
from vfiopy.dmabuf.origin import BarOrigin, Origin
from vfiopy.errors import (
    ClosedError,
    NotSupportedError,
    RevokedError,
)
from vfiopy.lives import report_errors
from vfiopy.mmio import numpy_view
from vfiopy.signals import Cause

if TYPE_CHECKING:
    from vfiopy.iova import IovaSpace
    from vfiopy.pci.p2p import PeerPath

__all__ = ["DmaBufMapping", "ImportState", "ImportingSpace", "let_go", "listen", "still_away"]


class ImportingSpace(Protocol):
    """What this file needs of an :class:`vfiopy.AddressSpace`, which is made on top of it."""

    name: str
    book: IovaSpace

    @property
    def mappers(self) -> tuple[Mapper, ...]:
        """Its mappers."""

    def by_address(self) -> list[Mapper]:
        """Those that need device memory to be mapped in this process."""

    def map_window(self, window: DeviceWindow, prot: Prot, *, iova: int | None, limit: int, alignment: int) -> Mapping:
        """Map device memory."""

    def copy_window(
        self, window: DeviceWindow, prot: Prot, iova: int | None, copier: Copier, source: Mapper, source_iova: int
    ) -> Mapping:
        """Share what another mapper has mapped."""

    def restore(self, mapping: Mapping) -> None:
        """Unmap a revoked mapping and map it again at the same IOVA."""


class DmaBufMapping:
    """A dma-buf, or a part of it, that the devices of a space can reach.

    Made by ``space.import_dmabuf()`` and ``space.peer()``. ``bool(mapping)`` says whether it is mapped, revoked or not.
    Dropping the object does not unmap.

    Threads: may be shared.

    Attributes:
        space: the address space.
        mapping: the plain mapping below; its ``iova`` is there whatever the state.
    """

    def __init__(
        self,
        space: ImportingSpace,
        mapping: Mapping,
        memory: ImportedMemory,
        find_paths: Callable[[], Sequence[PeerPath]] = tuple,
    ) -> None:
        self.space = space
        self.mapping = mapping
        self._memory = memory
        self._find_paths = find_paths

    # --- looking ---

    @property
    def state(self) -> ImportState:
        """Live, revoked or unknown, as far as this process can know."""
        self._memory.origin.look()
        return self._memory.state

    @property
    def cause(self) -> Cause | None:
        """Why it was revoked."""
        return self._memory.cause

    @property
    def paths(self) -> tuple[PeerPath, ...]:
        """How each device of the space reaches the memory, read from sysfs now; only of what ``peer()`` made."""
        return tuple(self._find_paths())

    @property
    def watched(self) -> bool:
        """The exporter is this process's, or its life is watched: its end is noticed."""
        return self._memory.origin.watched

    def check(self) -> None:
        """Raise unless it is mapped and live.

        Raises:
            RevokedError: the exporter took the memory back, or may have done so.
            ClosedError: it was unmapped.
        """
        self._memory.origin.look()
        self._check()

    def _check(self) -> None:
        """As :meth:`check`, by what is known: looking may run callbacks, which no lock may be held for."""
        state = self._memory.state
        if state is ImportState.LIVE and self.mapping:
            return
        if not self.mapping:
            raise ClosedError(f"{self.mapping!r} was unmapped before")
        signals = self._memory.origin.signals
        where = f"the import at IOVA {self.mapping.iova:#x}"
        if state is ImportState.UNKNOWN:
            raise RevokedError(
                f"{where} may be dead: its exporter, in another process, took the memory back for a while",
                object=signals.name,
                hint="remap() makes sure; receive() with watch=True, or adopt(life=...), notices more",
            )
        reason = "its memory was taken back" if self.cause is None else self.cause.value
        raise RevokedError(
            f"{reason}: nothing is behind {where} any more", object=signals.name, hint=self._advice(signals.over)
        )

    def _advice(self, over: bool) -> str:
        if over:
            return "unmap() it; the device has to be opened and its BAR exported anew"
        return "remap() brings it back once the device decodes memory again"

    @property
    def iova(self) -> int:
        """The first IOVA, for the device. Raises as :meth:`check` does."""
        self.check()
        return self.mapping.iova

    @property
    def size(self) -> int:
        """Bytes."""
        return self.mapping.size

    @property
    def prot(self) -> Prot:
        """What devices may do."""
        return self.mapping.prot

    @property
    def ranges(self) -> tuple[Area, ...] | None:
        """Where it is on the bus: one (address, bytes), or None where the fd came from another process."""
        memory = self.mapping.memory
        physical = memory.physical if isinstance(memory, DeviceWindow) else 0
        return (Area(physical, self.size),) if physical else None

    def pin(
        self, *, offset: int = 0, size: int | None = None, owner: int = 0, prot: Prot = Prot.RW
    ) -> list[int | None]:
        """Pin pages; return the page frame number of each: the BAR's own, or None where that is not known.

        ``space.book.unpin(iova + offset, size, owner)`` lets go.

        Raises:
            RevokedError, ClosedError: see :meth:`check`.
        """
        length = self.size - offset if size is None else size
        return self.space.book.pin(self.iova + offset, length, prot & self.prot, owner, peer=True, pfns=True)

    def array(self, dtype: npt.DTypeLike = "u1") -> DmaArray:
        """View the memory as an array that knows its ``.iova``, to be given to a driver like any DMA buffer.

        The CPU's view goes through the exporter's device, whose BAR stays mapped until the array is gone. Touching it
        while the device does not decode memory is a bus error; its ``.iova`` raises as :meth:`check` does.

        Raises:
            NotSupportedError: the dma-buf came from another process: this one has no mapping of the BAR.
        """
        self.check()
        origin, window = self._memory.origin, cast("DeviceWindow", self.mapping.memory)
        if not isinstance(origin, BarOrigin):
            raise NotSupportedError(
                "this process cannot map the BAR behind it", object=origin.signals.name, hint="use .iova alone"
            )
        element: np.dtype[Any] = np.dtype(dtype)
        view = numpy_view(origin.region, window.offset, self.size // element.itemsize, element)
        return view.view(DmaArray).reached_by(_PeerReach(self, int(view.__array_interface__["data"][0])))

    def on_revoked(self, callback: Callable[[DmaBufMapping], object]) -> None:
        """Have ``callback(mapping)`` called after the memory was taken back, with no lock held; it may unmap or remap.

        It is called at once where the memory was taken back before. Errors in it go to ``sys.unraisablehook``.
        """
        memory = self._memory
        memory.origin.look()
        call = partial(callback, self)
        with memory.origin.signals.lock:
            memory.callbacks.append(call)
            missed = memory.missed and bool(self.mapping)
        if missed:
            report_errors(call)

    # --- changing ---

    def remap(self) -> None:
        """Bring a revoked import back at the same IOVA: unmap it and map it again. Does nothing where it is live.

        Raises:
            RevokedError: the memory is still away, or gone for good; the import stays as it was.
            ClosedError: it was unmapped.
        """
        if not self.mapping:
            raise ClosedError(f"{self.mapping!r} was unmapped before")
        memory = self._memory
        origin = memory.origin
        origin.look()
        with origin.signals.lock:
            if memory.state is ImportState.LIVE:
                return
            if origin.signals.over:
                self._check()
            try:
                if cast("DeviceWindow", self.mapping.memory).dmabuf_fd < 0:
                    check_there(origin)
                self.space.restore(self.mapping)
            except RevokedError as error:
                memory.mark(ImportState.REVOKED, memory.cause)
                refused = error
            else:
                memory.mark(ImportState.LIVE, None)
                return
        origin.refused()
        raise still_away(origin, refused) from refused

    def unmap(self, *, timeout: float = 0.0) -> None:
        """Take it away from the devices, live or not: see :meth:`vfiopy.dma.Mapping.unmap`."""
        self.mapping.unmap(timeout=timeout)

    def copy_to(self, space: ImportingSpace, *, iova: int | None = None, prot: Prot | None = None) -> DmaBufMapping:
        """Map the same memory in another space by IOMMU_IOAS_COPY.

        Args:
            space: its mapper is an IOAS of the same iommufd context: ``IoasMapper.sibling()`` makes one.
            iova: where; None lets the book choose.
            prot: None for the same.

        Raises:
            NotSupportedError: the two spaces do not share an iommufd.
            RevokedError, OverlapError: as for an import.
        """
        rights = self.prot if prot is None else prot
        memory = self._memory
        memory.origin.look()
        copier = _copier(self.space, space)
        if copier is None:
            raise NotSupportedError(
                "the two spaces do not have one IOAS each in the same iommufd",
                object=f"address space '{space.name}'",
                hint="space.add_mapper(mapper.sibling()), or import the dma-buf there: space.import_dmabuf(buf)",
            )
        copy = ImportedMemory(memory.origin)
        window = cast("DeviceWindow", self.mapping.memory)
        own = OwnedFd(window.dmabuf_fd)
        twin = replace(window, dmabuf_fd=own.fd, owner=(copy, own))
        try:
            with memory.origin.signals.lock:
                self._check()
                mapping = space.copy_window(twin, rights, iova, copier, self.space.mappers[0], self.mapping.iova)
                listen(copy, mapping, space)
        except BaseException:
            let_go(space, twin, own)
            raise
        return DmaBufMapping(space, mapping, copy)

    def __bool__(self) -> bool:
        return bool(self.mapping)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.mapping:
            self.mapping.unmap()

    def __repr__(self) -> str:
        state = self._memory.state.value if self.mapping else "unmapped"
        first = self.mapping.iova
        return f"<DmaBufMapping {first:#x}-{self.mapping.last:#x} of {self._memory.origin.signals.name} ({state})>"


class _PeerReach:
    """Implements :class:`vfiopy.dma.buffer.Reach`."""

    def __init__(self, imported: DmaBufMapping, address: int) -> None:
        self._imported = imported
        self.mapping = imported.mapping
        self.iova = self.mapping.iova
        self.size = self.mapping.size
        self.address = address
        self.timeout = FREE_TIMEOUT

    def check_open(self) -> None:
        self._imported.check()

    def close(self) -> None:
        if self.mapping:
            self.mapping.unmap(timeout=self.timeout)


def _copier(source: ImportingSpace, target: ImportingSpace) -> Copier | None:
    if len(source.mappers) != 1 or len(target.mappers) != 1:
        return None
    mapper = target.mappers[0]
    return mapper if isinstance(mapper, Copier) and mapper.can_copy_from(source.mappers[0]) else None


def listen(memory: ImportedMemory, mapping: Mapping, space: ImportingSpace) -> None:
    """Have the hub tell an import of its memory's end. With the lock of the origin's signals."""
    memory.mapped(mapping, space)
    memory.origin.signals.listen(memory)


def still_away(origin: Origin, error: RevokedError) -> RevokedError:
    """What a refused import or remap says where it is known why."""
    signals = origin.signals
    cause = signals.absent
    if cause is None:
        return error
    hint = "it never comes back; export the BAR anew" if cause.final else "undo that first, then try again"
    return RevokedError(
        f"the memory is away: {cause.value}", errno=error.errno, object=signals.name, call=error.call, hint=hint
    )


def let_go(space: ImportingSpace, window: DeviceWindow, own: OwnedFd) -> None:
    """Close the fd of what was not mapped: the traceback of the failure would keep it open."""
    if all(one.memory is not window for one in space.book.mappings()):
        own.close()
