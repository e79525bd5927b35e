"""Events of a trace, and the JSON that they become: one object to a line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["FORMAT", "KINDS", "Event", "from_json", "region_word", "to_json"]

FORMAT = 1
KINDS = (
    "open",
    "read",
    "write",
    "poll",
    "hold",
    "irq",
    "map",
    "unmap",
    "memory",
    "reset",
    "close",
    "error",
    "lost",
)
_NOTHING: Mapping[str, Any] = {}


class Event(NamedTuple):
    """One thing that a program did with a device.

    Attributes:
        time: nanoseconds, CLOCK_MONOTONIC. A read's is taken after it, a write's before it.
        kind: one of :data:`KINDS`.
        device: what the device was opened as.
        thread: kernel's id of the thread that did it.
        caller: ``"file:line"`` of who did it, outside of vfiopy; empty where there is no Python frame.
        region: ``"bar0"``, ``"rom"``, ``"config"``, ...; None for what has none.
        offset: bytes from the region's start.
        width: bytes of the access.
        value: that was read or written, as the program saw it.
        facts: the rest, by kind: see docs/tracing.md.
    """

    time: int
    kind: str
    device: str
    thread: int
    caller: str
    region: str | None = None
    offset: int | None = None
    width: int | None = None
    value: int | None = None
    facts: Mapping[str, Any] = _NOTHING


def region_word(index: int) -> str:
    """Return a region's word in traces, filters and masks, by VFIO's index."""
    if 0 <= index <= 5:
        return f"bar{index}"
    return {6: "rom", 7: "config", 8: "vga"}.get(index, f"region{index}")


def to_json(event: Event) -> dict[str, Any]:
    """Make an event ready for ``json.dumps``; what it does not have is left out."""
    answer: dict[str, Any] = {"time": event.time, "kind": event.kind, "device": event.device}
    if event.region is not None:
        answer |= {"region": event.region, "offset": event.offset, "width": event.width}
    if event.value is not None:
        answer["value"] = event.value
    answer |= event.facts
    answer |= {"thread": event.thread, "caller": event.caller}
    return answer


def from_json(record: Mapping[str, Any]) -> Event:
    """Undo :func:`to_json`. Raises ``KeyError`` where the object is no event."""
    facts = {key: value for key, value in record.items() if key not in Event._fields}
    known = {key: record[key] for key in ("region", "offset", "width", "value") if key in record}
    return Event(
        record["time"], record["kind"], record["device"], record["thread"], record["caller"], **known, facts=facts
    )
