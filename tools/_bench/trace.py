"""(7) Tracing: what it costs while nobody traces, and per event while somebody does."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import vfiopy
from vfiopy.mmio import Region
from vfiopy.trace import Event, JsonLines, Perfetto, Sink, tracing

from .measure import Statement, compare, pin_to_one_cpu
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "tracing of register accesses"
NOTES = (
    "Plain memory stands for the BAR. An access tests one number, the span of the fast path, which is 0 while a region "
    "is traced: the code of an untraced access is the same with and without tracing in the program, and the first rows "
    "show it: a region that was never traced, one that was, one beside a region that is traced now. Traced accesses "
    "make an event (time, thread, caller, place, value); what the sink does with it, in batches, is in the figure. "
    "CPU time without the loop's own. Interleaved, medians, 3 processes."
)

SIZE = mmap.PAGESIZE
OFFSET = 8
UNTRACED = 1.05
"""Of a region that was never traced: what is more is not noise."""


class _Nothing:
    """A sink that does nothing."""

    def begin(self, _header: Mapping[str, Any]) -> None:
        """Do nothing."""

    def write(self, _events: Sequence[Event]) -> None:
        """Do nothing."""

    def end(self, _events: int, _lost: int) -> None:
        """Do nothing."""


def _traced(stack: ExitStack, address: int, sink: Sink, index: int = 2) -> Region:
    """A mapped region whose accesses go to a sink."""
    device = stack.enter_context(vfiopy.open("emulated:edu"))
    stack.enter_context(tracing(device, sink, only=[f"bar{index}"]))
    region = Region("benchmark", SIZE, [(0, address, SIZE)])
    observer = device.bars.observer
    assert observer is not None
    observer.region_opened(2, region)
    stack.callback(region.close)
    return region


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    pin_to_one_cpu()
    rounds, seconds = (3, 0.0005) if quick else (15, 0.01)
    with mmap.mmap(-1, SIZE) as memory, ExitStack() as stack:
        anchor = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(anchor)
        file = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
        never, before, beside = (Region("benchmark", SIZE, [(0, address, SIZE)]) for _ in range(3))
        traced = _traced(stack, address, _Nothing())
        before.set_trace(traced.trace)
        before.set_trace(None)
        names = {
            "never": never,
            "before": before,
            "beside": beside,
            "traced": traced,
            "others": _traced(stack, address, _Nothing(), index=1),
            "lines": _traced(stack, address, JsonLines(file)),
            "chrome": _traced(stack, address, Perfetto(file)),
            "o": OFFSET,
        }
        rows: list[Row] = []
        for group, code in (("untraced read", "{}.read32(o)"), ("untraced write", "{}.write32(o, 5)")):
            statements = [
                Statement("never traced", code.format("never"), names, baseline=True),
                Statement("traced before", code.format("before"), names, goal=UNTRACED),
                Statement("beside a traced region", code.format("beside"), names, goal=UNTRACED),
                Statement("of a traced device, not selected", code.format("others"), names, goal=UNTRACED),
            ]
            rows += compare(group, statements, rounds=rounds, seconds=seconds)
        events = [
            Statement("untraced", "never.read32(o)", names, baseline=True),
            Statement("traced, events thrown away", "traced.read32(o)", names),
            Statement("traced, JSON lines", "lines.read32(o)", names),
            Statement("traced, Perfetto", "chrome.read32(o)", names),
        ]
        rows += compare("one event (a read)", events, rounds=rounds, seconds=seconds)
        stack.close()
        for region in (never, before, beside):
            region.close()
        del names, traced, statements, events
        del anchor
        gc.collect()
    return rows
