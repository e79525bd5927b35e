"""Fences: when work on a buffer is done, as a file descriptor (Documentation/driver-api/sync_file.rst)."""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Callable
from typing import Self

from vfiopy.errors import VfioTimeoutError
from vfiopy.kernel.ioctl import SyncFileFd, SyncFileInfo
from vfiopy.lives import Resource

__all__ = ["Fence", "ready", "ready_async"]


class Fence(Resource):
    """One fence or several, signalled when all of them are.

    Threads: may be shared.
    """

    _rank = 45

    def __init__(self, calls: SyncFileFd) -> None:
        """Take over a sync file."""
        self.calls = calls
        super().__init__(calls.label)

    @classmethod
    def adopt(cls, fd: int, name: str | None = None) -> Self:
        """Duplicate a sync file's fd that came from elsewhere: a GPU's driver, another process."""
        return cls(SyncFileFd.adopt(fd, name))

    def fileno(self) -> int:
        """For poll(): readable once signalled."""
        return self.calls.fileno()

    @property
    def info(self) -> SyncFileInfo:
        """Name, status and the fences that it is made of."""
        return self.calls.file_info()

    @property
    def signalled(self) -> bool:
        """All of it is done (or failed: ``info`` tells)."""
        return ready(self.fileno(), select.POLLIN, 0)

    def merge(self, other: Fence, name: str = "vfiopy") -> Fence:
        """Return a new fence that is signalled when both are."""
        return Fence(self.calls.merge(other.calls, name))

    def set_deadline(self, seconds: float) -> None:
        """Tell whoever works on it that it is needed in so many seconds (Linux 6.4)."""
        self.calls.set_deadline(time.monotonic_ns() + int(seconds * 1e9))

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is signalled; whether the work went well, ``info.status`` says.

        Raises:
            VfioTimeoutError: not within ``timeout`` seconds.
        """
        if not ready(self.fileno(), select.POLLIN, timeout):
            raise self._late(timeout)

    async def wait_async(self, timeout: float | None = None) -> None:
        """As :meth:`wait`, without blocking the event loop."""
        if not await ready_async(self.fileno(), select.POLLIN, timeout):
            raise self._late(timeout)

    def _late(self, timeout: float | None) -> VfioTimeoutError:
        return VfioTimeoutError(f"not signalled within {timeout} s", object=self._label)

    def _release(self) -> None:
        self.calls.close()


def ready(fd: int, events: int, timeout: float | None) -> bool:
    """Wait for one of ``select.POLL*`` on an fd; return whether it came."""
    poller = select.poll()
    poller.register(fd, events)
    return bool(poller.poll(None if timeout is None else timeout * 1000))


async def ready_async(fd: int, events: int, timeout: float | None) -> bool:
    """As :func:`ready`, without blocking the event loop."""
    loop = asyncio.get_running_loop()
    if ready(fd, events, 0):
        return True
    came: asyncio.Future[None] = loop.create_future()
    watched = os.dup(fd)  # an event loop watches an fd for one task only
    watch: Callable[..., None] = loop.add_reader if events == select.POLLIN else loop.add_writer
    unwatch = loop.remove_reader if events == select.POLLIN else loop.remove_writer

    def wake() -> None:
        if not came.done():
            came.set_result(None)

    try:
        watch(watched, wake)
        await asyncio.wait_for(came, timeout)
    except TimeoutError:
        return ready(watched, events, 0)
    finally:
        unwatch(watched)
        os.close(watched)
    return True
