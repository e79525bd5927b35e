"""The state of an import: live, revoked or unknown; kept by the book, told by the hub."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from enum import Enum
from typing import Any

from vfiopy.dma.mapping import Mapping
from vfiopy.dmabuf.origin import Origin
from vfiopy.errors import RevokedError
from vfiopy.lives import report_errors
from vfiopy.signals import Cause

__all__ = ["ImportState", "ImportedMemory", "check_there"]


class ImportState(Enum):
    """Whether there is something behind an import's IOVA."""

    LIVE = "live"
    REVOKED = "revoked"
    UNKNOWN = "unknown"


class ImportedMemory:
    """Whether an import's memory is there, and who is to be told. Implements the hub's MemoryListener.

    Threads: its state changes under the lock of the origin's signals.
    """

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.state = ImportState.LIVE
        self.cause: Cause | None = None
        self.callbacks: list[Callable[[], object]] = []
        self._space: weakref.ref[Any] | None = None  # the book keeps this object alive, and the space the book
        self._iova = self._serial = 0
        self._before = ImportState.LIVE
        self._told = False

    @property
    def missed(self) -> bool:
        """It is revoked, and the owners were told already: who comes now was not. With the lock."""
        return self.state is ImportState.REVOKED and self._told

    def mapped(self, mapping: Mapping, space: object) -> None:
        """It is in the book now."""
        self._space = weakref.ref(space)
        self._iova, self._serial = mapping.iova, mapping.serial

    def mark(self, state: ImportState, cause: Cause | None) -> bool:
        """Take a state, here and in the book; False: it is not in the book any more."""
        self.state, self.cause = state, cause
        space = None if self._space is None else self._space()
        revoked = state is not ImportState.LIVE
        return space is not None and bool(space.book.set_revoked(self._iova, self._serial, revoked))

    # --- the hub's ---

    def going(self, cause: Cause) -> bool:
        """The memory is about to go."""
        if self.state is ImportState.REVOKED or self._space is None:
            if cause.final:
                self.cause = cause
            return False
        self._before, self._told = self.state, False
        return self.mark(ImportState.REVOKED, cause)

    def stayed(self) -> None:
        """It did not go."""
        self.mark(self._before, None)

    def gone(self, cause: Cause) -> None:  # noqa: ARG002  the handle has it
        """It is gone: tell the owners."""
        with self.origin.signals.lock:
            self._told = True
            callbacks = list(self.callbacks)
        for callback in callbacks:
            report_errors(callback)

    def doubtful(self) -> None:
        """It may be gone."""
        if self.state is ImportState.LIVE and self._space is not None:
            self.mark(ImportState.UNKNOWN, None)


def check_there(origin: Origin) -> None:
    """Refuse memory that is away, before it is mapped by its address: of a dma-buf the kernel is the judge.

    With the lock of the origin's signals.
    """
    cause = origin.signals.absent
    if cause is not None:
        raise RevokedError(
            f"the memory is away: {cause.value}", object=origin.signals.name, hint="undo that first, then try again"
        )
