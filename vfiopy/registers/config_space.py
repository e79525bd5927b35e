"""Configuration space as a register map: the header, and the capabilities that a device has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from vfiopy.device import ConfigSpace
from vfiopy.errors import RegisterNameError
from vfiopy.pci.capabilities import Msi
from vfiopy.pci.fields import Capability, ExtendedCapability
from vfiopy.registers.access import access_of
from vfiopy.registers.bound import Register, Registers
from vfiopy.registers.config_tables import BRIDGE, CAPABILITIES, EXTENDED, FUNCTION, Row
from vfiopy.registers.spec import FieldSpec, GroupSpec, MemberSpec, RegisterSpec

__all__ = ["config_name", "config_offset", "config_register", "config_registers", "hazard"]

_ALIASES: Final = {"pcie": "express", "exp": "express", "power": "pm", "ids": "subsystem"}
_PLACE: Final = re.compile(r"(?P<name>[a-z]\w*)\+(?P<more>0x[0-9a-f]+|\d+)")


def _fields(text: str) -> tuple[FieldSpec, ...]:
    found = []
    for word in text.split():
        place, _, names = word.partition("=")
        name, _, bits = place.partition(":")
        high, _, low = bits.partition("-")
        lowest = int(low or high)
        found.append(
            FieldSpec(
                name=name.lstrip("~"),
                low=lowest,
                width=int(high) - lowest + 1,
                on_write="woclr" if name.startswith("~") else None,
                names={value: one.replace("_", " ") for value, one in enumerate(names.split(","))} if names else {},
            )
        )
    return tuple(found)


def _specs(rows: Iterable[Row]) -> dict[str, MemberSpec]:
    return {name: RegisterSpec(name, at, size, size, _fields(fields)) for name, at, size, fields in rows}


def _msi(one: Msi) -> list[Row]:
    data = 12 if one.is_64bit else 8
    rows: list[Row] = [("address_high", 8, 4, "")] if one.is_64bit else []
    rows.append(("data", data, 2, ""))
    if one.maskable:
        rows += [("mask", data + 4, 4, ""), ("pending", data + 8, 4, "")]
    return rows


def _capabilities(config: ConfigSpace) -> list[Capability | ExtendedCapability]:
    return [*config.capabilities(), *config.extended_capabilities()]


def _number(one: Capability | ExtendedCapability) -> str:
    return f"ecap{one.id:04x}" if isinstance(one, ExtendedCapability) else f"cap{one.id:02x}"


def _group(one: Capability | ExtendedCapability, size: int) -> GroupSpec:
    known = EXTENDED if isinstance(one, ExtendedCapability) else CAPABILITIES
    name, rows = known.get(one.id, (_number(one), []))
    if isinstance(one, Msi):
        rows = rows + _msi(one)
    members = _specs(row for row in rows if one.offset + row[1] + row[2] <= size)
    last = max((member.offset + member.span for member in members.values()), default=4)
    return GroupSpec(name, one.offset, last, members, text=one.name)


def config_registers(config: ConfigSpace) -> Registers:
    """Make a map of what this device has: header registers by name, capabilities as groups.

    ``regs.command``, ``regs.msix.control``, ``regs.express.link_status``; a second capability of a kind has a 2 after
    its name. Reads the header's layout and the lists of capabilities, no more.
    """
    members = _specs(BRIDGE if config.read8(0x0E) & 0x7F == 1 else FUNCTION)
    for one in _capabilities(config):
        group = _group(one, config.size)
        name, number = group.name, 2
        while name in members:
            name, number = f"{group.name}{number}", number + 1
        members[name] = group
    return Registers(access_of(config), GroupSpec("config", 0, config.size, members))


def config_name(path: str) -> str:
    """Return a name as the map has it: in lower case, and capabilities by one word (``"PCIe"`` is ``"express"``)."""
    head, dot, rest = path.lower().partition(".")
    return f"{_ALIASES.get(head, head)}{dot}{rest}"


def config_register(config: ConfigSpace, path: str) -> Register:
    """Find one register by name: ``"command"``, ``"msix.control"``. Reads lists of capabilities only where it has to.

    Raises:
        RegisterNameError: there is none of this name, or the device does not have the capability.
    """
    name = config_name(path)
    header = _specs(FUNCTION)
    if name in header and name in _specs(BRIDGE):  # the same in both layouts
        found = Registers(access_of(config), GroupSpec("config", 0, config.size, header))[name]
    else:
        found = config_registers(config)[name]
    if not isinstance(found, Register):
        known = ", ".join(f"{path}.{member}" for member in found.spec.members) if isinstance(found, Registers) else ""
        raise RegisterNameError("it is a capability, not a register", object=path, hint=f"it has {known}")
    return found


def config_offset(config: ConfigSpace, text: str) -> int | None:
    """Return the offset that ``"msix+2"``, ``"cap09+4"`` or ``"ecap0023+8"`` means; None for what is not of this form.

    Raises:
        RegisterNameError: the device does not have this capability.
    """
    match = _PLACE.fullmatch(text.lower())
    if match is None:
        return None
    name = _ALIASES.get(match["name"], match["name"])
    names = []
    for one in _capabilities(config):
        group = _group(one, config.size).name
        if name in (_number(one), group):
            return one.offset + int(match["more"], 0)
        names.append(group)
    raise RegisterNameError(
        f"it has no capability '{match['name']}'", object=config.name, hint=f"it has {', '.join(names)}"
    )


# offset from the start of the header or capability → what writing there does
_HEADER_HAZARDS: Final = (
    (0x04, 0x06, "the command register switches memory decode, bus mastering and INTx"),
    (0x0F, 0x10, "BIST starts a self-test of the device"),
    (0x10, 0x28, "a BAR says where the device's registers are"),
    (0x30, 0x34, "the ROM's BAR says where it is"),
)
_CAPABILITY_HAZARDS: Final = {
    0x01: (0x04, 0x06, "the power state goes with it: in D3hot the device has no registers, and may forget everything"),
    0x05: (0x02, 0x18, "MSI is set up by the kernel: device.irqs.msi"),
    0x10: (0x08, 0x34, "it has the bit that resets the function, the link's and the requests' settings"),
    0x11: (0x02, 0x0C, "MSI-X is set up by the kernel: device.irqs.msix"),
    0x13: (0x04, 0x05, "it has the bit that resets the function"),
}
_EXTENDED_HAZARDS: Final = {
    0x0D: "ACS decides who is isolated from whom",
    0x0F: "the IOMMU has to know of ATS",
    0x10: "SR-IOV is the kernel's: sriov_numvfs in sysfs",
    0x13: "the IOMMU has to know of PRI",
    0x15: "a resized BAR may lie over another one",
    0x1B: "the IOMMU has to know of PASIDs",
    0x1E: "a wrong power setting can take the link down",
}


def hazard(config: ConfigSpace, offset: int, size: int) -> str | None:
    """Say why a write of ``size`` bytes at ``offset`` may do harm, or None where nothing is known against it."""
    end = offset + size
    if offset < 0x40:
        if end > 0x18 and config.read8(0x0E) & 0x7F == 1 and (offset < 0x34 or end > 0x3E):
            return "it is a bridge: what is behind it goes by these registers"
        return next((why for first, last, why in _HEADER_HAZARDS if offset < last and end > first), None)
    for one in config.capabilities():
        first, last, why = _CAPABILITY_HAZARDS.get(one.id, (0, 0, ""))
        if why and offset < one.offset + last and end > one.offset + first:
            return why
    beginnings = sorted(config.extended_capabilities(), key=lambda one: one.offset) if offset >= 0x100 else []
    for extended in reversed(beginnings):
        if end > extended.offset:
            return _EXTENDED_HAZARDS.get(extended.id)
    return None
