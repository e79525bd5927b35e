"""What changed of a function since ``vfiopy info --save``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vfiopy.registers.config_tables import BRIDGE, CAPABILITIES, EXTENDED, FUNCTION

__all__ = ["compare", "config_rows", "load_snapshot", "print_changes", "save_snapshot"]

_ROW = 16
_KEYS = ("address", "name", "offset", "first")  # what tells one object of an array from the next


def config_rows(data: bytes) -> dict[str, Any]:
    """Configuration space as ``--json`` shows it: its size, and rows of 16 bytes by offset, without those of zeros."""
    rows = {f"{at:03x}": data[at : at + _ROW].hex(" ") for at in range(0, len(data), _ROW) if any(data[at : at + _ROW])}
    return {"size": len(data), "rows": rows}


def _config_bytes(config: dict[str, Any]) -> bytes:
    data = bytearray(config["size"])
    for at, row in config["rows"].items():
        piece = bytes.fromhex(row)
        data[int(at, 16) : int(at, 16) + len(piece)] = piece
    return bytes(data)


def save_snapshot(path: Path, facts: dict[str, Any]) -> None:
    """Write what ``--json`` shows to a file, whole or not at all."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        new.replace(path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        typer.echo(f"vfiopy: {path}: {error.strerror}", err=True)
        raise typer.Exit(1) from None


def load_snapshot(path: Path) -> dict[str, Any]:
    """Read what ``--save`` or ``--json`` wrote; exit status 2 for what is none."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        number = facts["format"]
        if number == 1:
            _config_bytes(facts["config"])
            return dict(facts)
        problem = f"it has format {number}, this vfiopy reads 1"
    except OSError as error:
        problem = str(error.strerror)
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = "not what 'vfiopy info ADDRESS --save FILE' writes"
    typer.echo(f"vfiopy: {path}: {problem}", err=True)
    raise typer.Exit(2)


def compare(before: dict[str, Any], after: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    """Return ``changes`` of facts and ``config`` bytes that differ.

    Args:
        before, after: what ``--json`` shows.
        ignore: paths, or beginnings of paths (``"power"``), that do not count; ``"config"`` for the bytes.
    """

    def counts(path: str) -> bool:
        return not any(path == one or path.startswith((f"{one}.", f"{one}[")) for one in ignore)

    old, new = ({path: value for path, value in _flat(facts, "") if counts(path)} for facts in (before, after))
    changes = [
        {"path": path, "before": old.get(path), "after": new.get(path)}
        for path in [*old, *(path for path in new if path not in old)]
        if old.get(path) != new.get(path)
    ]
    config = list(_config_changes(before, after)) if counts("config") else []
    sizes = [facts["config"]["size"] for facts in (before, after)]
    return {
        "different": bool(changes or config),
        "changes": changes,
        "config": config,
        "config_compared": min(sizes),
    }


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, one in value.items():
            if path or key not in ("config", "format"):
                yield from _flat(one, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for one in value:
            key = next((str(one[name]) for name in _KEYS if name in one), "")
            offset = f"@{one['offset']:#x}" if "offset" in one and "name" in one else ""
            yield from _flat(one, f"{path}[{key}{offset}]")
    else:
        yield path, value


def _config_changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[dict[str, Any]]:
    old, new = _config_bytes(before["config"]), _config_bytes(after["config"])
    end = min(len(old), len(new))
    at = 0
    while at < end:
        if old[at] == new[at]:
            at += 1
            continue
        first = at
        where = _where(after, first)
        while at < end and old[at] != new[at] and _where(after, at)[0] == where[0]:
            at += 1
        yield {
            "offset": first,
            "before": old[first:at].hex(" "),
            "after": new[first:at].hex(" "),
            "where": "".join(where),
        }


def _where(facts: dict[str, Any], offset: int) -> tuple[str, str]:
    """Name the register that a byte is of, and how far into it the byte is."""
    if offset < 0x40:
        layout = _config_bytes(facts["config"])[0x0E] & 0x7F
        rows, start, name = (BRIDGE if layout == 1 else FUNCTION), 0, ""
    else:
        extended = offset >= 0x100
        below = [one for one in facts["capabilities"] if one["extended"] == extended and one["offset"] <= offset]
        if not below:
            return "", ""
        owner = max(below, key=lambda one: int(one["offset"]))
        name, rows = (EXTENDED if extended else CAPABILITIES).get(owner["id"], (owner["name"], []))
        start = owner["offset"]
    for register, at, size, _ in rows:
        if at <= offset - start < at + size:
            more = offset - start - at
            return f"{name}.{register}" if name else register, f"+{more}" if more else ""
    return name, f"+{offset - start:#x}"


# --- for people ---


def print_changes(screen: Console, answer: dict[str, Any], name: str) -> None:
    """Show what differs: a line for each, before and after."""
    if not answer["different"]:
        screen.print(f"{name}: as it was")
        return
    screen.print(Text(name, style="bold cyan"))
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for heading in ("  what", "before", "after"):
        table.add_column(heading, overflow="fold")
    for one in answer["changes"]:
        table.add_row(Text(f"  {one['path']}"), *_sides(one["before"], one["after"]))
    for one in answer["config"]:
        place = Text(f"  config {one['offset']:#05x}").append(f"  {one['where']}", style="dim")
        table.add_row(place, Text(one["before"], style="red"), Text(one["after"], style="green"))
    screen.print(table)
    if answer["config"] and answer["config_compared"] <= 64:
        screen.print(Text("  configuration space was compared up to 0x40: the rest is root's", style="yellow"))


def _sides(before: Any, after: Any) -> tuple[Text, Text]:
    if isinstance(before, list) and isinstance(after, list):  # what went, and what came
        went = [one for one in before if one not in after]
        came = [one for one in after if one not in before]
        if went or came:
            return Text(_words(went), style="red"), Text(_words(came), style="green")
    return Text(_words(before), style="red"), Text(_words(after), style="green")


def _words(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)
