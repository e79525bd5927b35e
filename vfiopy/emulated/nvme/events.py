"""Asynchronous events (Base 2.0, 5.2): what the controller tells without being asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum

from vfiopy.emulated.nvme.command import RefusedError
from vfiopy.nvme_spec.opcodes import LogPage
from vfiopy.nvme_spec.status import Code

__all__ = ["EventType", "Events"]


class EventType(IntEnum):
    """Types of events (Base 2.0, figure 146)."""

    ERROR = 0
    HEALTH = 1
    NOTICE = 2


_MOST_WAITING = 64


class Events:
    """Requests that wait for events, and events that wait for requests.

    After an event of a type, no other of that type is told until the host has read the log page that goes with it.

    Args:
        most: requests that may wait.
        complete: called with (command identifier, dword 0) where a request ends.
    """

    def __init__(self, most: int, complete: Callable[[int, int], None]) -> None:
        self._most = most
        self._complete = complete
        self._requests: deque[int] = deque()
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._masked: dict[int, int] = {}  # type → log page that lets the next come

    def reset(self) -> None:
        """Forget all, as a controller reset does."""
        self._requests.clear()
        self._waiting.clear()
        self._masked.clear()

    def request(self, cid: int) -> None:
        """Asynchronous Event Request: wait; raises RefusedError where too many do."""
        if len(self._requests) >= self._most:
            raise RefusedError(Code.EVENT_LIMIT_EXCEEDED)
        self._requests.append(cid)
        self._tell()

    def withdraw(self, cid: int) -> bool:
        """Abort: take a request back; whether there was one."""
        if cid not in self._requests:
            return False
        self._requests.remove(cid)
        return True

    def post(self, kind: EventType, information: int, page: int) -> None:
        """Something happened; the same thing is not told twice while it waits."""
        event = (int(kind), information, page)
        if event not in self._waiting and len(self._waiting) < _MOST_WAITING:
            self._waiting.append(event)
            self._tell()

    def page_read(self, page: int) -> None:
        """The host has read a log page, without Retain Asynchronous Event."""
        for kind in [kind for kind, needed in self._masked.items() if needed == page]:
            del self._masked[kind]
        self._tell()

    def _tell(self) -> None:
        for event in list(self._waiting):
            if not self._requests:
                return
            kind, information, page = event
            if kind not in self._masked:
                self._waiting.remove(event)
                self._masked[kind] = page
                self._complete(self._requests.popleft(), kind | information << 8 | page << 16)

    def invalid_doorbell(self, *, value: bool) -> None:
        """A doorbell that does not exist was written, or a wrong value to one that does."""
        self.post(EventType.ERROR, int(value), LogPage.ERRORS)

    def namespace_changed(self) -> None:
        """The list of changed namespaces has grown."""
        self.post(EventType.NOTICE, 0, LogPage.CHANGED_NAMESPACES)

    def health(self, warnings: int) -> None:
        """These bits of the critical warning are new (figure 148)."""
        if warnings & 1 << 0:
            self.post(EventType.HEALTH, 2, LogPage.SMART)  # spare below its threshold
        if warnings & 1 << 1:
            self.post(EventType.HEALTH, 1, LogPage.SMART)  # temperature
        if warnings & (1 << 2 | 1 << 3):
            self.post(EventType.HEALTH, 0, LogPage.SMART)  # reliability
