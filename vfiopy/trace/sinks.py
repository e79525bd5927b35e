"""Where traces go: JSON lines, text, a list."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from vfiopy.trace.event import Event, to_json
from vfiopy.trace.words import Folder, event_words, repeated

__all__ = ["Collect", "JsonLines", "Text", "open_output"]


def open_output(target: str | Path | TextIO) -> tuple[TextIO, bool]:
    """Return a file to write to, and whether it is ours to close."""
    if isinstance(target, str | Path):
        return Path(target).open("w", encoding="utf-8"), True
    return target, False


class _FileSink:
    def __init__(self, target: str | Path | TextIO) -> None:
        self._file, self._owned = open_output(target)

    def _finish(self) -> None:
        try:
            self._file.flush()
        finally:
            if self._owned:
                self._file.close()


class JsonLines(_FileSink):
    """A JSON object to a line: one of kind ``"begin"``, the events, one of kind ``"end"``.

    Args:
        target: path, or a text file that stays open.
    """

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the first line."""
        self._put(header)
        self._file.flush()

    def write(self, events: Sequence[Event]) -> None:
        """Write a line for each, and have the kernel take them."""
        for event in events:
            self._put(to_json(event))
        self._file.flush()

    def end(self, events: int, lost: int) -> None:
        """Write the last line and close."""
        try:
            self._put({"kind": "end", "events": events, "lost": lost})
        finally:
            self._finish()

    def _put(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


class Text(_FileSink):
    """A line of text for each event: seconds since the first, what, who. Repetitions of a line are counted.

    Args:
        target: path, or a text file that stays open.
    """

    def __init__(self, target: str | Path | TextIO) -> None:
        super().__init__(target)
        self._start = 0
        self._folder = Folder()

    def begin(self, header: Mapping[str, Any]) -> None:
        """Note the time that the lines count from."""
        self._start = header["time"]

    def write(self, events: Sequence[Event]) -> None:
        """Write a line for each."""
        for event in events:
            shown, left_out = self._folder.feed(event)
            if left_out:
                self._file.write(repeated(left_out) + "\n")
            if shown:
                words = event_words(event, self._start)
                self._file.write("  ".join(text for text, _ in words if text).rstrip() + "\n")
        self._file.flush()

    def end(self, events: int, lost: int) -> None:  # noqa: ARG002
        """Say how many were lost, if any, and close."""
        try:
            left_out = self._folder.rest()
            if left_out:
                self._file.write(repeated(left_out) + "\n")
            if lost:
                self._file.write(f"{lost} events were lost\n")
        finally:
            self._finish()


class Collect:
    """Keeps events in a list, for tests and notebooks.

    Attributes:
        header: what the trace said of itself.
        events: so far.
        lost: how many were lost, once it is over.
    """

    def __init__(self) -> None:
        self.header: Mapping[str, Any] = {}
        self.events: list[Event] = []
        self.lost = 0

    def begin(self, header: Mapping[str, Any]) -> None:
        """Keep the header."""
        self.header = header

    def write(self, events: Sequence[Event]) -> None:
        """Keep the events."""
        self.events += events

    def end(self, events: int, lost: int) -> None:  # noqa: ARG002
        """Keep the count."""
        self.lost = lost
