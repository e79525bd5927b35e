"""Capabilities of functions that have addresses translated for themselves: ATS, PRI and PASID.

Layouts: PCI Express Base 6.0 (section at each class).
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiopy.pci.fields import Body, ExtendedCapability, bits

__all__ = [
    "AddressTranslation",
    "PageRequest",
    "ProcessAddressSpace",
    "decode_ats",
    "decode_pasid",
    "decode_pri",
]


@dataclass(frozen=True, slots=True)
class AddressTranslation(ExtendedCapability):
    """Address translation services (10.5.1).

    Attributes:
        queue_depth: invalidations that the function takes before it holds the sender up.
        page_aligned: translation requests are page aligned.
        enabled: the function may ask for translations.
        smallest_unit: smallest translation in bytes.
    """

    queue_depth: int
    page_aligned: bool
    enabled: bool
    smallest_unit: int


def decode_ats(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    """Decode the capability that starts at ``body``."""
    features, control = body.u16(4), body.u16(6)
    return AddressTranslation(
        id_,
        body.offset,
        version,
        name,
        queue_depth=bits(features, 4, 0) or 32,
        page_aligned=bool(features & 1 << 5),
        enabled=bool(control & 1 << 15),
        smallest_unit=4096 << bits(control, 4, 0),
    )


@dataclass(frozen=True, slots=True)
class PageRequest(ExtendedCapability):
    """Page request interface (10.5.2).

    Attributes:
        enabled: the function may send page requests.
        stopped: no page request is outstanding after the function was told to stop.
        failed: a response was a failure.
        unexpected_group: a response named a group that was not asked for.
        pasid_required: responses carry a PASID.
        capacity: outstanding requests that the function can have.
        allocated: outstanding requests that it may have.
    """

    enabled: bool
    stopped: bool
    failed: bool
    unexpected_group: bool
    pasid_required: bool
    capacity: int
    allocated: int


def decode_pri(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    """Decode the capability that starts at ``body``."""
    status = body.u16(6)
    return PageRequest(
        id_,
        body.offset,
        version,
        name,
        enabled=bool(body.u16(4) & 1),
        stopped=bool(status & 1 << 8),
        failed=bool(status & 1),
        unexpected_group=bool(status & 2),
        pasid_required=bool(status & 1 << 15),
        capacity=body.u32(8),
        allocated=body.u32(12),
    )


@dataclass(frozen=True, slots=True)
class ProcessAddressSpace(ExtendedCapability):
    """Process address space ID (7.8.9).

    Attributes:
        width: bits of a PASID that the function supports.
        execute: it can ask for execute permission.
        privileged: it has a privileged mode.
        enabled: it may send PASIDs.
    """

    width: int
    execute: bool
    privileged: bool
    enabled: bool


def decode_pasid(body: Body, id_: int, version: int, name: str) -> ExtendedCapability:
    """Decode the capability that starts at ``body``."""
    features = body.u16(4)
    return ProcessAddressSpace(
        id_,
        body.offset,
        version,
        name,
        width=bits(features, 12, 8),
        execute=bool(features & 2),
        privileged=bool(features & 4),
        enabled=bool(body.u16(6) & 1),
    )
