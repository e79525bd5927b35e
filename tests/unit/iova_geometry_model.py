"""The model's lower half: ranges, what is free of them, and where a new mapping goes."""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from iova_kernel import Entry

from vfiopy import errors

__all__ = [
    "CLOSING",
    "LIVE",
    "MMIO",
    "REMOTE",
    "RESERVED",
    "TOP",
    "UNIT",
    "UNKNOWN",
    "UNMAPPING",
    "Geometry",
    "Mapped",
    "Refused",
]

TOP = (1 << 64) - 1
UNIT = mmap.PAGESIZE
MMIO, REMOTE = 2, 3
RESERVED, LIVE, CLOSING, UNMAPPING, UNKNOWN = range(5)
TIGHT_FITS = 32
"""With more free ranges than this the native allocator may stop looking for the very best fit."""

Range = tuple[int, int]


class Refused(Exception):  # noqa: N818  it is what a model does, not an error
    """The space must refuse with this class."""

    def __init__(self, kind: type[Exception]) -> None:
        super().__init__(kind.__name__)
        self.kind = kind


@dataclass(eq=False)
class Mapped:
    iova: int
    size: int
    prot: int
    address: int
    kind: int
    fd: int
    fd_offset: int
    memory: object
    state: int = RESERVED
    handed_out: bool = False
    slots: set[int] = field(default_factory=set)
    pins: Counter[int] = field(default_factory=Counter)  # by page number
    held: Counter[int] = field(default_factory=Counter)  # by owner

    @property
    def last(self) -> int:
        return self.iova + self.size - 1

    def row(self) -> tuple[object, ...]:
        return (
            self.iova, self.size, self.prot, self.address, self.kind, self.state, self.memory,
            self.fd, self.fd_offset if self.fd >= 0 else 0, self.pins.total(),
        )  # fmt: skip

    def entry(self, *, ioas: bool) -> Entry:
        return Entry(self.size, self.fd_offset if ioas and self.fd >= 0 else self.address)


class Geometry:
    """Usable ranges, windows, and the mappings in them."""

    def __init__(self) -> None:
        self.usable: list[Range] = [(0, TOP)]
        self.excluded: list[Range] = []
        self.transient: Range | None = None
        self.page_sizes = UNIT
        self.max_mappings = 0
        self.mapped: list[Mapped] = []  # sorted by iova

    @property
    def page(self) -> int:
        return self.page_sizes & -self.page_sizes

    def cells(self) -> list[Range]:
        """Usable without excluded, cut where the transient window begins and ends."""
        cells = list(self.usable)
        for first, last in self.excluded:
            cells = [part for cell in cells for part in _without(cell, first, last)]
        if self.transient:
            first, last = self.transient
            cells = [part for cell in cells for part in _cut(cell, first, last)]
        return cells

    def free_ranges(self) -> list[Range]:
        free = self.cells()
        for it in self.mapped:
            free = [part for cell in free for part in _without(cell, it.iova, it.last)]
        return free

    def _change(self, **wanted: object) -> None:
        before = {name: getattr(self, name) for name in wanted}
        for name, value in wanted.items():
            setattr(self, name, value)
        try:
            if self.max_mappings and len(self.mapped) > self.max_mappings:
                raise Refused(errors.NoSpaceError)
            cells = self.cells()
            for it in self.mapped:
                if not any(first <= it.iova and it.last <= last for first, last in cells):
                    raise Refused(errors.IovaRangeError)
                if (it.iova | (it.last + 1)) % self.page:
                    raise Refused(errors.AlignmentError)
        except Refused:
            for name, value in before.items():
                setattr(self, name, value)
            raise

    def set_usable(self, ranges: list[Range], page_sizes: int, max_mappings: int) -> None:
        self._change(usable=list(ranges), page_sizes=page_sizes, max_mappings=max_mappings)

    def exclude(self, first: int, last: int) -> None:
        if any(a <= last and first <= b for a, b in self.excluded):
            raise Refused(errors.IovaRangeError)
        self._change(excluded=sorted([*self.excluded, (first, last)]))

    def include(self, first: int, last: int) -> None:
        if (first, last) not in self.excluded:
            raise Refused(errors.IovaRangeError)
        self._change(excluded=[it for it in self.excluded if it != (first, last)])

    def set_transient(self, window: Range | None) -> None:
        self._change(transient=window)

    def _check_fixed(self, first: int, last: int) -> None:
        for it in self.mapped:
            if it.iova <= last and first <= it.last:
                raise Refused(errors.OverlapError if it.state in {LIVE, CLOSING} else errors.BusyError)
        if not any(a <= first and last <= b for a, b in self.cells()):
            raise Refused(errors.IovaRangeError)

    def _zone(self, transient: bool) -> list[Range]:
        window = self.transient
        free = self.free_ranges()
        assert len(free) <= TIGHT_FITS, "more free ranges than the model is exact for"
        inside = [it for it in free if window and window[0] <= it[0] and it[1] <= window[1]]
        wanted = inside if transient else [it for it in free if it not in inside]
        return sorted(wanted, key=lambda it: (it[1] - it[0], it[0]))

    def _choose(self, size: int, address: int, align: int, limit: int, transient: bool) -> int:
        for zone in [self._zone(True), self._zone(False)] if transient else [self._zone(False)]:
            for modulus, offset in self._congruences(size, address, align):
                for first, last in zone:
                    at = max(first, 1)
                    at += (offset - at) % modulus
                    if at + size - 1 <= min(last, limit):
                        return at
        raise Refused(errors.NoSpaceError)

    def _congruences(self, size: int, address: int, align: int) -> Iterator[tuple[int, int]]:
        """Moduli and offsets to try, best first: the largest page that lies whole inside the memory."""
        for bit in reversed(range(64)):
            page = 1 << bit
            whole = -(-address // page) * page + page <= address + size
            if self.page_sizes & page and page > self.page and whole and address % min(page, align) == 0:
                yield (page, address % page) if page > align else (align, 0)
        yield align, 0


def _without(cell: Range, first: int, last: int) -> Iterator[Range]:
    """A range without another one."""
    if last < cell[0] or cell[1] < first:
        yield cell
        return
    if cell[0] < first:
        yield cell[0], first - 1
    if last < cell[1]:
        yield last + 1, cell[1]


def _cut(cell: Range, first: int, last: int) -> Iterator[Range]:
    """A range, cut where another one begins and ends."""
    if last < cell[0] or cell[1] < first:
        yield cell
        return
    if cell[0] < first:
        yield cell[0], first - 1
    yield max(cell[0], first), min(cell[1], last)
    if last < cell[1]:
        yield last + 1, cell[1]
