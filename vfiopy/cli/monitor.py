"""``vfiopy monitor``: what happens on the PCI bus and in its IOMMU, as it happens."""

from __future__ import annotations

import errno
import json
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.text import Text

from vfiopy.cli.common import console, refusals_told, system_of
from vfiopy.errors import VfioError
from vfiopy.pci import Event, Monitor, PciAddress, System, monitor
from vfiopy.pci.iommu_faults import IommuFault
from vfiopy.pci.kernel_log import LogEntry, LogReader

__all__ = ["run_monitor"]

_STYLES = {
    "fault": "bold red",
    "aer": "bold red",
    "lost": "bold red",
    "add": "green",
    "remove": "yellow",
    "bind": "green",
    "unbind": "yellow",
}
_WORDS = {
    "add": "the function appeared",
    "remove": "the function is gone",
    "unbind": "its driver let it go",
    "change": "something about it changed",
}

_Record = dict[str, Any]


def run_monitor(
    context: typer.Context,
    addresses: Annotated[list[str] | None, typer.Argument(help="Only these functions; all by default.")] = None,
    seconds: Annotated[float | None, typer.Option("--for", help="End after so many seconds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object to a line.")] = False,
) -> None:
    """Show what happens: functions that come, go, get or lose a driver; IOMMU faults; AER errors. Ctrl-C ends it.

    The kernel log takes root, or CAP_SYSLOG, on most systems; what cannot be seen is said first.
    """
    with refusals_told():
        wanted = {PciAddress.parse(text) for text in addresses or ()}
        show = _show_json if as_json else _Screen().show
        # not ignored, so that select ends at once
        before = [signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            with ExitStack() as stack:
                for record in _watch(system_of(context), stack, seconds):
                    address = record.get("address")
                    if not wanted or address is None or PciAddress.parse(address) in wanted:
                        show(record)
        except _EndedError:
            pass
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
                signal.signal(number, handler)


class _EndedError(Exception):
    """Ctrl-C, or SIGTERM."""


def _end(*_: object) -> None:
    raise _EndedError


def _watch(system: System, stack: ExitStack, seconds: float | None) -> Iterator[_Record]:
    """Yield records: the first says what is seen, and what is not."""
    bus = stack.enter_context(monitor(nodes=True))
    sources: list[tuple[Any, Callable[[], Iterator[_Record]]]] = [(bus, lambda: _bus_records(bus))]
    blind: list[dict[str, str]] = []
    try:
        log = stack.enter_context(LogReader(system))
    except VfioError as error:
        blind.append({"what": "IOMMU faults, AER errors, VFIO's messages", "reason": error.meaning, "hint": error.hint})
    else:
        sources.append((log, lambda: map(_log_record, log.wait(0))))
    yield {"format": 1, "kind": "begin", "time": time.time(), "blind": blind}

    selector = stack.enter_context(selectors.DefaultSelector())
    for source, read in sources:
        selector.register(source, selectors.EVENT_READ, read)
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        for key, _ in selector.select(left):
            yield from key.data()


def _record(kind: str, text: str, address: PciAddress | None = None, **more: Any) -> _Record:
    known = {"kind": kind, "time": time.time(), "address": str(address) if address else None, "text": text}
    return {**known, "driver": None, "node": None, "fault": None, **more}


def _bus_records(bus: Monitor) -> Iterator[_Record]:
    try:
        event = bus.wait(0)
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        yield _record("lost", "events of the bus were lost: too many at once")
    else:
        if event is not None:
            yield _bus_record(event)


def _bus_record(event: Event) -> _Record:
    text = _WORDS.get(event.action, event.action)
    if event.node:
        text = f"/dev/vfio/devices/{event.node} {'is there' if event.action == 'add' else 'is gone'}"
    elif event.driver and event.action in ("bind", "add"):
        text = f"{event.driver} has it"
    return _record(event.action, text, event.address, driver=event.driver, node=event.node)


def _log_record(entry: LogEntry) -> _Record:
    return _record(entry.kind.value, entry.text, entry.source, fault=_fault(entry.fault) if entry.fault else None)


def _fault(fault: IommuFault) -> _Record:
    return {**asdict(fault), "source": str(fault.source) if fault.source else None}


def _show_json(record: _Record) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


class _Screen:
    def __init__(self) -> None:
        self._console = console()

    def show(self, record: _Record) -> None:
        """Print a line."""
        if record["kind"] == "begin":
            for one in record["blind"]:
                words = f"not seen: {one['what']}: {one['reason']}; {one['hint']}"
                self._console.print(Text(words, style="yellow"))
            self._console.print(Text("watching; Ctrl-C ends it", style="dim"))
            return
        at = time.strftime("%H:%M:%S", time.localtime(record["time"])) + f".{int(record['time'] * 1000) % 1000:03d}"
        who = record["address"] or ""
        text = record["text"].removeprefix(f"{who}: ") if who else record["text"]
        kind = (f"{record['kind']:<6}", _STYLES.get(record["kind"], "cyan"))
        line = Text.assemble((at, "dim"), "  ", kind, "  ", (f"{who}  " if who else "", "bold"), text)
        self._console.print(line, soft_wrap=True)
