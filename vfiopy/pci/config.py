"""Configuration space as a whole: the header decoded, and the capabilities that follow it.

Pure: works over any ``read(offset, size) -> bytes``, be it sysfs, VFIO or an emulated device. The live
register access is :class:`vfiopy.device.ConfigSpace`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from typing import TypeVar

from vfiopy.pci.capabilities import walk_capabilities
from vfiopy.pci.ext_capabilities import walk_extended
from vfiopy.pci.fields import Body, Capability, ExtendedCapability, Read, bits

__all__ = ["Bar", "BridgeHeader", "Command", "Decoded", "Header", "Status", "decode", "decode_header"]


class Command(IntFlag):
    """Command register (PCI Express Base 6.0, 7.5.1.1.3)."""

    IO = 1 << 0
    MEMORY = 1 << 1
    BUS_MASTER = 1 << 2
    SPECIAL_CYCLES = 1 << 3
    WRITE_INVALIDATE = 1 << 4
    VGA_SNOOP = 1 << 5
    PARITY = 1 << 6
    SERR = 1 << 8
    FAST_BACK_TO_BACK = 1 << 9
    INTX_DISABLE = 1 << 10


class Status(IntFlag):
    """Status register (PCI Express Base 6.0, 7.5.1.1.4)."""

    IMMEDIATE_READINESS = 1 << 0
    INTERRUPT = 1 << 3
    CAPABILITIES = 1 << 4
    MHZ_66 = 1 << 5
    FAST_BACK_TO_BACK = 1 << 7
    MASTER_PARITY_ERROR = 1 << 8
    SIGNALED_TARGET_ABORT = 1 << 11
    RECEIVED_TARGET_ABORT = 1 << 12
    RECEIVED_MASTER_ABORT = 1 << 13
    SIGNALED_SYSTEM_ERROR = 1 << 14
    PARITY_ERROR = 1 << 15


@dataclass(frozen=True, slots=True)
class Bar:
    """A base address register as it reads (7.5.1.2.1). Its size takes writes to find out; sysfs and VFIO know
    it.

    Attributes:
        index: number of the (first) register, 0 to 5.
        address: the address in it.
        is_io: I/O ports rather than memory.
        is_64bit: it takes the next register too.
        prefetchable: reads have no side effects.
    """

    index: int
    address: int
    is_io: bool
    is_64bit: bool
    prefetchable: bool


@dataclass(frozen=True, slots=True)
class BridgeHeader:
    """What a type 1 header has instead of a type 0 header's registers (7.5.1.3).

    Attributes:
        primary_bus: bus that the bridge sits on.
        secondary_bus: bus behind it.
        subordinate_bus: highest bus behind it.
        io: first and last I/O port that is forwarded, or None.
        memory: first and last memory address that is forwarded, or None.
        prefetchable: the same for prefetchable memory.
        control: bridge control register.
    """

    primary_bus: int
    secondary_bus: int
    subordinate_bus: int
    io: tuple[int, int] | None
    memory: tuple[int, int] | None
    prefetchable: tuple[int, int] | None
    control: int


@dataclass(frozen=True, slots=True)
class Header:
    """The first 64 bytes of configuration space.

    Attributes:
        vendor: vendor ID.
        device: device ID.
        command: command register.
        status: status register.
        revision: revision ID.
        class_code: 24 bits: base class, sub-class, programming interface.
        cache_line: cache line size in bytes; 0 where it is not set.
        type: 0 for a function, 1 for a PCI-to-PCI bridge, 2 for a CardBus bridge.
        multifunction: the device has more functions.
        bars: the base address registers that are not zero: up to 6 of type 0, up to 2 of type 1.
        subsystem_vendor: subsystem vendor ID, type 0 only (a bridge has a capability for it).
        subsystem_device: subsystem ID, type 0 only.
        rom_address: address of the expansion ROM.
        rom_enabled: the expansion ROM decodes.
        interrupt_pin: 0 none, 1 INTA ... 4 INTD.
        interrupt_line: what firmware wrote there.
        bridge: the registers of a type 1 header.
    """

    vendor: int
    device: int
    command: Command
    status: Status
    revision: int
    class_code: int
    cache_line: int
    type: int
    multifunction: bool
    bars: tuple[Bar, ...]
    subsystem_vendor: int
    subsystem_device: int
    rom_address: int
    rom_enabled: bool
    interrupt_pin: int
    interrupt_line: int
    bridge: BridgeHeader | None


def _bars(top: Body, count: int) -> tuple[Bar, ...]:
    found: list[Bar] = []
    index = 0
    while index < count:
        value = top.u32(0x10 + 4 * index)
        is_io = bool(value & 1)
        is_64bit = not is_io and bits(value, 2, 1) == 2 and index + 1 < count
        if value:
            high = top.u32(0x14 + 4 * index) if is_64bit else 0
            found.append(
                Bar(
                    index=index,
                    address=value & ~3 if is_io else high << 32 | value & ~0xF,
                    is_io=is_io,
                    is_64bit=is_64bit,
                    prefetchable=not is_io and bool(value & 8),
                )
            )
        index += 2 if is_64bit else 1
    return tuple(found)


def _window(first: int, last: int) -> tuple[int, int] | None:
    return (first, last) if first <= last and last else None


def _bridge(top: Body) -> BridgeHeader:
    io_base, io_limit = top.u8(0x1C), top.u8(0x1D)
    io_high = (top.u16(0x30), top.u16(0x32)) if bits(io_base, 3, 0) == 1 else (0, 0)
    base, limit = top.u16(0x24), top.u16(0x26)
    high = (top.u32(0x28), top.u32(0x2C)) if bits(base, 3, 0) == 1 else (0, 0)
    return BridgeHeader(
        primary_bus=top.u8(0x18),
        secondary_bus=top.u8(0x19),
        subordinate_bus=top.u8(0x1A),
        io=_window(
            io_high[0] << 16 | bits(io_base, 7, 4) << 12,
            io_high[1] << 16 | bits(io_limit, 7, 4) << 12 | 0xFFF,
        ),
        memory=_window(
            bits(top.u16(0x20), 15, 4) << 20,
            bits(top.u16(0x22), 15, 4) << 20 | 0xF_FFFF,
        ),
        prefetchable=_window(
            high[0] << 32 | bits(base, 15, 4) << 20,
            high[1] << 32 | bits(limit, 15, 4) << 20 | 0xF_FFFF,
        ),
        control=top.u16(0x3E),
    )


def decode_header(read: Read) -> Header:
    """Decode the first 64 bytes of configuration space (PCI Express Base 6.0, 7.5.1)."""
    data = read(0, 64)
    top = Body(lambda offset, size: data[offset : offset + size], 0, 64)
    kind = bits(top.u8(0x0E), 6, 0)
    rom = top.u32({0: 0x30, 1: 0x38}[kind]) if kind in (0, 1) else 0
    class_revision = top.u32(0x08)
    return Header(
        vendor=top.u16(0x00),
        device=top.u16(0x02),
        command=Command(top.u16(0x04)),
        status=Status(top.u16(0x06)),
        revision=bits(class_revision, 7, 0),
        class_code=bits(class_revision, 31, 8),
        cache_line=top.u8(0x0C) * 4,
        type=kind,
        multifunction=bool(top.u8(0x0E) & 0x80),
        bars=_bars(top, {0: 6, 1: 2}.get(kind, 0)),
        subsystem_vendor=top.u16(0x2C) if kind == 0 else 0,
        subsystem_device=top.u16(0x2E) if kind == 0 else 0,
        rom_address=rom & ~0x7FF,
        rom_enabled=bool(rom & 1),
        interrupt_pin=top.u8(0x3D),
        interrupt_line=top.u8(0x3C),
        bridge=_bridge(top) if kind == 1 else None,
    )


_C = TypeVar("_C", bound=Capability | ExtendedCapability)


@dataclass(frozen=True, slots=True)
class Decoded:
    """Configuration space at one moment.

    Attributes:
        header: the first 64 bytes.
        capabilities: standard capabilities in list order.
        extended: extended capabilities in list order.
    """

    header: Header
    capabilities: tuple[Capability, ...]
    extended: tuple[ExtendedCapability, ...]

    def find(self, kind: type[_C]) -> _C | None:
        """The first capability of a class, such as :class:`~vfiopy.pci.capabilities.MsiX`, or None."""
        for capability in (*self.capabilities, *self.extended):
            if isinstance(capability, kind):
                return capability
        return None


def decode(read: Read) -> Decoded:
    """Decode header and capabilities.

    Args:
        read: ``read(offset, size)`` over configuration space; may return less where the space ends.
    """
    return Decoded(
        header=decode_header(read),
        capabilities=tuple(walk_capabilities(read)),
        extended=tuple(walk_extended(read)),
    )
