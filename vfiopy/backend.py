"""The seam: what a device, its address space and an emulated device's host look like, whoever stands behind.

Three packages implement it: :mod:`vfiopy.kernel` (VFIO and iommufd), :mod:`vfiopy.emulated` (a Python object) and
:mod:`vfiopy.vfio_user` (a socket). :mod:`vfiopy.device` and :mod:`vfiopy.dma` are written against this file alone.

Index numbers and flag bits are those of linux/vfio.h, because every backend speaks VFIO's model of a device. The
records that the protocols speak in live in :mod:`vfiopy.backend_records`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vfiopy.backend_records import (
    Area,
    DeviceInfo,
    DeviceWindow,
    Doorbell,
    FileMemory,
    HostMemory,
    IovaRange,
    IrqAction,
    IrqFlag,
    IrqIndex,
    IrqInfo,
    KernelTarget,
    MapperTraits,
    Memory,
    MemoryKind,
    Prot,
    RegionFlag,
    RegionIndex,
    RegionInfo,
    RemoteMemory,
    region_name,
)

if TYPE_CHECKING:
    from vfiopy.iova import IovaSpace
    from vfiopy.signals import MemorySignals

__all__ = [
    "Adviser",
    "Area",
    "BarPort",
    "BookReader",
    "BurstIo",
    "Copier",
    "DeviceInfo",
    "DeviceIo",
    "DeviceWindow",
    "Doorbell",
    "DoorbellIo",
    "FileMemory",
    "FileRegions",
    "Host",
    "HostMemory",
    "IovaRange",
    "IrqAction",
    "IrqFlag",
    "IrqIndex",
    "IrqInfo",
    "KernelTarget",
    "Mapper",
    "MapperTraits",
    "Memory",
    "MemoryKind",
    "MemorySource",
    "MigrationStream",
    "Placer",
    "Prot",
    "RegionFlag",
    "RegionIndex",
    "RegionInfo",
    "RemoteMemory",
    "TellingIo",
    "Window",
    "region_name",
]


class Window(Protocol):
    """A part of a region that is mapped into this process."""

    @property
    def address(self) -> int:
        """Virtual address of the first byte."""

    @property
    def size(self) -> int:
        """Size in bytes."""

    def close(self) -> None:
        """Unmap. Idempotent."""


@runtime_checkable
class DeviceIo(Protocol):
    """A way to reach one device. Methods raise :class:`vfiopy.errors.VfioError`; none of them is a hot path."""

    @property
    def name(self) -> str:
        """What the user calls the device: ``"0000:00:05.0"``, ``"emulated:edu"``."""

    @property
    def backend(self) -> str:
        """The way it is reached: ``"iommufd"``, ``"type1v2"``, ``"emulated"``, ..."""

    def info(self) -> DeviceInfo:
        """Describe the device."""

    def region_info(self, index: int) -> RegionInfo:
        """Describe a region; size 0 where it does not exist."""

    def irq_info(self, index: int) -> IrqInfo:
        """Describe an interrupt index; count 0 where it has no vector."""

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Read bytes from a region. An aligned read of 1, 2, 4 or 8 bytes is one access of that width."""

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write bytes to a region. An aligned write of 1, 2, 4 or 8 bytes is one access of that width."""

    def map_region(self, index: int, offset: int, size: int) -> Window:
        """Map a part of a region; raises NotSupportedError where it cannot be."""

    def set_irqs(
        self,
        index: int,
        action: IrqAction,
        start: int,
        count: int,
        *,
        fds: Sequence[int] | None = None,
        bools: Sequence[bool] | None = None,
    ) -> None:
        """VFIO_DEVICE_SET_IRQS. With neither ``fds`` nor ``bools``: DATA_NONE; TRIGGER with count 0 disables the index.

        An fd of -1 takes one vector's eventfd away.
        """

    def reset(self) -> None:
        """Reset the function."""

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        """VFIO_DEVICE_FEATURE: ``operation`` is GET, SET or PROBE as in linux/vfio.h; returns the payload."""

    def close(self) -> None:
        """Let the device go. Idempotent."""


@runtime_checkable
class TellingIo(Protocol):
    """A device that tells when the memory of its BARs goes away, which only those that can be a peer's target do."""

    @property
    def signals(self) -> MemorySignals:
        """Where it tells."""


@runtime_checkable
class BarPort(Protocol):
    """Which region of which device a :class:`vfiopy.mmio.Region` is: its ``slow`` attribute."""

    @property
    def io(self) -> DeviceIo:
        """The device."""

    @property
    def index(self) -> int:
        """The region's index."""


