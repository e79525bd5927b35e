"""``vfiopy replay``: play a recorded trace, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

import vfiopy
from vfiopy.cli.common import console, print_json, refusals_told
from vfiopy.trace.event import Event
from vfiopy.trace.places import Place
from vfiopy.trace.reader import Recorded, read_trace
from vfiopy.trace.replay import Difference, Outcome, Replay
from vfiopy.trace.words import event_words

__all__ = ["run_replay"]

_SHOWN = 10


def run_replay(
    trace: Annotated[Path, typer.Argument(help="A trace in JSON lines: vfiopy trace --out FILE.jsonl ...")],
    target: Annotated[str, typer.Argument(help="The device: emulated:edu, vfio-user:PATH, 0000:00:05.0.")],
    check: Annotated[bool, typer.Option("--check", help="Compare each value that is read.")] = False,
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="Registers that may differ: bar0:0x20, bar0:0x20-0x3f, bits: bar0:0x24&0xff. Repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Which device of the trace, where it has several.")] = None,
    timeout: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for an interrupt, or for a polled register.")
    ] = 1.0,
    pace: Annotated[bool, typer.Option("--pace", help="Leave the time between events that was recorded.")] = False,
    exact: Annotated[
        bool, typer.Option("--exact", help="As many reads as were recorded, also in what looks like a polling loop.")
    ] = False,
    backend: Annotated[str | None, typer.Option(help="iommufd, type1v2, ...; the best one by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Play the accesses of a trace against a device. Exit status 1 when it failed, or answered differently.

    Bus mastering, interrupts and DMA buffers are switched and made as they were when the trace was recorded.
    """
    try:
        places = [Place.parse(text) for text in ignore or ()]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--ignore") from None
    with refusals_told():
        recorded = read_trace(trace)
        events = _of_one_device(recorded, device)
        with vfiopy.open(target, backend=backend) as opened:
            replay = Replay(opened, events, check=check, ignore=places, timeout=timeout, pace=pace, exact=exact)
            outcome = _play(replay)
    if as_json:
        print_json(_as_dict(trace, target, recorded, outcome))
    else:
        _print(recorded, outcome, check)
    raise typer.Exit(0 if outcome.ok else 1)


def _of_one_device(recorded: Recorded, name: str | None) -> list[Event]:
    names = recorded.devices()
    if name is None and len(names) > 1:
        raise typer.BadParameter(f"the trace has {', '.join(names)}: say which", param_hint="--device")
    if name is not None and name not in names:
        raise typer.BadParameter(f"the trace has no {name}, but {', '.join(names)}", param_hint="--device")
    return [event for event in recorded.events if name is None or event.device == name]


def _play(replay: Replay) -> Outcome:
    screen = Console(stderr=True)
    with Progress(console=screen, transient=True, disable=not screen.is_terminal) as progress:
        task = progress.add_task("replay", total=len(replay.steps))
        return replay.run(lambda done: progress.update(task, completed=done))


def _place(event: Event) -> dict[str, Any]:
    return {"region": event.region, "offset": event.offset, "width": event.width}


def _difference(one: Difference) -> dict[str, Any]:
    event = one.event
    place = {"event": one.number, "time": event.time, "kind": event.kind, **_place(event)}
    return {**place, "recorded": event.value, "found": one.found, "text": one.text, "caller": event.caller}


def _as_dict(trace: Path, target: str, recorded: Recorded, outcome: Outcome) -> dict[str, Any]:
    return {
        "format": 1,
        "ok": outcome.ok,
        "trace": str(trace),
        "target": target,
        "complete": recorded.complete,
        "played": outcome.played,
        "compared": outcome.compared,
        "relocated": outcome.relocated,
        "skipped": dict(outcome.skipped),
        "differences": [_difference(one) for one in outcome.differences],
    }


def _print(recorded: Recorded, outcome: Outcome, check: bool) -> None:
    screen = console()
    if outcome.differences:
        start = recorded.header["time"]
        table = Table("event", "time", "what", "difference", "who", title="first differences")
        for one in outcome.differences[:_SHOWN]:
            time, kind, what, caller = (text.strip() for text, _ in event_words(one.event, start))
            table.add_row(str(one.number), time, escape(f"{kind} {what}"), escape(one.text), escape(caller))
        screen.print(table)
    if not recorded.complete:
        screen.print("the trace is not complete: events were lost, or its program was killed", style="yellow")
    for reason, count in outcome.skipped.items():
        screen.print(f"not played: {count} {reason}", style="yellow")
    if outcome.relocated:
        screen.print(f"{outcome.relocated} buffers are at another IOVA than in the trace")
    compared = f"{outcome.compared} values compared" if check else "values were not compared (--check does)"
    number = len(outcome.differences)
    verdict = f": {number} difference{'s' if number > 1 else ''}" if number else ": no difference" if check else ""
    screen.print(f"{outcome.played} steps played, {compared}{verdict}")
