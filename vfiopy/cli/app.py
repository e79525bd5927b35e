"""The typer application."""

from __future__ import annotations

from typing import Annotated

import typer

from vfiopy import __version__
from vfiopy.cli.bind import run_bind, run_restore, run_unbind
from vfiopy.cli.doctor import run_doctor
from vfiopy.cli.dump import run_dump
from vfiopy.cli.info import run_info
from vfiopy.cli.iova import run_iova
from vfiopy.cli.list import run_list
from vfiopy.cli.monitor import run_monitor
from vfiopy.cli.new_device import run_new_device
from vfiopy.cli.read import run_read
from vfiopy.cli.replay import run_replay
from vfiopy.cli.run import run_run
from vfiopy.cli.selftest import run_selftest
from vfiopy.cli.serve import run_serve
from vfiopy.cli.shell import run_shell
from vfiopy.cli.trace import run_trace
from vfiopy.cli.watch import run_watch
from vfiopy.cli.write import run_write

__all__ = ["app"]

app = typer.Typer(
    help="Drive PCI devices from user space.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)


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


app.command("list")(run_list)
app.command("info")(run_info)
app.command("doctor")(run_doctor)
app.command("bind")(run_bind)
app.command("unbind")(run_unbind)
app.command("restore")(run_restore)
app.command("read")(run_read)
app.command("write")(run_write)
app.command("dump")(run_dump)
app.command("watch")(run_watch)
app.command("shell")(run_shell)
# What follows the script and the target is the script's, options too.
app.command("run", context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(run_run)
app.command("selftest")(run_selftest)
app.command("serve")(run_serve)
app.command("new-device")(run_new_device)
app.command("trace", context_settings={"allow_interspersed_args": False})(run_trace)
app.command("replay")(run_replay)
app.command("monitor")(run_monitor)
app.command("iova")(run_iova)
