"""The typer application, whole."""

from __future__ import annotations

from vfiopy.cli.commands import make_app

__all__ = ["app"]

app = make_app()
