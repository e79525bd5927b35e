"""Standard capabilities of a PCI function, decoded. Pure: works over anything that reads configuration space.

Layouts: PCI Express Base 6.0 (section at each class), PCI Local Bus 3.0, PCI Power Management 1.2; numbers as
in linux/pci_regs.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfiopy.pci.capability_names import CAPABILITY_NAMES
from vfiopy.pci.express import PciExpress, decode_express
from vfiopy.pci.fields import Body, Capability, Read, bits

__all__ = [
    "AdvancedFeatures",
    "Capability",
    "Msi",
    "MsiX",
    "PciExpress",
    "PowerManagement",
    "SubsystemId",
    "VendorSpecific",
    "VitalProductData",
    "walk_capabilities",
]

_STATUS = 0x06
_STATUS_CAPABILITIES = 1 << 4
_HEADER_TYPE = 0x0E
_POINTER = 0x34
_POINTER_CARDBUS = 0x14
_FIRST = 0x40
_END = 0x100


@dataclass(frozen=True, slots=True)
class PowerManagement(Capability):
    """Power management (PCI Express Base 6.0, 7.5.2).

    Attributes:
        version: of the power management interface.
        d1: the function supports D1.
        d2: the function supports D2.
        pme_states: power states that PME can be sent from: 0 D0 ... 3 D3hot, 4 D3cold.
        state: power state now: 0 to 3.
        no_soft_reset: D3hot to D0 keeps the function's state; where False it resets the function.
        pme_enable: PME is on.
        pme_status: a PME is pending.
    """

    version: int
    d1: bool
    d2: bool
    pme_states: tuple[int, ...]
    state: int
    no_soft_reset: bool
    pme_enable: bool
    pme_status: bool


def _power(body: Body, id_: int, name: str) -> Capability:
    pmc, pmcsr = body.u16(2), body.u16(4)
    return PowerManagement(
        id_,
        body.offset,
        name,
        version=bits(pmc, 2, 0),
        d1=bool(pmc & 1 << 9),
        d2=bool(pmc & 1 << 10),
        pme_states=tuple(state for state in range(5) if pmc & 1 << 11 + state),
        state=bits(pmcsr, 1, 0),
        no_soft_reset=bool(pmcsr & 1 << 3),
        pme_enable=bool(pmcsr & 1 << 8),
        pme_status=bool(pmcsr & 1 << 15),
    )


@dataclass(frozen=True, slots=True)
class VitalProductData(Capability):
    """Vital product data is there (PCI Express Base 6.0, 7.9.18); not read, as reading it takes writes."""


def _vpd(body: Body, id_: int, name: str) -> Capability:
    return VitalProductData(id_, body.offset, name)


@dataclass(frozen=True, slots=True)
class Msi(Capability):
    """Message-signalled interrupts (PCI Express Base 6.0, 7.7.1).

    Attributes:
        enabled: MSI is on.
        vectors: how many messages the function can send, 1 to 32.
        vectors_enabled: how many are allocated.
        is_64bit: the address has 64 bits.
        maskable: each vector can be masked.
        extended_data: the function can send 32 bits of data.
        address: where messages are written to.
        data: what is written for vector 0.
        mask: bit per vector; None where vectors cannot be masked.
        pending: bit per vector; None where vectors cannot be masked.
    """

    enabled: bool
    vectors: int
    vectors_enabled: int
    is_64bit: bool
    maskable: bool
    extended_data: bool
    address: int
    data: int
    mask: int | None
    pending: int | None


def _msi(body: Body, id_: int, name: str) -> Capability:
    control = body.u16(2)
    is_64bit = bool(control & 1 << 7)
    maskable = bool(control & 1 << 8)
    data_at = 12 if is_64bit else 8
    high = body.u32(8) if is_64bit else 0
    return Msi(
        id_,
        body.offset,
        name,
        enabled=bool(control & 1),
        vectors=1 << bits(control, 3, 1),
        vectors_enabled=1 << bits(control, 6, 4),
        is_64bit=is_64bit,
        maskable=maskable,
        extended_data=bool(control & 1 << 9),
        address=high << 32 | body.u32(4),
        data=body.u16(data_at),
        mask=body.u32(data_at + 4) if maskable else None,
        pending=body.u32(data_at + 8) if maskable else None,
    )


@dataclass(frozen=True, slots=True)
class VendorSpecific(Capability):
    """Vendor-specific registers (PCI Express Base 6.0, 7.9.4).

    Attributes:
        length: bytes, ID and pointer included.
        data: all of it.
    """

    length: int
    data: bytes


def _vendor(body: Body, id_: int, name: str) -> Capability:
    length = body.u8(2)
    return VendorSpecific(id_, body.offset, name, length=length, data=body.bytes(0, length))


@dataclass(frozen=True, slots=True)
class SubsystemId(Capability):
    """A bridge's subsystem IDs (PCI Express Base 6.0, 7.9.23).

    Attributes:
        vendor: subsystem vendor ID.
        device: subsystem ID.
    """

    vendor: int
    device: int


def _subsystem(body: Body, id_: int, name: str) -> Capability:
    return SubsystemId(id_, body.offset, name, vendor=body.u16(4), device=body.u16(6))


@dataclass(frozen=True, slots=True)
class MsiX(Capability):
    """MSI-X (PCI Express Base 6.0, 7.7.2).

    Attributes:
        enabled: MSI-X is on.
        masked: the whole function is masked.
        table_size: number of vectors; each takes 16 bytes of the table.
        table_bar: BAR that holds the table.
        table_offset: bytes from that BAR's start.
        pba_bar: BAR that holds the pending bits.
        pba_offset: bytes from that BAR's start.
    """

    enabled: bool
    masked: bool
    table_size: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int


def _msix(body: Body, id_: int, name: str) -> Capability:
    control, table, pba = body.u16(2), body.u32(4), body.u32(8)
    return MsiX(
        id_,
        body.offset,
        name,
        enabled=bool(control & 1 << 15),
        masked=bool(control & 1 << 14),
        table_size=bits(control, 10, 0) + 1,
        table_bar=bits(table, 2, 0),
        table_offset=table & ~7,
        pba_bar=bits(pba, 2, 0),
        pba_offset=pba & ~7,
    )


@dataclass(frozen=True, slots=True)
class AdvancedFeatures(Capability):
    """What a conventional function took over from PCI Express (PCI Express Base 6.0, 7.9.21).

    Attributes:
        flr: the function has a function level reset.
        transactions_pending_support: the status bit below means something.
        transactions_pending: the function waits for completions.
    """

    flr: bool
    transactions_pending_support: bool
    transactions_pending: bool


def _advanced(body: Body, id_: int, name: str) -> Capability:
    features = body.u8(3)
    return AdvancedFeatures(
        id_,
        body.offset,
        name,
        flr=bool(features & 2),
        transactions_pending_support=bool(features & 1),
        transactions_pending=bool(body.u8(5) & 1),
    )


_DECODERS: dict[int, Callable[[Body, int, str], Capability]] = {
    0x01: _power,
    0x03: _vpd,
    0x05: _msi,
    0x09: _vendor,
    0x0D: _subsystem,
    0x10: decode_express,
    0x11: _msix,
    0x13: _advanced,
}


def walk_capabilities(read: Read) -> list[Capability]:
    """Follow the list of standard capabilities and decode each one, in list order.

    A list that loops or points into the header ends there, as does one of a function that answers all ones.

    Args:
        read: ``read(offset, size)`` over configuration space; may return less where the space ends.
    """
    top = Body(read, 0, _END)
    status = top.u16(_STATUS)
    if status == 0xFFFF or not status & _STATUS_CAPABILITIES:
        return []
    cardbus = bits(top.u8(_HEADER_TYPE), 6, 0) == 2
    offset = top.u8(_POINTER_CARDBUS if cardbus else _POINTER) & ~3
    found: list[Capability] = []
    seen: set[int] = set()
    while offset >= _FIRST and offset not in seen:
        seen.add(offset)
        head = read(offset, 2)
        if len(head) < 2 or head[0] == 0xFF:
            break
        id_, following = head
        name = CAPABILITY_NAMES.get(id_, f"unknown ({id_:#04x})")
        decoder = _DECODERS.get(id_)
        body = Body(read, offset, _END)
        found.append(decoder(body, id_, name) if decoder else Capability(id_, offset, name))
        offset = following & ~3
    return found
