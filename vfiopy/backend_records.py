"""The plain records of the seam: numbers, descriptions of regions and interrupts, kinds of memory.

Take them from :mod:`vfiopy.backend`, which hands them out together with the protocols that speak in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import NamedTuple, TypeAlias

from vfiopy._native import HostMemory  # one is made for every buffer that is mapped

__all__ = [
    "Area",
    "DeviceInfo",
    "DeviceWindow",
    "Doorbell",
    "FileMemory",
    "HostMemory",
    "IovaRange",
    "IrqAction",
    "IrqFlag",
    "IrqIndex",
    "IrqInfo",
    "KernelTarget",
    "MapperTraits",
    "Memory",
    "MemoryKind",
    "Prot",
    "RegionFlag",
    "RegionIndex",
    "RegionInfo",
    "RemoteMemory",
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
"""What can be mapped."""


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


class Doorbell(NamedTuple):
    """A register whose writes may be told by an eventfd: who writes it says "look again", and nothing more.

    Attributes:
        offset, size: of the register in its region, bytes.
        value: the only value that counts, or None where any does.
    """

    offset: int
    size: int
    value: int | None = None
