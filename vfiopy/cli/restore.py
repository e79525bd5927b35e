"""``vfiopy restore``."""

from __future__ import annotations

from typing import Annotated

import typer

import vfiopy
from vfiopy.cli.common import refusals_told

__all__ = ["run_restore"]


def run_restore(
    address: Annotated[str | None, typer.Argument(help="PCI address; left out: everything vfiopy bound.")] = None,
) -> None:
    """Give devices back to the drivers that they had before 'vfiopy bind', or before a script died."""
    with refusals_told():
        for one in vfiopy.restore(address):
            typer.echo(f"{one}: {vfiopy.function(one).driver or 'no driver'}")
