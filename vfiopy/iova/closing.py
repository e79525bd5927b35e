"""Unmapping without blocking an event loop, and ending a book whose pins do not go."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from vfiopy._native import IovaClosing

__all__ = ["Leak", "leaked_memory", "wait_for_pins"]


class Leak(NamedTuple):
    """Pins that were left when a book was closed by force.

    Attributes:
        owner: name of the owner.
        pins: how many it holds.
        iova: first IOVA of the mapping that they are in.
        size: bytes of the mapping.
    """

    owner: str
    pins: int
    iova: int
    size: int


_leaked: list[object] = []


def leaked_memory() -> list[object]:
    """Return the memory that stays allocated although its book is closed or gone.

    Pins on it were never taken off, or the book was dropped while a kernel mapper had it. A device, or code that
    believes to be allowed to, may still write it: it is kept until the process ends.
    """
    return list(_leaked)


def keep_for_ever(memory: object) -> None:
    """Never free this memory."""
    _leaked.append(memory)


async def wait_for_pins(closing: IovaClosing, timeout: float | None) -> bool:
    """Wait until a closing range has no pins; False after ``timeout`` seconds (None: never).

    The owners' callbacks run in this task. No thread is used: the loop watches a file descriptor.
    """
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    descriptor = closing.fileno()
    loop.add_reader(descriptor, changed.set)
    try:
        async with asyncio.timeout(timeout):
            while not closing.ready():
                await changed.wait()
                changed.clear()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True
