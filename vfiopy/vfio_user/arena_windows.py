"""Arenas that a server has as a whole, because it takes too few mappings to have each buffer by itself.

An arena has a window of IOVAs, as large as it is; its buffers lie in the window as they lie in the arena. The first of
them announces the whole arena, the last one that goes takes it back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from vfiopy.vfio_user.arena import Arena, ArenaSlice

__all__ = ["ArenaWindows", "Window"]

_ALIGNED: Final = 2 << 20
_LOWEST: Final = 16 << 20  # what is below is left to who chooses an IOVA
_LAST: Final = (1 << 48) - 1


class Window:
    """Where an arena is.

    Attributes:
        arena: the arena.
        iova: of its first byte.
        users: how many of its buffers are mapped.
    """

    __slots__ = ("arena", "iova", "users")

    def __init__(self, arena: Arena, iova: int) -> None:
        self.arena = arena
        self.iova = iova
        self.users = 0

    @property
    def end(self) -> int:
        """Behind its last byte."""
        return self.iova + self.arena.size


class ArenaWindows:
    """The windows of one server. Threads: one at a time."""

    def __init__(self) -> None:
        self._by_arena: dict[Arena, Window] = {}
        self._single: list[tuple[int, int]] = []  # (first, end) of what is mapped by itself, sorted

    def __iter__(self) -> Iterator[Window]:
        return iter(tuple(self._by_arena.values()))

    def __len__(self) -> int:
        """How many mappings the server has."""
        return len(self._by_arena) + len(self._single)

    def advise(self, piece: ArenaSlice, limit: int) -> int | None:
        """Say where a buffer is best mapped; None where that is no matter, or cannot be.

        Args:
            piece: the buffer.
            limit: the last IOVA that its device reaches.
        """
        window = self._by_arena.get(piece.arena)
        base = window.iova if window is not None else self._gap(piece.arena.size, limit, _LOWEST, _ALIGNED)
        if base is None or base + piece.offset + piece.size - 1 > limit:
            return None
        return base + piece.offset

    def _taken(self) -> list[tuple[int, int]]:
        return sorted([*self._single, *((window.iova, window.end) for window in self._by_arena.values())])

    def _gap(self, size: int, limit: int, start: int, alignment: int) -> int | None:
        """Find room, from ``start`` up: a device may have fewer address lines than its driver says."""
        at = start
        for first, end in self._taken():
            if at + size <= first:
                break
            at = max(at, -(-end // alignment) * alignment)
        return at if at + size - 1 <= min(limit, _LAST) else None

    def advise_alone(self, size: int, limit: int) -> int | None:
        """Say where other memory is best mapped: the book sees no arena, and might choose one."""
        alignment = min(1 << max(size.bit_length() - 1, 12), _ALIGNED)
        return self._gap(size, limit, alignment, alignment)

    def enter(self, piece: ArenaSlice, iova: int) -> Window | None:
        """Find the window that a buffer lies in at this IOVA, or make it; None where it is to be mapped by itself."""
        window = self._by_arena.get(piece.arena)
        base = iova - piece.offset
        if window is None:
            if base < _ALIGNED or base + piece.arena.size > _LAST + 1 or self._is_taken(base, piece.arena.size):
                return None
            window = self._by_arena[piece.arena] = Window(piece.arena, base)
        elif window.iova != base:
            return None
        window.users += 1
        return window

    def leave(self, window: Window) -> bool:
        """A buffer goes; return whether it was the last one of its window, which is gone then."""
        window.users -= 1
        if window.users:
            return False
        del self._by_arena[window.arena]
        return True

    def find(self, iova: int, size: int) -> Window | None:
        """Return a window that the range touches."""
        return next(
            (window for window in self._by_arena.values() if window.iova < iova + size and iova < window.end), None
        )

    def _is_taken(self, iova: int, size: int) -> bool:
        at = bisect_right(self._single, (iova, _LAST << 1))
        before = at > 0 and self._single[at - 1][1] > iova
        behind = at < len(self._single) and self._single[at][0] < iova + size
        return before or behind or self.find(iova, size) is not None

    def add_single(self, iova: int, size: int) -> None:
        """Note what is mapped by itself."""
        self._single.insert(bisect_right(self._single, (iova, iova + size)), (iova, iova + size))

    def drop_single(self, iova: int, size: int) -> None:
        """Note that it is gone."""
        self._single.remove((iova, iova + size))
