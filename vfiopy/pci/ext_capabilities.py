"""Extended capabilities of a PCI Express function, decoded. Pure: works over anything that reads
configuration space.

Layouts: PCI Express Base 6.0 (section at each class); numbers as in linux/pci_regs.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfiopy.pci.aer import AdvancedErrorReporting, decode_aer
from vfiopy.pci.capabilities import walk_capabilities
from vfiopy.pci.capability_names import EXTENDED_CAPABILITY_NAMES
from vfiopy.pci.fields import Body, ExtendedCapability, Read, bits
from vfiopy.pci.sriov import SrIov, decode_sriov
from vfiopy.pci.translation import (
    AddressTranslation,
    PageRequest,
    ProcessAddressSpace,
    decode_ats,
    decode_pasid,
    decode_pri,
)

__all__ = [
    "AccessControl",
    "AddressTranslation",
    "AdvancedErrorReporting",
    "AlternativeRoutingId",
    "DesignatedVendorSpecific",
    "ExtendedCapability",
    "L1Substates",
    "LatencyTolerance",
    "PageRequest",
    "ProcessAddressSpace",
    "ResizableBar",
    "ResizableBars",
    "SerialNumber",
    "SrIov",
    "VendorSpecificExtended",
    "walk_extended",
]

_FIRST = 0x100
_END = 0x1000
_PCI_X = 0x07
_EXPRESS = 0x10


@dataclass(frozen=True, slots=True)
class SerialNumber(ExtendedCapability):
    """Device serial number (7.9.3).

    Attributes:
        serial: 64-bit EUI.
    """

    serial: int

    def __str__(self) -> str:
        return self.serial.to_bytes(8, "big").hex("-")


def _serial(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    return SerialNumber(id_, body.offset, version, name, serial=body.u32(8) << 32 | body.u32(4))


@dataclass(frozen=True, slots=True)
class VendorSpecificExtended(ExtendedCapability):
    """Vendor-specific extended registers (7.9.5).

    Attributes:
        vsec_id: the vendor's number for it.
        revision: the vendor's revision of it.
        length: bytes, headers included.
    """

    vsec_id: int
    revision: int
    length: int


def _vsec(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    head = body.u32(4)
    return VendorSpecificExtended(
        id_,
        body.offset,
        version,
        name,
        vsec_id=bits(head, 15, 0),
        revision=bits(head, 19, 16),
        length=bits(head, 31, 20),
    )


@dataclass(frozen=True, slots=True)
class DesignatedVendorSpecific(ExtendedCapability):
    """Registers that a vendor defined for others' devices too, such as CXL's (7.9.6).

    Attributes:
        vendor: vendor ID of who defined it.
        dvsec_id: that vendor's number for it.
        revision: revision of it.
        length: bytes, headers included.
    """

    vendor: int
    dvsec_id: int
    revision: int
    length: int


def _dvsec(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    head = body.u32(4)
    return DesignatedVendorSpecific(
        id_,
        body.offset,
        version,
        name,
        vendor=bits(head, 15, 0),
        dvsec_id=body.u16(8),
        revision=bits(head, 19, 16),
        length=bits(head, 31, 20),
    )


_ACS_SERVICES = (
    "source validation",
    "translation blocking",
    "request redirect",
    "completion redirect",
    "upstream forwarding",
    "egress control",
    "direct translated",
)


@dataclass(frozen=True, slots=True)
class AccessControl(ExtendedCapability):
    """Access control services (PCI Express Base 5.0, 7.7.8): what makes IOMMU groups small.

    Attributes:
        supported: services that the function has.
        enabled: services that are on.
        isolates: the four services that the kernel wants of a port for devices behind it to have groups of
            their own (source validation, request redirect, completion redirect, upstream forwarding) are on.
    """

    supported: tuple[str, ...]
    enabled: tuple[str, ...]

    @property
    def isolates(self) -> bool:
        """The services that keep devices behind this port apart are on."""
        wanted = ("source validation", "request redirect", "completion redirect", "upstream forwarding")
        return all(service in self.enabled for service in wanted)


def _acs(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    def names(register: int) -> tuple[str, ...]:
        return tuple(service for bit, service in enumerate(_ACS_SERVICES) if register & 1 << bit)

    return AccessControl(id_, body.offset, version, name, supported=names(body.u16(4)), enabled=names(body.u16(6)))


@dataclass(frozen=True, slots=True)
class AlternativeRoutingId(ExtendedCapability):
    """Alternative routing-ID interpretation (7.8.8).

    Attributes:
        next_function: function number of the next function of the device, 0 at the last.
        function_group: the group that the function is in.
    """

    next_function: int
    function_group: int


def _ari(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    return AlternativeRoutingId(
        id_,
        body.offset,
        version,
        name,
        next_function=bits(body.u16(4), 15, 8),
        function_group=bits(body.u16(6), 6, 4),
    )


@dataclass(frozen=True, slots=True)
class LatencyTolerance(ExtendedCapability):
    """Latency tolerance reporting (7.8.2).

    Attributes:
        max_snoop_ns: most latency that the function may report for snooped requests, in ns.
        max_no_snoop_ns: the same for requests without snoop.
    """

    max_snoop_ns: int
    max_no_snoop_ns: int


def _ltr(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    def nanoseconds(register: int) -> int:
        return bits(register, 9, 0) << 5 * bits(register, 12, 10)

    return LatencyTolerance(
        id_,
        body.offset,
        version,
        name,
        max_snoop_ns=nanoseconds(body.u16(4)),
        max_no_snoop_ns=nanoseconds(body.u16(6)),
    )


@dataclass(frozen=True, slots=True)
class L1Substates(ExtendedCapability):
    """L1 power management substates (7.8.3).

    Attributes:
        supported: of ``"PCI-PM L1.2"``, ``"PCI-PM L1.1"``, ``"ASPM L1.2"``, ``"ASPM L1.1"``.
        enabled: those that are on.
    """

    supported: tuple[str, ...]
    enabled: tuple[str, ...]


def _l1ss(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    def names(register: int) -> tuple[str, ...]:
        states = ("PCI-PM L1.2", "PCI-PM L1.1", "ASPM L1.2", "ASPM L1.1")
        return tuple(state for bit, state in enumerate(states) if register & 1 << bit)

    features = body.u32(4)
    return L1Substates(
        id_,
        body.offset,
        version,
        name,
        supported=names(features) if features & 1 << 4 else (),
        enabled=names(body.u32(8)),
    )


@dataclass(frozen=True, slots=True)
class ResizableBar:
    """One BAR whose size can be chosen.

    Attributes:
        bar: BAR index.
        size: size now, in bytes.
        sizes: sizes that it can take, in bytes.
    """

    bar: int
    size: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResizableBars(ExtendedCapability):
    """Resizable BARs (7.8.6), or those of virtual functions (7.8.7; ID 0x0024).

    Attributes:
        bars: one entry for each resizable BAR.
    """

    bars: tuple[ResizableBar, ...]


def _rebar(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    # The first entry's control register says how many entries there are.
    count = min(bits(body.u32(8), 7, 5), 6)
    entries = []
    for index in range(count):
        sizes, control = body.u32(4 + 8 * index), body.u32(8 + 8 * index)
        possible = bits(control, 31, 16) << 28 | bits(sizes, 31, 4)
        entries.append(
            ResizableBar(
                bar=bits(control, 2, 0),
                size=1 << 20 + bits(control, 13, 8),
                sizes=tuple(1 << 20 + bit for bit in range(44) if possible & 1 << bit),
            )
        )
    return ResizableBars(id_, body.offset, version, name, bars=tuple(entries))


_DECODERS: dict[int, Callable[[Body, int, int, str], ExtendedCapability]] = {
    0x0001: decode_aer,
    0x0003: _serial,
    0x000B: _vsec,
    0x000D: _acs,
    0x000E: _ari,
    0x000F: decode_ats,
    0x0010: decode_sriov,
    0x0013: decode_pri,
    0x0015: _rebar,
    0x0018: _ltr,
    0x001B: decode_pasid,
    0x001E: _l1ss,
    0x0023: _dvsec,
    0x0024: _rebar,
}


def walk_extended(read: Read) -> list[ExtendedCapability]:
    """Follow the list of extended capabilities and decode each one, in list order.

    Only PCI Express and PCI-X functions have one, so a conventional function is not read above its 256 bytes.
    A list that loops or points below 0x100 ends there.

    Args:
        read: ``read(offset, size)`` over configuration space; may return less where the space ends.
    """
    if not any(capability.id in (_EXPRESS, _PCI_X) for capability in walk_capabilities(read)):
        return []
    offset = _FIRST
    found: list[ExtendedCapability] = []
    seen: set[int] = set()
    while offset >= _FIRST and offset not in seen:
        seen.add(offset)
        head = read(offset, 4)
        value = int.from_bytes(head, "little")
        if len(head) < 4 or value in (0, 0xFFFF_FFFF):
            break
        id_, version, following = bits(value, 15, 0), bits(value, 19, 16), bits(value, 31, 20)
        name = EXTENDED_CAPABILITY_NAMES.get(id_, f"unknown ({id_:#06x})")
        body = Body(read, offset, _END)
        decoder = _DECODERS.get(id_)
        if decoder:
            found.append(decoder(body, id_, version, name))
        elif id_:  # a null capability only carries a pointer
            found.append(ExtendedCapability(id_, offset, version, name))
        offset = following & ~3
    return found
