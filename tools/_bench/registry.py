"""The benchmarks there are. A new one is a module with the attributes of :class:`Benchmark`, named here."""

from __future__ import annotations

import importlib
from typing import Protocol, cast

from .results import Row

__all__ = ["BENCHMARKS", "Benchmark", "Unavailable", "load"]

BENCHMARKS = {
    "mmio": "tools._bench.mmio",
    "dma_map": "tools._bench.dma_map",
    "irq": "tools._bench.irq",
    "iova": "tools._bench.iova",
    "vfio_user": "tools._bench.vfio_user",
    "p2p": "tools._bench.p2p",
    "nvme": "tools._bench.nvme",
    "trace": "tools._bench.trace",
}


class Unavailable(Exception):  # noqa: N818  it is no error that a machine has no such device
    """The benchmark needs something that this machine has not got; the text says what, and where to find it."""


class Benchmark(Protocol):
    """What a benchmark module has."""

    TITLE: str
    """One line: what is measured."""
    NOTES: str
    """What a reader of the figures has to know: conditions, what is not measured, what the goal is."""

    def run(self, *, quick: bool) -> list[Row]:
        """Measure. ``quick`` makes a smoke test of it: figures come out, they are not to be believed.

        Raises:
            Unavailable: it needs something that is not here.
        """


def load(name: str) -> Benchmark:
    """Import a benchmark: only when it is to run, because each needs other things."""
    return cast("Benchmark", importlib.import_module(BENCHMARKS[name]))
