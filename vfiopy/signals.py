"""Says when the memory of a device's BARs goes away, and when it is back.

The hub below those who take it away (:mod:`vfiopy.kernel`, :mod:`vfiopy.emulated`) and those who have it imported
elsewhere (:mod:`vfiopy.dma`), so that they need not know each other. The kernel tells nobody: when a function is reset,
powered down, closed, or stops to decode memory, it empties the page tables of whoever imported a dma-buf of its BARs
(drivers/vfio/pci/vfio_pci_dmabuf.c), and they stay empty when the memory is back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import Enum
from functools import partial
from typing import ClassVar, Protocol
from weakref import WeakSet, WeakValueDictionary

from vfiopy.errors import VfioError
from vfiopy.lives import report_errors

__all__ = ["Cause", "MemoryListener", "MemorySignals", "taking"]


class Cause(Enum):
    """Why the memory of a device went away; the value is the text for messages."""

    DECODE = "its memory decode was switched off"
    POWER = "it was put into D3hot"
    LOW_POWER = "it entered low power"
    RESET = "it was reset"
    HOT_RESET = "its bus was reset"
    DECODE_TOUCHED = "its memory bit was written as 0, which ends imports even though a virtual function has none"
    CLOSED = "it was closed"
    EXPORTER_GONE = "the process that exported it has ended"

    @property
    def lasts(self) -> bool:
        """The memory does not come back by itself as soon as the operation is over."""
        return self not in (Cause.RESET, Cause.HOT_RESET, Cause.DECODE_TOUCHED)

    @property
    def final(self) -> bool:
        """It never comes back: a dma-buf of it is good for nothing any more."""
        return self in (Cause.CLOSED, Cause.EXPORTER_GONE)


class MemoryListener(Protocol):
    """Who has the memory imported. ``going``, ``stayed`` and ``doubtful`` are called with the hub's lock held."""

    def going(self, cause: Cause) -> bool:
        """The memory is about to go: stop using it. Return whether that is news."""

    def stayed(self) -> None:
        """It did not go after all: the operation was refused before it touched anything."""

    def gone(self, cause: Cause) -> None:
        """It is gone; called without a lock."""

    def doubtful(self) -> None:
        """It may be gone."""


class MemorySignals:
    """What happens to the memory of one device.

    ``lock`` serialises everything that takes the memory away with those who import it, so that an import belongs
    clearly before or after. It is held across system calls, and never while callbacks run.

    Threads: may be shared.

    Attributes:
        name: of the device, for messages.
        lock: see above; reentrant.
        addresses: bus addresses of the device's BARs that somebody has looked up, None where there is none to know.
    """

    _known: ClassVar[WeakValueDictionary[str, MemorySignals]] = WeakValueDictionary()
    _lives = threading.Lock()  # over _known and all _users

    def __init__(self, name: str) -> None:
        self.name = name
        self.lock = threading.RLock()
        self._listeners: WeakSet[MemoryListener] = WeakSet()
        self._causes: dict[Cause, None] = {}
        self._users = 0
        self.addresses: dict[int, int | None] = {}

    @classmethod
    def opened(cls, name: str) -> MemorySignals:
        """One more user of a device in this process, by its PCI address; the first one gets new signals."""
        with cls._lives:
            found = cls._known.get(name)
            if found is None:
                found = cls._known[name] = cls(name)
            found._users += 1
        return found

    @classmethod
    def known(cls, name: str) -> MemorySignals | None:
        """The signals of a device if this process has it open."""
        return cls._known.get(name)

    # --- looking -------------------------------------------------------------------------------------------------

    @property
    def absent(self) -> Cause | None:
        """Why the memory is not there now; None: nothing is known to have taken it away."""
        return next(iter(self._causes), None)

    @property
    def over(self) -> bool:
        """It will never be there again."""
        return any(cause.final for cause in self._causes)

    def listen(self, listener: MemoryListener) -> None:
        """Tell this one too, for as long as it lives."""
        with self.lock:
            self._listeners.add(listener)

    # --- telling -------------------------------------------------------------------------------------------------

    def taking(self, cause: Cause, untouched: tuple[int, ...] = ()) -> AbstractContextManager[None]:
        """Run what takes the memory away, inside a ``with`` block: :func:`taking` for this device alone."""
        return taking([(self, cause)], untouched)

    def _took(self, cause: Cause) -> None:
        if cause.lasts:
            self._causes[cause] = None
        elif cause is not Cause.DECODE_TOUCHED:
            self._causes.pop(Cause.POWER, None)  # after a reset the function is in D0

    def took(self, cause: Cause) -> None:
        """Tell of memory that went away without our doing."""
        with self.taking(cause):
            pass

    def returned(self, cause: Cause) -> None:
        """What a lasting cause took away is given back. Imports stay dead all the same."""
        with self.lock:
            self._causes.pop(cause, None)

    def doubt(self) -> None:
        """The memory was away for a while at least, and nobody can say since when."""
        with self.lock:
            for listener in list(self._listeners):
                listener.doubtful()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Run what closes the device; the last user takes the memory along."""
        with self._lives:
            self._users -= 1
            last = not self._users
            if last and self._known.get(self.name) is self:  # no more where the garbage collector has found it
                del self._known[self.name]  # who opens it from here on has another life
        if not last:
            yield
            return
        with self.taking(Cause.CLOSED):
            yield


@contextmanager
def taking(what: Iterable[tuple[MemorySignals, Cause]], untouched: tuple[int, ...] = ()) -> Iterator[None]:
    """Run what takes the memory of devices away, inside a ``with`` block.

    Listeners know before it begins. What they are to do about it they do afterwards, with no lock held.

    Args:
        what: whose memory, and why.
        untouched: errnos of the operation that mean that it did nothing at all.
    """
    # In one order everywhere: two threads that reset a bus must not wait for each other.
    both = sorted(what, key=lambda one: (one[0].name, id(one[0])))
    told: list[tuple[MemoryListener, Cause]] = []
    try:
        with ExitStack() as locks:
            for signals, cause in both:
                locks.enter_context(signals.lock)
                told += [(one, cause) for one in list(signals._listeners) if one.going(cause)]
            try:
                yield
            except VfioError as error:
                if error.errno in untouched:
                    while told:
                        told.pop()[0].stayed()
                    both.clear()
                raise
            finally:
                for signals, cause in both:
                    signals._took(cause)
    finally:
        for listener, cause in told:
            report_errors(partial(listener.gone, cause))
