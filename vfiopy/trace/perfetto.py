"""Traces for ui.perfetto.dev and chrome://tracing.

The Trace Event Format of Chrome, which Perfetto reads too: accesses and interrupts are instants on the row of their
thread, mappings are spans of an address space, and the number of mapped bytes is a counter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vfiopy.trace.event import Event
from vfiopy.trace.sinks import open_output
from vfiopy.trace.words import event_words

__all__ = ["Perfetto"]


class Perfetto:
    """Writes one JSON object with ``traceEvents``.

    Args:
        target: path, or a text file that stays open.
    """

    def __init__(self, target: str | Path | TextIO) -> None:
        self._file, self._owned = open_output(target)
        self._pid = 0
        self._last = 0
        self._first = True
        self._threads: set[int] = set()
        self._mapped: dict[tuple[str, int], int] = {}

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write what stands before the events."""
        self._pid = header["pid"]
        other = {key: header[key] for key in ("vfiopy", "clock", "unix_time") if key in header}
        other["program"] = " ".join(header.get("program", ()))
        self._file.write(f'{{"displayTimeUnit":"ns","otherData":{json.dumps(other)},"traceEvents":[\n')
        name = Path(header["program"][-1]).name if header.get("program") else "vfiopy"
        self._put({"ph": "M", "name": "process_name", "pid": self._pid, "tid": 0, "args": {"name": name}})

    def write(self, events: Sequence[Event]) -> None:
        """Write events. Their times never go back: threads that overtook each other are put right by nanoseconds."""
        for event in events:
            if event.thread not in self._threads:
                self._threads.add(event.thread)
                args = {"name": f"thread {event.thread}"}
                self._put({"ph": "M", "name": "thread_name", "pid": self._pid, "tid": event.thread, "args": args})
            self._last = max(self._last, event.time)
            for record in self._records(event):
                self._put({**record, "pid": self._pid, "tid": event.thread, "ts": self._last / 1000})
        self._file.flush()

    def _records(self, event: Event) -> Iterator[dict[str, Any]]:
        args: dict[str, Any] = {"device": event.device, "caller": event.caller, **event.facts}
        if event.region is not None:
            place = {"region": event.region, "offset": f"{event.offset:#x}", "width": event.width}
            args |= {**place, "value": None if event.value is None else f"{event.value:#x}"}
        name = f"{event.kind} {event_words(event)[2][0].strip()}"
        if event.kind in ("map", "unmap"):
            yield from self._spans(event)
        yield {"ph": "i", "s": "t", "cat": _category(event), "name": name, "args": args}

    def _spans(self, event: Event) -> Iterator[dict[str, Any]]:
        facts = event.facts
        first = facts["iova"]
        if event.kind == "map":
            self._mapped[event.device, first] = facts["size"]
            yield self._span("b", event.device, first, facts["size"])
        else:
            end = first + (facts["size"] or 1)
            for device, iova in [key for key in self._mapped if key[0] == event.device and first <= key[1] < end]:
                yield self._span("e", device, iova, self._mapped.pop((device, iova)))
        total = sum(size for (device, _), size in self._mapped.items() if device == event.device)
        yield {"ph": "C", "cat": "dma", "name": f"mapped by {event.device}", "args": {"bytes": total}}

    @staticmethod
    def _span(phase: str, device: str, iova: int, size: int) -> dict[str, Any]:
        name = f"{iova:#x} {size:#x} bytes"
        return {"ph": phase, "cat": "dma", "name": name, "id": f"{device} {iova:#x}", "args": {"device": device}}

    def end(self, events: int, lost: int) -> None:  # noqa: ARG002
        """Close what is open, say what was lost, and close the file."""
        try:
            if lost:
                place = {"pid": self._pid, "tid": 0, "ts": self._last / 1000}
                self._put({"ph": "i", "s": "g", "cat": "lost", "name": f"{lost} events lost", "args": {}, **place})
            for (device, iova), size in self._mapped.items():
                place = {"pid": self._pid, "tid": 0, "ts": self._last / 1000}
                self._put({**self._span("e", device, iova, size), **place})
            self._file.write("\n]}\n")
            self._file.flush()
        finally:
            if self._owned:
                self._file.close()

    def _put(self, record: Mapping[str, Any]) -> None:
        self._file.write(("" if self._first else ",\n") + json.dumps(record))
        self._first = False


def _category(event: Event) -> str:
    if event.region is not None and event.kind != "error":
        return "register"
    return {"map": "dma", "unmap": "dma", "memory": "dma", "hold": "register"}.get(event.kind, event.kind)
