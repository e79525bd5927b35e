"""Checks of the machine: IOMMU, modules, shared nodes, limits."""

from __future__ import annotations

import os
from collections.abc import Iterator

from vfiopy.doctor.finding import MachineCheck, Problem, Severity
from vfiopy.pci import System, is_vfio_driver, memlock_limit
from vfiopy.pci.words import size_words

__all__ = ["MACHINE_CHECKS", "noiommu_mode"]

_LITTLE_MEMLOCK = 64 << 20  # bytes; the usual default is 8 MiB, one big queue pair takes more
_INTERRUPT_REMAPPING = 1 << 3  # VT-d specification 4.1, 11.4.3, ECAP.IR


def noiommu_mode(system: System) -> bool:
    """VFIO may take devices without an IOMMU."""
    return system.text(system.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode") == "Y"


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
    if not any(is_vfio_driver(name) for name in system.names(system.pci / "drivers")):
        yield Problem(
            Severity.BLOCKS,
            "no VFIO driver for PCI is loaded",
            f"{system.driver('vfio-pci')} is missing",
            "modprobe vfio-pci",
        )


def _shared_nodes(system: System) -> Iterator[Problem]:
    if any(_module(system)):
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
    registers = {
        name: int(text, 16)
        for name in system.names(folder)
        if (text := system.text(folder / name / "intel-iommu/ecap"))
    }
    without = [name for name, ecap in registers.items() if not ecap & _INTERRUPT_REMAPPING]
    words = (system.text(system.proc / "cmdline") or "").split()
    told = [word for word in words if word in ("intremap=off", "nointremap")]
    if not without and not told:
        return
    closed = [
        module
        for module in ("iommufd", "vfio_iommu_type1")
        if system.text(system.sys / "module" / module / "parameters/allow_unsafe_interrupts") == "N"
    ]
    if closed:
        reason = told[0] if told else f"{', '.join(without)} cannot remap interrupts"
        yield Problem(
            Severity.BLOCKS,
            f"interrupts are not remapped, so {' and '.join(closed)} refuse to attach a device (EPERM)",
            f"{reason}; allow_unsafe_interrupts is N",
            "switch interrupt remapping on (firmware, x2APIC); or, where all devices are trusted, set "
            + " and ".join(f"{module}.allow_unsafe_interrupts=1" for module in closed)
            + " (each way has its own)",
        )


def _memlock(system: System) -> Iterator[Problem]:
    limit = memlock_limit(system=system)
    if limit.exempt or limit.soft is None or limit.soft >= _LITTLE_MEMLOCK:
        return
    used = max(limit.locked, limit.pinned)
    yield Problem(
        Severity.LIMITS,
        f"this user may lock {size_words(limit.soft)} only, and DMA memory counts as locked (ENOMEM beyond it)",
        f"RLIMIT_MEMLOCK is {limit.soft}, {used} in use by this process",
        "ulimit -l, or /etc/security/limits.d: '@vfio - memlock 8388608'; a service takes LimitMEMLOCK=",
    )


def _lockdown(system: System) -> Iterator[Problem]:
    text = system.text(system.sys / "kernel/security/lockdown") or ""
    if "[integrity]" in text or "[confidentiality]" in text:
        yield Problem(
            Severity.NOTE,
            "the kernel is locked down: programs that map BARs through sysfs (resourceN) get EPERM",
            f"{system.sys}/kernel/security/lockdown is {text}",
            "reach BARs through VFIO, which lockdown leaves alone",
        )


def _page_size(_system: System) -> Iterator[Problem]:
    size = os.sysconf("SC_PAGE_SIZE")
    if size != 4096:
        yield Problem(
            Severity.NOTE,
            f"pages have {size_words(size)}: IOVA, address and size of each mapping are multiples of that",
            f"sysconf(_SC_PAGESIZE) is {size}",
            "do not write 4096 into a driver; let allocate() round",
        )


MACHINE_CHECKS: tuple[MachineCheck, ...] = (
    MachineCheck("iommu groups", _groups),
    MachineCheck("vfio module", _module),
    MachineCheck("shared nodes", _shared_nodes),
    MachineCheck("interrupt remapping", _interrupt_remapping),
    MachineCheck("memlock", _memlock),
    MachineCheck("lockdown", _lockdown),
    MachineCheck("page size", _page_size),
)
"""In order of what to fix first."""
