"""``vfiopy dump``: a range of registers, or of memory: in hexadecimal, by the names of a map, or into a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from vfiopy.cli.common import console, print_json, refusals_told
from vfiopy.cli.numbers import hexadecimal, number, required_number
from vfiopy.cli.place import (
    BackendOption,
    Item,
    JsonOption,
    MapOption,
    OffsetArgument,
    Place,
    RegionArgument,
    TargetArgument,
    opened,
)
from vfiopy.cli.read import note
from vfiopy.errors import AccessError, RegisterNameError, VfioError
from vfiopy.registers import Array, Field, Register, Registers, config_registers
from vfiopy.registers.config_space import config_name, config_offset

__all__ = ["run_dump"]

_ROW = 16  # bytes
_LONG = 0x8000  # accesses that take long enough to show progress


def run_dump(
    target: TargetArgument,
    region: RegionArgument,
    offset: OffsetArgument,
    length: Annotated[
        str | None, typer.Argument(help="Bytes. It may be left out for a group of registers that is named.")
    ] = None,
    width: Annotated[int, typer.Option(help="Bytes of each access: 1, 2, 4 or 8.")] = 4,
    names: Annotated[
        bool, typer.Option("--names", help="Configuration space by names of registers and fields.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the bytes to this file, as they lie on the bus.")
    ] = None,
    map_file: MapOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a range, ascending, each access of one width. The range has to be said: nothing reads a whole BAR.

    With a map (or --names, for configuration space) shows its registers in this range and their fields, read with their
    own width. Registers whose read has a side effect are left out, and told.
    """
    with refusals_told(), opened(target, region, backend, map_file) as place:
        registers = place.registers
        if registers is None and place.config is not None and (names or number(offset) is None):
            registers = config_registers(place.config)
        start, size = _range(place, registers, offset, length)
        if registers is not None and output is None and (names or map_file is not None or length is None):
            _by_name(place, registers, start, size, as_json)
        else:
            _by_offset(place, start, size, width, output, as_json)


def _range(place: Place, registers: Registers | None, offset: str, length: str | None) -> tuple[int, int]:
    start = number(offset)
    if start is None and place.config is not None:
        start = config_offset(place.config, offset)
        offset = config_name(offset)
    if start is None:
        if registers is None:
            raise RegisterNameError(
                f"'{offset}' is no number, and {place.region} has names only with a map",
                object=place.device.name,
                hint="give --map FILE.rdl, or an offset such as 0x20",
            )
        found = registers[offset]
        if isinstance(found, Field):
            found = found.register
        if length is None:
            if isinstance(found, Array):
                found_all = [one for one in registers.registers() if one.path.startswith(f"{found.path}[")]
                end = max((one.offset + one.size for one in found_all), default=found.offset)
                return found.offset, end - found.offset
            if isinstance(found, Register | Registers):
                return found.offset, found.spec.size
        start = found.offset
    if length is None:
        raise typer.BadParameter("say how many bytes; nothing reads a whole region unasked", param_hint="LENGTH")
    size = required_number(length, "LENGTH")
    if start < 0 or not size or start + size > place.space.size:
        raise AccessError(
            f"{size:#x} bytes from {start:#x} are outside of its {place.space.size:#x} bytes", object=place.space.name
        )
    return start, size


def _answer(place: Place, start: int, size: int, **more: Any) -> dict[str, Any]:
    """What ``--json`` shows: values by offset, registers by name, or the file they are in; null for the others."""
    parts: dict[str, Any] = {"width": None, "values": None, "registers": None, "file": None, "notes": []}
    return {**place.heading(), "offset": start, "length": size, **parts, **more}


# --- by offset ---


def _by_offset(place: Place, start: int, size: int, width: int, output: Path | None, as_json: bool) -> None:
    space = place.space
    if width not in space.widths:
        raise AccessError(
            f"it has no accesses of {width} bytes",
            object=space.name,
            hint=f"widths are {', '.join(map(str, space.widths))} bytes",
        )
    if start % width or size % width:
        raise AccessError(
            f"{size:#x} bytes from {start:#x} are not whole accesses of {width} bytes",
            object=space.name,
            hint=f"take a range of multiples of {width}, or --width {_fitting(start | size, width)}",
        )
    values = _Values(_values(place, start, size, width), width)
    if output is not None:
        _into(output, values, width)
    elif as_json:
        shown = list(values)
    else:
        _print_rows(start, values, width)
    certain, notes = _silence(place, values.ones)
    if as_json and output is not None:
        print_json(_answer(place, start, size, width=width, file=str(output), notes=notes))
    elif as_json:
        print_json(_answer(place, start, size, width=width, values=shown, notes=notes))
    else:
        if output is not None:
            typer.echo(f"{size} bytes in {output}")
        note(notes)
    raise typer.Exit(1 if certain else 0)


