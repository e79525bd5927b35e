"""One interrupt vector: an eventfd and the ways to wait for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Self
from weakref import ref

from vfiopy._native import EventBase
from vfiopy.errors import BusyError, ClosedError, VfioTimeoutError
from vfiopy.lives import Resource

__all__ = ["Vector"]

_Waiter = asyncio.Future[int]


class Vector(Resource, EventBase):
    """An interrupt vector that signals an eventfd (eventfd(2)).

    The kernel adds 1 to the eventfd's counter per interrupt; a wait takes the whole counter. ``fileno()`` makes the
    vector usable with select, poll and every event loop.

    Threads: waits of several threads compete for events; each event is seen by one of them. A vector that was waited
    for in an event loop is closed by that loop's thread, or when the loop is not running.

    Attributes:
        number: of the vector, from 0.
        total: how many interrupts were taken so far.
    """

    _rank = 50

    # take() and wait() are EventBase's: one native call each.

    def __init__(self, label: str, number: int, trigger: Callable[[int], None]) -> None:
        # Non-blocking, because between poll() and read() another waiter may have taken the event.
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        super().__init__(label)
        self._set_fd(fd)
        self.number = number
        self._trigger = trigger
        self._lent = False
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that watches the fd
        self._waiter: _Waiter | None = None

    def _release(self) -> None:
        waiter, loop = self._waiter, self._loop
        self._stop_watching()
        self._close_fd()
        if waiter is not None and loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(_fail, waiter, ClosedError(f"{self._label} was closed during the wait"))

    def fileno(self) -> int:
        """Return the eventfd; it becomes readable with the next interrupt."""
        self.check_open()
        # From here on somebody else may register it with an event loop, or take it out.
        self._lent = True
        return self._fd

    def observe(self, observer: Callable[[int], object] | None) -> None:
        """Have ``observer(count)`` called with the interrupts that each wait takes; None stops it.

        Who reads :meth:`fileno` by itself takes them unseen.
        """
        self._set_observer(observer)

    def for_backend(self) -> int:
        """Return the eventfd for who signals it: as :meth:`fileno`, but nobody will wait on it."""
        self.check_open()
        return self._fd

    # --- asyncio -------------------------------------------------------------------------------------------------

    async def wait_async(self, timeout: float | None = None) -> int:
        """Wait as :meth:`wait` does, in an asyncio event loop and without a thread.

        Cancelling the wait loses no event. One task at a time may wait for one vector.

        Raises:
            VfioTimeoutError: no interrupt came in time.
            BusyError: another task is waiting.
            ClosedError: the vector was closed meanwhile.
        """
        return self.take() or await self._wait_in_loop(timeout)

    async def _wait_in_loop(self, timeout: float | None) -> int:
        if self._waiter is not None:
            raise BusyError(
                "another task is waiting for this vector",
                object=self._label,
                hint="have one task wait, and hand the events on with an asyncio.Event or Queue",
            )
        loop = asyncio.get_running_loop()
        waiter: _Waiter = loop.create_future()
        timer = None if timeout is None else loop.call_later(timeout, _settle, waiter, 0)
        self._waiter = waiter
        try:
            self._watch(loop)
            count = await waiter
        except BaseException:
            self._return_events(waiter)
            raise
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()
            if self._lent:
                self._stop_watching()
        if not count:
            raise self._timed_out(timeout)
        return count

    def _return_events(self, waiter: _Waiter) -> None:
        """Where events were taken for a task that was then cancelled, have the next wait find them."""
        if waiter.done() and not waiter.cancelled() and not waiter.exception() and waiter.result():
            with suppress(ClosedError):
                self._put_back(waiter.result())

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the loop watch the eventfd; that stays so after the wait, because the next wait is seldom far."""
        if self._loop is loop and not self._lent:
            return
        if self._loop is not loop:
            self._stop_watching()
        loop.add_reader(self._fd, _on_readable, ref(self), loop, self._fd)
        self._loop = loop

    def _stop_watching(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            loop.remove_reader(self._fd)

    def _serve_waiter(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            # Nobody waits: the event stays where it is, and the loop must not spin on it.
            self._stop_watching()
        elif count := self.take():
            waiter.set_result(count)

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Awaitable[int]:
        return self.wait_async()

    # --- the rest ------------------------------------------------------------------------------------------------

    def trigger(self) -> None:
        """Make the interrupt happen from software (VFIO_IRQ_SET_ACTION_TRIGGER)."""
        self.check_open()
        self._trigger(self.number)

    def _closing(self) -> ClosedError:
        return ClosedError(f"{self._label} is closed")

    def _timed_out(self, timeout: float | None) -> VfioTimeoutError:
        return VfioTimeoutError(
            f"no interrupt within {timeout} s",
            object=self._label,
            hint="is the device's own interrupt enable set, and device.bus_master on? MSI is a DMA write",
        )


def _on_readable(vector: ref[Vector], loop: asyncio.AbstractEventLoop, fd: int) -> None:
    # A loop that watches must not keep a vector alive that nobody else wants.
    alive = vector()
    if alive is None:
        loop.remove_reader(fd)
    else:
        alive._serve_waiter()


def _settle(waiter: _Waiter, count: int) -> None:
    if not waiter.done():
        waiter.set_result(count)


def _fail(waiter: _Waiter, error: Exception) -> None:
    if not waiter.done():
        waiter.set_exception(error)
