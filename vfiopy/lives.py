"""How objects with a resource end: close once, never from a finalizer, never in a forked child.

A finalizer may run at any bytecode, in any thread, with any lock held. So it only *enqueues* what is left to do; the
next ordinary operation of any vfiopy object drains the queue and warns. A forked child shares the parent's open files:
unmapping there would unmap the parent, so objects remember the process that made them.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import NamedTuple, Self

from vfiopy._native import set_leftovers
from vfiopy.errors import ClosedError, ForkedError

__all__ = ["Resource", "drain_finalizers", "report_errors", "retire"]


class _Leftover(NamedTuple):
    pid: int
    rank: int
    thing: Resource | None
    release: Callable[[], object]


_leftovers: SimpleQueue[_Leftover] = SimpleQueue()


def retire(release: Callable[[], object]) -> None:
    """Have ``release()`` called by the next operation: for finalizers of what may properly end by being dropped."""
    _enqueue(_Leftover(os.getpid(), 0, None, release))


def _enqueue(leftover: _Leftover) -> None:
    _leftovers.put(leftover)
    set_leftovers(True)  # native operations look at this flag, not into the queue


def drain_finalizers() -> int:
    """Close what was dropped without ``close()``; return how many objects that were.

    Called by every operation that opens or maps something; may be called at any time. Emits a ``ResourceWarning``
    for each object that should have been closed. What goes wrong meanwhile (also a warning that is made an error) is
    reported by ``sys.unraisablehook``, as for Python's own finalizers: it is no fault of the operation that drains.
    """
    count = 0
    batch: list[_Leftover] = []
    try:
        while _take_all(batch):
            while batch:
                count += _finish_first(batch)
    except BaseException:  # KeyboardInterrupt: the rest is for the next operation
        for leftover in batch:
            _enqueue(leftover)
        raise
    return count


def _take_all(batch: list[_Leftover]) -> bool:
    set_leftovers(False)  # first: what comes in meanwhile sets it again
    with suppress(Empty):
        # One call of C, which no KeyboardInterrupt can cut between taking and keeping.
        batch.extend(iter(_leftovers.get_nowait, None))
    # A graph that dies at once is finalized in any order. Owners go first: they know the order of what they own.
    batch.sort(key=lambda leftover: leftover.rank)
    return bool(batch)


def _finish_first(batch: list[_Leftover]) -> int:
    leftover = batch[0]
    if leftover.thing is None:
        del batch[0]  # first: pages must not be given back twice
        return _finish(leftover)
    count = _finish(leftover)
    del batch[0]  # last: an object is finalized once, so nobody else would close it
    return count


def _finish(leftover: _Leftover) -> int:
    if leftover.pid != os.getpid():
        return 0
    thing = leftover.thing
    if thing is None:
        report_errors(leftover.release)
        return 0
    if not thing:
        return 0  # its owner has closed it meanwhile
    report_errors(leftover.release)
    report_errors(lambda: warnings.warn(f"{thing._label} was never closed", ResourceWarning, stacklevel=4))
    return 1


def report_errors(work: Callable[[], object]) -> None:
    """Run a callback whose failure is no fault of the operation that calls it: ``sys.unraisablehook`` gets that."""
    try:
        work()
    except Exception as error:
        _Unraisable(error)


class _Unraisable:
    """Made and dropped at once: a finalizer is the only way for Python code to have the interpreter report an error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __del__(self) -> None:
        raise self._error


class Resource:
    """Base of objects that own a kernel resource.

    A subclass implements :meth:`_release`, which frees everything and may be called once only. ``close()`` is
    idempotent; ``bool(x)`` means open; leaving a ``with`` block closes.

    Threads: ``close()`` may race with another ``close()``; other methods say for themselves.
    """

    _open = False  # an object whose __init__ failed early counts as closed
    _rank = 0  # of objects that are dropped together the lowest is closed first; owners are below what they own

    def __init__(self, label: str) -> None:
        drain_finalizers()
        self._label = label
        self._pid = os.getpid()
        self._open = True

    def _release(self) -> None:
        raise NotImplementedError

    def _leftover(self) -> Callable[[], None]:
        """What the finalizer enqueues. Keeps the object itself alive until then, which Python allows."""
        return self.close

    def check_open(self) -> None:
        """Raise :class:`ClosedError` or :class:`ForkedError` unless this object may be used here and now."""
        if not self._open:
            raise ClosedError(f"{self._label} is closed")
        if self._pid != os.getpid():
            raise ForkedError(
                f"{self._label} belongs to process {self._pid}; this is its child {os.getpid()}. "
                "Open the device again in the child, or use the 'spawn' start method of multiprocessing"
            )

    def close(self) -> None:
        """Free the resource. Safe to call twice; does nothing in a forked child."""
        if not self._open:
            return
        if self._pid != os.getpid():
            self._open = False
            return
        self._release()
        self._open = False

    def __bool__(self) -> bool:
        return self._open

    def __enter__(self) -> Self:
        self.check_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._open and self._pid == os.getpid():
            _enqueue(_Leftover(self._pid, self._rank, self, self._leftover()))

    def __repr__(self) -> str:
        state = "" if self._open else " (closed)"
        return f"<{type(self).__name__} {self._label}{state}>"
