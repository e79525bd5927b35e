"""Reading a trace that was written as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vfiopy.errors import VfioError
from vfiopy.trace.event import FORMAT, Event, from_json
from vfiopy.trace.places import Place

__all__ = ["Recorded", "read_trace"]


_NEEDED: dict[str, dict[str, type]] = {
    "open": {"backend": str, "regions": dict},
    "poll": {"mask": int},
    "hold": {"size": int, "label": str},
    "irq": {"interrupt": str, "operation": str},
    "map": {"iova": int, "size": int, "prot": str, "memory": str},
    "unmap": {"iova": int, "bytes": int},
    "memory": {"iova": int, "data": str, "when": str},
    "error": {"operation": str, "error": str, "text": str},
}
_INTERRUPTS = ("intx", "msi", "msix", "error", "request")
_OPERATIONS = ("enable", "disable", "mask", "unmask", "replace", "trigger", "taken", "returned")


@dataclass(frozen=True, slots=True)
class Recorded:
    """A trace as it was written.

    Attributes:
        header: what it says of itself.
        events: in order.
        complete: it has an end, and lost nothing.
    """

    header: dict[str, Any]
    events: Sequence[Event]
    complete: bool

    def devices(self) -> list[str]:
        """Names of the devices in it, in order."""
        return list(dict.fromkeys(event.device for event in self.events))


def read_trace(path: str | Path) -> Recorded:
    """Read a trace.

    Raises:
        VfioError: it cannot be opened, or is no trace of this format; says in which line.
    """
    events: list[Event] = []
    header: dict[str, Any] = {}
    complete = False
    number = 0
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                record = json.loads(line)
                if number == 1:
                    header = _header(record)
                elif record["kind"] == "end":
                    complete = not record["lost"]
                else:
                    events.append(_checked(from_json(record)))
    except OSError as error:
        raise VfioError("the trace cannot be read", errno=error.errno, object=str(path), call="open") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise VfioError(
            f"line {number} is no line of a trace in format {FORMAT}",
            object=str(path),
            hint="write JSON lines to play again: vfiopy trace --out FILE.jsonl ...",
        ) from None
    if not events:
        raise VfioError(
            "there are no events in the trace", object=str(path), hint="did the program open its device through vfiopy?"
        )
    return Recorded(header, events, complete and not any(event.kind == "lost" for event in events))


def _checked(event: Event) -> Event:
    """Return an event that can be shown and played. Raises ``ValueError``, ``KeyError`` or ``TypeError``."""
    for name, kind in _NEEDED.get(event.kind, {}).items():
        _must(isinstance(event.facts[name], kind))
    if event.kind in ("read", "write", "poll"):
        word, offset, width, value = event.region or "", event.offset, event.width, event.value
        _must(Place.parse(word) == Place(word.lower()) and word not in ("irq", "dma"))
        _must(isinstance(offset, int) and offset >= 0)
        _must(isinstance(width, int) and (width in (1, 2, 4, 8) or word == "config"))
        _must(isinstance(value, int) and value >= 0 and (event.kind == "poll" or not value >> 8 * (width or 0)))
    elif event.kind == "irq":
        _must(event.facts["interrupt"] in _INTERRUPTS and event.facts["operation"] in _OPERATIONS)
    return event


def _must(true: bool) -> None:
    if not true:
        raise ValueError


def _header(record: dict[str, Any]) -> dict[str, Any]:
    if record["kind"] != "begin" or record["format"] != FORMAT:
        raise ValueError
    return record
