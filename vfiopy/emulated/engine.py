"""Work that a device does after the register write that asked for it has returned."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from vfiopy.errors import StateError

__all__ = ["Engine"]

Work = Callable[[], None]


class Engine:
    """Runs work at its time: in a thread of its own, or, in manual mode, when ``step()`` is called.

    The thread starts with the first piece of work, sleeps until the next is due, and ends with :meth:`close`.

    Threads: every method may be called from any thread, also from the work itself.

    Args:
        name: of the thread.
        run: called with each piece of work; must not raise in the thread.
        manual: nothing happens by itself.
    """

    def __init__(self, name: str, run: Callable[[Work], None], *, manual: bool = False) -> None:
        self.name = name
        self.manual = manual
        self._run = run
        self._heap: list[tuple[float, int, Work]] = []
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._paused = False
        self._running = False
        self._now = 0.0  # manual mode has a clock of its own

    @property
    def pending(self) -> int:
        """Pieces of work that wait for their time."""
        return len(self._heap)

    def schedule(self, delay: float, work: Work) -> None:
        """Do ``work`` in ``delay`` seconds. Work that is due at the same time is done in order."""
        with self._wake:
            now = self._now if self.manual else time.monotonic()
            heapq.heappush(self._heap, (now + delay, next(self._numbers), work))
            if self.manual:
                return
            if self._thread is None:
                self._stopping = False
                # A daemon: a script that ends without close() must not hang on a device that is only software.
                self._thread = threading.Thread(target=self._loop, name=self.name, daemon=True)
                self._thread.start()
            else:
                self._wake.notify_all()

    def step(self) -> bool:
        """Do the earliest piece of work now, whatever its time; return whether there was one.

        Raises:
            StateError: the engine has a thread that does this.
        """
        if not self.manual:
            raise StateError(f"{self.name} works by itself; make the device with manual=True to step it")
        with self._wake:
            if not self._heap or self._paused:
                return False
            due, _, work = heapq.heappop(self._heap)
            self._now = max(self._now, due)
        self._run(work)
        return True

    def cancel(self) -> int:
        """Forget all work that is not running; return how many pieces that were."""
        with self._wake:
            count = len(self._heap)
            self._heap.clear()
            return count

    def pause(self, timeout: float) -> bool:
        """Begin no more work; return whether the piece that is running, if one is, ended within ``timeout`` seconds."""
        with self._wake:
            self._paused = True
            return self._wake.wait_for(lambda: not self._running, timeout)

    def resume(self) -> None:
        """Go on; what became due meanwhile is done at once. Idempotent."""
        with self._wake:
            self._paused = False
            self._wake.notify_all()

    def close(self) -> None:
        """Forget the work and end the thread, after the piece that is running. Idempotent; usable again afterwards."""
        with self._wake:
            self._heap.clear()
            self._stopping = True
            self._paused = False
            thread, self._thread = self._thread, None
            self._wake.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _loop(self) -> None:
        while True:
            with self._wake:
                work = self._next()
                self._running = work is not None
            if work is None:
                return
            try:
                self._run(work)
            finally:
                with self._wake:
                    self._running = False
                    if self._paused:
                        self._wake.notify_all()
            del work  # or it would live, with the device, through the next sleep

    def _next(self) -> Work | None:
        """Wait for the next piece of work; None at the end. The condition is held."""
        while not self._stopping and self._thread is threading.current_thread():
            if not self._heap or self._paused:
                self._wake.wait()
                continue
            left = self._heap[0][0] - time.monotonic()
            if left <= 0:
                return heapq.heappop(self._heap)[2]
            self._wake.wait(left)
        return None
