"""``vfiopy iova``: what is mapped in the address spaces of another process."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vfiopy.cli.common import console, print_json, refusals_told, system_of
from vfiopy.errors import VfioError
from vfiopy.inspection.client import ask
from vfiopy.inspection.page_tables import page_table_snapshot
from vfiopy.iova.picture import bytes_word

__all__ = ["run_iova"]

_SHOWN = 40


def run_iova(
    context: typer.Context,
    pid: Annotated[int, typer.Argument(help="The process.")],
    tables: Annotated[
        bool, typer.Option("--page-tables", help="What the IOMMU translates, even if the process would answer; as root")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show what the devices of a process can reach: mappings, free ranges, pins and who holds them.

    The process lets itself be looked at by vfiopy.allow_inspection() or VFIOPY_INSPECT=1. Of any other, root sees what
    Intel's IOMMU translates.
    """
    with refusals_told():
        answer = _look(pid, tables, context)
    if as_json:
        print_json(answer)
    else:
        _print(console(), answer)


def _look(pid: int, tables: bool, context: typer.Context) -> dict[str, Any]:
    if tables:
        return page_table_snapshot(pid, system_of(context))
    try:
        return ask(pid)
    except VfioError as refused:
        if os.geteuid():
            raise
        try:
            return page_table_snapshot(pid, system_of(context))
        except VfioError as error:
            if error.meaning == refused.meaning:  # there is no such process
                raise
            hint = "; ".join(filter(None, (refused.hint, error.hint)))
            raise VfioError(
                f"{refused.meaning}, and {error.meaning}", errno=refused.errno, object=refused.object, hint=hint
            ) from None


def _print(screen: Console, answer: dict[str, Any]) -> None:
    program = " ".join(answer["program"])
    screen.print(Text.assemble(("process ", ""), (str(answer["pid"]), "bold"), f"  {program}"), soft_wrap=True)
    if not answer["spaces"]:
        screen.print("it has no open address space")
    for space in answer["spaces"]:
        screen.print()
        if "picture" in space:
            head, *rows = space["picture"].splitlines()
            screen.print(Text(head, style="bold"))
            screen.print(f"  devices: {', '.join(space['devices']) or 'none'}")
            screen.print(Text("\n".join(rows)), soft_wrap=True)
        else:
            words = f"{len(space['mappings'])} ranges, {bytes_word(space['mapped_bytes'])} translated"
            screen.print(Text(f"{space['name']}: {words}", style="bold"))
        _print_mappings(screen, space["mappings"])
        for owner in space.get("owners", ()):
            first, last = owner["iova"], owner["iova"] + owner["size"] - 1
            screen.print(f"{owner['name']} holds {owner['pins']} pins in {first:#x}-{last:#x}", style="yellow")


def _print_mappings(screen: Console, mappings: list[dict[str, Any]]) -> None:
    if not mappings:
        return
    live = "kind" in mappings[0]
    headings = ("IOVA", "last", "size", "prot", *(("memory", "state", "pins") if live else ("pages of",)))
    table = Table(*headings)
    for one in mappings[:_SHOWN]:
        rest = (one["kind"], one["state"], str(one["pins"])) if live else (bytes_word(one["page_size"]),)
        last = one["iova"] + one["size"] - 1
        table.add_row(f"{one['iova']:#x}", f"{last:#x}", bytes_word(one["size"]), one["prot"], *rest)
    screen.print(table)
    if len(mappings) > _SHOWN:
        screen.print(f"... {len(mappings) - _SHOWN} more; --json has them all", style="dim")
