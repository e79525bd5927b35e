"""The commands by name, each in a module of its own, which is imported when its command is wanted."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Annotated, Any

import typer

from vfiopy import __version__

__all__ = ["COMMANDS", "make_app"]

# The module of this package that has the command as run_NAME, and what click is to know about its words.
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "list": ("list", {}),
    "info": ("info", {}),
    "doctor": ("doctor", {}),
    "bind": ("bind", {}),
    "unbind": ("bind", {}),
    "restore": ("bind", {}),
    "read": ("read", {}),
    "write": ("write", {}),
    "dump": ("dump", {}),
    "watch": ("watch", {}),
    "shell": ("shell", {}),
    # What follows the script and the target is the script's, options too.
    "run": ("run", {"allow_extra_args": True, "allow_interspersed_args": False}),
    "selftest": ("selftest", {}),
    "serve": ("serve", {}),
    "new-device": ("new_device", {}),
    "trace": ("trace", {"allow_interspersed_args": False}),
    "replay": ("replay", {}),
    "monitor": ("monitor", {}),
    "iova": ("iova", {}),
}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"vfiopy {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold options of the program itself."""


def make_app(names: Iterable[str] = COMMANDS) -> typer.Typer:
    """Make the program with these of its commands: importing the others takes longer than most of them run."""
    app = typer.Typer(
        help="Drive PCI devices from user space.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=True,
    )
    app.callback()(_options)
    for name in names:
        module, settings = COMMANDS[name]
        function = getattr(import_module(f"vfiopy.cli.{module}"), f"run_{name.replace('-', '_')}")
        app.command(name, context_settings=settings)(function)
    return app
