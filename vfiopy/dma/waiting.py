"""Unmapping from an event loop: waiting for pins without a thread, and without holding up the loop."""

from __future__ import annotations

from vfiopy.dma.mappers import MapperSet
from vfiopy.errors import StateError
from vfiopy.iova import IovaSpace
from vfiopy.iova.closing import wait_for_pins

__all__ = ["unmap_async"]


async def unmap_async(book: IovaSpace, mappers: MapperSet, iova: int, size: int | None, timeout: float | None) -> int:
    """Do :meth:`AddressSpace.unmap_async`."""
    if not book.is_stepwise():
        try:
            return await book.unmap_async(iova, None if size is None else iova + size - 1, timeout=timeout)
        except StateError:
            if not book.is_stepwise():  # else a mapper in Python joined meanwhile; everything is as it was
                raise
    found = book.find(iova) if size is None else None
    if found is not None and found.iova == iova:
        size = found.size
    if size is not None:
        closing = book.closing(iova, iova + size - 1, True)
        try:
            if not await wait_for_pins(closing, timeout):
                closing.raise_pinned()
        finally:
            closing.give_up()
    return mappers.unmap(iova, size, 0.0)  # who pins in between is told, and named, again
