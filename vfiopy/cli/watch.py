"""``vfiopy watch``: registers as they change."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from vfiopy.cli.common import console, refusals_told
from vfiopy.cli.numbers import hexadecimal
from vfiopy.cli.place import (
    BackendOption,
    Item,
    MapOption,
    Place,
    RegionArgument,
    TargetArgument,
    WidthOption,
    opened,
)
from vfiopy.cli.read import note

__all__ = ["run_watch"]


@dataclass(slots=True)
class _Watched:
    """One register, and what it did so far."""

    item: Item
    value: int = 0
    before: int | None = None
    changes: int = 0
    when: datetime = datetime.min
    ones: bool = False

    def look(self, first: bool) -> bool:
        """Read it; return whether it is another value than last time."""
        value = self.item.read()
        if not first and value == self.value:
            return False
        self.before = None if first else self.value
        self.value = value
        self.changes += not first
        self.when = datetime.now().astimezone()
        return True


def run_watch(
    target: TargetArgument,
    region: RegionArgument,
    offsets: Annotated[
        list[str], typer.Argument(help="Offsets, names, groups; each register is read once in each interval.")
    ],
    width: WidthOption = None,
    interval: Annotated[float, typer.Option(min=0.001, help="Seconds from one look to the next.")] = 0.5,
    times: Annotated[int, typer.Option(min=0, help="Look so many times; 0: until Ctrl-C.")] = 0,
    changes: Annotated[
        bool, typer.Option("--changes", help="A line for each change, on a terminal too, instead of a table.")
    ] = False,
    map_file: MapOption = None,
    backend: BackendOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each change and nothing else.")] = False,
) -> None:
    """Look at registers again and again: a table on a terminal, one line for each change in a pipe.

    Reads what is named and nothing else. Ends with Ctrl-C or SIGTERM; the device is closed then.
    """
    with refusals_told(), opened(target, region, backend, map_file) as place:
        items: list[Item] = []
        for one in offsets:
            found, left_out = place.locate_all(one, width)
            items += found
            note(left_out)
        if place.registers is not None:
            items = [place.known(item) for item in items]
        watched = [_Watched(item) for item in items]
        with _stopping() as stop:
            rounds = _rounds(interval, times, stop)
            if as_json or changes or not sys.stdout.isatty():
                _lines(place, watched, rounds, as_json)
            else:
                _table(place, watched, rounds, interval)


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the device is closed in peace."""
    stop = threading.Event()
    old = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _rounds(interval: float, times: int, stop: threading.Event) -> Iterator[int]:
    """Yield 0, 1, ... at each interval; where a look took longer, the next ones are not made up for."""
    begin = time.monotonic()
    number = 0
    while not stop.is_set() and (not times or number < times):
        yield number
        number += 1
        if times and number >= times:
            return
        now = time.monotonic()
        begin = max(begin + interval, now)
        stop.wait(begin - now)


def _ones(place: Place, one: _Watched) -> list[str]:
    """What to say of a value that is all ones: once, not with each look."""
    if one.ones or not one.item.is_all_ones(one.value):
        return []
    one.ones = True
    return [f"{_name(one.item)}: all ones: device gone or sleeping? {place.silence()[1]}"]


def _name(item: Item) -> str:
    return item.name or f"{item.offset:#06x}"


def _shown(item: Item, value: int) -> str:
    return hexadecimal(value, item.width) if item.field is None else hex(value)


def _what_changed(item: Item, before: int | None, value: int) -> str:
    """Fields that changed, in words."""
    if item.field is not None:
        return item.field.words(value)
    if item.register is None:
        return ""
    words = []
    for one in reversed(item.register.spec.fields):
        old, new = None if before is None else one.extract(before), one.extract(value)
        if new if old is None else old != new:
            name = one.words(new)
            words.append(f"{one.name}={name or (new if new < 10 else hex(new))}")
    return " ".join(words)


def _lines(place: Place, watched: list[_Watched], rounds: Iterator[int], as_json: bool) -> None:
    for number in rounds:
        for one in watched:
            if not one.look(number == 0):
                continue
            item = one.item
            if as_json:
                answer: dict[str, Any] = {**place.heading(), "time": one.when.isoformat(), "before": one.before}
                typer.echo(json.dumps({**answer, **item.describe(one.value)}))
            else:
                before = "" if one.before is None else f"{_shown(item, one.before)} -> "
                words = _what_changed(item, one.before, one.value)
                line = f"{one.when:%H:%M:%S.%f}  {_name(item)}  {before}{_shown(item, one.value)}  {words}"
                typer.echo(line.rstrip())
            note(_ones(place, one))
        sys.stdout.flush()


def _table(place: Place, watched: list[_Watched], rounds: Iterator[int], interval: float) -> None:
    notes: list[str] = []

    def draw(number: int) -> Table:
        table = Table(
            title=f"{place.device.name} {place.region}, every {interval:g} s, look {number + 1}; Ctrl-C ends",
            title_justify="left",
            title_style="dim",
            box=None,
            pad_edge=False,
        )
        for heading in ("register", "value", "changes", "last", "fields"):
            table.add_column(
                heading, header_style="bold", overflow="fold", justify="right" if heading == "changes" else "left"
            )
        for one in watched:
            fresh = one.changes and (datetime.now().astimezone() - one.when).total_seconds() < 2 * interval
            table.add_row(
                Text(_name(one.item), style="cyan"),
                Text(_shown(one.item, one.value), style="bold yellow" if fresh else "bold"),
                str(one.changes),
                f"{one.when:%H:%M:%S}" if one.changes else "",
                Text(_what_changed(one.item, None, one.value), style="dim"),
            )
        for text in notes:
            table.caption = Text(text, style="yellow")
        return table

    with Live(console=console(), auto_refresh=False, transient=False) as live:
        for number in rounds:
            for one in watched:
                one.look(number == 0)
                notes += _ones(place, one)
            live.update(draw(number), refresh=True)
