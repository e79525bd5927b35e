"""A command under way, and the ways to wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Any, Protocol

from numpy.typing import NDArray

from vfiopy.drivers.nvme.commands import Command
from vfiopy.drivers.nvme.errors import NvmeError
from vfiopy.errors import VfiopyError
from vfiopy.nvme_spec.status import Status

__all__ = ["Carrier", "Request"]


class Carrier(Protocol):
    """What carries a request to the controller and back: a queue pair."""

    name: str
    number: int

    def wait(self, request: Request, timeout: float | None) -> None:
        """Wait until the request is settled, or raise NvmeTimeoutError."""

    async def wait_async(self, request: Request, timeout: float | None) -> None:
        """The same in an event loop."""


class Request:
    """A submitted command: ``request.wait()``, or ``await request``.

    It keeps its data buffer alive until the controller is done with it, so a wait that is interrupted or cancelled does
    no harm: the completion is matched to it whenever it comes. A wait that times out does: see :meth:`wait`.

    Threads: as its queue.

    Attributes:
        queue: where it was submitted.
        command: what was submitted.
        cid: its identifier in the queue.
        done: the controller has completed it, or never will.
        status: what the controller answered, or None.
        result: dword 0 of the completion; what it means depends on the command.
        error: what :meth:`wait` raises, or None.
    """

    __slots__ = ("_data", "_futures", "cid", "command", "done", "error", "queue", "result", "status")

    def __init__(self, queue: Carrier, command: Command, cid: int, data: NDArray[Any] | None) -> None:
        self.queue = queue
        self._data = data
        self._futures: list[asyncio.Future[None]] = []
        self.command = command
        self.cid = cid
        self.done = False
        self.status: Status | None = None
        self.result = 0
        self.error: VfiopyError | None = None

    def complete(self, status: Status, result: int) -> None:
        """Say what the controller answered: called by the queue."""
        self.status = status
        self.result = result
        if not status.ok:
            self.error = NvmeError(status, object=self.queue.name, call=self.command.name)
        self._settle()

    def abandon(self, error: VfiopyError) -> None:
        """Say that the controller will not answer: called by the queue."""
        self.error = error
        self._settle()

    def _settle(self) -> None:
        self.done = True
        self._data = None
        for future in self._futures:
            if not future.done():
                future.set_result(None)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the completion.

        Args:
            timeout: seconds; None for the controller's default.

        Returns:
            Dword 0 of the completion.

        Raises:
            NvmeError: the controller completed the command with an error.
            NvmeTimeoutError: it did not complete it in time. The controller is disabled then, because it might still
                write the buffer, and everything else that was under way is aborted.
            CommandAbortedError: the controller was reset, disabled or closed meanwhile.
        """
        if not self.done:
            self.queue.wait(self, timeout)
        return self._outcome()

    async def wait_async(self, timeout: float | None = None) -> int:
        """Wait as :meth:`wait` does, in an asyncio event loop; any number of tasks may wait for requests of a queue.

        Cancelling the wait leaves the command under way.
        """
        if not self.done:
            await self.queue.wait_async(self, timeout)
        return self._outcome()

    def __await__(self) -> Generator[object, None, int]:
        """Wait in an asyncio event loop, with the controller's default timeout."""
        return self.wait_async().__await__()

    def _outcome(self) -> int:
        if self.error is not None:
            raise self.error
        return self.result

    async def sleep(self, timeout: float) -> None:
        """Sleep until the request is settled, or ``timeout`` seconds: called by the signals."""
        future = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        try:
            async with asyncio.timeout(timeout):
                await future
        except TimeoutError:
            pass  # the caller looks for itself
        finally:
            self._futures.remove(future)

    def __repr__(self) -> str:
        state = "under way" if not self.done else "failed" if self.error else "done"
        return f"<Request {self.command.name} on {self.queue.name}: {state}>"
