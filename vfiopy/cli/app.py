"""The typer application."""

from __future__ import annotations

import json
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vfiopy
from vfiopy import __version__, selftest, vfio_user
from vfiopy.selftest.runner import ALL_BACKENDS

__all__ = ["app"]

app = typer.Typer(
    help="Drive PCI devices from user space.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
_COLOURS = {
    selftest.Status.PASSED: "green",
    selftest.Status.FAILED: "bold red",
    selftest.Status.SKIPPED: "yellow",
}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vfiopy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold options of the program itself."""


@app.command("selftest")
def run_selftest(
    target: Annotated[str, typer.Argument(help="PCI address bound to vfio-pci, or emulated:edu.")],
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
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command("bind")
def run_bind(
    address: Annotated[str, typer.Argument(help="PCI address, such as 0000:00:05.0.")],
    driver: Annotated[str, typer.Option(help="Driver to bind to.")] = "vfio-pci",
    group: Annotated[bool, typer.Option("--group", help="The whole IOMMU group, without its bridges.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Even if the running system uses the device.")] = False,
) -> None:
    """Hand a device to vfio-pci until 'vfiopy restore' or the next boot. Remembers what was before."""
    with _refusals_told():
        binding = vfiopy.bind(address, driver, whole_group=group, force=force)
        binding.keep()
    for function in binding.functions:
        typer.echo(f"{function.address}: {function.driver}")


@app.command("restore")
def run_restore(
    address: Annotated[str | None, typer.Argument(help="PCI address; left out: everything vfiopy bound.")] = None,
) -> None:
    """Give devices back to the drivers that they had before 'vfiopy bind', or before a script died."""
    with _refusals_told():
        for one in vfiopy.restore(address):
            typer.echo(f"{one}: {vfiopy.function(one).driver or 'no driver'}")


@app.command("serve")
def run_serve(
    target: Annotated[str, typer.Argument(help="An emulated device (edu), or a PCI address bound to vfio-pci.")],
    socket: Annotated[Path, typer.Option(help="Where to listen; its folder is made with mode 0700.")],
    trust_files: Annotated[
        bool, typer.Option(help="Map memory files that the client could make shorter: it can then end the server.")
    ] = False,
) -> None:
    """Offer a device on a vfio-user socket, for QEMU or vfiopy, until Ctrl-C or SIGTERM."""
    name = target if ":" in target else f"emulated:{target}"
    with _refusals_told(), vfiopy.serve(name, socket, limits=vfio_user.Limits(trust_files=trust_files)) as server:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        # JSON and paths must stay in one piece, whatever the width of the terminal
        typer.echo(f"serving {name} at {socket}")
        typer.echo(f"QEMU:   -device {shlex.quote(server.qemu_option)}")
        typer.echo("        share its memory, or every DMA is a message: -m SIZE -machine memory-backend=ram \\")
        typer.echo("        -object memory-backend-memfd,id=ram,size=SIZE,share=on")
        typer.echo(f"vfiopy: vfiopy.open('vfio-user:{socket.absolute()}')")
        sys.stdout.flush()
        with suppress(KeyboardInterrupt):
            server.run()


@contextmanager
def _refusals_told() -> Iterator[None]:
    """Turn an error with a meaning and a hint into two lines and exit status 1."""
    try:
        yield
    except vfiopy.VfiopyError as error:
        typer.echo(f"vfiopy: {error}", err=True)
        raise typer.Exit(1) from None


def _print(report: selftest.Report) -> None:
    console = Console()
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
    console.print(table)
    counts = ", ".join(f"{report.count(status)} {status}" for status in selftest.Status)
    console.print(f"{counts}; {report.machine['cpu']}, kernel {report.machine['kernel']}")
