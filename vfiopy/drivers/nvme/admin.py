"""Admin commands, each as one method that waits for its end."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfiopy.drivers.nvme import commands
from vfiopy.drivers.nvme.commands import Command
from vfiopy.drivers.nvme.events import AsyncEvent
from vfiopy.drivers.nvme.identify import ControllerInfo, NamespaceInfo
from vfiopy.drivers.nvme.queue import Allocator, QueuePair
from vfiopy.drivers.nvme.request import Request
from vfiopy.nvme_spec.opcodes import Cns, Feature, LogPage
from vfiopy.nvme_spec.structures import (
    ERROR_LOG_ENTRY,
    IDENTIFY_CONTROLLER,
    IDENTIFY_NAMESPACE,
    IDENTIFY_SIZE,
    SMART_LOG,
)

__all__ = ["Admin"]

_NAMESPACE_LIST = IDENTIFY_SIZE // 4


class Admin:
    """The admin command set of a controller: ``controller.admin``.

    All methods raise NvmeError where the controller refuses, and NvmeTimeoutError where it does not answer.

    Threads: one at a time.

    Attributes:
        queue: the admin queue pair, for commands that have no method here.
    """

    def __init__(self, queue: QueuePair, memory: Allocator, page: int) -> None:
        self.queue = queue
        self._memory = memory
        self._page = page
        self._buffer = memory.allocate(IDENTIFY_SIZE, "u1", alignment=page)

    def close(self) -> None:
        """Free the buffer; the controller must be disabled. Idempotent."""
        self._buffer.free()

    def execute(self, command: Command, data: NDArray[Any] | None = None, timeout: float | None = None) -> int:
        """Run any admin command and return dword 0 of its completion."""
        return self.queue.execute(command, data, timeout)

    # --- identify ------------------------------------------------------------------------------------------------

    def identify(self, cns: int, nsid: int = 0) -> bytes:
        """Return the 4096 bytes of Identify (Base 2.0, 5.17)."""
        self.execute(commands.identify(cns, nsid), self._buffer)
        return self._buffer.tobytes()

    def identify_controller(self) -> ControllerInfo:
        """Say what the controller is and can do."""
        return ControllerInfo.decode(np.frombuffer(self.identify(Cns.CONTROLLER), IDENTIFY_CONTROLLER)[0])

    def identify_namespace(self, nsid: int) -> NamespaceInfo:
        """Say what a namespace is. One that exists but is not active reads as all zeroes: 0 blocks."""
        return NamespaceInfo.decode(nsid, np.frombuffer(self.identify(Cns.NAMESPACE, nsid), IDENTIFY_NAMESPACE)[0])

    def active_namespaces(self) -> list[int]:
        """Return the identifiers of all active namespaces, ascending (Base 2.0, 5.17, CNS 02h)."""
        found: list[int] = []
        while True:
            page = np.frombuffer(self.identify(Cns.ACTIVE_NAMESPACES, found[-1] if found else 0), "<u4")
            found += [int(nsid) for nsid in page[page != 0]]
            if len(found) % _NAMESPACE_LIST or not page.any():
                return found

    # --- features ------------------------------------------------------------------------------------------------

    def get_feature(self, feature: int, *, nsid: int = 0, select: int = 0, value: int = 0) -> int:
        """Return a feature's value (Base 2.0, 5.15); ``select`` 0 current, 1 default, 2 saved."""
        return self.execute(commands.get_features(feature, nsid=nsid, select=select, value=value))

    def set_feature(self, feature: int, value: int, *, nsid: int = 0, save: bool = False) -> int:
        """Set a feature (Base 2.0, 5.27) and return dword 0 of the completion."""
        return self.execute(commands.set_features(feature, value, nsid=nsid, save=save))

    def request_queues(self, count: int) -> int:
        """Ask for this many I/O queue pairs; return how many there may be (Base 2.0, 5.27.1.5).

        Only before the first of them is created.
        """
        granted = self.set_feature(Feature.NUMBER_OF_QUEUES, (count - 1) << 16 | count - 1)
        return min(granted & 0xFFFF, granted >> 16) + 1

    # --- log pages -----------------------------------------------------------------------------------------------

    def log_page(
        self, page: int, size: int, *, nsid: int = commands.ALL_NAMESPACES, offset: int = 0, keep: bool = False
    ) -> bytes:
        """Return bytes of a log page (Base 2.0, 5.16).

        Args:
            page: log page identifier.
            size: bytes, a multiple of 4.
            nsid: namespace, or all.
            offset: first byte, a multiple of 4; the controller may not support it.
            keep: do not take the page's asynchronous event as seen.
        """
        command = commands.get_log_page(page, size, nsid=nsid, offset=offset, keep=keep)
        if size <= self._buffer.nbytes:
            part = self._buffer[:size]
            self.execute(command, part)
            return part.tobytes()
        with self._memory.allocate(size, "u1", alignment=self._page) as buffer:
            self.execute(command, buffer)
            return buffer.tobytes()

    def smart_log(self, nsid: int = commands.ALL_NAMESPACES) -> np.void:
        """Return the health log, a record of SMART_LOG (Base 2.0, 5.16.1.3)."""
        record: np.void = np.frombuffer(self.log_page(LogPage.SMART, SMART_LOG.itemsize, nsid=nsid), SMART_LOG)[0]
        return record

    def error_log(self, entries: int = 1) -> NDArray[Any]:
        """Return the newest entries of the error log, newest first: records of ERROR_LOG_ENTRY that are valid."""
        data = self.log_page(LogPage.ERRORS, entries * ERROR_LOG_ENTRY.itemsize)
        records: NDArray[Any] = np.frombuffer(data, ERROR_LOG_ENTRY)
        return records[np.flatnonzero(records["error_count"])]

    # --- events --------------------------------------------------------------------------------------------------

    def request_event(self) -> Request:
        """Ask to be told of one event (Base 2.0, 5.2) and return at once.

        ``AsyncEvent.decode(request.result)`` says which, when ``request.done``. Do not ``wait()`` for it with a time
        limit: an event that does not happen is no failure. :meth:`wait_event` waits without harm.
        """
        return self.queue.submit(commands.async_event_request())

    def wait_event(self, request: Request, timeout: float) -> AsyncEvent | None:
        """Wait for a requested event; None where none came within ``timeout`` seconds, and the request stays open."""
        return AsyncEvent.decode(request.result) if self.queue.settled(request, timeout) else None

    # --- queues --------------------------------------------------------------------------------------------------

    def create_queue(self, queue: QueuePair) -> None:
        """Make a queue pair known to the controller: completion queue first (Base 2.0, 5.4 and 5.5)."""
        self.execute(
            commands.create_cq(queue.number, queue.depth, queue.completion_iova, queue.signal.vector)
        )
        try:
            self.execute(commands.create_sq(queue.number, queue.depth, queue.submission_iova, queue.number))
        except BaseException:
            self.execute(commands.delete_cq(queue.number))
            raise

    def delete_queue(self, queue: QueuePair) -> None:
        """Make the controller forget a queue pair: submission queue first (Base 2.0, 5.6 and 5.7)."""
        self.execute(commands.delete_sq(queue.number))
        queue.reap()  # what was completed on the way; the doorbell is gone with the completion queue
        self.execute(commands.delete_cq(queue.number))

    def abort(self, request: Request) -> bool:
        """Ask the controller to end one command (Base 2.0, 5.1); whether it did.

        An aborted command is completed with the error "Command Abort Requested".
        """
        return not self.execute(commands.abort(request.queue.number, request.cid)) & 1
