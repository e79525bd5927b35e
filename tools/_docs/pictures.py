"""Pictures drawn from real objects and from the figures of the pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import TextIO

import numpy as np
from matplotlib.figure import Figure

import vfiopy

__all__ = ["registers", "space"]

DOCS = Path(__file__).resolve().parents[2] / "docs"


def space(file: TextIO) -> str:
    """An address space with a few mappings, one of them pinned, as ``space.plot()`` shows it; returns what it is."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    with (
        vfiopy.open("emulated:edu") as device,
        device.dma.allocate(1 << 14) as ring,
        device.dma.allocate((512, 512), dtype="u4", iova=0x4000_0000),
        mmap.mmap(-1, 1 << 16) as page,
        device.dma.map(page, prot=vfiopy.Prot.READ),
    ):
        device.space.book.pin(ring.iova, ring.nbytes, vfiopy.Prot.RW)
        device.space.plot(figure.subplots())
        device.space.book.unpin(ring.iova, ring.nbytes)
    figure.savefig(file, format="svg")
    return "address space with three mappings, one pinned"


def registers(file: TextIO) -> str:
    """The first table of benchmarks.md as bars; returns what it is."""
    text = (DOCS / "benchmarks.md").read_text()
    table = text[text.index("| path | read |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip().strip("`*") for cell in line.strip("|").split("|")] for line in table]
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    names = [re.sub("`", "", row[0]) for row in rows][::-1]
    where = np.arange(len(rows))
    axes.barh(where + 0.2, [float(row[1]) for row in rows][::-1], 0.38, label="read")
    axes.barh(where - 0.2, [float(row[3]) for row in rows][::-1], 0.38, label="write")
    axes.set_yticks(where, names)
    axes.set_xlabel("ns of CPU time for one 32-bit access")
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="svg")
    return "CPU time of a register access, path by path"
