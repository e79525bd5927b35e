"""Checks of a function that VFIO holds: can it be opened, and what will not work then."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator

from vfiopy.doctor.finding import DeviceCheck, Problem, Severity
from vfiopy.pci import Function
from vfiopy.pci.config import Command, decode_header
from vfiopy.pci.holders import vfio_holders
from vfiopy.pci.isolation import CONVENTIONAL, separators

__all__ = ["OPENING_CHECKS"]

_CAP_SYS_RAWIO = 17  # linux/capability.h


def _cdev(one: Function) -> Iterator[Problem]:
    missing = one.cdev_missing
    if not one.is_vfio or not missing:
        return
    group = one.group_node
    works = group is not None and group.exists()
    stale = one.cdev_node is not None or (group is not None and not works)
    yield Problem(
        Severity.LIMITS if works else Severity.BLOCKS,
        "the device is there, its character device is not" if works else "it is bound, and has no node to open",
        missing,
        "mount a fresh devtmpfs, or hand the node to the container"
        if stale
        else "it can be opened through its group; for iommufd boot a kernel with CONFIG_VFIO_DEVICE_CDEV",
    )


def _stale_node(one: Function) -> Iterator[Problem]:
    if not one.is_vfio:
        return
    system = one.system
    pairs = [(node, system.sys / "class/vfio" / node.name / "dev") for node in (one.group_node,) if node is not None]
    if one.cdev_node is not None:
        pairs.append((one.cdev_node, one.sysfs / "vfio-dev" / one.cdev_node.name / "dev"))
    for node, file in pairs:
        wanted = system.text(file)
        if wanted is None or not node.is_char_device():
            continue
        number = node.stat().st_rdev
        if f"{os.major(number)}:{os.minor(number)}" != wanted:
            yield Problem(
                Severity.BLOCKS,
                f"{node} is the node of something else: this /dev is an old copy, as in a container",
                f"{node} is {os.major(number)}:{os.minor(number)}, {file} says {wanted}",
                "mount a fresh devtmpfs, or start the container again after binding",
            )


def _held(one: Function) -> Iterator[Problem]:
    if not one.is_vfio:
        return
    # Group and character devices exclude each other: an open device of another member holds the group too.
    holders = {str(holder): None for member in one.group_members() if member.is_vfio for holder in vfio_holders(member)}
    if holders:
        yield Problem(
            Severity.BLOCKS,
            "a process uses it or a device of its group (EBUSY)",
            "; ".join(holders),
            "end that process or close the file there; a leaked fd of your own counts",
        )


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _permissions(one: Function) -> Iterator[Problem]:
    dev = one.system.dev
    ways = [
        [node, shared]
        for node, shared in ((one.cdev_node, dev / "iommu"), (one.group_node, dev / "vfio/vfio"))
        if node is not None and node.exists() and shared.exists()
    ]
    refused = [[node for node in way if not os.access(node, os.R_OK | os.W_OK)] for way in ways]
    if not one.is_vfio or not refused or not all(refused):
        return
    nodes = list(dict.fromkeys(node for way in refused for node in way))
    modes = (f"{node} is {node.stat().st_mode & 0o777:04o} of uid {node.stat().st_uid}" for node in nodes)
    yield Problem(
        Severity.BLOCKS,
        "this user may not open its nodes (EACCES)",
        "; ".join(modes),
        f"as root: vfiopy bind {one} --user {_user()}",
    )


def _noiommu(one: Function) -> Iterator[Problem]:
    if not one.is_vfio or not one.is_noiommu:
        return
    status = one.system.text(one.system.proc / "self/status") or ""
    mask = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    able = bool(int(mask, 16) & 1 << _CAP_SYS_RAWIO)
    yield Problem(
        Severity.NOTE if able else Severity.BLOCKS,
        "VFIO has it without an IOMMU: nothing keeps its DMA in bounds" + ("" if able else ", so opening takes root"),
        f"its group is noiommu; CAP_SYS_RAWIO: {'yes' if able else 'no'}",
        "know what you do, and say so to open()" if able else "run with CAP_SYS_RAWIO",
    )


def _token(one: Function) -> Iterator[Problem]:
    pf = None if one.physfn is None else Function(one.physfn, one.system)
    if one.is_vfio and pf is not None and pf.is_vfio:
        yield Problem(
            Severity.NOTE,
            "it is a virtual function of a physical function that VFIO holds: opening needs the token that was "
            "given to that one (EACCES without)",
            f"{pf} is bound to {pf.driver}",
            "pass vf_token= to open(), the same for both",
        )


def _memory_off(one: Function) -> Iterator[Problem]:
    if not one.is_vfio or decode_header(one.read_config).command & Command.MEMORY:
        return
    # VFIO switches it off when nobody has the device; and who has its group open may not have the device.
    holders = [holder for holder in vfio_holders(one) if holder.node != str(one.group_node)]
    if holders:
        yield Problem(
            Severity.BLOCKS,
            "a process has it open and its memory decode is off: registers fault, BAR exports are revoked (ENODEV)",
            f"{one.sysfs}/config: command register bit 1 is 0; {'; '.join(map(str, holders))}",
            "the process that has it open sets device.memory_enabled = True, before it exports or imports a BAR",
        )


def _power(one: Function) -> Iterator[Problem]:
    state = one.system.text(one.sysfs / "power_state")
    if state not in ("D3hot", "D3cold"):
        return
    yield Problem(
        Severity.NOTE,
        f"it sleeps ({state})"
        + ("; opening wakes it, and vfio-pci puts it back when nobody has it open" if one.is_vfio else ""),
        f"{one.sysfs}/power_state is {state}",
        f"if it does not wake well: echo on > {one.sysfs}/power/control; or 'options vfio-pci disable_idle_d3=1' in "
        "/etc/modprobe.d/vfio.conf, and load the module again",
    )


def _reset(one: Function) -> Iterator[Problem]:
    if not one.header_type and not one.reset_methods:
        yield Problem(
            Severity.LIMITS,
            "the kernel has no way to reset it alone: a user gets it as the last one left it, reset() is EINVAL",
            f"{one.sysfs}/reset_method is missing or empty",
            "reset it by its own registers, or hot-reset its whole bus with all devices on it open",
        )


def _unassigned(one: Function) -> Iterator[Problem]:
    bars = [each.name for each in one.resources if each.index < 6 and each.size > 1 and not each.start]
    if bars and not one.header_type:
        yield Problem(
            Severity.LIMITS,
            "the system gave no addresses to a part of it, so that part cannot be reached",
            f"no address: {', '.join(bars)}",
            "firmware: above 4G decoding, resizable BAR; kernel: pci=realloc",
        )


def _wide_group(one: Function) -> Iterator[Problem]:
    if one.header_type:
        return
    others = [other for other in one.group_members() if other != one and not other.is_bridge]
    if not others:
        return
    same = [other for other in others if other.address.slot == one.address.slot]
    bridges = separators(one)
    joined = [bridge for bridge in bridges if bridge.apart is False]
    if len(same) == len(others):
        cause = "its group has other functions of the same device, which has no ACS between them"
    elif joined:
        cause = f"its group spans several devices: {joined[-1].kind} {joined[-1].address} does not keep them apart"
    else:
        cause = "its group spans several devices: a bridge above them does not keep them apart (no ACS)"
    evidence = f"group {one.iommu_group} has also {', '.join(map(str, others))}"
    yield Problem(
        Severity.NOTE,
        f"{cause}; they go to one user together",
        "; ".join([evidence, *map(str, bridges)]),
        "another slot: nothing splits a conventional bus"
        if joined and joined[-1].kind == CONVENTIONAL
        else "another slot, or a kernel with pci=config_acs=; patches that override ACS take the isolation away",
    )


OPENING_CHECKS: tuple[DeviceCheck, ...] = (
    DeviceCheck("character device", _cdev),
    DeviceCheck("stale node", _stale_node),
    DeviceCheck("memory decode", _memory_off),
    DeviceCheck("held", _held),
    DeviceCheck("permissions", _permissions),
    DeviceCheck("no IOMMU", _noiommu),
    DeviceCheck("token", _token),
    DeviceCheck("reset", _reset),
    DeviceCheck("unassigned BAR", _unassigned),
    DeviceCheck("power", _power),
    DeviceCheck("wide group", _wide_group),
)
"""In order of what to fix first."""
