"""What sysfs says about the IOMMU in front of a function: its hardware, its group's domain, reserved addresses."""

from __future__ import annotations

from dataclasses import dataclass

from vfiopy.pci.fields import bits
from vfiopy.pci.function import Function

__all__ = ["IommuHardware", "ReservedRegion", "iommu_hardware", "reserved_regions"]


@dataclass(frozen=True, slots=True)
class ReservedRegion:
    """IOVAs that cannot be mapped (Documentation/ABI/testing/sysfs-kernel-iommu_groups).

    Attributes:
        first: first address.
        last: last address, included.
        kind: ``direct`` (firmware needs it mapped one to one), ``direct-relaxable``, ``reserved`` or ``msi``.
    """

    first: int
    last: int
    kind: str


def reserved_regions(function: Function) -> tuple[ReservedRegion, ...]:
    """The reserved regions of a function's IOMMU group, ascending."""
    text = function.system.text(function.sysfs / "iommu_group/reserved_regions") or ""
    lines = (line.split() for line in text.splitlines())
    return tuple(ReservedRegion(int(words[0], 16), int(words[1], 16), words[2]) for words in lines if len(words) == 3)


@dataclass(frozen=True, slots=True)
class IommuHardware:
    """One IOMMU of the machine.

    Attributes:
        name: as in /sys/class/iommu, such as ``dmar0``.
        domain: type of the group's default domain (``DMA``, ``DMA-FQ``, ``identity``, ``blocked``), None where the
            kernel does not say.
        address_bits: width of the addresses that it translates; None where sysfs does not say (only VT-d does).
        page_sizes: sizes in bytes that it maps with one entry; empty where sysfs does not say.
        interrupt_remapping: it can remap interrupts; None where sysfs does not say.
        snoop_control: it can enforce cache coherency; None where sysfs does not say.
    """

    name: str | None
    domain: str | None
    address_bits: int | None = None
    page_sizes: tuple[int, ...] = ()
    interrupt_remapping: bool | None = None
    snoop_control: bool | None = None


def iommu_hardware(function: Function) -> IommuHardware | None:
    """The IOMMU that translates for a function; None where it has no IOMMU group."""
    if function.iommu_group is None:
        return None
    system = function.system
    name = system.link_name(function.sysfs / "iommu")
    domain = system.text(function.sysfs / "iommu_group/type")
    cap, ecap = (system.text(function.sysfs / "iommu/intel-iommu" / word) for word in ("cap", "ecap"))
    if not cap or not ecap:
        return IommuHardware(name, domain)
    # VT-d specification 4.1, 11.4.2 (MGAW, SLLPS) and 11.4.3 (IR, SC); the files have no 0x
    capability, extended = int(cap, 16), int(ecap, 16)
    large = bits(capability, 35, 34)
    return IommuHardware(
        name,
        domain,
        address_bits=bits(capability, 21, 16) + 1,
        page_sizes=(4096, *(size for bit, size in ((1, 1 << 21), (2, 1 << 30)) if large & bit)),
        interrupt_remapping=bool(extended & 1 << 3),
        snoop_control=bool(extended & 1 << 7),
    )
