"""How the host learns of completions: an interrupt vector that one or more queues share, or looking.

Any kind of interrupt is only a reason to look: what counts is the phase tag in the completion queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Literal, Protocol

from vfiopy.device import Device, Interrupt, Vector
from vfiopy.drivers.nvme.request import Request
from vfiopy.drivers.nvme.rings import CompletionRing
from vfiopy.errors import NotSupportedError, StateError, VfioTimeoutError

__all__ = ["InterruptKind", "PollSignal", "Served", "Signal", "VectorSignal", "enable_signals"]

InterruptKind = Literal["msix", "msi", "intx", "polling"]

_EAGER_LOOKS = 64
_LAZY_INTERVAL = 0.0005


class Served(Protocol):
    """Who is told: a queue pair."""

    name: str

    @property
    def completions(self) -> CompletionRing:
        """Where to look."""

    def reap(self) -> int:
        """Take what is in the completion queue."""


class Signal(Protocol):
    """What a queue pair waits on."""

    @property
    def vector(self) -> int | None:
        """The interrupt vector for Create I/O Completion Queue; None for no interrupt."""

    def add(self, queue: Served) -> None:
        """Speak for a queue."""

    def remove(self, queue: Served) -> None:
        """Speak for it no longer."""

    def wait(self, queue: Served, timeout: float) -> None:
        """Return when there may be a completion, or after ``timeout`` seconds."""

    async def wait_async(self, request: Request, queue: Served, timeout: float) -> None:
        """Return when the request is settled, or after ``timeout`` seconds."""


class PollSignal:
    """No interrupt: native code looks at the completion queue, without the GIL."""

    vector: int | None = None

    def add(self, queue: Served) -> None:
        """Nothing to remember."""

    def remove(self, queue: Served) -> None:
        """Nothing to forget."""

    def wait(self, queue: Served, timeout: float) -> None:
        """Spin on the phase tag."""
        queue.completions.poll(timeout)

    async def wait_async(self, request: Request, queue: Served, timeout: float) -> None:
        """Look whenever the event loop has nothing else to do; after a while, every half millisecond."""
        deadline = time.monotonic() + timeout
        looks = 0
        while not request.done and time.monotonic() < deadline:
            await asyncio.sleep(0 if looks < _EAGER_LOOKS else _LAZY_INTERVAL)
            looks += 1
            queue.reap()


class VectorSignal:
    """One interrupt vector.

    Args:
        vector: the eventfd's owner.
        rearm: called after the queues were looked at, for INTx, which masks itself.
    """

    def __init__(self, vector: Vector, rearm: Callable[[], None] | None = None) -> None:
        self._vector = vector
        self._rearm = rearm
        self._queues: list[Served] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting = 0

    @property
    def vector(self) -> int | None:
        """The vector's number."""
        return self._vector.number

    def add(self, queue: Served) -> None:
        """Look at this queue, too, when the interrupt comes."""
        self._queues.append(queue)

    def remove(self, queue: Served) -> None:
        """Look at it no longer."""
        if queue in self._queues:
            self._queues.remove(queue)

    def serve(self) -> None:
        """Look at all queues of this vector."""
        for queue in tuple(self._queues):
            queue.reap()
        if self._rearm is not None:
            # After the doorbells were written: the controller has taken the line back, or has more to say.
            self._rearm()

    def wait(self, queue: Served, timeout: float) -> None:  # noqa: ARG002  the vector speaks for all its queues
        """Sleep on the eventfd."""
        try:
            self._vector.wait(timeout)
        except VfioTimeoutError:
            return
        self.serve()

    async def wait_async(self, request: Request, queue: Served, timeout: float) -> None:
        """Sleep in the event loop, which watches the eventfd for as long as anybody waits."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and self._waiting:
                raise StateError(f"{queue.name} is awaited in another event loop already")
            self._loop = loop
        if not self._waiting:
            loop.add_reader(self._vector.fileno(), self._on_readable)
        self._waiting += 1
        try:
            await request.sleep(timeout)
        finally:
            self._waiting -= 1
            if not self._waiting:
                loop.remove_reader(self._vector.fileno())
                self._loop = None

    def _on_readable(self) -> None:
        if self._vector.take():
            self.serve()


def enable_signals(
    device: Device, kind: InterruptKind | None, count: int
) -> tuple[InterruptKind, list[Signal], Interrupt | None]:
    """Enable the interrupts of an NVMe controller.

    Args:
        device: the function.
        kind: which kind, or None for the best that the function has.
        count: how many vectors are of use: one for the admin queue, one for each I/O queue.

    Returns:
        The kind, the signals (at least one, at most ``count``), and what to disable in the end.

    Raises:
        NotSupportedError: the function does not have the kind that was asked for.
    """
    irqs = device.irqs
    sources: list[tuple[InterruptKind, Interrupt]] = [("msix", irqs.msix), ("msi", irqs.msi), ("intx", irqs.intx)]
    for name, interrupt in sources:
        if kind not in (None, name):
            continue
        available = interrupt.count
        if available:
            vectors = interrupt.enable(min(count, available))
            rearm = interrupt.unmask if name == "intx" else None
            return name, [VectorSignal(vector, rearm) for vector in vectors], interrupt
        if kind is not None:
            raise NotSupportedError(
                f"the function has no {name} interrupt",
                object=device.name,
                hint="leave interrupts=None, or say 'polling'",
            )
    return "polling", [PollSignal()], None
