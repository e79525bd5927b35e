"""``vfiopy bind``, ``vfiopy unbind`` and ``vfiopy restore``."""

from __future__ import annotations

import grp
import pwd
from typing import Annotated, Any

import typer

from vfiopy import pci
from vfiopy.cli.common import print_json, refusals_told, system_of
from vfiopy.cli.complete import complete_address
from vfiopy.errors import DeviceNotFoundError, VfiopyError
from vfiopy.pci import Function, PciAddress, System
from vfiopy.pci.records import state_folder

__all__ = ["run_bind", "run_restore", "run_unbind"]

_Addresses = Annotated[
    list[str], typer.Argument(help="PCI addresses, such as 0000:00:05.0.", autocompletion=complete_address)
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def run_bind(
    context: typer.Context,
    addresses: _Addresses,
    driver: Annotated[str, typer.Option(help="Driver to bind to.")] = "vfio-pci",
    group: Annotated[bool, typer.Option("--group", help="The whole IOMMU group, without its bridges.")] = False,
    user: Annotated[str | None, typer.Option("--user", help="Who may open it from now on.")] = None,
    group_name: Annotated[str | None, typer.Option("--group-name", help="The group that may open it.")] = None,
    persist: Annotated[bool, typer.Option("--persist", help="At each boot too, until 'unbind --persist'.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if the running system uses the device.")] = False,
    as_json: _Json = False,
) -> None:
    """Hand devices to vfio-pci until 'vfiopy unbind', 'vfiopy restore' or the next boot.

    Remembers what was before. Refuses what the running system uses.
    """
    system = system_of(context)
    _check_names(user, group_name)
    if persist:
        _check_persist(addresses, group, driver, user, group_name, system)
    with refusals_told(), pci.bind(addresses, driver, whole_group=group, force=force, system=system) as binding:
        report = [_entry(one, binding.previous_driver(one)) for one in binding.functions]
        if user is not None or group_name is not None:
            for one, entry in zip(binding.functions, report, strict=True):
                entry["granted"] = [str(node) for node in pci.grant(one, user, group_name, system=system)]
        if persist:
            _persist(binding.functions, report, driver, user, group_name, system)
        binding.keep()
    if as_json:
        print_json({"format": 1, "functions": report})
        return
    who = " and ".join(filter(None, (user, group_name and f"the group {group_name}")))
    for entry in report:
        typer.echo(_line(entry))
        if entry["granted"]:
            typer.echo(f"  for {who}: {', '.join(entry['granted'])}")
        if entry["persisted"]:
            typer.echo(f"  at each boot: {', '.join(entry['persisted'])}")
    if who:
        typer.echo("memory for DMA counts as locked: 'ulimit -l' of who uses it has to allow that")


def run_unbind(
    context: typer.Context,
    addresses: _Addresses,
    group: Annotated[bool, typer.Option("--group", help="All of the IOMMU group that VFIO holds.")] = False,
    persist: Annotated[bool, typer.Option("--persist", help="Remove what binds it at each boot, too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if it has virtual functions; they go.")] = False,
    as_json: _Json = False,
) -> None:
    """Take devices off VFIO: back to what they were, or to the driver that the kernel chooses."""
    system = system_of(context)
    with refusals_told():
        wanted, gone = _present(addresses, persist, system)
        named = dict.fromkeys(wanted)
        if group:
            named = dict.fromkeys(other for one in wanted for other in one.group_members())
        was = {one: one.driver for one in named}
        kept = persist and any(file.own for one in named for file in pci.persisted(one.address, system=system))
        done: list[Function] = []
        if not kept or any(one.is_vfio for one in wanted):  # a file alone can be removed, too
            done = pci.unbind(wanted, whole_group=group, force=force, system=system)
        files = [one.address for one in named] + gone if persist else []
        removed = [str(path) for one in files for path in pci.forget(one, system=system)]
        left = [path for one in done for path in _kept(one, system)]
    report = [_entry(one, was.get(one)) for one in done]
    if as_json:
        print_json({"format": 1, "functions": report, "removed": removed, "left": left})
        return
    for entry in report:
        typer.echo(_line(entry))
    _say_removed(removed)
    for path in left:
        typer.echo(f"comes back at the next boot: {path}; 'vfiopy unbind --persist' removes it if it is vfiopy's")


def run_restore(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Argument(help="PCI address; left out: everything vfiopy bound.", autocompletion=complete_address),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Undo what vfiopy did: drivers, overrides, virtual functions, owners of nodes, bindings for each boot."""
    system = system_of(context)
    with refusals_told():
        done = [Function(one, system) for one in pci.restore(address, system=system)]
        removed = [str(path) for path in pci.forget(address, system=system)]
    if as_json:
        print_json({"format": 1, "functions": [_entry(one, None) for one in done], "removed": removed})
        return
    for one in done:
        typer.echo(f"{one}: {one.driver or 'no driver'}")
    _say_removed(removed)
    if not done and not removed:
        # What root bound is written down elsewhere; silence would look like success.
        typer.echo(f"nothing to undo is written down in {state_folder()}")


def _present(addresses: list[str], persist: bool, system: System) -> tuple[list[Function], list[PciAddress]]:
    """The functions, and addresses of which nothing but a file for each boot is left: the card was pulled out."""
    wanted, gone = [], []
    for address in addresses:
        try:
            wanted.append(pci.function(address, system=system))
        except DeviceNotFoundError:
            where = PciAddress.parse(address)
            if not persist or not any(file.own for file in pci.persisted(where, system=system)):
                raise
            gone.append(where)
    return wanted, gone


def _check_names(user: str | None, group_name: str | None) -> None:
    # Before anything is changed.
    try:
        if user is not None:
            pwd.getpwnam(user)
    except KeyError:
        raise typer.BadParameter(f"there is no user {user!r}", param_hint="--user") from None
    try:
        if group_name is not None:
            grp.getgrnam(group_name)
    except KeyError:
        raise typer.BadParameter(f"there is no group {group_name!r}", param_hint="--group-name") from None


def _check_persist(
    addresses: list[str], group: bool, driver: str, user: str | None, group_name: str | None, system: System
) -> None:
    # Before anything is changed, too: taking a device from its driver and giving it back is not nothing.
    with refusals_told():
        wanted = [pci.function(address, system=system) for address in addresses]
        if group:
            wanted += [other for one in wanted for other in one.group_members() if not other.is_bridge]
        try:
            for one in wanted:
                pci.check_persist(one.address, driver, user=user, group=group_name, system=system)
        except ValueError as error:
            if isinstance(error, VfiopyError):
                raise
            raise typer.BadParameter(str(error)) from None


def _persist(
    functions: tuple[Function, ...],
    report: list[dict[str, Any]],
    driver: str,
    user: str | None,
    group_name: str | None,
    system: System,
) -> None:
    """For each function or for none; bind's own undoing does not know of these files."""
    fresh = []
    try:
        for one, entry in zip(functions, report, strict=True):
            if not pci.persisted(one.address, system=system):
                fresh.append(one)
            others = any(other != one and other in functions for other in one.group_members())
            files = pci.persist(one.address, driver, whole_group=others, user=user, group=group_name, system=system)
            entry["persisted"] = [str(file) for file in files]
    except BaseException:
        for one in fresh:
            pci.forget(one.address, system=system)
        raise


def _entry(function: Function, was: str | None) -> dict[str, Any]:
    group, cdev = function.group_node, function.cdev_node
    return {
        "address": str(function),
        "driver": function.driver,
        "was": was,
        "iommu_group": function.iommu_group,
        "group_node": None if group is None else str(group),
        "cdev_node": None if cdev is None else str(cdev),
        "granted": [],
        "persisted": [],
    }


def _line(entry: dict[str, Any]) -> str:
    was = entry["was"] or "no driver"
    before = "" if entry["was"] == entry["driver"] else f" (was {was})"
    nodes = [node for node in (entry["group_node"], entry["cdev_node"]) if node]
    return ": ".join([entry["address"], ", ".join([f"{entry['driver'] or 'no driver'}{before}", *nodes])])


def _kept(function: Function, system: System) -> list[str]:
    return [str(one.path) for one in pci.persisted(PciAddress.parse(str(function)), system=system)]


def _say_removed(paths: list[str]) -> None:
    for path in paths:
        typer.echo(f"removed: {path}")
