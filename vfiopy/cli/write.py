"""``vfiopy write``: one register, or some bits of it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vfiopy.cli.common import print_json, refusals_told
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
    WidthOption,
    opened,
)
from vfiopy.cli.read import note
from vfiopy.errors import AccessError, RegisterNameError
from vfiopy.registers.config_space import hazard

__all__ = ["run_write"]


def run_write(
    target: TargetArgument,
    region: RegionArgument,
    offset: OffsetArgument,
    value: Annotated[str, typer.Argument(help="What to write; for a field also a name of its values.")],
    width: WidthOption = None,
    mask: Annotated[
        str | None, typer.Option(help="Change these bits only, VALUE being in their place: one read, one write.")
    ] = None,
    field: Annotated[
        str | None, typer.Option(help="Change this field of a named register only: one read, one write.")
    ] = None,
    read_back: Annotated[bool, typer.Option("--read-back", help="Read it afterwards, and show what it reads.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Even what may do harm: BARs, command, power state, ...")
    ] = False,
    map_file: MapOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a register with one access; nothing is read, unless --mask, a field or --read-back ask for it.

    A device that has a function reset is reset when it is closed, or opened again: a note says so.
    """
    with refusals_told(), opened(target, region, backend, map_file) as place:
        item = _item(place, offset, width, field)
        if place.config is not None and not force:
            why = hazard(place.config, item.offset, item.width)
            if why is not None:
                raise AccessError(
                    f"a write to {item.name or hex(item.offset)} may do harm: {why}",
                    object=place.config.name,
                    hint="--force writes it anyway",
                )
        before, written = _write(item, value, mask, force)
        after = None
        if read_back:
            whole = Item(item.space, item.offset, item.width, item.register)
            after = whole.read()
        notes = _notes(place)
        if as_json:
            answer: dict[str, Any] = {**place.heading(), "offset": item.offset, "width": item.width, "name": item.name}
            print_json({**answer, "before": before, "written": written, "read_back": after, "notes": notes})
            return
        words = [f"{item.name or hex(item.offset)}:"]
        if before is not None:
            words.append(f"{hexadecimal(before, item.width)} ->")
        words.append(hexadecimal(written, item.width))
        if after is not None:
            words.append(f"reads {hexadecimal(after, item.width)}")
        typer.echo(" ".join(words))
        note(notes)


def _item(place: Place, offset: str, width: int | None, field: str | None) -> Item:
    item = place.locate(offset, width)
    if field is None:
        return item
    item = place.known(item)
    if item.register is None:
        raise RegisterNameError(
            f"nothing is known of the fields at {offset}", object=place.device.name, hint="give --map, or --mask"
        )
    if item.field is not None:
        raise typer.BadParameter(f"{offset} is a field already", param_hint="--field")
    return Item(item.space, item.offset, item.width, item.register, item.register[field].spec, named=True)


def _write(item: Item, value: str, mask: str | None, force: bool) -> tuple[int | None, int]:
    """Return what was read before, if anything, and what was written."""
    register = item.register
    if (
        register is not None
        and register.spec.side_effect
        and (item.field is not None or mask is not None)
        and not force
    ):
        raise AccessError(
            f"changing a part takes a read, and {register.spec.side_effect}",
            object=register.path,
            hint="--force does it; or write all of it",
        )
    if item.field is not None and register is not None:
        if mask is not None:
            raise typer.BadParameter("a field has its own bits", param_hint="--mask")
        given = number(value)
        change = {item.field.name: value if given is None else given}
        register.merge(0, **change)  # what cannot be is refused before anything is read
        before = register.read() if register.spec.readable else None
        written = register.merge(before or 0, **change)
        register.write(written)
        return before, written
    new = required_number(value, "VALUE")
    if mask is None:
        if register is None:
            item.space.write(item.offset, item.width, new)
        else:
            register.write(new)
        return None, new
    bits = required_number(mask, "--mask")
    if new & ~bits or bits >> 8 * item.width:
        raise AccessError(
            f"{new:#x} has bits outside of the mask {bits:#x}, or the mask outside of {item.width} bytes",
            object=item.name or hex(item.offset),
            hint="VALUE is in its place: to set bit 7, --mask 0x80 with 0x80",
        )
    before = item.read()
    written = before & ~bits | new
    if register is None:
        item.space.write(item.offset, item.width, written)
    else:
        register.write(written)
    return before, written


def _notes(place: Place) -> list[str]:
    """What becomes of what was written: a function that has a reset does not keep it until the next command."""
    device = place.device
    if device.backend == "emulated" or not device.can_reset:
        return []
    who = "who opens it next resets it" if device.backend == "vfio-user" else "the kernel resets it when it is closed"
    return [f"what was written is lost: {who}; to go on with it, stay in one process: vfiopy shell {device.name}"]
