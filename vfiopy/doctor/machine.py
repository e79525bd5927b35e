"""Checks of the machine: IOMMU, modules, shared nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vfiopy.doctor.finding import MachineCheck, Problem, Severity
from vfiopy.doctor.memory import MEMORY_CHECKS
from vfiopy.pci import System, is_vfio_driver

__all__ = ["MACHINE_CHECKS", "noiommu_mode", "variant_drivers"]

_INTERRUPT_REMAPPING = 1 << 3  # VT-d specification 4.1, 11.4.3, ECAP.IR


def noiommu_mode(system: System) -> bool:
    """VFIO may take devices without an IOMMU."""
    return system.text(system.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode") == "Y"


def variant_drivers(system: System) -> list[str]:
    """VFIO drivers for devices of one kind (``mlx5_vfio_pci``, ...) that are loaded."""
    return [name for name in system.names(system.pci / "drivers") if is_vfio_driver(name) and name != "vfio-pci"]


def _groups(system: System) -> Iterator[Problem]:
    if system.names(system.sys / "kernel/iommu_groups") or noiommu_mode(system):
        return
    words = (system.text(system.proc / "cmdline") or "").split()
    off = [word for word in words if word in ("iommu=off", "intel_iommu=off", "amd_iommu=off")]
    tables = [name for name in ("DMAR", "IVRS") if (system.sys / "firmware/acpi/tables" / name).exists()]
    evidence = f"{system.sys}/kernel/iommu_groups has no group"
    if off:
        cause, remedy = "the kernel was told to leave the IOMMU off", f"remove {off[0]} from the kernel's command line"
        evidence += f"; command line: {off[0]}"
    elif tables:
        cause = "the firmware offers an IOMMU and the kernel does not use it"
        evidence += f"; ACPI table {tables[0]} is there"
        remedy = "boot with intel_iommu=on" if tables[0] == "DMAR" else "look for AMD-Vi in the kernel log"
    else:
        cause = "the machine shows no IOMMU"
        evidence += "; no ACPI table DMAR or IVRS"
        remedy = "switch VT-d or AMD-Vi on in the firmware; in a virtual machine give it a virtual IOMMU"
    yield Problem(Severity.BLOCKS, cause, evidence, remedy)


def _module(system: System) -> Iterator[Problem]:
    if system.driver("vfio-pci").exists():
        return
    variants = variant_drivers(system)
    bound = [name for name in variants if _devices_of(system, name)]
    yield Problem(
        Severity.LIMITS if bound else Severity.BLOCKS,
        f"only variant drivers are loaded ({', '.join(variants)}), which take their own devices and no others"
        if variants
        else "no VFIO driver for PCI is loaded",
        f"{system.driver('vfio-pci')} is missing",
        "modprobe vfio-pci",
    )


def _devices_of(system: System, driver: str) -> list[str]:
    return [name for name in system.names(system.driver(driver)) if ":" in name]


def _shared_nodes(system: System) -> Iterator[Problem]:
    if not any(is_vfio_driver(name) for name in system.names(system.pci / "drivers")):
        return  # the nodes come with the modules
    nodes = [system.dev / "vfio/vfio", system.dev / "iommu"]
    if not any(node.exists() for node in nodes):
        yield Problem(
            Severity.BLOCKS,
            "the modules are there and their nodes are not: this /dev is a stale copy, as in a container",
            f"neither {nodes[0]} nor {nodes[1]} exists",
            "start the container with the devices, or modprobe vfio vfio_iommu_type1 iommufd",
        )


def _interrupt_remapping(system: System) -> Iterator[Problem]:
    folder = system.sys / "class/iommu"
    units = system.names(folder)
    registers = {name: int(text, 16) for name in units if (text := system.text(folder / name / "intel-iommu/ecap"))}
    words = (system.text(system.proc / "cmdline") or "").split()
    if told := [word for word in words if word in ("intremap=off", "nointremap")]:
        reason = f"command line: {told[0]}"
    elif without := [name for name, ecap in registers.items() if not ecap & _INTERRUPT_REMAPPING]:
        reason = f"{', '.join(without)} cannot remap interrupts (extended capability register, bit 3)"
    elif any(name.startswith(("dmar", "ivhd")) for name in units) and _plain_interrupts(system):
        # What the hardware could do is not always used: erratum, firmware that opts out. AMD's sysfs says nothing.
        reason = f"no interrupt of {system.proc}/interrupts is remapped (none is IR-PCI-MSI or IR-IO-APIC)"
    else:
        return
    closed = [
        module
        for module in ("iommufd", "vfio_iommu_type1")
        if system.text(system.sys / "module" / module / "parameters/allow_unsafe_interrupts") == "N"
    ]
    if closed:
        yield Problem(
            Severity.BLOCKS,
            f"interrupts are not remapped, so {' and '.join(closed)} refuse to attach a device (EPERM)",
            f"{reason}; allow_unsafe_interrupts is N",
            "switch interrupt remapping on (firmware, x2APIC); or, where all devices are trusted: "
            + "; ".join(f"echo Y > {system.sys}/module/{name}/parameters/allow_unsafe_interrupts" for name in closed)
            + " (each way has its own)",
        )


def _plain_interrupts(system: System) -> bool:
    chips = re.findall(r"\b(IR-)?(?:PCI-MSIX?|IO-APIC)", system.text(system.proc / "interrupts") or "")
    return bool(chips) and not any(chips)


def _lockdown(system: System) -> Iterator[Problem]:
    text = system.text(system.sys / "kernel/security/lockdown") or ""
    if "[integrity]" in text or "[confidentiality]" in text:
        yield Problem(
            Severity.NOTE,
            "the kernel is locked down: programs that map BARs through sysfs (resourceN) get EPERM",
            f"{system.sys}/kernel/security/lockdown is {text}",
            "reach BARs through VFIO, which lockdown leaves alone",
        )


MACHINE_CHECKS: tuple[MachineCheck, ...] = (
    MachineCheck("iommu groups", _groups),
    MachineCheck("vfio module", _module),
    MachineCheck("shared nodes", _shared_nodes),
    MachineCheck("interrupt remapping", _interrupt_remapping),
    *MEMORY_CHECKS,
    MachineCheck("lockdown", _lockdown),
)
"""In order of what to fix first."""
