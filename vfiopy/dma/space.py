"""The address space of one or more devices: the book, and the mappers that make it true."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike

from vfiopy._native import SpaceBase
from vfiopy.backend import FileMemory, HostMemory, IovaRange, Mapper, Memory, MemoryKind, Prot
from vfiopy.dma.buffer import Allocation, DmaArray, allocate_pages
from vfiopy.dma.mappers import MapperSet, Member
from vfiopy.dma.mapping import Mapping
from vfiopy.dma.memory import PAGE_SIZE, let_go, memory_of, round_to_pages
from vfiopy.dma.peer_memory import ANY_IOVA, PeerMemory
from vfiopy.dma.waiting import unmap_async
from vfiopy.errors import AlignmentError, MemoryKindError, NotMappedError, StateError
from vfiopy.iova import IovaMapping, IovaSpace
from vfiopy.lives import Resource, drain_finalizers
from vfiopy.observing import Observer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from typing_extensions import Buffer

__all__ = ["AddressSpace", "Member", "all_spaces"]

_all: WeakSet[AddressSpace] = WeakSet()


class AddressSpace(PeerMemory):
    """A DMA address space: what its devices can reach, and at which IOVA.

    Open one to put several devices into it; ``vfiopy.open()`` makes one of its own where none is given.

    ``space.book`` is the native IOVA space below. ``map`` and ``Mapping.unmap`` are one native call each.

    Threads: ``map``, ``unmap``, ``pin`` and look-ups may be called from any thread; devices join and leave from one
    thread at a time.

    Args:
        name: for messages.
    """

    _rank = -10

    def __init__(self, name: str = "dma") -> None:
        Resource.__init__(self, f"address space '{name}'")
        SpaceBase.__init__(self, IovaSpace(name))
        self.name = name
        self._mappers = MapperSet(self.book, self._label)
        self._allocations: WeakSet[Allocation] = WeakSet()
        self._patience: tuple[float | None, bool] = (0.0, False)
        self._choose_road()
        _all.add(self)

    def _choose_road(self) -> None:
        """Let plain buffers go straight to the book where nobody else has to be asked."""
        mappers = self._mappers
        plain = not mappers.in_python and MemoryKind.HOST in mappers.kinds
        self._direct = self._open and plain and not self._observers

    def observe(self, observer: Observer) -> None:
        """Have an observer told of every map and unmap from now on, but for those asked of ``space.book`` itself."""
        self._observers = (*self._observers, observer)
        self._choose_road()

    def ignore(self, observer: Observer) -> None:
        """End :meth:`observe`. Idempotent."""
        self._observers = tuple(one for one in self._observers if one is not observer)
        self._choose_road()

    # --- mappers and devices -------------------------------------------------------------------------------------

    def join(self, mapper: Mapper, member: Member) -> None:
        """Take a device in: called by ``vfiopy.open()``.

        Mappings that exist already are replayed into a mapper that is new here. On failure the space is as before.

        Raises:
            IovaRangeError: an existing mapping lies outside of what the device's IOMMU can do.
        """
        self.check_open()
        self._direct = False  # until all mappers agree again, every map asks them in words
        try:
            self._mappers.join(mapper, member)
        finally:
            self._choose_road()

    def add_mapper(self, mapper: Mapper) -> None:
        """Take in a mapper before its devices, so that ``vfiopy.open(..., space=...)`` finds it.

        For containers and IOASes of a privileged launcher: ``space.add_mapper(ContainerMapper.adopt(fd))``, then
        ``vfiopy.open(address, space=space, device_fd=...)``. The space closes it.
        """
        self.check_open()
        self._direct = False
        try:
            self._mappers.add(mapper)
        finally:
            self._choose_road()

    def leave(self, mapper: Mapper, member: Member) -> None:
        """Let a device go: called by ``Device.close()`` after the device is shut."""
        try:
            self._mappers.leave(mapper, member)
        finally:
            self._choose_road()

    # --- mapping -------------------------------------------------------------------------------------------------

    # map, map_many and unmap_many are SpaceBase's: for plain buffers, straight from there to the book and the kernel.

    def _map_slowly(
        self, memory: Memory | Buffer, iova: int | None, prot: int, limit: int, alignment: int
    ) -> Mapping:
        """Map what is not a plain buffer, or through mappers in Python; or say in words why it cannot be done."""
        self.check_open()
        drain_finalizers()
        rights = Prot(prot)
        ready = memory_of(memory, rights)
        try:
            return self._map_ready(ready, rights, iova, limit, alignment)
        except BaseException:
            if ready is not memory:
                let_go(ready)
            raise

    def _map_many_slowly(self, memories: Iterable[Memory | Buffer], prot: int, limit: int) -> list[Mapping]:
        done: list[Mapping] = []
        try:
            for memory in memories:
                done.append(self._map_slowly(memory, None, prot, limit, 0))
        except BaseException as error:
            self._take_back(done, error)
        return done

    def unmap(self, iova: int, size: int | None = None, *, timeout: float = 0.0) -> int:
        """Unmap one mapping by its first IOVA, or everything in ``[iova, iova + size)``.

        A range must hold whole mappings only; holes in it are fine, and an empty range unmaps 0 bytes, whatever the
        backend underneath thinks of it.

        Args:
            iova: first IOVA.
            size: bytes, or None for exactly the mapping that begins at ``iova``.
            timeout: seconds to wait for the owners of pins.

        Returns:
            Number of bytes unmapped.

        Raises:
            NotMappedError: no mapping begins at ``iova`` (only without ``size``), or an end cuts a mapping in two.
            PinnedError, UnmappingError: see :meth:`Mapping.unmap`.
        """
        self._check_range(iova, size)
        if size is None:
            return self._unmap(lambda: self.book.unmap(iova, timeout), iova, None, timeout)
        return self._unmap(lambda: self.book.unmap_range(iova, iova + size - 1, timeout), iova, size, timeout)

    async def unmap_async(self, iova: int, size: int | None = None, *, timeout: float | None = 0.0) -> int:
        """As :meth:`unmap`, but an event loop goes on while owners of pins take their time; ``timeout`` None: for ever.

        Their callbacks run in this task. The mappers are called as by :meth:`unmap`, at the end, in one go. Cancelling
        the task leaves everything as it was.
        """
        self._check_range(iova, size)
        with self._told_of_unmap(iova, size) as done:
            done.append(await unmap_async(self.book, self._mappers, iova, size, timeout))
        return done[0]

    def _check_range(self, iova: int, size: int | None) -> None:
        self.check_open()
        if size is not None and not 0 < size <= (1 << 64) - iova:
            raise NotMappedError(
                f"a range of {size:#x} bytes at IOVA {iova:#x} cannot be unmapped",
                object=self._label,
                hint="a range has at least one byte and ends within the 64-bit space",
            )

    @contextmanager
    def _told_of_unmap(self, iova: int, size: int | None) -> Iterator[list[int]]:
        """Tell the observers of what the block does; it puts the number of bytes into the list."""
        facts: dict[str, object] = {"iova": iova, "size": size}
        done: list[int] = []
        self._tell("unmapping", facts)
        try:
            yield done
        except BaseException as error:
            self._tell("unmap", facts, error)
            raise
        self._tell("unmap", {**facts, "count": done[0]})

    def _unmap(self, directly: Callable[[], int], iova: int, size: int | None, timeout: float) -> int:
        if not self._observers:
            return self._unmap_now(directly, iova, size, timeout)
        with self._told_of_unmap(iova, size) as done:
            done.append(self._unmap_now(directly, iova, size, timeout))
        return done[0]

    def _unmap_now(self, directly: Callable[[], int], iova: int, size: int | None, timeout: float) -> int:
        try:
            if not self.book.is_stepwise():
                return directly()
        except StateError:
            if not self.book.is_stepwise():  # else a mapper in Python joined since we looked
                raise
        return self._mappers.unmap(iova, size, timeout)

    def unmap_all(self, *, timeout: float = 0.0) -> int:
        """Unmap everything; return the number of bytes."""
        self.check_open()
        return self._unmap(lambda: self.book.unmap_all(timeout), 0, 1 << 64, timeout)

    def allocate(
        self,
        shape: int | Sequence[int],
        dtype: DTypeLike = "u1",
        *,
        iova: int | None = None,
        prot: Prot = Prot.RW,
        limit: int = ANY_IOVA,
        alignment: int = 0,
        page_size: int = PAGE_SIZE,
        numa_node: int | None = None,
        order: Any = "C",
        transient: bool = False,
    ) -> DmaArray:
        """Allocate zeroed memory and map it: a numpy array with an ``.iova``.

        Args:
            shape: as for ``numpy.zeros``; an int is a number of *elements*.
            dtype: as for ``numpy.zeros``; bytes by default.
            iova, prot, limit, alignment: see :meth:`map`.
            page_size, numa_node: see :func:`vfiopy.dma.buffer.allocate_pages`.
            order: ``"C"`` or ``"F"``.
            transient: it will not live long: take its IOVA from the window for such, if there is one
                (``space.book.set_transient()``), so that it leaves no hole among those that stay.
        """
        if np.dtype(dtype).hasobject:
            raise MemoryKindError(
                "Python objects cannot live in memory that a device writes",
                object="allocate()",
                hint="use a dtype of numbers or bytes",
            )
        count = int(np.prod(shape, dtype=object))
        size = count * np.dtype(dtype).itemsize
        memory = self._pages(size, page_size, numa_node)
        # The array first: numpy refuses a bad shape, dtype or order, and then nothing is mapped.
        array = DmaArray.over(memory, shape, dtype, order)
        if transient:
            self.check_open()
            mapping = self._map_ready(memory, Prot(prot), iova, limit, alignment, transient=True)
        else:
            mapping = self.map(memory, iova=iova, prot=prot, limit=limit, alignment=alignment)
        self._allocations.add(array.adopt(mapping))
        return array

    def _pages(self, size: int, page_size: int, numa_node: int | None) -> HostMemory | FileMemory:
        if size > 0 and page_size == PAGE_SIZE and numa_node is None and self._mappers.in_python:
            drain_finalizers()
            memory = self._mappers.allocate(round_to_pages(size))
            if memory is not None:
                return memory
        return allocate_pages(size, page_size=page_size, numa_node=numa_node)

    def bounce(self, data: Buffer, *, prot: Prot = Prot.READ, limit: int = ANY_IOVA) -> DmaArray:
        """Copy ``data`` (any buffer, also ``bytes``) into a new DMA buffer of as many bytes.

        The explicit way for memory that cannot be mapped itself; with ``with`` it is unmapped at the end. Its IOVA
        comes from the window for transient buffers, see :meth:`allocate`.

        Raises:
            AlignmentError: there are no bytes.
        """
        view = memoryview(data).cast("B")
        if not view.nbytes:
            raise AlignmentError(
                "no bytes to copy: a DMA buffer has at least one", object="bounce()", hint="skip transfers of 0 bytes"
            )
        buffer = self.allocate(view.nbytes, prot=prot, limit=limit, transient=True)
        buffer[:] = view
        return buffer

    # --- looking -------------------------------------------------------------------------------------------------

    def find(self, iova: int) -> Mapping | None:
        """Return the mapping that contains ``iova``, or None."""
        self.check_open()
        found = self.book.find(iova)
        return None if found is None else self._handle_of(found)

    def mappings(self) -> list[Mapping]:
        """Return all mappings, by IOVA."""
        self.check_open()
        return [self._handle_of(found) for found in self.book.mappings()]

    def _handle_of(self, found: IovaMapping) -> Mapping:
        return Mapping(self, found.iova, found.size, found.address, found.prot, found.serial)

    def members(self) -> list[Member]:
        """Return the devices that are in it."""
        return self._mappers.members()

    def usable_ranges(self) -> list[IovaRange]:
        """Return the IOVA ranges that all mappers of the space can use."""
        return [IovaRange(*bounds) for bounds in self.book.usable()]

    def stats(self) -> dict[str, Any]:
        """Return counts and bytes: mapped, free, pinned, charged; see :meth:`vfiopy.iova.IovaSpace.stats`."""
        return self.book.stats()

    def text_map(self, width: int = 64) -> str:
        """Draw the space as text: ranges, reserved windows, mappings by kind, pins."""
        return self.book.text_map(width)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the same with matplotlib (extra ``plot``), into ``axes`` or a figure of its own."""
        return self.book.plot(axes)

    # --- end -----------------------------------------------------------------------------------------------------

    def close(self, *, timeout: float | None = 0.0, force: bool = False) -> None:
        """Close the devices, which turns their bus mastering off; tell the owners of pins; unmap everything.

        Args:
            timeout: seconds to wait for pins to go after their owners were told, None for ever.
            force: give up on pins that do not go. Each owner of such is named in a ResourceWarning, and the memory
                is never freed (see :func:`vfiopy.iova.leaked_memory`).

        Raises:
            PinnedError: owners of pins, whom it names, did not let go, and it was not to be forced. The devices are
                closed then; mappings and memory stay, and closing can be tried again.
        """
        self._patience = (timeout, force)
        super().close()

    def _release(self) -> None:
        for member in self._mappers.members():
            member.close()
        self._mappers.close()
        # Devices are gone and with them their mappers; what is left in the book is bookkeeping and memory.
        if self._mappers:
            raise StateError(f"{self._label} still has mappers: {[mapper.name for mapper in self._mappers]}")
        timeout, force = self._patience
        left = self.book.mappings() if self._observers else []
        if left:
            self._tell("unmapping", {"iova": 0, "size": 1 << 64})
        leaks = self.book.close(timeout=timeout, force=force)
        for gone in left:
            self._tell("unmap", {"iova": gone.iova, "size": None, "count": gone.size})
        for allocation in list(self._allocations):
            if leaks:
                allocation.abandon()  # its pins may be among those: the memory stays
            else:
                allocation.close()  # nothing is left to unmap; it only learns that it is over
        self._direct = False


def all_spaces() -> list[AddressSpace]:
    """Return the address spaces of this process that are open, in no order."""
    return [space for space in _all.copy() if space and space._pid == os.getpid()]
