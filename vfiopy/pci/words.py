"""Decoded capabilities in words, as a person reads them. Pure: reads nothing."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from functools import singledispatch

from vfiopy.pci.capabilities import (
    AdvancedFeatures,
    Msi,
    MsiX,
    PciExpress,
    PowerManagement,
    SubsystemId,
)
from vfiopy.pci.ext_capabilities import (
    AccessControl,
    AddressTranslation,
    L1Substates,
    ProcessAddressSpace,
    ResizableBars,
    SerialNumber,
)
from vfiopy.pci.fields import Capability, ExtendedCapability
from vfiopy.pci.sriov import SrIov

__all__ = ["capability_words", "size_words"]

_POWER = ("D0", "D1", "D2", "D3hot", "D3cold")


def size_words(size: int) -> str:
    """A number of bytes with the largest unit that divides it: ``"64 KiB"``."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size and not size & ((1 << shift) - 1):
            return f"{size >> shift} {unit}"
    return f"{size} bytes"


def _on(enabled: bool) -> str:
    return "on" if enabled else "off"


@singledispatch
def capability_words(capability: Capability | ExtendedCapability) -> list[str]:
    """What a capability says, a short phrase each; empty for one that is not decoded."""
    base = ExtendedCapability if isinstance(capability, ExtendedCapability) else Capability
    known = {one.name for one in fields(base)}
    found = []
    for one in fields(capability):
        value = getattr(capability, one.name)
        name = one.name.replace("_", " ")
        if one.name in known or value is False or value is None or value == ():
            continue
        if value is True:
            found.append(name)
        elif isinstance(value, bytes):
            found.append(f"{name}: {value.hex(' ')}")
        elif isinstance(value, tuple):
            found.append(f"{name}: {', '.join(map(str, value))}")
        elif isinstance(value, int) and not isinstance(value, Enum):
            found.append(f"{name}: {value:#x}")
        else:
            found.append(f"{name}: {value}")
    return found


@capability_words.register
def _power(capability: PowerManagement) -> list[str]:
    states = ["D0", *(["D1"] if capability.d1 else []), *(["D2"] if capability.d2 else []), "D3hot"]
    found = [f"now in {_POWER[capability.state]}", f"has {', '.join(states)}"]
    if capability.pme_states:
        found.append(f"PME from {', '.join(_POWER[state] for state in capability.pme_states)}")
    found.append("keeps its state in D3hot" if capability.no_soft_reset else "D3hot resets it")
    return found


@capability_words.register
def _msi(capability: Msi) -> list[str]:
    found = [_on(capability.enabled), f"{capability.vectors} vectors"]
    if capability.enabled:
        found.append(f"{capability.vectors_enabled} allocated")
    found.append("64-bit address" if capability.is_64bit else "32-bit address")
    found.append("each vector can be masked" if capability.maskable else "vectors cannot be masked")
    return found


@capability_words.register
def _msix(capability: MsiX) -> list[str]:
    return [
        _on(capability.enabled),
        *(["all masked"] if capability.masked else []),
        f"{capability.table_size} vectors",
        f"table in BAR{capability.table_bar} at {capability.table_offset:#x}",
        f"pending bits in BAR{capability.pba_bar} at {capability.pba_offset:#x}",
    ]


@capability_words.register
def _express(capability: PciExpress) -> list[str]:
    kind = capability.port_type
    found = [kind.name.lower().replace("_", " ") if isinstance(kind, Enum) else f"port type {kind}"]
    if capability.has_link:
        found.append(
            f"link {capability.link_speed} GT/s x{capability.link_width}"
            f" of {capability.max_link_speed} GT/s x{capability.max_link_width}"
        )
    found.append(f"payload {capability.max_payload} of {capability.max_payload_supported} bytes")
    found.append(f"read requests up to {capability.max_read_request} bytes")
    found.append("function level reset" if capability.flr else "no function level reset")
    if capability.aspm_enabled:
        found.append(f"ASPM {', '.join(capability.aspm_enabled)}")
    if capability.error_status:
        found.append(f"errors seen: {', '.join(capability.error_status)}")
    return found


@capability_words.register
def _advanced(capability: AdvancedFeatures) -> list[str]:
    return ["function level reset" if capability.flr else "no function level reset"]


@capability_words.register
def _subsystem(capability: SubsystemId) -> list[str]:
    return [f"subsystem {capability.vendor:04x}:{capability.device:04x}"]


@capability_words.register
def _serial(capability: SerialNumber) -> list[str]:
    return [str(capability)]


@capability_words.register(AccessControl)
@capability_words.register(L1Substates)
def _services(capability: AccessControl | L1Substates) -> list[str]:
    return [
        f"can: {', '.join(capability.supported) or 'nothing'}",
        f"on: {', '.join(capability.enabled) or 'nothing'}",
    ]


@capability_words.register
def _sriov(capability: SrIov) -> list[str]:
    return [
        _on(capability.enabled),
        f"{capability.num_vfs} of {capability.total_vfs} VFs",
        f"VF device {capability.vf_device:04x}",
        f"first VF {capability.first_offset} after it, then every {capability.stride}",
    ]


@capability_words.register
def _ats(capability: AddressTranslation) -> list[str]:
    return [_on(capability.enabled), f"{capability.queue_depth} invalidations queued"]


@capability_words.register
def _pasid(capability: ProcessAddressSpace) -> list[str]:
    return [_on(capability.enabled), f"{capability.width} bits"]


@capability_words.register
def _rebar(capability: ResizableBars) -> list[str]:
    return [
        f"BAR{one.bar}: {size_words(one.size)}, can be {', '.join(map(size_words, one.sizes))}"
        for one in capability.bars
    ]
