"""Timing, interleaved, so that a slow moment of the machine hits all contenders alike.

Statements are timed by the CPU time of this thread: what other programs take does not count. Loops, which enter the
kernel or wait for a device, time themselves, by the clock.
"""

from __future__ import annotations

import gc
import os
import random
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median, quantiles

from .results import Row

__all__ = ["Loop", "Statement", "compare", "compare_loops", "pin_to_one_cpu"]

TARGET = 0.02  # seconds for one sample: long against a timer tick, short against a disturbance


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement to time.

    Attributes:
        name: what it is called in the table.
        code: the statement.
        names: what its names mean; they become local variables.
        baseline: the one that the others are compared with.
        goal: largest ratio that is wanted.
        remark: for the table.
    """

    name: str
    code: str
    names: Mapping[str, object] = field(default_factory=dict)
    baseline: bool = False
    goal: float | None = None
    remark: str = ""

    def timer(self) -> timeit.Timer:
        """Make a timer whose names are local variables, as in a user's function."""
        setup = "; ".join(f"{name} = _names[{name!r}]" for name in self.names) or "pass"
        return timeit.Timer(self.code, setup, time.thread_time, {"_names": self.names})


@dataclass(frozen=True, slots=True)
class Loop:
    """A contender that times itself.

    Attributes:
        name: what it is called in the table.
        run: does the thing so many times; returns how long that took altogether, in ns.
        baseline: the one that the others are compared with.
        goal: largest ratio that is wanted.
        remark: for the table.
    """

    name: str
    run: Callable[[int], float]
    baseline: bool = False
    goal: float | None = None
    remark: str = ""


def pin_to_one_cpu() -> None:
    """Stay on one CPU: caches and clocks then are the same for all samples."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _loops(timer: timeit.Timer, seconds: float) -> int:
    count = 1000
    while (taken := timer.timeit(count)) < seconds / 4:
        count *= 4
    return max(1, int(count * seconds / taken))


def compare(group: str, statements: Sequence[Statement], *, rounds: int, seconds: float = TARGET) -> list[Row]:
    """Time statements against each other, in ns per execution without the loop around it.

    Each round takes one sample of every statement, in an order of its own; an empty statement goes along and its
    median is subtracted. A ratio is the median of the rounds' ratios.

    Args:
        group: for the rows.
        statements: what to time; at most one of them is the baseline.
        rounds: samples per statement.
        seconds: length of a sample.
    """
    timers = [Statement("", "pass").timer(), *(statement.timer() for statement in statements)]
    loops = [_loops(timer, seconds) for timer in timers]
    samples = _interleave(
        [partial(_per_execution, timer.timeit, n, 1e9) for timer, n in zip(timers, loops, strict=True)], rounds
    )
    floor = median(samples[0])
    return _rows(group, statements, [[value - floor for value in each] for each in samples[1:]], "ns")


def compare_loops(group: str, loops: Sequence[Loop], *, rounds: int, seconds: float = TARGET) -> list[Row]:
    """Time loops against each other, in µs per execution. See :func:`compare`; nothing is subtracted."""
    counts = []
    for loop in loops:
        loop.run(1)  # what happens the first time only is not of interest
        one = loop.run(1) / 1e9
        counts.append(max(1, min(10_000, int(seconds / max(one, 1e-9)))))
    samples = _interleave(
        [partial(_per_execution, loop.run, n, 1e-3) for loop, n in zip(loops, counts, strict=True)], rounds
    )
    return _rows(group, loops, samples, "µs")


def _per_execution(run: Callable[[int], float], count: int, scale: float) -> float:
    return run(count) / count * scale


def _rows(
    group: str, contenders: Sequence[Statement | Loop], samples: Sequence[Sequence[float]], unit: str
) -> list[Row]:
    base = next((samples[i] for i, contender in enumerate(contenders) if contender.baseline), None)
    rows = []
    for contender, each in zip(contenders, samples, strict=True):
        deciles = quantiles(each, n=10, method="inclusive")
        ratio = None if base is None else median(mine / its for mine, its in zip(each, base, strict=True))
        rows.append(
            Row(
                group=group,
                name=contender.name,
                value=median(each),
                low=deciles[0],
                high=deciles[-1],
                unit=unit,
                ratio=ratio,
                baseline=contender.baseline,
                goal=contender.goal,
                remark=contender.remark,
            )
        )
    return rows


def _interleave(runs: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Return the samples of each contender."""
    samples: list[list[float]] = [[] for _ in runs]
    order = list(range(len(runs)))
    shuffle = random.Random(5).shuffle
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for index in order:
                samples[index].append(runs[index]())
    finally:
        if enabled:
            gc.enable()
    return samples
