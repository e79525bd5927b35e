"""IovaSpace's steps by number, as the model has them: what is under way is remembered here instead of by the caller."""

from __future__ import annotations

from typing import Any

from vfiopy.iova import IovaReservation, IovaSpace, IovaUnmapping

__all__ = ["NumberedSteps"]


class NumberedSteps:
    """Ends reservations by their IOVA, and unmaps by the order in which they began."""

    def __init__(self, space: IovaSpace) -> None:
        self._space = space
        self._reserved: dict[int, IovaReservation] = {}
        self._unmapping: list[IovaUnmapping] = []

    def begin_map(self, *arguments: Any) -> int:
        reserved = self._space.begin_map(*arguments)
        self._reserved[reserved.iova] = reserved
        return reserved.iova

    def commit_map(self, iova: int) -> None:
        self._reserved.pop(iova).commit()

    def abort_map(self, iova: int) -> None:
        self._reserved.pop(iova).abort()

    def begin_unmap(self, first: int, last: int) -> list[Any]:
        self._unmapping.append(self._space.begin_unmap(first, last))
        return self._unmapping[-1].mappings

    def finish_unmap(self, number: int) -> int:
        return self._unmapping.pop(number).finish()

    def abort_unmap(self, number: int) -> None:
        self._unmapping.pop(number).abort()
