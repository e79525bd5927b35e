"""A queue pair: commands go in, completions come out, and each finds its way back to who waits for it."""

from __future__ import annotations

import time
from typing import Any, NoReturn, Protocol

from numpy.typing import DTypeLike, NDArray

from vfiopy.dma import DmaArray
from vfiopy.drivers.nvme.commands import Command
from vfiopy.drivers.nvme.errors import QueueFullError, TransferSizeError
from vfiopy.drivers.nvme.prp import ENTRY, fill_prps, list_pages
from vfiopy.drivers.nvme.request import Request
from vfiopy.drivers.nvme.rings import Completion, CompletionRing, SubmissionRing
from vfiopy.drivers.nvme.signals import Signal
from vfiopy.errors import MemoryKindError, VfiopyError
from vfiopy.mmio import Region
from vfiopy.nvme_spec.status import Status
from vfiopy.nvme_spec.structures import CQE, SQE

__all__ = ["Allocator", "Keeper", "QueuePair"]


class Allocator(Protocol):
    """Where queue memory comes from: ``device.dma``."""

    def allocate(self, shape: int, dtype: DTypeLike = ..., *, alignment: int = ...) -> DmaArray:
        """Return a zeroed one-dimensional DMA buffer."""


class Keeper(Protocol):
    """Who keeps the queue pair: the controller."""

    timeout: float

    def check_running(self) -> None:
        """Raise unless commands can be submitted."""

    def timed_out(self, request: Request, timeout: float) -> NoReturn:
        """Bring the controller into a defined state, and raise."""

    def fail(self, reason: str) -> None:
        """The controller broke the protocol: disable it and abandon everything that is under way."""


