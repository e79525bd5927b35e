"""``vfiopy list``: PCI functions as a tree by IOMMU group."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.text import Text
from rich.tree import Tree

from vfiopy.cli.common import console, print_json, refusals_told, system_of
from vfiopy.cli.complete import complete_address
from vfiopy.errors import DeviceGoneError, PciAddressError
from vfiopy.pci import Function, find
from vfiopy.pci.readiness import State, readiness

__all__ = ["describe_function", "run_list"]

_COLOURS = {
    State.READY: "bold green",
    State.BINDABLE: "green",
    State.BUSY: "yellow",
    State.DENIED: "yellow",
    State.BLOCKED: "red",
    State.NO_NODE: "red",
    State.IN_USE: "red",
    State.NO_IOMMU: "red",
    State.BRIDGE: "dim",
}


def run_list(
    context: typer.Context,
    address: Annotated[
        str | None,
        typer.Argument(
            help="One PCI address, such as 0000:00:05.0; left out: all functions.", autocompletion=complete_address
        ),
    ] = None,
    class_code: Annotated[
        str | None, typer.Option("--class", help="Class: a word such as nvme, or 2, 4 or 6 hexadecimal digits.")
    ] = None,
    ids: Annotated[str | None, typer.Option("--id", help="VENDOR:DEVICE or VENDOR:, hexadecimal.")] = None,
    driver: Annotated[str | None, typer.Option(help="Held by this driver; '' for no driver.")] = None,
    group: Annotated[int | None, typer.Option(help="Of this IOMMU group.")] = None,
    state: Annotated[str | None, typer.Option(help=f"VFIO readiness: {', '.join(one.value for one in State)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show PCI functions by IOMMU group: driver, users, how near to VFIO, reset, NUMA, SR-IOV.

    Changes nothing and needs no root; who uses a device is shown as far as this user may see. Exit status 1
    when nothing fits.
    """
    if state is not None and state not in {one.value for one in State}:
        raise typer.BadParameter(f"{state!r} is none of {', '.join(one.value for one in State)}", param_hint="--state")
    vendor, device = _ids(ids)
    with refusals_told():
        try:
            functions = find(
                address=address,
                class_code=class_code,
                vendor=vendor,
                device=device,
                driver=driver,
                iommu_group=group,
                system=system_of(context),
            )
        except PciAddressError:
            raise
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        rows = []
        for one in functions:
            try:
                rows.append(describe_function(one))
            except DeviceGoneError:
                continue  # unplugged meanwhile
    rows = [row for row in rows if state is None or row["vfio"]["state"] == state]
    groups = _by_group(rows)
    if as_json:
        print_json({"format": 1, "groups": groups})
    elif rows:
        console().print(_tree(groups))
    else:
        typer.echo("no PCI function fits", err=True)
    raise typer.Exit(0 if rows else 1)


def _ids(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    try:
        vendor, device = (int(word, 16) if word else None for word in text.split(":"))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not VENDOR:DEVICE in hexadecimal", param_hint="--id") from None
    return vendor, device


def describe_function(function: Function) -> dict[str, Any]:
    """One function as ``--json`` shows it. Raises DeviceGoneError when it is removed meanwhile."""
    ready = readiness(function)
    total = function.sriov_totalvfs
    pf = function.physfn
    return {
        "address": str(function.address),
        "name": function.name,
        "vendor": f"{function.vendor:04x}",
        "device": f"{function.device:04x}",
        "class": f"{function.class_code:06x}",
        "class_name": function.class_name,
        "driver": function.driver,
        "iommu_group": function.iommu_group,
        "numa_node": function.numa_node,
        "reset_methods": list(function.reset_methods),
        "sriov": None if total is None else {"total": total, "enabled": function.sriov_numvfs},
        "physical_function": None if pf is None else str(pf),
        "vfio": {"state": ready.state.value, "reasons": list(ready.reasons)},
    }


def _by_group(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    numbers = sorted({row["iommu_group"] for row in rows}, key=lambda number: (number is None, number or 0))
    return [
        {"iommu_group": number, "functions": [row for row in rows if row["iommu_group"] == number]}
        for number in numbers
    ]


def _tree(groups: list[dict[str, Any]]) -> Tree:
    tree = Tree(Text("PCI functions", style="bold"), guide_style="dim")
    for group in groups:
        number = group["iommu_group"]
        branch = tree.add(Text("no IOMMU group" if number is None else f"IOMMU group {number}", style="bold"))
        for row in group["functions"]:
            branch.add(_label(row))
    return tree


def _label(row: dict[str, Any]) -> Text:
    state = State(row["vfio"]["state"])
    line = Text.assemble(
        (row["address"], "bold cyan"),
        f"  {row['name']}",
        (f" [{row['vendor']}:{row['device']}]", "dim") if "[" not in row["name"] else "",
        f"  {row['driver'] or 'no driver'}  ",
        (state.value, _COLOURS[state]),
    )
    facts = [row["class_name"]]
    if row["numa_node"] is not None:
        facts.append(f"NUMA node {row['numa_node']}")
    if row["sriov"] is not None:
        facts.append(f"SR-IOV {row['sriov']['enabled']} of {row['sriov']['total']} VFs")
    if row["physical_function"] is not None:
        facts.append(f"VF of {row['physical_function']}")
    facts.append(f"reset: {', '.join(row['reset_methods']) or 'none'}")
    line.append(f"\n{'; '.join(facts)}", style="dim")
    for reason in row["vfio"]["reasons"]:
        line.append(f"\n{reason}", style="yellow")
    return line
