"""A picture of a space, as text or with matplotlib: people look before they read.

IOVA spaces are huge and nearly empty, so neither picture is to scale: each stretch of equal use (free, not usable,
excluded, a run of alike mappings) gets a row of text, or a bar as wide as the logarithm of its size.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import log2
from typing import TYPE_CHECKING, NamedTuple

from vfiopy import _native

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Stretch", "bytes_word", "kind_word", "plot", "prot_word", "state_word", "stretches", "text_map"]

_LAST = (1 << 64) - 1
_KINDS = {
    _native.KIND_HOST: "host",
    _native.KIND_FILE: "file",
    _native.KIND_MMIO: "device",
    _native.KIND_REMOTE: "remote",
}
_STATES = {
    _native.STATE_CLOSING: "closing",
    _native.STATE_UNMAPPING: "unmapping",
    _native.STATE_UNKNOWN: "unknown",
}
_PROTS = {1: "r", 2: "w", 3: "rw"}
_COLOURS = {
    "host": "tab:blue",
    "file": "tab:green",
    "device": "tab:orange",
    "remote": "tab:purple",
    "free": "white",
    "transient, free": "lightyellow",
    "excluded": "tab:gray",
    "not usable": "black",
}
_MOST_ROWS = 60


def kind_word(kind: int) -> str:
    """Return what pictures call a kind of memory."""
    return _KINDS[kind]


def prot_word(prot: int) -> str:
    """Return ``"r"``, ``"w"`` or ``"rw"``."""
    return _PROTS[prot]


def state_word(state: int) -> str:
    """Return what pictures call a mapping's state; ``"live"`` where they say nothing."""
    return _STATES.get(state, "live")


class Stretch(NamedTuple):
    """Neighbouring IOVAs that are used alike.

    Attributes:
        first, last: IOVAs, both included.
        use: ``"free"``, ``"transient, free"``, ``"excluded"``, ``"not usable"``, or a kind of memory.
        detail: of mappings: prot, and the state where it is not live.
        mappings: how many, 0 where it is none.
        pinned: runs of pinned pages, pairs of IOVAs.
    """

    first: int
    last: int
    use: str
    detail: str = ""
    mappings: int = 0
    pinned: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.last - self.first + 1


def stretches(space: _native.IovaSpace) -> list[Stretch]:
    """Divide the whole 64-bit space by use."""
    rows = [Stretch(first, last, "free") for first, last in space.free_ranges()]
    for first, last in space.transient():
        rows = [row._replace(use="transient, free") if first <= row.first <= last else row for row in rows]
    rows += [Stretch(first, last, "excluded") for first, last in space.excluded()]
    rows += _mapped(space)
    rows.sort()
    return list(_with_holes(rows))


def _mapped(space: _native.IovaSpace) -> list[Stretch]:
    rows: list[Stretch] = []
    for it in space.mappings():
        detail = " ".join(filter(None, (_PROTS[it.prot], _STATES.get(it.state, ""))))
        last = it.iova + it.size - 1
        row = Stretch(it.iova, last, _KINDS[it.kind], detail, 1, tuple(space.pinned(it.iova, last)) if it.pins else ())
        before = rows[-1] if rows else None
        if before and (before.last + 1, before.use, before.detail) == (row.first, row.use, row.detail):
            rows[-1] = before._replace(last=last, mappings=before.mappings + 1, pinned=before.pinned + row.pinned)
        else:
            rows.append(row)
    return rows


def _with_holes(rows: Iterable[Stretch]) -> Iterable[Stretch]:
    at = 0
    for row in rows:
        if row.first > at:
            yield Stretch(at, row.first - 1, "not usable")
        yield row
        at = row.last + 1
    if at <= _LAST:
        yield Stretch(at, _LAST, "not usable")


def bytes_word(size: int) -> str:
    """Return a size as people write it: ``"2 MiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            return f"{size:g} {unit}" if unit == "B" else f"{size:.4g} {unit}"
        size = size // 1024 if size % 1024 == 0 else size / 1024  # type: ignore[assignment]
    return f"{size:.4g} EiB"


def _pin_bar(row: Stretch, width: int) -> str:
    """One character for each part of the stretch: all of it pinned, some, or none."""
    width = min(width, max(row.size >> 12, 1))
    bar = []
    for index in range(width):
        first = row.first + row.size * index // width
        last = row.first + row.size * (index + 1) // width - 1
        pinned = sum(max(0, min(last, b) - max(first, a) + 1) for a, b in row.pinned)
        bar.append("#" if pinned > last - first else ":" if pinned else ".")
    return "".join(bar)


def text_map(space: _native.IovaSpace, width: int = 64) -> str:
    """Draw a space as text: a line of figures, then a row for each stretch.

    The bar behind mappings with pins shows where these are: ``#`` all pages, ``:`` some, ``.`` none.

    Args:
        space: the book.
        width: of the longest bar, characters.
    """
    figures = _native.IovaSpace.stats(space)
    head = (
        f"space '{space.name}': {figures['mappings']} mappings, {bytes_word(figures['mapped_bytes'])} mapped, "
        f"{bytes_word(figures['pinned_bytes'])} pinned, {bytes_word(figures['free_bytes'])} free in "
        f"{figures['free_ranges']} ranges, fragmentation {figures['fragmentation']:.3f}"
    )
    lines = [head]
    rows = stretches(space)
    skipped = len(rows) - _MOST_ROWS
    for index, row in enumerate(rows):
        if skipped > 0 and index == _MOST_ROWS // 2:
            lines.append(f"  ... {skipped} more rows ...")
        if skipped > 0 and _MOST_ROWS // 2 <= index < len(rows) - _MOST_ROWS // 2:
            continue
        use = f"{row.use} {row.detail}".strip()
        if row.mappings > 1:
            use += f" x{row.mappings}"
        bar = f"  {_pin_bar(row, width)}" if row.pinned else ""
        lines.append(f"  {row.first:#018x}-{row.last:#018x} {bytes_word(row.size):>10}  {use}{bar}")
    return "\n".join(lines)


def plot(space: _native.IovaSpace, axes: Axes | None = None) -> Axes:
    """Draw a space with matplotlib: a bar for each stretch, coloured by use, pinned pages darker at its foot.

    Args:
        space: the book.
        axes: where to draw; None makes a new figure.

    Returns:
        The axes, for titles and for saving (``axes.figure.savefig(...)``).

    Raises:
        ImportError: matplotlib is missing: install ``vfiopy[plot]``.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra: only who asks for a picture needs it

    if axes is None:
        axes = Figure(figsize=(12, 2.5), layout="constrained").subplots()
    at = 0.0
    ticks, labels, seen = [], [], set()
    for row in stretches(space):
        width = log2(row.size) - 8 if row.size > 1 << 9 else 1.0
        label = None if row.use in seen else row.use
        seen.add(row.use)
        axes.bar(at, 1.0, width, align="edge", color=_COLOURS[row.use], edgecolor="black", linewidth=0.5, label=label)
        for first, last in row.pinned:
            left = at + width * (first - row.first) / row.size
            pinned = max(width * (last - first + 1) / row.size, 0.1)  # one page of many should be seen
            axes.bar(left, 0.25, pinned, align="edge", color="tab:red")
        ticks.append(at)
        labels.append(f"{row.first:#x}")
        at += width
    axes.set_xticks(ticks, labels, rotation=60, ha="right", fontsize=6)
    axes.set_yticks([])
    axes.set_xlim(0, at)
    axes.set_title(f"space '{space.name}' (not to scale; red: pinned)", pad=24)
    axes.legend(ncols=len(seen), loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7)
    return axes
