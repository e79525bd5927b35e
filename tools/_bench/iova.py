"""The IOVA space: map, look up, unmap, pin and unpin, and the memory that pins take."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import random
import subprocess
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from statistics import median, quantiles

from vfiopy.iova import MAPPER_TYPE1, IovaSpace

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

TREE = Path(__file__).resolve().parents[2]
PAGE = mmap.PAGESIZE
HERE = 0x7F00_0000_0000
USABLE = [(0x1000, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)]
PAGE_SIZES = 0x4020_1000
BATCH = 2000

MAP_NS = {100_000: 1000.0, 1_000_000: 3000.0}
PIN_NS = 300.0
DENSE_NS = 2.0
PFN_NS = 40.0
TREE_RATIO = 1 / 40
LOOKUP_RATIO = 1 / 3
DENSE_BYTES = 10.0
RANDOM_BYTES = 64.0


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


def _rows(group: str, measures: Sequence[Measure], rounds: int) -> list[Row]:
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


def _per_item(work: Callable[[], object], count: int) -> float:
    start = time.thread_time_ns()
    work()
    taken = time.thread_time_ns() - start
    start = time.thread_time_ns()
    for _ in range(count):
        pass
    return max(taken - (time.thread_time_ns() - start), 0) / count


# --- mappings --------------------------------------------------------------------------------------------------------


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

        return _per_item(work, BATCH)

    def unmap(self) -> float:
        """Unmap the batch, in random order."""
        remove = self.space.unmap
        random.shuffle(self.mapped)

        def work() -> None:
            for iova in self.mapped:
                remove(iova)

        taken = _per_item(work, BATCH)
        self.mapped.clear()
        return taken

    def find(self) -> float:
        """Look up random IOVAs."""
        look, points = self.space.find, self._some_points()

        def work() -> None:
            for point in points:
                look(point)

        return _per_item(work, BATCH)

    def contains(self) -> float:
        """Ask whether random IOVAs are mapped."""
        space, points = self.space, self._some_points()

        def work() -> None:
            for point in points:
                point in space  # noqa: B015  the question is what is timed

        return _per_item(work, BATCH)


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

        return _per_item(work, len(self.fresh))

    def remove(self) -> float:
        """Take the batch out."""
        records = self.records

        def work() -> None:
            for iova in self.fresh:
                del records[iova]

        return _per_item(work, len(self.fresh))

    def find(self) -> float:
        """Look up the record that contains an IOVA: the largest key that is not above it."""
        records, points = self.records, self._some_points()

        def work() -> None:
            for point in points:
                records[next(records.irange(maximum=point, reverse=True))]

        return _per_item(work, BATCH)


def _mappings(sizes: Sequence[int], rounds: int) -> list[Row]:
    rows = []
    for size in sizes:
        book, records = _Book(size), _Sorted(size)
        per_level = f"n = {size:,}; log2 n = {log2(size):.1f}"
        group = f"{size:,} mappings"
        lookup = LOOKUP_RATIO if size == 1_000_000 else None
        rows += _rows(
            group + ": map",
            [
                Measure("SortedDict[iova] = record", records.insert, baseline=True),
                Measure("space.map()", book.map, most=MAP_NS.get(size), remark=per_level),
                Measure("(not compared) SortedDict, batch out", records.remove, remark="puts it back as it was"),
                Measure("space.unmap()", book.unmap, remark="random order"),
            ],
            rounds,
        )
        rows += _rows(
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


# --- pins ------------------------------------------------------------------------------------------------------------


def _baselines() -> ctypes.CDLL:
    """Build and load native/bench/baselines.c."""
    library = TREE / "build" / "bench" / "baselines.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    sources = [TREE / "native" / "bench" / "baselines.c", TREE / "native" / "iova" / "rbtree.c"]
    command = [os.environ.get("CC", "cc"), "-std=gnu11", "-O2", "-fPIC", "-shared", f"-I{TREE / 'native'}"]
    subprocess.run([*command, "-o", str(library), *map(str, sources)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.page_tree_ns.restype = ctypes.c_double
    loaded.page_tree_ns.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64]
    return loaded


class _Pins:
    """A mapping of a GiB (of IOVAs: nobody touches the memory), and pins in it."""

    COUNT = 262_144

    def __init__(self, baselines: ctypes.CDLL) -> None:
        self.baselines = baselines
        self.space = IovaSpace("benchmark")
        self.space.set_usable(USABLE, PAGE_SIZES)
        self.iova = self.space.map(None, HERE, self.COUNT * PAGE, 3)
        self.random_pages = random.Random(3).sample(range(self.COUNT), 100_000)

    def dense(self, pages: int) -> float:
        """Pin and unpin neighbours, in one call each: ns a page."""
        rounds = max(1, min(5000, 4_000_000 // pages))
        pin, unpin, iova, size = self.space.pin, self.space.unpin, self.iova, pages * PAGE

        def work() -> None:
            for _ in range(rounds):
                pin(iova, size, 3)
                unpin(iova, size)

        return _per_item(work, rounds) / pages

    def tree(self, pages: Sequence[int]) -> float:
        """The same pages in a tree with a node for each: ns a page."""
        iovas = array("Q", (self.iova + page * PAGE for page in pages))
        address, _ = iovas.buffer_info()
        return float(self.baselines.page_tree_ns(address, len(iovas), max(1, 500_000 // len(iovas))))

    def one(self, *, pin: bool) -> float:
        """Pin one page many times over, or unpin it: ns a call."""
        add, take, iova = self.space.pin, self.space.unpin, self.iova

        def pins() -> None:
            for _ in range(BATCH):
                add(iova, PAGE, 3)

        def unpins() -> None:
            for _ in range(BATCH):
                take(iova, PAGE)

        return _per_item(pins if pin else unpins, BATCH)

    def random(self) -> float:
        """Pin and unpin single pages in random order: ns a page."""
        pin, unpin, iova = self.space.pin, self.space.unpin, self.iova

        def work() -> None:
            for page in self.random_pages:
                pin(iova + page * PAGE, PAGE, 3)
            for page in self.random_pages:
                unpin(iova + page * PAGE, PAGE)

        return _per_item(work, len(self.random_pages))

    def bytes_dense(self, pages: int) -> float:
        """Bytes a page of pins that begin somewhere inside a chunk."""
        self.space.pin(self.iova + 100 * PAGE, pages * PAGE, 3)
        taken = float(self.space.stats()["pin_memory"]) / pages
        self.space.unpin(self.iova + 100 * PAGE, pages * PAGE)
        return taken

    def bytes_random(self, pages: int) -> float:
        """Bytes a page of single pages far from each other."""
        chosen = self.random_pages[:pages]
        for page in chosen:
            self.space.pin(self.iova + page * PAGE, PAGE, 3)
        taken = float(self.space.stats()["pin_memory"]) / pages
        for page in chosen:
            self.space.unpin(self.iova + page * PAGE, PAGE)
        return taken


class _Frames:
    """Real memory that a mapper holds, so that page frame numbers may be known."""

    COUNT = 32_768
    HUGE = 2 << 20

    def __init__(self, baselines: ctypes.CDLL, *, huge: bool) -> None:
        size = self.COUNT * PAGE
        self.memory = mmap.mmap(-1, size + self.HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.address = -(-ctypes.addressof(self.anchor) // self.HUGE) * self.HUGE
        ctypes.memset(self.address, 1, size)
        self.space = IovaSpace("benchmark")
        no_kernel = ctypes.cast(baselines.no_kernel, ctypes.c_void_p).value or 0
        self.space.add_kernel_mapper(MAPPER_TYPE1, -1, ioctl=no_kernel)
        self.iova = self.space.map(self.memory, self.address, size, 3)
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)

    def read(self, pages: int) -> float:
        """Read the kernel's table, and nothing else: ns a page."""
        rounds = max(1, 8192 // pages)
        into = bytearray(8 * pages)

        def work() -> None:
            for _ in range(rounds):
                os.preadv(self.pagemap, [into], self.address // PAGE * 8)

        return _per_item(work, rounds) / pages

    def pin(self, pages: int) -> float:
        """Pin with page frame numbers from pagemap, unpin: ns a page."""
        rounds = max(1, 8192 // pages)
        size = pages * PAGE

        def work() -> None:
            for _ in range(rounds):
                self.space.pin(self.iova, size, 3, pfns=True)
                self.space.unpin(self.iova, size)

        return _per_item(work, rounds) / pages

    def bytes(self) -> float:
        """Bytes a page with its number."""
        self.space.pin(self.iova, self.COUNT * PAGE, 3, pfns=True)
        taken = float(self.space.stats()["pin_memory"]) / self.COUNT
        self.space.unpin(self.iova, self.COUNT * PAGE)
        return taken


def _frames(baselines: ctypes.CDLL, rounds: int) -> list[Row]:
    rows = []
    for huge in (True, False):
        frames = _Frames(baselines, huge=huge)
        group = f"pin with page frame numbers and unpin, a page; memory of {'2 MiB' if huge else '4 KiB'} pages"
        measures = [Measure("the kernel's part: pread() of pagemap", lambda it=frames: it.read(512))]  # type: ignore[misc]
        for pages in (512, _Frames.COUNT):
            measures.append(
                Measure(f"space.pin(pfns=True), {pages:,} pages", lambda it=frames, n=pages: it.pin(n), most=PFN_NS)  # type: ignore[misc]
            )
        rows += _rows(group, measures, rounds)
    memory = [Measure(f"{_Frames.COUNT:,} with numbers", frames.bytes, most=DENSE_BYTES, unit="B")]
    return rows + _rows("memory of pins with numbers, a page", memory if os.geteuid() == 0 else [], 2)


def _pins(rounds: int) -> list[Row]:
    baselines = _baselines()
    pins = _Pins(baselines)
    rows = []
    for pages in (1, 512, _Pins.COUNT):
        neighbours = range(pages)
        goal = most = None
        if pages > 1:
            goal, most = TREE_RATIO, DENSE_NS
        rows += _rows(
            f"pin and unpin {pages:,} neighbours, a page",
            [
                Measure("C tree, a node a page", lambda p=neighbours: pins.tree(p), baseline=True),  # type: ignore[misc]
                Measure("space.pin(), .unpin()", lambda n=pages: pins.dense(n), goal=goal, most=most),  # type: ignore[misc]
            ],
            rounds,
        )
    rows += _rows(
        "pin and unpin 100,000 random pages, a page",
        [
            Measure("C tree, a node a page", lambda: pins.tree(pins.random_pages), baseline=True),
            Measure("space.pin(), .unpin()", pins.random, remark="two Python calls a page"),
        ],
        rounds,
    )
    rows += _rows(
        "one call from Python",
        [
            Measure("space.pin() of a page", lambda: pins.one(pin=True), most=PIN_NS),
            Measure("space.unpin() of a page", lambda: pins.one(pin=False)),
        ],
        rounds,
    )
    rows += _rows(
        "memory of pins, a page",
        [
            Measure("512 neighbours", lambda: pins.bytes_dense(512), most=DENSE_BYTES, unit="B"),
            Measure("262,000 neighbours", lambda: pins.bytes_dense(262_000), most=DENSE_BYTES, unit="B"),
            Measure("1,000 of 262,144 at random", lambda: pins.bytes_random(1000), most=RANDOM_BYTES, unit="B"),
            Measure("100,000 of 262,144 at random", lambda: pins.bytes_random(100_000), most=RANDOM_BYTES, unit="B"),
        ],
        2,
    )
    return rows + _frames(baselines, rounds)


def run(*, quick: bool) -> list[Row]:
    """Measure."""
    pin_to_one_cpu()
    sizes = (1_000,) if quick else (1_000, 100_000, 1_000_000)
    return _mappings(sizes, 3 if quick else 15) + _pins(3 if quick else 11)
