"""The machine around an emulated device in this process: its memory through the book, its interrupts as eventfds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from vfiopy.backend import (
    FileMemory,
    HostMemory,
    IovaRange,
    IrqIndex,
    KernelTarget,
    MapperTraits,
    Memory,
    MemoryKind,
    Prot,
    RemoteMemory,
)
from vfiopy.emulated.dirty_log import DirtyLog
from vfiopy.emulated.irqs import IrqTable
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.emulated.records import Fault
from vfiopy.errors import NotMappedError, VfioError
from vfiopy.memory_view import LostMemoryError, view_of

if TYPE_CHECKING:
    from vfiopy.iova import IovaSpace

__all__ = ["EmulatedHost", "EmulatedMapper"]

# What a PC with an Intel vIOMMU in QEMU has: 48 bits but for the window of the local APICs (seen in the lab).
_RANGES = (IovaRange(0, 0xFEDF_FFFF), IovaRange(0xFEF0_0000, (1 << 48) - 1))
_PAGE_SIZES = 1 << 12 | 1 << 21 | 1 << 30


class EmulatedMapper:
    """The mapper of an emulated device: there is nothing to map, the device looks into the book of its space.

    Implements :class:`vfiopy.backend.BookReader`.
    """

    adopted = False

    def __init__(self, name: str) -> None:
        self._name = f"book of {name}"
        self.book: IovaSpace | None = None
        self._on_book: list[Callable[[IovaSpace | None], None]] = []

    @property
    def name(self) -> str:
        """For messages."""
        return self._name

    @property
    def kernel_target(self) -> KernelTarget | None:
        """None: no kernel is involved."""
        return None

    def traits(self) -> MapperTraits:
        """Pages as of an x86 IOMMU, any number of mappings, any memory."""
        return MapperTraits(_PAGE_SIZES, 0, frozenset(MemoryKind))

    def ranges(self) -> list[IovaRange]:
        """Usable IOVA ranges."""
        return list(_RANGES)

    def attach_book(self, book: IovaSpace) -> None:
        """Take the book of the space that the device joins."""
        self.book = book
        for callback in self._on_book:
            callback(book)

    def on_book(self, callback: Callable[[IovaSpace | None], None]) -> None:
        """Have ``callback`` called with the book when there is one, and with None when it is taken away."""
        self._on_book.append(callback)
        if self.book is not None:
            callback(self.book)

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        """Nothing to do."""

    def unmap(self, iova: int, size: int) -> int:  # noqa: ARG002
        """Nothing to do."""
        return size

    def close(self) -> None:
        """Let the book go. Idempotent."""
        if self.book is not None:
            self.book = None
            for callback in self._on_book:
                callback(None)
        self._on_book.clear()  # they keep the device alive


class EmulatedHost:
    """What the device sees: implements :class:`vfiopy.backend.Host`.

    DMA is a copy between Python objects and the memory that the book names, which is pinned meanwhile: an unmap waits
    for it or is refused, so that no memory goes away under a copy.

    Threads: any.

    Attributes:
        log: which pages were written, once it is started.
    """

    def __init__(self, device: PciDevice, mapper: EmulatedMapper, irqs: IrqTable) -> None:
        self._device = device
        self._irqs = irqs
        self._book: IovaSpace | None = None
        self._owner = 0
        self._callbacks: list[Callable[[int, int], None]] = []
        self.log = DirtyLog(f"emulated:{device.name}")
        mapper.on_book(self._use_book)

    def _use_book(self, book: IovaSpace | None) -> None:
        if self._book is not None:
            self._book.remove_owner(self._owner)
        self._book = book
        if book is not None:
            self._owner = book.add_owner(f"emulated:{self._device.name}", self._unmapping)

    def _unmapping(self, iova: int, size: int) -> None:
        for callback in self._callbacks:
            callback(iova, size)

    def on_unmap(self, callback: Callable[[int, int], None]) -> None:
        """Have ``callback(iova, size)`` called before a mapping goes that this device holds pins in."""
        self._callbacks.append(callback)

    # --- DMA -----------------------------------------------------------------------------------------------------

    def access(self, iova: int, size: int, prot: Prot) -> AbstractContextManager[list[memoryview]]:
        """Pin a range for the length of a ``with`` block and yield views of it, in order; read-only without WRITE.

        The views end with the block. Do nothing slow inside it.

        Raises:
            NotMappedError: (from the ``with``) not all of it is mapped with this protection; the device's ``faults``
                has it.
        """
        return _Access(self, iova, size, prot)

    def plain(self, iova: int, size: int, prot: Prot) -> tuple[IovaSpace, int, memoryview] | None:
        """Pin a range that is one piece of this process's memory, and return book, owner and a view; else None.

        Raises:
            NotMappedError: as :meth:`access` does.
        """
        book, owner = self._book, self._owner
        if book is None or not size or iova + size > 1 << 64:
            return None
        try:
            book.pin(iova, size, prot, owner, peer=True)
        except VfioError as error:
            raise self._fault(iova, size, prot, error.meaning) from error
        try:
            found = book.check(iova, size, prot)
            if len(found) == 1:
                address, length, memory = found[0]
                if isinstance(memory, HostMemory) or (isinstance(memory, FileMemory) and memory.address):
                    view = memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
                    return book, owner, view if Prot.WRITE in prot else view.toreadonly()
        except BaseException:
            book.unpin(iova, size, owner)
            raise
        book.unpin(iova, size, owner)
        return None

    @contextmanager
    def pieces(self, iova: int, size: int, prot: Prot) -> Iterator[list[memoryview]]:
        """Do what :meth:`access` does, whatever the memory is and however many pieces it has."""
        book = self._book
        if book is None:
            raise self._fault(iova, size, prot, "the device is in no address space")
        if not size:
            yield []
            return
        if iova + size > 1 << 64:
            raise self._fault(iova, size, prot, "the range reaches beyond the 64-bit address space")
        try:
            with ExitStack() as stack:
                try:
                    book.pin(iova, size, prot, self._owner, peer=True)
                    stack.callback(book.unpin, iova, size, self._owner)
                    views = [
                        stack.enter_context(view_of(address, length, self._patient(memory), prot))
                        for address, length, memory in book.check(iova, size, prot)
                    ]
                except VfioError as error:
                    # Not mapped, not so, going away, a BAR that nobody mapped: to an IOMMU it is all the same.
                    raise self._fault(iova, size, prot, error.meaning) from error
                try:
                    yield views
                finally:
                    if Prot.WRITE in prot:  # whatever of it was written
                        self.log.note(iova, size)
        except LostMemoryError as error:
            raise self._fault(iova, size, prot, error.meaning) from error

    def _patient(self, memory: object) -> object:
        """Have the device serve its registers while somebody else is asked for memory."""
        return _Patient(memory, self._device) if isinstance(memory, RemoteMemory) else memory

    def _fault(self, iova: int, size: int, prot: Prot, reason: str) -> NotMappedError:
        self._device.record_fault(Fault(iova, size, Prot.WRITE in prot, reason))
        return NotMappedError(
            f"DMA of {size:#x} bytes at IOVA {iova:#x} faults: {reason}",
            object=f"emulated:{self._device.name}",
        )

    def read(self, iova: int, size: int) -> bytes:
        """DMA read: memory to device; raises as :meth:`access` does."""
        with self.access(iova, size, Prot.READ) as views:
            return b"".join(views)

    def write(self, iova: int, data: bytes) -> None:
        """DMA write: device to memory; raises as :meth:`access` does, and then has written nothing."""
        with self.access(iova, len(data), Prot.WRITE) as views:
            done = 0
            for view in views:
                view[:] = data[done : done + len(view)]
                done += len(view)

    # --- interrupts ----------------------------------------------------------------------------------------------

    def trigger(self, index: IrqIndex, vector: int = 0) -> None:
        """Send an MSI or MSI-X message, or assert INTx."""
        self._irqs.trigger(index, vector)

    def deassert(self) -> None:
        """Take INTx back."""
        self._irqs.deassert()


class _Access:
    """What :meth:`EmulatedHost.access` returns. Written out, for each DMA of each device comes through here."""

    __slots__ = ("_found", "_host", "_range", "_slowly")

    def __init__(self, host: EmulatedHost, iova: int, size: int, prot: Prot) -> None:
        self._host = host
        self._range = iova, size, prot
        self._found: tuple[IovaSpace, int, memoryview] | None = None
        self._slowly: AbstractContextManager[list[memoryview]] | None = None

    def __enter__(self) -> list[memoryview]:
        self._found = self._host.plain(*self._range)
        if self._found is not None:
            return [self._found[2]]
        self._slowly = self._host.pieces(*self._range)
        return self._slowly.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._found is None:
            return self._slowly.__exit__(kind, error, trace) if self._slowly is not None else None
        book, owner, view = self._found
        iova, size, _ = self._range
        try:
            if not view.readonly:  # whatever of it was written
                self._host.log.note(iova, size)
            view.release()
        finally:
            book.unpin(iova, size, owner)
        return None


class _Patient(RemoteMemory):
    """Remote memory, asked for without the device's lock: who has the memory may want a register first."""

    def __init__(self, memory: RemoteMemory, device: PciDevice) -> None:
        super().__init__(memory.size, memory.writable)
        self._memory = memory
        self._device = device

    def read(self, offset: int, size: int) -> bytes | bytearray:
        with self._device.waiting():
            return self._memory.read(offset, size)

    def write(self, offset: int, data: bytes | bytearray) -> None:
        with self._device.waiting():
            self._memory.write(offset, data)
