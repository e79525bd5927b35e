"""The IOVA space: map, look up, unmap; with the pins, the whole of its benchmark."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from math import log2

from vfiopy.iova import IovaSpace

from .iova_measure import BATCH, HERE, PAGE, PAGE_SIZES, USABLE, Measure, per_item, rows_of
from .iova_pins import pin_rows
from .measure import pin_to_one_cpu
from .results import Row

__all__ = ["NOTES", "TITLE", "run"]

TITLE = "the IOVA space: mappings and pins"
NOTES = (
    "No kernel mapper: this is the cost of the book, called from Python, without the loop. CPU time, interleaved, "
    "medians. Mappings of 4 KiB, look-ups at random IOVAs. The SortedDict maps first IOVAs to records and has no "
    "allocator, no second index and no locks. The page tree is C, timed in C, with a node for each pinned page as in "
    "the kernel. Without root, pagemap tells no page frame numbers. Bytes include what the allocator adds."
)

MAP_NS = {100_000: 1000.0, 1_000_000: 3000.0}
LOOKUP_RATIO = 1 / 3


class _Book:
    """A book with many mappings, and batches of operations on it that leave it as it was."""

    def __init__(self, size: int) -> None:
        self.space = IovaSpace("benchmark")
        self.space.set_usable(USABLE, PAGE_SIZES)
        self.memory = object()
        for index in range(size):
            # Every other page of address space stays unused, as with buffers from mmap().
            self.space.map(self.memory, HERE + 2 * PAGE * index, PAGE, 3)
        chosen = random.Random(7)
        first = self.space.mappings()[0].iova
        self.points = [first + chosen.randrange(size) * PAGE + chosen.randrange(PAGE) for _ in range(20 * BATCH)]
        self.addresses = [HERE + (2 * chosen.randrange(size) + 1) * PAGE for _ in range(BATCH)]
        self.mapped: list[int] = []

    def _some_points(self) -> list[int]:
        start = random.randrange(len(self.points) - BATCH)
        return self.points[start : start + BATCH]

    def map(self) -> float:
        """Map a batch where the allocator likes it; it goes again with :meth:`unmap`."""
        place, memory, mapped = self.space.map, self.memory, self.mapped

        def work() -> None:
            for address in self.addresses:
                mapped.append(place(memory, address, PAGE, 3))

        return per_item(work, BATCH)

    def unmap(self) -> float:
        """Unmap the batch, in random order."""
        remove = self.space.unmap
        random.shuffle(self.mapped)

        def work() -> None:
            for iova in self.mapped:
                remove(iova)

        taken = per_item(work, BATCH)
        self.mapped.clear()
        return taken

    def find(self) -> float:
        """Look up random IOVAs."""
        look, points = self.space.find, self._some_points()

        def work() -> None:
            for point in points:
                look(point)

        return per_item(work, BATCH)

    def contains(self) -> float:
        """Ask whether random IOVAs are mapped."""
        space, points = self.space, self._some_points()

        def work() -> None:
            for point in points:
                point in space  # noqa: B015  the question is what is timed

        return per_item(work, BATCH)


class _Sorted:
    """The same with a SortedDict."""

    def __init__(self, size: int) -> None:
        try:
            from sortedcontainers import SortedDict  # noqa: PLC0415  a tool of the dev extra
        except ImportError as error:
            raise SystemExit("this benchmark needs sortedcontainers: pip install 'vfiopy[dev]'") from error
        self.records = SortedDict({PAGE * (index + 1): (PAGE, 3, HERE) for index in range(size)})
        chosen = random.Random(7)
        self.points = [PAGE + chosen.randrange(size * PAGE) for _ in range(20 * BATCH)]
        self.fresh = [PAGE * (index + 1) + 1 for index in chosen.sample(range(size), min(size, BATCH))]

    def _some_points(self) -> list[int]:
        start = random.randrange(len(self.points) - BATCH)
        return self.points[start : start + BATCH]

    def insert(self) -> float:
        """Insert a batch between the others; :meth:`remove` takes it out."""
        records = self.records

        def work() -> None:
            for iova in self.fresh:
                records[iova] = (PAGE, 3, HERE)

        return per_item(work, len(self.fresh))

    def remove(self) -> float:
        """Take the batch out."""
        records = self.records

        def work() -> None:
            for iova in self.fresh:
                del records[iova]

        return per_item(work, len(self.fresh))

    def find(self) -> float:
        """Look up the record that contains an IOVA: the largest key that is not above it."""
        records, points = self.records, self._some_points()

        def work() -> None:
            for point in points:
                records[next(records.irange(maximum=point, reverse=True))]

        return per_item(work, BATCH)


def _mappings(sizes: Sequence[int], rounds: int) -> list[Row]:
    rows = []
    for size in sizes:
        book, records = _Book(size), _Sorted(size)
        per_level = f"n = {size:,}; log2 n = {log2(size):.1f}"
        group = f"{size:,} mappings"
        lookup = LOOKUP_RATIO if size == 1_000_000 else None
        rows += rows_of(
            group + ": map",
            [
                Measure("SortedDict[iova] = record", records.insert, baseline=True),
                Measure("space.map()", book.map, most=MAP_NS.get(size), remark=per_level),
                Measure("(not compared) SortedDict, batch out", records.remove, remark="puts it back as it was"),
                Measure("space.unmap()", book.unmap, remark="random order"),
            ],
            rounds,
        )
        rows += rows_of(
            group + ": look up",
            [
                Measure("SortedDict, key at or below", records.find, baseline=True),
                Measure("space.find(iova)", book.find, goal=lookup, remark=per_level),
                Measure("iova in space", book.contains),
            ],
            rounds,
        )
        del book, records
        gc.collect()
    return rows


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    pin_to_one_cpu()
    sizes = (1_000,) if quick else (1_000, 100_000, 1_000_000)
    return _mappings(sizes, 3 if quick else 15) + pin_rows(3 if quick else 11)