class _Values:
    """Values as they are read; afterwards, whether all bits of all of them were ones."""

    def __init__(self, values: Iterator[int], width: int) -> None:
        self._values = values
        self._full = (1 << 8 * width) - 1
        self.ones = True

    def __iter__(self) -> Iterator[int]:
        for value in self._values:
            self.ones &= value == self._full
            yield value


def _silence(place: Place, ones: bool) -> tuple[bool, list[str]]:
    """Say whether a device that gave nothing but ones is certainly silent, and why."""
    if not ones:
        return False, []
    certain, why = place.silence()
    return certain, [f"all ones: device gone or sleeping? {why}"]


def _into(output: Path, values: Iterable[int], width: int) -> None:
    try:
        with output.open("wb") as file:
            for value in values:
                file.write(value.to_bytes(width, "little"))
    except VfioError:
        raise
    except OSError as error:
        raise VfioError("cannot be written", errno=error.errno, object=str(output), call="write") from None


def _print_rows(start: int, values: Iterable[int], width: int) -> None:
    screen = console()
    row: list[int] = []
    at = start
    for value in values:
        row.append(value)
        if len(row) == _ROW // width:
            screen.print(_row(at, row, width))
            at, row = at + _ROW, []
    if row:
        screen.print(_row(at, row, width))


def _fitting(bits: int, width: int) -> int:
    return next(one for one in (4, 2, 1) if one < width and not bits % one)


def _values(place: Place, start: int, size: int, width: int) -> Iterator[int]:
    with Progress(console=Console(stderr=True), disable=size // width < _LONG or not sys.stderr.isatty()) as progress:
        task = progress.add_task("reading", total=size)
        for offset in range(start, start + size, width):
            yield place.space.read(offset, width)
            if not offset % 0x1000:
                progress.update(task, completed=offset - start)
        progress.update(task, completed=size)


def _row(offset: int, values: list[int], width: int) -> Text:
    columns = " ".join(f"{value:0{2 * width}x}" for value in values)
    data = b"".join(value.to_bytes(width, "little") for value in values)
    letters = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in data)
    full = _ROW // width * (2 * width + 1) - 1
    return Text.assemble((f"{offset:08x}", "dim"), f"  {columns:<{full}}  ", (letters, "cyan"))


# --- by name ---


def _by_name(place: Place, registers: Registers, start: int, size: int, as_json: bool) -> None:
    rows: list[tuple[Item, int | None, str]] = []
    for one in registers.registers(start, start + size):
        item = Item(place.space, one.offset, one.size, one)
        left_out = one.spec.side_effect or ("" if one.spec.readable else "write-only")
        rows.append((item, None if left_out else one.read(), left_out))
    if not rows:
        raise AccessError(
            f"the map has no register that lies in {start:#x} to {start + size - 1:#x}", object=place.space.name
        )
    read = [item.is_all_ones(value) for item, value, _ in rows if value is not None]
    certain, notes = _silence(place, bool(read) and all(read))
    if as_json:
        described = [{**_described(item, value), "left_out": left_out or None} for item, value, left_out in rows]
        print_json(_answer(place, start, size, registers=described, notes=notes))
    else:
        console().print(_table(rows))
        note(notes)
    raise typer.Exit(1 if certain else 0)


def _described(item: Item, value: int | None) -> dict[str, Any]:
    if value is not None:
        return item.describe(value)
    answer = item.describe(0)
    return {**answer, "value": None, "hex": None, "fields": []}


def _table(rows: list[tuple[Item, int | None, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")
    for item, value, left_out in rows:
        spec = item.register.spec if item.register is not None else None
        text = "" if spec is None else spec.text
        shown = Text(f"not read: {left_out}", style="yellow") if value is None else Text(hexadecimal(value, item.width))
        table.add_row(Text(f"{item.offset:#06x}", style="dim"), Text(item.name or "", style="bold cyan"), shown, text)
        if value is None or spec is None:
            continue
        for one in reversed(spec.fields):
            content = one.extract(value)
            style = "" if content else "dim"
            table.add_row(
                "",
                Text(f"  {one.name} [{one.bits}]", style=style),
                Text(f"  {content if content < 10 else hex(content)}", style=style),
                Text("  ".join(filter(None, (one.words(content), one.text))), style="dim"),
            )
    return table
