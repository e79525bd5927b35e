"""Being told what a program does with its devices: the seam between those who do it and who traces it.

Registers report by themselves (``Region.set_trace``, ``Vector._set_observer``), from the accessing thread and with no
lock held. Everything slower comes through an :class:`Observer`. None of it costs more than a test for None while nobody
observes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from vfiopy.mmio import Region

__all__ = ["Observer", "told"]


class Observer(Protocol):
    """Who is told. Called in the thread that does it, with no lock held."""

    def tell(self, kind: str, facts: Mapping[str, object], error: BaseException | None = None) -> None:
        """Hear of something that happened, or that failed with ``error``.

        Args:
            kind: ``"config"``, ``"irq"``, ``"map"``, ``"unmap"``, ``"unmapping"`` (about to), ``"reset"``, ``"close"``.
            facts: what it was, by names that fit the kind.
            error: why it did not happen.
        """

    def region_opened(self, index: int, region: Region) -> None:
        """Hear of a region before its first access; ``index`` is VFIO's."""

    def vector_made(self, kind: str, number: int) -> Callable[[int], object] | None:
        """Return what a vector's ``_set_observer`` takes: a callable(count), or None."""


def told(observer: Observer | None, kind: str, **facts: object) -> AbstractContextManager[dict[str, object]]:
    """Tell the observer, if there is one, how the block ended; the block may add to the facts that it is given.

    Where nobody observes nothing is run around the block: an interrupt's unmask comes through here.
    """
    return nullcontext(facts) if observer is None else _telling(observer, kind, facts)


@contextmanager
def _telling(observer: Observer, kind: str, facts: dict[str, object]) -> Iterator[dict[str, object]]:
    try:
        yield facts
    except BaseException as error:
        observer.tell(kind, facts, error)
        raise
    observer.tell(kind, facts)