class Mapper(Protocol):
    """A way for memory to reach a device. One address space may have several."""

    @property
    def name(self) -> str:
        """For messages: ``"IOAS 1 of /dev/iommu"``."""

    @property
    def kernel_target(self) -> KernelTarget | None:
        """Set where native code can do the mapping by itself; ``map`` and ``unmap`` are then not called."""

    @property
    def adopted(self) -> bool:
        """Made from somebody else's fd: closing it does not take our mappings away."""

    def traits(self) -> MapperTraits:
        """Describe the mapper; asked again after each device that joins or leaves."""

    def ranges(self) -> list[IovaRange]:
        """Usable IOVA ranges, sorted and disjoint; asked again after each device that joins or leaves."""

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        """Make memory reachable at ``iova``; all of it or, when it raises, nothing.

        Must raise where something is mapped there already: after an interrupted ``unmap`` it is asked to be sure.
        """

    def unmap(self, iova: int, size: int) -> int:
        """Undo one ``map``; return the number of bytes unmapped.

        Must raise where there is no such mapping: after an interrupted ``map`` it is asked to be sure.
        """

    def close(self) -> None:
        """Let go; everything is unmapped. Idempotent."""


@runtime_checkable
class BookReader(Protocol):
    """A mapper that needs no map calls, because its device looks into the book by itself."""

    def attach_book(self, book: IovaSpace) -> None:
        """Say which book; called once, when the first device of the mapper joins a space."""


@runtime_checkable
class MemorySource(Protocol):
    """A mapper that does best with memory of its own making."""

    def allocate(self, size: int) -> FileMemory | None:
        """Make zeroed memory of so many whole pages; its ``owner`` has ``__array_interface__``. None to decline."""


@runtime_checkable
class FileRegions(Protocol):
    """A ``DeviceIo`` whose regions, where they can be mapped, are files that another process may map as well."""

    def region_file(self, index: int) -> tuple[int, int]:
        """Return an fd, which stays the device's, and where in the file the region begins, bytes.

        Raises NotSupportedError where there is none.
        """


@runtime_checkable
class BurstIo(Protocol):
    """A ``DeviceIo`` that does many writes of registers by less than one call each."""

    def write_burst(self, index: int, offset: int, width: int, step: int, data: bytes) -> None:
        """Write one register after another: ``width`` bytes of ``data`` at ``offset``, the next ``step`` bytes on.

        Each is one access, in this order; with a ``step`` of 0 all go to the same register.
        """


@runtime_checkable
class DoorbellIo(Protocol):
    """A ``DeviceIo`` with doorbells."""

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        """Return those of a region."""


@runtime_checkable
class MigrationStream(Protocol):
    """A ``DeviceIo`` whose migration data come by calls, and not through an fd (VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE).

    The states are moved by ``feature`` as everywhere.
    """

    def migration_read(self, size: int) -> bytes:
        """Return the next bytes of the device's state; fewer than asked for where there are no more now."""

    def migration_write(self, data: bytes) -> None:
        """Take the next bytes of a device's state."""


@runtime_checkable
class Placer(Protocol):
    """A mapper under which memory has one IOVA only, so that nobody can choose (no IOMMU: the physical address)."""

    def place(self, memory: Memory) -> int:
        """Return that IOVA; raises MemoryKindError where this memory cannot be used at all."""


@runtime_checkable
class Adviser(Protocol):
    """A mapper that does best where memory has a certain IOVA, and takes any other."""

    def advise(self, memory: Memory, limit: int) -> int | None:
        """Return that IOVA, where there is one up to ``limit``, the last that may be used."""


@runtime_checkable
class Copier(Protocol):
    """A mapper that can share a mapping of another one (IOMMU_IOAS_COPY)."""

    def can_copy_from(self, source: Mapper) -> bool:
        """Whether the two have enough in common."""

    def copy_from(self, source: Mapper, source_iova: int, size: int, prot: Prot, iova: int) -> None:
        """Map at ``iova`` what is mapped there; all of it or, when it raises, nothing."""


class Host(Protocol):
    """What a device that is itself software sees of the machine that it sits in."""

    def access(self, iova: int, size: int, prot: Prot) -> AbstractContextManager[list[memoryview]]:
        """Pin a range for the length of a ``with`` block and yield views of it, in order.

        Raises NotMappedError where the IOMMU would fault; the fault is recorded.
        """

    def read(self, iova: int, size: int) -> bytes:
        """DMA read: memory to device."""

    def write(self, iova: int, data: bytes) -> None:
        """DMA write: device to memory."""

    def trigger(self, index: IrqIndex, vector: int = 0) -> None:
        """Send an MSI or MSI-X message, or assert INTx."""

    def deassert(self) -> None:
        """Take INTx back."""

    def on_unmap(self, callback: Callable[[int, int], None]) -> None:
        """Have ``callback(iova, size)`` called before a mapping goes that this device holds pins in."""
