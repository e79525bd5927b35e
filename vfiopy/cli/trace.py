"""``vfiopy trace``: what a program does with its devices, line by line."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from vfiopy.trace import Event, JsonLines, Perfetto, Selection, Sink
from vfiopy.trace import Text as PlainText
from vfiopy.trace.collector import Collected, collect
from vfiopy.trace.words import Folder, event_words, repeated

__all__ = ["run_trace"]

_STYLES = {
    "time": "dim",
    "caller": "dim",
    "read": "green",
    "write": "yellow",
    "irq": "magenta",
    "map": "cyan",
    "unmap": "cyan",
    "memory": "cyan",
    "error": "bold red",
    "lost": "bold red",
    "hold": "bold red",
    "reset": "bold",
}


class Format(StrEnum):
    """Ways to write a trace."""

    TEXT = "text"
    JSONL = "jsonl"
    PERFETTO = "perfetto"


_BY_NAME = {".jsonl": Format.JSONL, ".json": Format.PERFETTO, ".perfetto": Format.PERFETTO}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Not rich's answer, which is to exit: the program that is traced goes on."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class _Screen:
    """A line for each event on standard error: standard output is the program's."""

    def __init__(self) -> None:
        self._console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self._start = 0
        self._folder = Folder()

    def begin(self, header: Mapping[str, Any]) -> None:
        self._start = header["time"]

    def write(self, events: Sequence[Event]) -> None:
        for event in events:
            shown, left_out = self._folder.feed(event)
            self._repeated(left_out)
            if shown:
                words = event_words(event, self._start)
                line = Text("  ").join(Text(text, style=_STYLES.get(what, "")) for text, what in words if text)
                line.rstrip()
                self._console.print(line)

    def _repeated(self, times: int) -> None:
        if times:
            self._console.print(Text(repeated(times), style="dim"))

    def end(self, events: int, lost: int) -> None:
        self._repeated(self._folder.rest())
        words = f"{events} events" + (f", {lost} LOST" if lost else "")
        self._console.print(Text(words, style="bold red" if lost else "dim"))


def run_trace(
    command: Annotated[list[str], typer.Argument(help="A Python script, or any command, and its arguments.")],
    out: Annotated[Path | None, typer.Option(help="Write here instead of to the screen.")] = None,
    form: Annotated[
        Format | None, typer.Option("--format", help="Left out: by the name of --out, which is .jsonl or .json.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--filter", help="bar0, bar0:0x20-0x3f, config, irq or dma; may be repeated. All by default."),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", help="Only devices that are opened by this name; may be repeated.")
    ] = None,
    contents: Annotated[
        bool, typer.Option("--contents", help="Record what DMA memory holds, as far as it changes. Slow.")
    ] = False,
    sync: Annotated[
        bool, typer.Option("--sync", help="Hand over each event before the program goes on, in case that it crashes.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON lines to standard output; what the program prints goes to stderr.")
    ] = False,
) -> None:
    """Run a program and record what it does with its devices: registers, interrupts, DMA maps, resets, errors.

    The program opens devices through vfiopy; nothing of it is changed. Ends with the program's exit status.
    """
    try:
        Selection(only or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--filter") from None
    if as_json and (out is not None or form not in (None, Format.JSONL)):
        raise typer.BadParameter("--json writes JSON lines to standard output; leave --out and --format out")
    line = _command_line(command)
    options = {"only": only or [], "devices": device or [], "contents": contents, "sync": sync}
    try:
        sink = JsonLines(sys.stdout) if as_json else _sink(out, form)
        result = collect(line, sink, options=options, stdout=sys.stderr if as_json else None)
    except OSError as error:
        typer.echo(f"vfiopy: {error.filename or out or 'the trace'}: {error.strerror}", err=True)
        raise typer.Exit(1) from None
    with suppress(BrokenPipeError):  # nobody reads standard error any more
        _tell(result, out)
    raise typer.Exit(result.status or (1 if result.error else 0))


def _command_line(command: list[str]) -> list[str]:
    """What to run. What cannot be is refused here, before an older trace is overwritten."""
    name = command[0]
    if name.endswith(".py"):
        found = Path(name).is_file()
        command = [sys.executable, *command]
    else:
        found = shutil.which(name) is not None
    if not found:
        typer.echo(f"vfiopy: {name}: no script or command that can be run", err=True)
        raise typer.Exit(1)
    return command


def _sink(out: Path | None, form: Format | None) -> Sink:
    kind = form or _BY_NAME.get(out.suffix if out else "", Format.TEXT)
    target = out or sys.stderr
    if kind is Format.JSONL:
        return JsonLines(target)
    if kind is Format.PERFETTO:
        return Perfetto(target)
    return _Screen() if out is None else PlainText(out)


def _tell(result: Collected, out: Path | None) -> None:
    if result.error is not None:
        where = out or "the trace"
        typer.echo(f"vfiopy: {where}: {result.error.strerror}; {result.lost} events were lost", err=True)
    elif not result.processes:
        typer.echo("vfiopy: the program opened no device through vfiopy", err=True)
    elif out is not None:
        lost = f", {result.lost} lost" if result.lost else ""
        typer.echo(f"vfiopy: {result.events} events{lost} in {out}", err=True)
