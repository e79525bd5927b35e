"""``vfiopy new-device``: the beginning of an emulated device of one's own."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from vfiopy.cli.common import print_json

__all__ = ["run_new_device"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def run_new_device(
    name: Annotated[str, typer.Argument(help="What to call it, in lower case with hyphens: my-device.")],
    folder: Annotated[Path, typer.Option(help="Where to put the file.")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Write the beginning of an emulated device of your own: it runs, with registers, DMA and an interrupt."""
    if _NAME.fullmatch(name) is None:
        raise typer.BadParameter(f"{name!r} is not made of lower-case letters, digits and hyphens")
    text = resources.files("vfiopy.emulated").joinpath("template.py").read_text(encoding="utf-8")
    words = name.split("-")
    for old, new in (
        ("NewDevice", "".join(word.capitalize() for word in words)),
        ("new-device", name),
        ("new_device", "_".join(words)),
    ):
        text = text.replace(old, new)
    path = folder / f"{'_'.join(words)}.py"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        typer.echo(f"vfiopy: {path}: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    if as_json:
        print_json({"format": 1, "file": str(path), "name": name})
    else:
        typer.echo(f"{path}: try it with: python {path} /tmp/{name}.sock")
