"""Checks of a function on its way to vfio-pci: is it VFIO's to take, and does it get there."""

from __future__ import annotations

from collections.abc import Iterator

from vfiopy.doctor.finding import DeviceCheck, Problem, Severity
from vfiopy.doctor.machine import noiommu_mode, variant_drivers
from vfiopy.pci import Function, is_vfio_driver, uses
from vfiopy.pci.iommu import reserved_regions

__all__ = ["BINDING_CHECKS"]

# drivers/vfio/pci/vfio_pci.c, vfio_pci_dev_in_denylist(): QAT C3XXX, C62X, DH895XCC with their VFs, DSA, IAX
_DENYLIST = (0x19E2, 0x19E3, 0x37C8, 0x37C9, 0x0435, 0x0443, 0x0B25, 0x0CFE)
_INTEL = 0x8086


def _bridge(one: Function) -> Iterator[Problem]:
    if one.header_type:
        yield Problem(
            Severity.BLOCKS,
            "it is a bridge; VFIO drives functions only",
            f"header type {one.header_type}, {one.class_name}",
            "bind the functions behind it; bridges do not count against their group",
        )


def _no_group(one: Function) -> Iterator[Problem]:
    system = one.system
    if one.iommu_group is None and system.names(system.sys / "kernel/iommu_groups") and not noiommu_mode(system):
        yield Problem(
            Severity.BLOCKS,
            "the machine has an IOMMU, but none in front of this function",
            f"{one.sysfs}/iommu_group is missing",
            "move it to another slot; in a virtual machine put it where the virtual IOMMU translates",
        )


def _direct_ranges(one: Function) -> Iterator[Problem]:
    direct = [region for region in reserved_regions(one) if region.kind == "direct"]
    if direct:
        ranges = ", ".join(f"{region.first:#x} to {region.last:#x}" for region in direct)
        yield Problem(
            Severity.BLOCKS,
            "the firmware wants memory mapped one to one for it at all times (RMRR, IVMD), so the kernel does not "
            "hand it over (EINVAL)",
            f"reserved_regions of group {one.iommu_group}: direct {ranges}",
            "switch off in the firmware what shares that memory: USB legacy support, management controller, HP "
            "shared memory",
        )


def _in_use(one: Function) -> Iterator[Problem]:
    reasons = [] if one.is_vfio or one.header_type else uses(one, virtual_functions=False)
    if reasons:
        yield Problem(
            Severity.BLOCKS,
            f"the running system uses it through {one.driver or 'no driver of its own'}",
            "; ".join(reasons),
            "unmount, take down or stop that first",
        )


def _denylist(one: Function) -> Iterator[Problem]:
    if one.is_vfio or one.vendor != _INTEL or one.device not in _DENYLIST:
        return
    if one.system.text(one.system.sys / "module/vfio_pci/parameters/disable_denylist") != "Y":
        yield Problem(
            Severity.BLOCKS,
            "vfio-pci refuses it by default: known not to be safe in a user's hands",
            f"{one.vendor:04x}:{one.device:04x} is on the driver's denylist",
            "where its user is trusted: 'options vfio-pci disable_denylist=1' in /etc/modprobe.d/vfio.conf, and load "
            "the module again (modprobe -r vfio-pci; modprobe vfio-pci)",
        )


def _sriov(one: Function) -> Iterator[Problem]:
    if one.is_vfio or not one.sriov_numvfs:
        return
    yield Problem(
        Severity.BLOCKS,
        "its virtual functions are on, and vfio-pci does not take such a physical function (EBUSY)",
        f"sriov_numvfs is {one.sriov_numvfs}",
        f"use a virtual function, or switch them off: echo 0 > {one.sysfs}/sriov_numvfs",
    )


def _override(one: Function) -> Iterator[Problem]:
    wanted = one.driver_override
    if wanted is None or wanted == one.driver:
        return
    evidence = f"driver_override is {wanted}, its driver is {one.driver or 'none'}"
    if not one.system.driver(wanted).exists():
        yield Problem(
            Severity.BLOCKS,
            f"it is kept for the driver {wanted}, which is not loaded",
            evidence,
            f"modprobe {wanted}; or take that back: echo > {one.sysfs}/driver_override",
        )
    elif is_vfio_driver(wanted) and one.driver is None:
        yield Problem(
            Severity.BLOCKS,
            f"it is kept for {wanted}, which did not take it",
            evidence,
            f"echo {one} > /sys/bus/pci/drivers_probe, and read why in the kernel log",
        )
    else:
        yield Problem(
            Severity.NOTE if one.is_vfio else Severity.LIMITS,
            f"a stale override: at the next binding only {wanted} may take it",
            evidence,
            f"echo > {one.sysfs}/driver_override",
        )


def _module(one: Function) -> Iterator[Problem]:
    system = one.system
    # Without any VFIO driver the machine's check has said so; a variant's being there does not help this function.
    variants = [] if one.is_vfio or one.header_type else variant_drivers(system)
    if variants and not system.driver("vfio-pci").exists():
        yield Problem(
            Severity.BLOCKS,
            f"vfio-pci is not loaded, only {', '.join(variants)}, which take their own devices and no others",
            f"{system.driver('vfio-pci')} is missing",
            "modprobe vfio-pci",
        )


def _not_bound(one: Function) -> Iterator[Problem]:
    if one.is_vfio or one.header_type:
        return
    driver = one.driver
    others = [other for other in one.group_blockers() if other != one and not other.is_bridge]
    yield Problem(
        Severity.BLOCKS,
        f"the driver {driver} holds it" if driver else "no driver holds it",
        f"{one.sysfs}/driver " + (f"is {driver}" if driver else "is missing"),
        f"vfiopy bind {'--group ' if others else ''}{one}",
    )


def _group(one: Function) -> Iterator[Problem]:
    others = [other for other in one.group_blockers() if other != one]
    if not others:
        return
    bridges = [other for other in others if other.header_type]
    fine = [str(other) for other in one.group_members() if other != one and other not in others]
    yield Problem(
        Severity.BLOCKS,
        f"IOMMU group {one.iommu_group} is not viable: "
        + ", ".join(f"{other.driver} holds {other} ({other.class_name})" for other in others),
        f"members that do not matter: {', '.join(fine) or 'none'}",
        f"a bridge with a driver of its own has to be unbound by hand: {', '.join(map(str, bridges))}"
        if bridges
        else f"vfiopy bind --group {one}",
    )


BINDING_CHECKS: tuple[DeviceCheck, ...] = (
    DeviceCheck("bridge", _bridge),
    DeviceCheck("no group", _no_group),
    DeviceCheck("direct ranges", _direct_ranges),
    DeviceCheck("virtual functions on", _sriov),
    DeviceCheck("in use", _in_use),
    DeviceCheck("denylist", _denylist),
    DeviceCheck("driver override", _override),
    DeviceCheck("vfio module", _module),
    DeviceCheck("not bound", _not_bound),
    DeviceCheck("group not viable", _group),
)
"""In order of what to fix first."""
