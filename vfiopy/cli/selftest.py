"""``vfiopy selftest``."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from vfiopy import selftest
from vfiopy.cli.common import console, print_json
from vfiopy.cli.complete import complete_target
from vfiopy.selftest.runner import ALL_BACKENDS

__all__ = ["run_selftest"]

_COLOURS = {
    selftest.Status.PASSED: "green",
    selftest.Status.FAILED: "bold red",
    selftest.Status.SKIPPED: "yellow",
}


def run_selftest(
    target: Annotated[
        str, typer.Argument(help="PCI address bound to vfio-pci, or emulated:edu.", autocompletion=complete_target)
    ],
    backend: Annotated[
        list[str] | None,
        typer.Option(help=f"Way to reach it: {', '.join(ALL_BACKENDS)}; may be repeated; 'all' for each of them."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")] = False,
) -> None:
    """Check a device without harming it: configuration space, DMA mappings, interrupts, reset.

    Reads and writes no register of the device itself. Exit status 0 when nothing failed.
    """
    wanted: list[str | None] = [None]
    if backend:
        wanted = [*ALL_BACKENDS] if "all" in backend else [*backend]
        unknown = [name for name in wanted if name not in ALL_BACKENDS]
        if unknown:
            raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(ALL_BACKENDS)}, all")
    report = selftest.run(target, backends=wanted)
    if as_json:
        print_json(report.as_dict())
    else:
        _print(report)
    raise typer.Exit(0 if report.ok else 1)


def _print(report: selftest.Report) -> None:
    screen = console()
    table = Table(title=f"selftest of {report.target}")
    for heading in ("check", "backend", "result", "ms", "what"):
        table.add_column(heading, justify="right" if heading == "ms" else "left")
    for result in report.results:
        facts = ", ".join(f"{key}: {value}" for key, value in result.facts.items())
        colour = _COLOURS[result.status]
        table.add_row(
            result.name,
            result.backend,
            f"[{colour}]{result.status}[/]",
            f"{result.seconds * 1000:.1f}",
            escape(result.detail or facts),  # an error's text may look like markup
        )
    screen.print(table)
    counts = ", ".join(f"{report.count(status)} {status}" for status in selftest.Status)
    screen.print(f"{counts}; {report.machine['cpu']}, kernel {report.machine['kernel']}")
