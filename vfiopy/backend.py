"""The seam: what a device, its address space and an emulated device's host look like, whoever stands behind.

Three packages implement it: :mod:`vfiopy.kernel` (VFIO and iommufd), :mod:`vfiopy.emulated` (a Python object) and
:mod:`vfiopy.vfio_user` (a socket). :mod:`vfiopy.device` and :mod:`vfiopy.dma` are written against this file alone.

Index numbers and flag bits are those of linux/vfio.h, because every backend speaks VFIO's model of a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias, runtime_checkable

from vfiopy._native import HostMemory  # one is made for every buffer that is mapped

if TYPE_CHECKING:
    from vfiopy.iova import IovaSpace
    from vfiopy.signals import MemorySignals

__all__ = [
    "Area",
    "BarPort",
    "BookReader",
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


class Prot(IntFlag):
    """What a *device* may do with mapped memory."""

    READ = 1
    WRITE = 2
    RW = 3


class RegionIndex(IntEnum):
    """VFIO_PCI_*_REGION_INDEX."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


def region_name(index: int) -> str:
    """Return what messages call a region: ``"BAR 2"``, ``"config space"``, ``"region 9"``."""
    if index <= RegionIndex.BAR5:
        return f"BAR {index}"
    names: dict[int, str] = {RegionIndex.ROM: "ROM", RegionIndex.CONFIG: "config space", RegionIndex.VGA: "VGA"}
    return names.get(index, f"region {index}")


class RegionFlag(IntFlag):
    """VFIO_REGION_INFO_FLAG_*, without the one that only says that capabilities follow."""

    READ = 1
    WRITE = 2
    MMAP = 4


class IrqIndex(IntEnum):
    """VFIO_PCI_*_IRQ_INDEX."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqFlag(IntFlag):
    """VFIO_IRQ_INFO_*."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


class IrqAction(IntFlag):
    """VFIO_IRQ_SET_ACTION_*."""

    MASK = 8
    UNMASK = 16
    TRIGGER = 32


class Area(NamedTuple):
    """A part of a region: offset from the region's start and size, both in bytes."""

    offset: int
    size: int


class IovaRange(NamedTuple):
    """A range of IOVAs, both ends included: the last page of the 64-bit space has no end that fits in 64 bits."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What VFIO_DEVICE_GET_INFO says.

    Attributes:
        num_regions: number of region indexes; an index may still be absent (size 0).
        num_irqs: number of interrupt indexes; an index may still have no vector.
        can_reset: the device has a function reset.
        is_pci: the device is a PCI function.
        atomics: completer widths in bytes that the path to the root supports (VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP).
    """

    num_regions: int
    num_irqs: int
    can_reset: bool
    is_pci: bool = True
    atomics: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """What VFIO_DEVICE_GET_REGION_INFO says, capabilities decoded.

    Attributes:
        index: region index.
        size: bytes; 0 means that the region does not exist.
        flags: what is possible with it.
        offset: where it begins in the device fd (0 where there is no fd).
        sparse: the only areas that may be mapped, or None where all of it may.
        msix_mappable: the pages that hold the MSI-X table may be mapped too.
        type: (type, subtype) of a device-specific region, or None.
    """

    index: int
    size: int
    flags: RegionFlag
    offset: int = 0
    sparse: tuple[Area, ...] | None = None
    msix_mappable: bool = False
    type: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class IrqInfo:
    """What VFIO_DEVICE_GET_IRQ_INFO says: ``count`` is the number of vectors."""

    index: int
    count: int
    flags: IrqFlag


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


class MemoryKind(IntEnum):
    """Kinds of memory that a mapper may or may not take."""

    HOST = 0
    FILE = 1
    MMIO = 2
    REMOTE = 3


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class FileMemory:
    """A range of a memfd (or another file that the kernel can map by fd), wherever or whether it is mapped here.

    Attributes:
        fd: file descriptor; must stay open for as long as it is mapped.
        offset: bytes from the start of the file.
        size: bytes.
        writable: the device may be allowed to write it.
        address: where this process has it mapped, or 0.
        owner: kept alive for as long as it is mapped.
    """

    fd: int
    offset: int
    size: int
    writable: bool
    address: int
    owner: object
    kind = MemoryKind.FILE


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class DeviceWindow:
    """A range of a device's BAR, as the target of another device's DMA.

    Attributes:
        region: region index at its device, or -1 where the dma-buf came from elsewhere.
        offset: bytes from the region's start, or from the dma-buf's where the region is not known.
        size: bytes.
        dmabuf_fd: the dma-buf that stands for it, or -1.
        address: where this process has it mapped, or 0 (only type1 and devices that are software need it).
        owner: the device or dma-buf object, kept alive for as long as it is mapped.
        dmabuf_offset: where the window begins in the dma-buf, bytes.
        physical: bus address of the first byte, or 0 where it is not known.
    """

    region: int
    offset: int
    size: int
    dmabuf_fd: int
    address: int
    owner: object
    dmabuf_offset: int = 0
    physical: int = 0
    writable = True
    kind = MemoryKind.MMIO


class RemoteMemory:
    """Memory that this process has not mapped: whoever has it is asked for each access.

    Attributes:
        size: bytes.
        writable: the device may be allowed to write it.
    """

    kind = MemoryKind.REMOTE
    address = 0
    owner: object = None

    def __init__(self, size: int, writable: bool) -> None:
        self.size = size
        self.writable = writable

    def read(self, offset: int, size: int) -> bytes | bytearray:
        """Read bytes; raises VfioError where nobody answers. A subclass implements it."""
        raise NotImplementedError

    def write(self, offset: int, data: bytes | bytearray) -> None:
        """Write bytes; raises VfioError where nobody answers. A subclass implements it."""
        raise NotImplementedError


Memory: TypeAlias = HostMemory | FileMemory | DeviceWindow | RemoteMemory


class KernelTarget(NamedTuple):
    """Where native code sends a map: mapper kind (``vfiopy.iova.MAPPER_*``), fd, and the IOAS id under iommufd."""

    kind: int
    fd: int
    object_id: int


@dataclass(frozen=True, slots=True)
class MapperTraits:
    """What a mapper can do.

    Attributes:
        page_sizes: bit n set means that pages of 2**n bytes can be used; the lowest is the alignment of everything.
        max_mappings: how many mappings it takes, 0 for no known limit.
        memory: the kinds of memory that it takes.
        dmabufs: it takes device memory as a dma-buf, and does not need an address in this process for it.
    """

    page_sizes: int
    max_mappings: int
    memory: frozenset[MemoryKind]
    dmabufs: bool = False


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


class Doorbell(NamedTuple):
    """A register whose writes may be told by an eventfd: who writes it says "look again", and nothing more.

    Attributes:
        offset, size: of the register in its region, bytes.
        value: the only value that counts, or None where any does.
    """

    offset: int
    size: int
    value: int | None = None


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
