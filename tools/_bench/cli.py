"""Command line of tools/bench."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .machine import describe
from .registry import BENCHMARKS, Unavailable, load
from .results import Row, merge, print_table, to_json

__all__ = ["main"]

PROCESSES = 3
CANNOT = 3
"""Exit status: the benchmark needs something that is not here."""
TOOL = Path(__file__).resolve().parents[1] / "bench"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="How fast vfiopy is, against what else one could use. Run it with the project's Python "
        "(.venv/bin/python tools/bench) on a machine that has nothing else to do.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all)")
    parser.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--json", metavar="FILE", help="write the results there too; - for standard output only")
    parser.add_argument("--quick", action="store_true", help="a smoke test: the figures mean nothing")
    parser.add_argument("--check", action="store_true", help="exit status 1 when a goal is missed")
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def _in_processes(name: str, *, quick: bool) -> list[Row] | None:
    """Run a benchmark in several fresh processes: where code and data come to lie is different luck each time.

    Returns None where it cannot run; the benchmark has said why.
    """
    command = [sys.executable, str(TOOL), name, "--one-process", *(["--quick"] if quick else [])]
    runs = []
    for _ in range(1 if quick else PROCESSES):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode == CANNOT:
            return None
        if done.returncode:
            raise SystemExit(done.returncode)
        rows = json.loads(done.stdout)["benchmarks"][name]
        runs.append([Row(**{key: value for key, value in row.items() if key != "met"}) for row in rows])
    return merge(runs)


def _one_process(name: str, machine: dict[str, object], *, quick: bool) -> int:
    try:
        rows = load(name).run(quick=quick)
    except Unavailable as reason:
        print(f"tools/bench: {name} cannot run here: {reason}", file=sys.stderr)
        return CANNOT
    sys.stdout.write(to_json(machine, {name: rows}))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for."""
    options = _parser().parse_args(arguments)
    if options.list:
        for name in BENCHMARKS:
            print(f"{name:12} {load(name).TITLE}")
        return 0
    if unknown := [name for name in options.names if name not in BENCHMARKS]:
        print(f"tools/bench: there is no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2

    machine = describe()
    if options.one_process:
        return _one_process(options.names[0], machine, quick=options.quick)
    results: dict[str, list[Row]] = {}
    console = Console(stderr=options.json == "-")
    if not console.is_terminal:
        console.width = max(console.width, 140)
    for name in options.names or BENCHMARKS:
        with console.status(f"measuring {name} ..."):
            rows = _in_processes(name, quick=options.quick)
        if rows is None:
            if options.names:
                return CANNOT
            continue
        results[name] = rows
        print_table(console, f"{name}: {load(name).TITLE}", load(name).NOTES, results[name])
    console.print("; ".join(f"{key} {value}" for key, value in machine.items()), style="dim", highlight=False)
    if options.json:
        text = to_json(machine, results)
        if options.json == "-":
            sys.stdout.write(text)
        else:
            Path(options.json).write_text(text)
    missed = [row for rows in results.values() for row in rows if row.met is False]
    return 1 if options.check and missed else 0
