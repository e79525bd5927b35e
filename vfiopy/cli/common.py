"""What the commands share: where they read the system, how they print, how they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from vfiopy.errors import AccessError, PciAddressError, RegisterMapError, RegisterNameError, VfiopyError
from vfiopy.pci import System

__all__ = ["console", "print_json", "refusals_told", "system_of"]

_NONSENSE = (AccessError, PciAddressError, RegisterMapError, RegisterNameError)  # nobody can do that, ever
_WIDE = 10_000  # columns; nobody's pipe or file folds lines


def console() -> Console:
    """Standard output: colours and folding for a terminal, plain whole lines where it is piped."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def print_json(answer: Any) -> None:
    """Print JSON and nothing else."""
    typer.echo(json.dumps(answer, indent=2))


def system_of(context: typer.Context) -> System:
    """The file systems to read: this machine's, unless a test handed in others."""
    return context.obj if isinstance(context.obj, System) else System()


@contextmanager
def refusals_told() -> Iterator[None]:
    """Turn an error with a meaning and a hint into two lines and exit status 1, or 2 for what makes no sense."""
    try:
        yield
    except VfiopyError as error:
        typer.echo(f"vfiopy: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, _NONSENSE) else 1) from None
