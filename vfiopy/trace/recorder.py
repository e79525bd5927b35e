"""Where events come in, from any thread, and go out to a sink in order."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, Protocol

from vfiopy.errors import VfioError
from vfiopy.trace.event import FORMAT, Event

__all__ = ["Recorder", "Sink", "header"]

_INTERVAL = 0.1  # seconds that an event waits at most
_BATCH = 256


class Sink(Protocol):
    """Where a trace goes. Called by one thread at a time, in this order: begin, write any number of times, end."""

    def begin(self, header: Mapping[str, Any]) -> None:
        """Take what the trace says of itself: see :func:`header`."""

    def write(self, events: Sequence[Event]) -> None:
        """Take the next events, sorted by time."""

    def end(self, events: int, lost: int) -> None:
        """Close. ``events`` were written, ``lost`` were not."""


def _version() -> str:
    from vfiopy import __version__  # noqa: PLC0415  the package's names come last

    return __version__


def header() -> dict[str, Any]:
    """What a trace says of itself before its first event."""
    return {
        "kind": "begin",
        "format": FORMAT,
        "vfiopy": _version(),
        "clock": "CLOCK_MONOTONIC",
        "time": time.monotonic_ns(),
        "unix_time": time.time_ns(),
        "pid": os.getpid(),
        "program": list(sys.orig_argv),
    }


class Recorder:
    """Takes events from any thread; a thread of its own hands them to the sink, at the latest after 0.1 s.

    Who reports faster than the sink writes waits for it: nothing is lost. With ``keep``, only the last events are
    kept, and written at the end, after a ``"lost"`` event that says how many came before. An event is lost
    otherwise when the sink fails, which :meth:`close` raises, or when its thread is interrupted on the way; both are
    counted.

    Forked children are not traced: they must not touch the devices.

    Args:
        sink: where it goes.
        keep: how many events are kept at most; None writes all.
        sync: hand over each event before the program goes on, for machines that may not survive the next access.
    """

    def __init__(self, sink: Sink, *, keep: int | None = None, sync: bool = False) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"a trace keeps at least 1 event, not {keep}")
        self._sink = sink
        self._keep = keep
        self._batch = 1 if sync else _BATCH
        self._buffer: deque[Event] = deque(maxlen=keep)
        self._lock = threading.RLock()  # a signal handler or finalizer may report in the middle of a report
        self._pid = os.getpid()
        self._taken = 0
        self._written = 0
        self._broken: Exception | None = None
        self._done = threading.Event()
        sink.begin(header())
        self._thread: threading.Thread | None = None
        if keep is None:
            self._thread = threading.Thread(target=self._flush_often, name="vfiopy trace", daemon=True)
            self._thread.start()

    @property
    def lost(self) -> int:
        """How many events were reported and are neither written nor kept for it."""
        return self._taken - self._written - len(self._buffer)

    def add(
        self,
        kind: str,
        device: str,
        caller: str,
        region: str | None = None,
        offset: int | None = None,
        width: int | None = None,
        value: int | None = None,
        facts: Mapping[str, Any] = {},
    ) -> None:
        """Take an event that happens now, in this thread."""
        if self._pid != os.getpid():
            return
        thread = threading.get_native_id()
        with self._lock:
            if self._done.is_set():
                return
            self._taken += 1
            self._buffer.append(
                Event(time.monotonic_ns(), kind, device, thread, caller, region, offset, width, value, facts)
            )
            if self._keep is None and len(self._buffer) >= self._batch:
                self._drain()

    def missed(self) -> None:
        """Count an event that could not be taken."""
        with self._lock:
            self._taken += 1

    def _drain(self) -> None:
        events: list[Event] = []
        with suppress(IndexError):  # one by one: what a signal handler or finalizer adds meanwhile comes along
            while True:
                events.append(self._buffer.popleft())
        events.sort(key=attrgetter("time"))
        if not events or self._broken is not None:
            return
        try:
            self._sink.write(events)
            self._written += len(events)
        except Exception as error:
            self._broken = error  # told by close(); what cannot be written now is counted as lost

    def flush(self) -> None:
        """Hand over what there is."""
        with self._lock:
            if self._keep is None:
                self._drain()

    def _flush_often(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.flush()

    def close(self) -> None:
        """Write what is left and end the sink. Idempotent.

        Raises:
            VfioError: the sink failed; says how many events were lost.
        """
        if self._pid != os.getpid() or self._done.is_set():
            return
        with self._lock:
            if self._done.is_set():
                return
            lost_before = self.lost
            if self._keep is not None and lost_before and self._buffer:
                last = self._buffer[0]
                text = Event(last.time, "lost", last.device, 0, "", facts={"count": lost_before})
                self._taken += 1
                kept = list(self._buffer)
                self._buffer = deque([text, *kept])
            self._drain()
            self._done.set()
            lost = self.lost
            try:
                self._sink.end(self._written, lost)
            except Exception as error:
                self._broken = self._broken or error
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._broken is not None:
            number = self._broken.errno if isinstance(self._broken, OSError) else None
            raise VfioError(
                f"the trace could not be written: {self._broken}; {lost} events are lost", errno=number, object="trace"
            ) from self._broken
