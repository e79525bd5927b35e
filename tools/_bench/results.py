"""Rows of a benchmark, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Row", "merge", "print_table", "to_json"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        group: rows of a group are compared with each other.
        name: what was measured.
        value: median.
        low: 10th percentile.
        high: 90th percentile.
        unit: of value, low and high.
        ratio: value over the value of the group's baseline; None for what is not compared.
        baseline: this row is what the others are compared with.
        goal: largest ratio that the project wants; None where there is no goal.
        most: largest value that the project wants, in ``unit``; None where there is no goal.
        remark: what else has to be known about it.
    """

    group: str
    name: str
    value: float
    low: float
    high: float
    unit: str = "ns"
    ratio: float | None = None
    baseline: bool = False
    goal: float | None = None
    remark: str = ""
    most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goals are met; None without one."""
        answers = []
        if self.goal is not None and self.ratio is not None:
            answers.append(self.ratio <= self.goal)
        if self.most is not None:
            answers.append(self.value <= self.most)
        return all(answers) if answers else None


def merge(runs: Sequence[list[Row]]) -> list[Row]:
    """Combine the same rows from several processes: medians of medians, the widest spread."""
    merged = []
    for same in zip(*runs, strict=True):
        ratios = [row.ratio for row in same if row.ratio is not None]
        merged.append(
            replace(
                same[0],
                value=median(row.value for row in same),
                low=min(row.low for row in same),
                high=max(row.high for row in same),
                ratio=median(ratios) if ratios else None,
            )
        )
    return merged


def _goal(row: Row) -> str:
    if row.met is None:
        return ""
    wanted = [f"≤ {row.goal:.3g}x"] if row.goal is not None else []
    wanted += [f"≤ {row.most:g} {row.unit}"] if row.most is not None else []
    return f"[{'green' if row.met else 'red'}]{'met' if row.met else 'MISSED'}[/] ({', '.join(wanted)})"


def print_table(console: Console, title: str, notes: str, rows: Sequence[Row]) -> None:
    """Show a benchmark's rows."""
    table = Table(title=title, title_justify="left", caption=notes, caption_justify="left")
    for heading in ("", "what"):
        table.add_column(heading)
    units = {row.unit for row in rows}
    for heading in (rows[0].unit if len(units) == 1 else "", "10-90 %", "ratio"):
        table.add_column(heading, justify="right")
    for heading in ("goal", "remark"):
        table.add_column(heading)
    group = ""
    for row in rows:
        if row.group != group:
            table.add_section()
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x" if row.ratio >= 0.1 else f"1/{1 / row.ratio:.0f}"
        digits = 1 if row.value >= 1 else 3
        table.add_row(
            row.group if row.group != group else "",
            f"[bold]{escape(row.name)}[/]" if row.met is not None else escape(row.name),
            f"{row.value:.{digits}f}" + ("" if len(units) == 1 else f" {row.unit}"),
            f"{row.low:.{digits}f}-{row.high:.{digits}f}",
            f"{ratio} (baseline)" if row.baseline else ratio,
            _goal(row),
            escape(row.remark),
        )
        group = row.group
    console.print(table)


def to_json(machine: dict[str, object], results: dict[str, list[Row]]) -> str:
    """Return everything as JSON text."""
    benchmarks = {name: [{**asdict(row), "met": row.met} for row in rows] for name, rows in results.items()}
    return json.dumps({"machine": machine, "benchmarks": benchmarks}, indent=1) + "\n"
