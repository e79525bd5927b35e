"""What the benchmarks of the IOVA space have in common: sampling in turns, and the shape of the space."""

from __future__ import annotations

import gc
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from .results import Row

__all__ = ["BATCH", "HERE", "PAGE", "PAGE_SIZES", "USABLE", "Measure", "per_item", "rows_of"]

PAGE = mmap.PAGESIZE
HERE = 0x7F00_0000_0000
USABLE = [(0x1000, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)]
PAGE_SIZES = 0x4020_1000
BATCH = 2000


@dataclass(frozen=True, slots=True)
class Measure:
    """One row to be: ``sample`` returns a value each time it is called; the rest is as in :class:`Row`."""

    name: str
    sample: Callable[[], float]
    baseline: bool = False
    goal: float | None = None
    most: float | None = None
    remark: str = ""
    unit: str = "ns"


def rows_of(group: str, measures: Sequence[Measure], rounds: int) -> list[Row]:
    """Sample in turns, so that a slow moment of the machine hits all alike."""
    values: list[list[float]] = [[] for _ in measures]
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for measure, mine in zip(measures, values, strict=True):
                mine.append(measure.sample())
    finally:
        if enabled:
            gc.enable()
    base = next((mine for measure, mine in zip(measures, values, strict=True) if measure.baseline), None)
    rows = []
    for measure, mine in zip(measures, values, strict=True):
        deciles = quantiles(mine, n=10)
        ratio = None if base is None else median(a / b for a, b in zip(mine, base, strict=True))
        rows.append(
            Row(
                group=group,
                name=measure.name,
                value=median(mine),
                low=deciles[0],
                high=deciles[-1],
                unit=measure.unit,
                ratio=ratio,
                baseline=measure.baseline,
                goal=measure.goal,
                most=measure.most,
                remark=measure.remark,
            )
        )
    return rows


def per_item(work: Callable[[], object], count: int) -> float:
    """CPU time of a part of ``work``, which loops ``count`` times, without the loop itself: ns."""
    start = time.thread_time_ns()
    work()
    taken = time.thread_time_ns() - start
    start = time.thread_time_ns()
    for _ in range(count):
        pass
    return max(taken - (time.thread_time_ns() - start), 0) / count
