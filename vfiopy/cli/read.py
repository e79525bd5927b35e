"""``vfiopy read``: registers, each by one access of the width that was asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vfiopy.cli.common import console, print_json, refusals_told
from vfiopy.cli.numbers import hexadecimal
from vfiopy.cli.place import (
    BackendOption,
    Item,
    JsonOption,
    MapOption,
    OffsetArgument,
    Place,
    RegionArgument,
    TargetArgument,
    WidthOption,
    opened,
)

__all__ = ["field_table", "note", "run_read"]


def run_read(
    target: TargetArgument,
    region: RegionArgument,
    offset: OffsetArgument,
    width: WidthOption = None,
    count: Annotated[int, typer.Option(min=1, help="So many accesses, at ascending offsets.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Read so many times.")] = 1,
    interval: Annotated[float, typer.Option(min=0, help="Seconds from one time to the next.")] = 0.0,
    fields: Annotated[
        bool | None,
        typer.Option("--fields/--no-fields", help="Show the fields of each register, where they are known."),
    ] = None,
    map_file: MapOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read registers: exactly the accesses that are asked for, none wider, none more often.

    Prints values in hexadecimal, and fields for what was asked for by name. Exit status 1 when all bits are ones
    because the device is gone, asleep, or does not decode.
    """
    with refusals_told(), opened(target, region, backend, map_file) as place:
        items = _items(place, offset, width, count, fields)
        show = any(item.named for item in items) if fields is None else fields
        samples: list[dict[str, Any]] = []
        gone = False
        for seconds, values in _read(items, repeat, interval):
            if as_json:
                described = [item.describe(value) for item, value in zip(items, values, strict=True)]
                samples.append({"seconds": seconds, "values": described})
            else:
                _print(items, values, show, f"{seconds:.6f}  " if repeat > 1 else "")
            gone |= any(item.is_all_ones(value) for item, value in zip(items, values, strict=True))
        certain, notes = False, []
        if gone:
            certain, why = place.silence()
            notes.append(f"all ones: device gone or sleeping? {why}")
        if as_json:
            print_json({**place.heading(), "samples": samples, "notes": notes})
        else:
            note(notes)
    raise typer.Exit(1 if certain else 0)


def note(notes: list[str]) -> None:
    """Tell what is not the answer itself."""
    for one in notes:
        typer.echo(f"vfiopy: {one}", err=True)


def _items(place: Place, offset: str, width: int | None, count: int, fields: bool | None) -> list[Item]:
    first = place.locate(offset, width)
    if count > 1 and first.named:
        raise typer.BadParameter(
            "goes with an offset, not with a name; 'vfiopy dump' shows a group", param_hint="--count"
        )
    space = first.space
    items = [Item(space, first.offset + index * first.width, first.width) for index in range(count)]
    items = [first] if first.named else items
    return [place.known(item) for item in items] if fields else items


def _read(items: list[Item], repeat: int, interval: float) -> Iterator[tuple[float, list[int]]]:
    begin = time.monotonic()
    for number in range(repeat):
        wait = begin + number * interval - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        now = time.monotonic() - begin
        yield now, [item.read() for item in items]


def _print(items: list[Item], values: list[int], show: bool, prefix: str) -> None:
    screen = console()
    for item, value in zip(items, values, strict=True):
        text = hexadecimal(value, item.width) if item.field is None else hex(value)
        if show and item.register is not None and item.field is None:
            screen.print(f"{prefix}[bold cyan]{item.name}[/] at {item.offset:#x}  {text}", highlight=False)
            if item.register.spec.fields:
                screen.print(field_table(item, value))
        elif show and item.field is not None:
            words = item.field.words(value)
            screen.print(f"{prefix}{text}{f'  {words}' if words else ''}")
        else:
            screen.print(f"{prefix}{f'{item.offset:#06x}  ' if len(items) > 1 else ''}{text}")


def field_table(item: Item, value: int) -> Table:
    """The fields of a register's value, from the highest bit down."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right")
    for one in reversed(() if item.register is None else item.register.spec.fields):
        content = one.extract(value)
        style = "bold" if content else "dim"
        shown = str(content) if content < 10 else hex(content)
        grid.add_row(
            Text(f"  {one.bits}", style="dim"),
            Text(one.name, style=style),
            Text(shown, style=style),
            Text(one.words(content)),
            Text(one.text, style="dim"),
        )
    return grid
