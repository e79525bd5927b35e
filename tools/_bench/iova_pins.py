"""The IOVA space: pin and unpin, and the memory that pins take."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
from array import array
from collections.abc import Sequence
from pathlib import Path

from vfiopy.iova import MAPPER_TYPE1, IovaSpace

from .iova_measure import BATCH, HERE, PAGE, PAGE_SIZES, USABLE, Measure, per_item, rows_of
from .results import Row

__all__ = ["pin_rows"]

TREE = Path(__file__).resolve().parents[2]
PIN_NS = 300.0
DENSE_NS = 2.0
PFN_NS = 40.0
TREE_RATIO = 1 / 40
DENSE_BYTES = 10.0
RANDOM_BYTES = 64.0


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

        return per_item(work, rounds) / pages

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

        return per_item(pins if pin else unpins, BATCH)

    def random(self) -> float:
        """Pin and unpin single pages in random order: ns a page."""
        pin, unpin, iova = self.space.pin, self.space.unpin, self.iova

        def work() -> None:
            for page in self.random_pages:
                pin(iova + page * PAGE, PAGE, 3)
            for page in self.random_pages:
                unpin(iova + page * PAGE, PAGE)

        return per_item(work, len(self.random_pages))

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

        return per_item(work, rounds) / pages

    def pin(self, pages: int) -> float:
        """Pin with page frame numbers from pagemap, unpin: ns a page."""
        rounds = max(1, 8192 // pages)
        size = pages * PAGE

        def work() -> None:
            for _ in range(rounds):
                self.space.pin(self.iova, size, 3, pfns=True)
                self.space.unpin(self.iova, size)

        return per_item(work, rounds) / pages

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
        rows += rows_of(group, measures, rounds)
    memory = [Measure(f"{_Frames.COUNT:,} with numbers", frames.bytes, most=DENSE_BYTES, unit="B")]
    return rows + rows_of("memory of pins with numbers, a page", memory if os.geteuid() == 0 else [], 2)


def pin_rows(rounds: int) -> list[Row]:
    """Measure."""
    baselines = _baselines()
    pins = _Pins(baselines)
    rows = []
    for pages in (1, 512, _Pins.COUNT):
        neighbours = range(pages)
        goal = most = None
        if pages > 1:
            goal, most = TREE_RATIO, DENSE_NS
        rows += rows_of(
            f"pin and unpin {pages:,} neighbours, a page",
            [
                Measure("C tree, a node a page", lambda p=neighbours: pins.tree(p), baseline=True),  # type: ignore[misc]
                Measure("space.pin(), .unpin()", lambda n=pages: pins.dense(n), goal=goal, most=most),  # type: ignore[misc]
            ],
            rounds,
        )
    rows += rows_of(
        "pin and unpin 100,000 random pages, a page",
        [
            Measure("C tree, a node a page", lambda: pins.tree(pins.random_pages), baseline=True),
            Measure("space.pin(), .unpin()", pins.random, remark="two Python calls a page"),
        ],
        rounds,
    )
    rows += rows_of(
        "one call from Python",
        [
            Measure("space.pin() of a page", lambda: pins.one(pin=True), most=PIN_NS),
            Measure("space.unpin() of a page", lambda: pins.one(pin=False)),
        ],
        rounds,
    )
    rows += rows_of(
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
