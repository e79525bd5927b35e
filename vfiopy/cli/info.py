"""``vfiopy info``: one function, as sysfs shows it, in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from vfiopy.cli.common import console, print_json, refusals_told, system_of
from vfiopy.cli.complete import complete_address
from vfiopy.cli.info_diff import compare, config_rows, load_snapshot, print_changes, save_snapshot
from vfiopy.cli.list import describe_function
from vfiopy.errors import PermissionDeniedError
from vfiopy.pci import Function, function
from vfiopy.pci.capabilities import Msi, MsiX
from vfiopy.pci.config import Command, Decoded, Status, decode_header
from vfiopy.pci.iommu import iommu_hardware, reserved_regions
from vfiopy.pci.words import capability_words, size_words

__all__ = ["describe", "run_info"]


def run_info(
    context: typer.Context,
    address: Annotated[str, typer.Argument(help="PCI address, such as 0000:00:05.0.", autocompletion=complete_address)],
    save: Annotated[
        Path | None, typer.Option(help="Write it to this file too, to compare with later.", dir_okay=False)
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(help="Show what differs from this file that --save or --json wrote.", dir_okay=False)
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="With --diff: a path that does not count, such as power; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show one function: regions, capabilities in words, interrupts, IOMMU. Does not open it.

    Without root the kernel shows only the first 64 bytes of configuration space, so capabilities are left out. Exit
    status 1 when --diff finds a difference.
    """
    before = None if diff is None else load_snapshot(diff)
    with refusals_told():
        facts = {"format": 1, **describe(function(address, system=system_of(context)))}
    if save is not None:
        save_snapshot(save, facts)
    if before is not None:
        answer = {"format": 1, "address": facts["address"], **compare(before, facts, ignore or [])}
        if as_json:
            print_json(answer)
        else:
            print_changes(console(), answer, facts["address"])
        raise typer.Exit(1 if answer["different"] else 0)
    if as_json:
        print_json(facts)
    else:
        _print(console(), facts)


def describe(one: Function) -> dict[str, Any]:
    """All that ``--json`` shows. Raises DeviceGoneError when the function is removed meanwhile."""
    config, missing = _config(one)
    header = config.header
    text = one.system.text
    return {
        **describe_function(one),
        "subsystem": f"{one.subsystem_vendor:04x}:{one.subsystem_device:04x}",
        "revision": one.revision,
        "driver_override": one.driver_override,
        "power": {
            "state": text(one.sysfs / "power_state"),
            "runtime": text(one.sysfs / "power/runtime_status"),
            "control": text(one.sysfs / "power/control"),
        },
        "command": _flags(header.command),
        "status": _flags(header.status),
        "regions": [
            {
                "name": region.name,
                "start": region.start,
                "size": region.size,
                "kind": "io" if region.is_io else "memory",
                "bits": 64 if region.is_64bit else 32,
                "prefetchable": region.prefetchable,
            }
            for region in one.resources
        ],
        "interrupts": _interrupts(one, config),
        "capabilities": [
            {"id": each.id, "extended": extended, "offset": each.offset, "name": each.name, "says": _says(each)}
            for extended, several in ((False, config.capabilities), (True, config.extended))
            for each in several
        ],
        "capabilities_missing": missing,
        "config": config_rows(one.read_config(0, 4096)),
        "iommu": _iommu(one),
    }


def _says(capability: Any) -> list[str]:
    return capability_words(capability)


def _config(one: Function) -> tuple[Decoded, str | None]:
    try:
        return one.config(), None
    except PermissionDeniedError as error:
        return Decoded(decode_header(one.read_config), (), ()), f"{error.meaning}; {error.hint}"


def _flags(register: Command | Status) -> list[str]:
    return [flag.name.lower().replace("_", " ") for flag in register if flag.name]


def _interrupts(one: Function, config: Decoded) -> dict[str, Any]:
    msi, msix = config.find(Msi), config.find(MsiX)
    folder = one.sysfs / "msi_irqs"
    return {
        "pin": " ABCD"[config.header.interrupt_pin].strip() or None if config.header.interrupt_pin <= 4 else None,
        "irq": one.system.number(one.sysfs / "irq") or None,
        "msi": None if msi is None else msi.vectors,
        "msix": None if msix is None else msix.table_size,
        # those that the driver has allocated now
        "allocated": {name: one.system.text(folder / name) for name in one.system.names(folder)},
    }


