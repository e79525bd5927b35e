"""Standard PCI capabilities that an emulated device can declare: bytes, and which bits software may write.

Register layouts: PCI Express Base 6.0, 7.5.2 (power management), 7.5.3 (PCI Express), 7.7.1 (MSI), 7.7.2 (MSI-X),
7.9.4 (vendor-specific).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

__all__ = [
    "CapabilityDeclaration",
    "CapabilityLayout",
    "Msi",
    "MsiX",
    "PciExpress",
    "PowerManagement",
    "VendorSpecific",
]


class CapabilityLayout(NamedTuple):
    """A capability as configuration space holds it, from its id byte on.

    Attributes:
        data: value after reset; the first two bytes (id, next pointer) are filled in by the configuration space.
        writable: bits that software may write.
        clearable: bits that a written 1 clears (RW1C).
    """

    data: bytes
    writable: bytes
    clearable: bytes


class CapabilityDeclaration(Protocol):
    """What a device lists in ``PciDevice.capabilities``."""

    id: ClassVar[int]

    def layout(self) -> CapabilityLayout:
        """Return the bytes."""


def _pack(
    form: str, data: tuple[int, ...], writable: tuple[int, ...], clearable: tuple[int, ...] = ()
) -> CapabilityLayout:
    """Lay out the registers behind the two common bytes."""
    empty = tuple(0 for _ in data)
    return CapabilityLayout(
        *(bytes(2) + struct.pack("<" + form, *values) for values in (data, writable, clearable or empty))
    )


@dataclass(frozen=True, slots=True)
class PowerManagement:
    """Power management, states D0 and D3hot."""

    id: ClassVar[int] = 0x01

    # offsets and bits that the configuration space looks at
    CONTROL: ClassVar[int] = 4
    STATE_MASK: ClassVar[int] = 0x3
    D0: ClassVar[int] = 0
    D3HOT: ClassVar[int] = 3

    def layout(self) -> CapabilityLayout:
        """Version 3, no D1, no D2, no PME; No_Soft_Reset: registers survive D3hot."""
        return _pack("HHH", (0x0003, 1 << 3, 0), (0, self.STATE_MASK, 0))


@dataclass(frozen=True, slots=True)
class Msi:
    """MSI.

    Attributes:
        vectors: 1, 2, 4, 8, 16 or 32.
        address64: the message address has 64 bits.
        per_vector_mask: it has mask and pending bits.
    """

    id: ClassVar[int] = 0x05
    CONTROL: ClassVar[int] = 2
    ENABLE: ClassVar[int] = 1 << 0

    vectors: int = 1
    address64: bool = True
    per_vector_mask: bool = False

    def __post_init__(self) -> None:
        if self.vectors not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"MSI has 1, 2, 4, 8, 16 or 32 vectors, not {self.vectors}")

    def layout(self) -> CapabilityLayout:
        """Control, message address, data, and what else was asked for."""
        form = "HI"
        data = [(self.vectors.bit_length() - 1) << 1 | self.address64 << 7 | self.per_vector_mask << 8, 0]
        writable = [self.ENABLE | 0x70, 0xFFFF_FFFC]
        if self.address64:
            form += "I"
            data.append(0)
            writable.append(0xFFFF_FFFF)
        form += "H"
        data.append(0)
        writable.append(0xFFFF)
        if self.per_vector_mask:
            form += "HII"  # the reserved half of the data register, mask bits, pending bits
            data += [0, 0, 0]
            writable += [0, (1 << self.vectors) - 1, 0]
        return _pack(form, tuple(data), tuple(writable))


@dataclass(frozen=True, slots=True)
class MsiX:
    """MSI-X.

    Attributes:
        vectors: 1 to 2048.
        table_bar, table_offset: where the table of ``16 * vectors`` bytes lies; the offset is a multiple of 8.
        pba_bar, pba_offset: where the pending bits lie.
    """

    id: ClassVar[int] = 0x11
    CONTROL: ClassVar[int] = 2
    ENABLE: ClassVar[int] = 1 << 15

    vectors: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int

    def __post_init__(self) -> None:
        if not 1 <= self.vectors <= 2048:
            raise ValueError(f"MSI-X has 1 to 2048 vectors, not {self.vectors}")
        for what, offset in (("table", self.table_offset), ("pending bits", self.pba_offset)):
            if offset % 8:
                raise ValueError(f"the offset of the MSI-X {what} is a multiple of 8, not {offset:#x}")

    @property
    def table_size(self) -> int:
        """Bytes of the table."""
        return 16 * self.vectors

    @property
    def pba_size(self) -> int:
        """Bytes of the pending bit array, whole quadwords."""
        return (self.vectors + 63) // 64 * 8

    def layout(self) -> CapabilityLayout:
        """Control, table and pending bit array."""
        return _pack(
            "HII",
            (self.vectors - 1, self.table_offset | self.table_bar, self.pba_offset | self.pba_bar),
            (self.ENABLE | 1 << 14, 0, 0),
        )


@dataclass(frozen=True, slots=True)
class PciExpress:
    """PCI Express, a root complex integrated endpoint: it has no link, and so no link registers.

    Attributes:
        function_reset: the function has FLR.
    """

    id: ClassVar[int] = 0x10
    DEVICE_CONTROL: ClassVar[int] = 8
    INITIATE_RESET: ClassVar[int] = 1 << 15

    function_reset: bool = False

    def layout(self) -> CapabilityLayout:
        """Version 2, type 9; role-based error reporting, 128-byte payloads."""
        capabilities = 1 << 15 | self.function_reset << 28
        control = 0x2810  # after reset: relaxed ordering, no snoop, 512-byte read requests
        writable = 0x781F | (self.INITIATE_RESET if self.function_reset else 0)
        rest = (0,) * 12  # no link, no slot, no root; nothing in the second device registers
        return _pack(
            "HIHH12I",
            (0x0092, capabilities, control, 0, *rest),
            (0, 0, writable, 0, *rest),
            (0, 0, 0, 0xF, *rest),
        )


@dataclass(frozen=True, slots=True)
class VendorSpecific:
    """A vendor-specific capability.

    Attributes:
        data: what follows the length byte.
        writable: bits of it that software may write; as long as ``data``, or empty for none.
    """

    id: ClassVar[int] = 0x09

    data: bytes
    writable: bytes = b""

    def __post_init__(self) -> None:
        if self.writable and len(self.writable) != len(self.data):
            raise ValueError(f"{len(self.writable)} bytes of write mask for {len(self.data)} bytes of data")
        if len(self.data) > 0xC0 - 3:
            raise ValueError(f"{len(self.data)} bytes do not fit into conventional configuration space")

    def layout(self) -> CapabilityLayout:
        """Length and data."""
        size = 3 + len(self.data)
        head = bytes((0, 0, size))
        return CapabilityLayout(head + self.data, bytes(3) + (self.writable or bytes(len(self.data))), bytes(size))