class QueuePair:
    """A submission and a completion queue of the same size (NVM Express Base Specification 2.0, 3.3).

    Threads: one at a time. Different queue pairs may be driven by different threads if each has an interrupt vector of
    its own, or polls; a timeout or a reset concerns them all.

    Args:
        keeper: the controller.
        number: queue identifier; 0 is the admin queue.
        depth: entries of each ring; one command less can be under way.
        memory: ``device.dma``.
        registers: BAR 0.
        doorbells: offsets of the submission tail and completion head doorbells.
        signal: what to wait on.
        page: the controller's memory page size, bytes.
        max_transfer: most bytes that one command moves.
        name: for messages.
    """

    def __init__(
        self,
        keeper: Keeper,
        number: int,
        depth: int,
        *,
        memory: Allocator,
        registers: Region,
        doorbells: tuple[int, int],
        signal: Signal,
        page: int,
        max_transfer: int,
        name: str,
    ) -> None:
        self.number = number
        self.depth = depth
        self.name = name
        self.signal = signal
        self.max_transfer = max_transfer
        self.missed_interrupts = 0
        self._keeper = keeper
        self._registers = registers
        self._tail_doorbell, self._head_doorbell = doorbells
        self._page = page
        self._inflight: dict[int, Request] = {}
        self._free = list(range(depth - 1))
        self._memory: list[DmaArray] = []
        try:
            self.submissions = SubmissionRing(self._allocate(memory, depth, SQE))
            self.completions = CompletionRing(self._allocate(memory, depth, CQE), f"{name} completions")
            self._list_entries = list_pages(max_transfer, page) * page // ENTRY
            total = (depth - 1) * self._list_entries
            self._lists = self._allocate(memory, total, "<u8") if total else None
        except BaseException:
            self.close()
            raise
        signal.add(self)

    def _allocate(self, memory: Allocator, count: int, dtype: DTypeLike) -> DmaArray:
        array = memory.allocate(count, dtype, alignment=self._page)
        self._memory.append(array)
        return array

    # --- submitting ----------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """How many more commands can be submitted right now."""
        return len(self._free)

    @property
    def under_way(self) -> tuple[Request, ...]:
        """The requests that are not completed."""
        return tuple(self._inflight.values())

    def submit(self, command: Command, data: NDArray[Any] | None = None) -> Request:
        """Submit a command without waiting for it.

        Args:
            command: what to do.
            data: the buffer that it reads or writes, all of it, contiguous; a slice of a DMA buffer is fine.

        Raises:
            QueueFullError: ``depth - 1`` commands are under way.
            TransferSizeError, AlignmentError, MemoryKindError: the buffer cannot be used.
            ControllerFailedError: the controller was disabled after a failure.
        """
        self._keeper.check_running()
        if not self._free:
            self.reap()
            if not self._free:
                raise QueueFullError(
                    f"{self.depth - 1} commands are under way, which is all that it holds",
                    object=self.name,
                    hint="wait for one of them first, or make the queue deeper",
                )
        cid = self._free.pop()
        try:
            prp1, prp2 = (command.prp1, 0) if data is None else self._describe(cid, data)
            request = Request(self, command, cid, data)
            tail = self.submissions.put(command, cid, prp1, prp2)
        except BaseException:
            self._free.append(cid)
            raise
        self._inflight[cid] = request
        self._registers.write32(self._tail_doorbell, tail)
        return request

    def _describe(self, cid: int, data: NDArray[Any]) -> tuple[int, int]:
        if not isinstance(data, DmaArray) or not data.flags.c_contiguous:
            raise MemoryKindError(
                "command data has to be a contiguous DMA buffer",
                object=self.name,
                hint="use device.dma.allocate(), and slices of it without a step",
            )
        if not 0 < data.nbytes <= self.max_transfer:
            raise TransferSizeError(
                f"{data.nbytes} bytes in one command; 1 to {self.max_transfer} can be moved",
                object=self.name,
                hint="Namespace.read() and write() split what is longer",
            )
        begin = cid * self._list_entries
        table, table_iova = None, 0
        if self._lists is not None:
            table = self._lists[begin : begin + self._list_entries]
            table_iova = self._lists.iova + begin * ENTRY
        return fill_prps(data.iova, data.nbytes, self._page, table, table_iova)

    def execute(self, command: Command, data: NDArray[Any] | None = None, timeout: float | None = None) -> int:
        """Submit a command and wait for it: see :meth:`submit` and :meth:`Request.wait`."""
        return self.submit(command, data).wait(timeout)

    # --- completing ----------------------------------------------------------------------------------------------

    def reap(self) -> int:
        """Take what is in the completion queue, without waiting; return how many completions that were."""
        count = 0
        wrong = None
        while (completion := self.completions.take()) is not None:
            count += 1
            wrong = self._finish(completion) or wrong
        if count:
            self._registers.write32(self._head_doorbell, self.completions.head)
        if wrong is not None:
            self._keeper.fail(wrong)
        return count

    def _finish(self, completion: Completion) -> str | None:
        request = self._inflight.pop(completion.cid, None)
        if request is None or completion.sqid != self.number:
            if request is not None:
                self._inflight[completion.cid] = request
            return (
                f"{self.name} got a completion for command {completion.cid} of queue {completion.sqid}, "
                "which is not under way"
            )
        self._free.append(completion.cid)
        request.complete(Status.decode(completion.status), completion.dw0)
        return None

    def settled(self, request: Request, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds, without harm to a request that is not settled then; whether it is."""
        deadline = time.monotonic() + timeout
        while True:
            self.reap()
            left = deadline - time.monotonic()
            if request.done or left <= 0:
                return request.done
            self.signal.wait(self, left)
            if not request.done and time.monotonic() >= deadline:
                self._last_look(request)

    def wait(self, request: Request, timeout: float | None) -> None:
        """Wait until the request is settled; what :meth:`Request.wait` calls."""
        limit = self._keeper.timeout if timeout is None else timeout
        if not self.settled(request, limit):
            self._keeper.timed_out(request, limit)

    async def wait_async(self, request: Request, timeout: float | None) -> None:
        """Wait until the request is settled; what :meth:`Request.wait_async` calls."""
        limit = self._keeper.timeout if timeout is None else timeout
        self.reap()
        if not request.done:
            await self.signal.wait_async(request, self, limit)
        if not request.done:
            self._last_look(request)
        if not request.done:
            self._keeper.timed_out(request, limit)

    def _last_look(self, request: Request) -> None:
        """Look before giving up: a completion without its interrupt is a fault, but not a lost command."""
        self.reap()
        if request.done and self.signal.vector is not None:
            self.missed_interrupts += 1

    # --- end -----------------------------------------------------------------------------------------------------

    def abandon(self, error: VfiopyError) -> None:
        """End all requests that are under way with this error; the controller must not be working on them any more."""
        requests, self._inflight = list(self._inflight.values()), {}
        self._free = list(range(self.depth - 1))
        for request in requests:
            request.abandon(error)

    def clear(self) -> None:
        """Start over with empty rings: the controller was reset."""
        self.submissions.clear()
        self.completions.clear()

    @property
    def submission_iova(self) -> int:
        """Where the controller sees the submission ring."""
        return self.submissions.memory.iova

    @property
    def completion_iova(self) -> int:
        """Where the controller sees the completion ring."""
        return self.completions.memory.iova

    def close(self) -> None:
        """Free the memory. The controller must not use the queue any more. Idempotent."""
        self.signal.remove(self)
        completions = getattr(self, "completions", None)
        if completions is not None:
            completions.close()
        for array in self._memory:
            array.free()
        self._memory = []

    def __repr__(self) -> str:
        return f"<QueuePair {self.name}: {len(self._inflight)} of {self.depth - 1} under way>"
