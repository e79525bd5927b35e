"""From the events of a trace to the steps of its replay: polls become one step each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from vfiopy.trace.event import Event

__all__ = ["Step", "plan"]

_Key = tuple[int, str | None, int | None, int | None, str]


@dataclass(frozen=True, slots=True)
class Step:
    """What is played at once.

    Attributes:
        number: of the event in the trace, from 1.
        event: the event; of a poll its last read.
        mask: this is a poll, until these bits read as they did in the end; None: one access.
        reads: how many reads the poll took.
    """

    number: int
    event: Event
    mask: int | None = None
    reads: int = 1


def plan(events: Sequence[Event], *, exact: bool = False) -> list[Step]:
    """Make steps of the events.

    A poll of the device's (``poll32()``) is told as such. In Python's own loops, reads of one register that all give
    the same value until the last are taken for a poll. Either is one step in the place of its last read.

    Args:
        events: of one device.
        exact: leave Python's loops as they are: as many reads as were recorded.
    """
    left_out: set[int] = set()
    polls: dict[int, tuple[int, int]] = {}  # index of the last read → mask, number of reads
    threads: dict[int, list[int]] = defaultdict(list)
    for index, event in enumerate(events):
        threads[event.thread].append(index)
    for indexes in threads.values():
        _find_polls(events, indexes, exact, left_out, polls)
    steps = []
    for index, event in enumerate(events):
        if index not in left_out:
            mask, reads = polls.get(index, (None, 1))
            steps.append(Step(index + 1, event, mask, reads))
    return steps


def _key(event: Event) -> _Key:
    return (event.thread, event.region, event.offset, event.width, event.caller)


def _find_polls(
    events: Sequence[Event], indexes: Sequence[int], exact: bool, left_out: set[int], polls: dict[int, tuple[int, int]]
) -> None:
    """Go through one thread's events."""
    at = 0
    while at < len(indexes):
        event = events[indexes[at]]
        if event.kind not in ("poll", "read"):
            at += 1
            continue
        begin = at + 1 if event.kind == "poll" else at
        end = begin
        while end < len(indexes) and events[indexes[end]].kind == "read" and _key(events[indexes[end]]) == _key(event):
            end += 1
        if event.kind == "poll":
            left_out.add(indexes[at])
            end = _end_of_poll(events, indexes, begin, end, event)
        values = [events[index].value for index in indexes[begin:end]]
        last = values[-1] if values else None
        mask = None
        if event.kind == "poll" and last is not None and last & event.facts["mask"] == event.value:
            mask = event.facts["mask"]
        elif event.kind == "read" and not exact and len(set(values[:-1])) == 1 and last != values[0]:
            mask = (1 << 8 * (event.width or 1)) - 1
        if mask is not None:
            left_out.update(indexes[begin : end - 1])
            polls[indexes[end - 1]] = (mask, len(values))
        at = max(end, at + 1)


def _end_of_poll(events: Sequence[Event], indexes: Sequence[int], begin: int, end: int, poll: Event) -> int:
    """The poll's own reads end with the first that fits; a read in the same line may follow it."""
    for at in range(begin, end):
        if (events[indexes[at]].value or 0) & poll.facts["mask"] == poll.value:
            return at + 1
    return end
