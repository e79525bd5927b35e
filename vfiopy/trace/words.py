"""An event as a line for people."""

from __future__ import annotations

import os.path

from vfiopy.trace.event import Event

__all__ = ["Folder", "event_words", "repeated"]


def event_words(event: Event, start: int = 0) -> list[tuple[str, str]]:
    """Say an event in columns of (text, what it is): time, kind, what, caller.

    Args:
        event: the event.
        start: the time that is shown as 0, ns.
    """
    caller = os.path.basename(event.caller)  # noqa: PTH119  a text with a line number, not a path
    return [
        (f"{(event.time - start) / 1e9:12.6f}", "time"),
        (f"{event.kind:<6}", event.kind),
        (f"{_what(event):<44}", "what"),
        (caller, "caller"),
    ]


def repeated(times: int) -> str:
    """Say how many events were left out because they only repeat the line above."""
    return f"{'':12}  {'':6}  ... {times} more of the same"


def _what(event: Event) -> str:  # noqa: PLR0911  one for each kind
    facts = event.facts
    if event.kind in ("read", "write"):
        arrow = "->" if event.kind == "read" else "<-"
        return f"{_place(event)} {arrow} {_value(event.value, event.width)}"
    if event.kind == "poll":
        return f"{_place(event)} & {facts['mask']:#x} == {event.value:#x}"
    if event.kind == "error":
        place = f" {_place(event)}" if event.region else ""
        return f"{facts['operation']}{place}: {facts['error']}: {facts['text']}"
    if event.kind == "irq":
        vector = f" vector {facts['vector']}" if "vector" in facts else ""
        count = f" x{facts['count']}" if facts.get("count", 1) != 1 else ""
        return f"{facts['interrupt']} {facts['operation']}{vector}{count}"
    if event.kind == "map":
        there = ", there before" if facts.get("existing") else ""
        return f"{facts['iova']:#x} {facts['size']:#x} bytes {facts['prot']} {facts['memory']}{there}"
    if event.kind == "unmap":
        return f"{facts['iova']:#x} {facts['bytes']:#x} bytes"
    if event.kind == "hold":
        return f"{facts['region']}+{facts['offset']:#x} {facts['size']:#x} bytes by address: {facts['label']}"
    if event.kind == "memory":
        return f"{facts['iova']:#x} {len(facts['data']) // 2:#x} bytes changed"
    if event.kind == "open":
        return f"{event.device} by {facts['backend']}"
    if event.kind == "lost":
        return facts.get("reason") or f"{facts['count']} earlier events were not kept"
    return event.device


def _place(event: Event) -> str:
    return f"{event.region}+{event.offset:#x}/{event.width}"


def _value(value: int | None, width: int | None) -> str:
    return "?" if value is None else f"{value:#0{2 * (width or 0) + 2}x}"


class Folder:
    """Leaves out events that only repeat the one before: a poll reads the same register thousands of times."""

    def __init__(self) -> None:
        self._last: Event | None = None
        self._times = 0

    def feed(self, event: Event) -> tuple[bool, int]:
        """Return whether the event is to be shown, and how many were left out before it."""
        last, self._last = self._last, event
        if last is not None and event.kind in ("read", "write") and event._replace(time=last.time) == last:
            self._times += 1
            return False, 0
        left_out, self._times = self._times, 0
        return True, left_out

    def rest(self) -> int:
        """Return how many were left out at the end."""
        left_out, self._times = self._times, 0
        return left_out