def _iommu(one: Function) -> dict[str, Any] | None:
    hardware = iommu_hardware(one)
    if hardware is None:
        return None
    return {
        "group": one.iommu_group,
        "members": [{"address": str(other), "driver": other.driver} for other in one.group_members()],
        "hardware": hardware.name,
        "domain": hardware.domain,
        "address_bits": hardware.address_bits,
        "page_sizes": list(hardware.page_sizes),
        "interrupt_remapping": hardware.interrupt_remapping,
        "snoop_control": hardware.snoop_control,
        "reserved": [
            {"first": region.first, "last": region.last, "kind": region.kind} for region in reserved_regions(one)
        ],
    }


# --- for people ---


def _print(screen: Console, facts: dict[str, Any]) -> None:
    screen.print(Text.assemble((facts["address"], "bold cyan"), f"  {facts['name']}"))
    screen.print(_identity(facts))
    for title, grid in (("Regions", _regions(facts)), ("IOMMU", _iommu_grid(facts["iommu"]))):
        screen.print(Text(title, style="bold"))
        screen.print(grid)
    tree = Tree(Text("Capabilities", style="bold"), guide_style="dim")
    for one in facts["capabilities"]:
        where = Text(f"{one['offset']:03x}  ", style="dim").append(one["name"], style="default")
        branch = tree.add(where)
        for phrase in one["says"]:
            branch.add(Text(phrase))
    if facts["capabilities_missing"]:
        tree.add(Text(facts["capabilities_missing"], style="yellow"))
    screen.print(tree)


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        if value:
            grid.add_row(Text(f"  {name}", style="dim"), Text(value))
    return grid


def _identity(facts: dict[str, Any]) -> Table:
    irqs, power, sriov = facts["interrupts"], facts["power"], facts["sriov"]
    lines = [
        f"INT{irqs['pin']} as IRQ {irqs['irq']}" if irqs["pin"] else "",
        f"{irqs['msi']} MSI" if irqs["msi"] else "",
        f"{irqs['msix']} MSI-X" if irqs["msix"] else "",
        f"{len(irqs['allocated'])} allocated now" if irqs["allocated"] else "",
    ]
    return _grid(
        [
            (
                "IDs",
                f"{facts['vendor']}:{facts['device']}, subsystem {facts['subsystem']}, rev {facts['revision']:02x}",
            ),
            ("class", f"{facts['class_name']} ({facts['class']})"),
            ("driver", facts["driver"] or "none"),
            ("override", facts["driver_override"] or ""),
            ("VFIO", "; ".join([facts["vfio"]["state"], *facts["vfio"]["reasons"]])),
            ("reset", ", ".join(facts["reset_methods"]) or "none"),
            ("NUMA node", "" if facts["numa_node"] is None else str(facts["numa_node"])),
            ("SR-IOV", f"{sriov['enabled']} of {sriov['total']} VFs" if sriov else ""),
            ("VF of", facts["physical_function"] or ""),
            ("power", ", ".join(filter(None, (power["state"], power["runtime"])))),
            ("command", ", ".join(facts["command"]) or "all off"),
            ("status", ", ".join(facts["status"])),
            ("interrupts", ", ".join(filter(None, lines)) or "none"),
        ]
    )


def _regions(facts: dict[str, Any]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for one in facts["regions"]:
        kind = f"{one['bits']}-bit memory" if one["kind"] == "memory" else "I/O ports"
        where = f"{one['start']:#x}" if one["start"] else "not assigned"
        more = ", prefetchable" if one["prefetchable"] else ""
        grid.add_row(f"  {one['name']}", size_words(one["size"]), where, kind + more)
    return grid


def _iommu_grid(iommu: dict[str, Any] | None) -> Table:
    if iommu is None:
        return _grid([("group", "none: the IOMMU is off, or there is none")])
    width = f", {iommu['address_bits']}-bit addresses" if iommu["address_bits"] else ""
    pages = f", pages of {', '.join(map(size_words, iommu['page_sizes']))}" if iommu["page_sizes"] else ""
    rows = [
        ("group", f"{iommu['group']}{', domain ' + iommu['domain'] if iommu['domain'] else ''}"),
        ("members", ", ".join(f"{one['address']} ({one['driver'] or 'no driver'})" for one in iommu["members"])),
        ("hardware", f"{iommu['hardware']}{width}{pages}" if iommu["hardware"] else ""),
    ]
    rows += [("reserved", f"{one['first']:#x} to {one['last']:#x} ({one['kind']})") for one in iommu["reserved"]]
    return _grid(rows)
