"""The book: what is mapped where in one DMA address space."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from vfiopy import _native
from vfiopy.errors import NotMappedError, PinnedError
from vfiopy.iova.accounting import charges
from vfiopy.iova.closing import Leak, keep_for_ever, wait_for_pins
from vfiopy.iova.picture import plot, text_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["IovaSpace"]

_LAST = (1 << 64) - 1


class IovaSpace(_native.IovaSpace):
    """The book of one DMA address space: every mapping, free range and pin, and the only IOVA allocator.

    IOVAs, addresses and sizes are ints in bytes; ranges are pairs ``(first, last)`` with both ends included,
    so that the last page of the 64-bit space can be written down. Each call is one native call: a map
    reserves the range, calls the kernel for every mapper, and commits or undoes it, with no bytecode between.

    A mapping goes in this order: owners of pins in it are told, the pins go, every mapper unmaps it, its memory
    is let go. Backends agree on one behaviour: a range to unmap must not cut a mapping (checked before anything
    is touched); holes and empty ranges are fine and count 0 bytes.

    The allocator never chooses IOVA 0, which many devices take for "none"; who needs it (a guest's memory
    begins there) can ask for it.

    A book that is dropped while a kernel mapper has mappings of it makes no call, because nobody knows whether the
    mapper's fd is still the same file; it never lets that memory go, with a ResourceWarning (:func:`leaked_memory`).

    Threads: everything may be called from any thread. Kernel calls for different mappings run in parallel.

    Args:
        name: for messages.
    """

    async def unmap_async(self, iova: int, last: int | None = None, *, timeout: float | None = 0.0) -> int:
        """Unmap without blocking the event loop while owners of pins take their time.

        Args:
            iova: where the mapping begins; with ``last``, the first IOVA of a range.
            last: the last IOVA of the range; None for exactly the mapping that begins at ``iova``.
            timeout: seconds to wait for pins to go after their owners were told, None for ever.

        Returns:
            Number of bytes unmapped.

        Raises:
            PinnedError: the owners, who are named, did not let go; everything is as it was. Cancelling the task
                leaves everything as it was too.
            NotMappedError, UnmappingError, BusyError: as for ``unmap``.
        """
        if last is None:
            found = self.find(iova)
            if found is None:
                raise NotMappedError(f"unmap_async: nothing is mapped at IOVA {iova:#x}", object=f"space '{self.name}'")
            last = iova + found.size - 1 if found.iova == iova else iova
        closing = self.closing(iova, last)
        try:
            if not await wait_for_pins(closing, timeout):
                closing.raise_pinned()
            return closing.finish()
        finally:
            closing.give_up()

    def close(self, *, timeout: float | None = 0.0, force: bool = False) -> list[Leak]:
        """Unmap everything, at the end of the book's life; bus mastering must be off by then.

        Args:
            timeout: seconds to wait for the owners of pins after they were told, None for ever.
            force: give up on pins that do not go: their mappings stay, and their memory is never freed, because
                a device may still write it (see :func:`leaked_memory`).

        Returns:
            One entry for each owner of pins in each mapping that was left by force; empty without ``force``.

        Raises:
            PinnedError: owners of pins did not let go, and it was not to be forced. Nothing is unmapped.
        """
        try:
            self.unmap_all(timeout)
        except PinnedError:
            if not force:
                raise
        else:
            return []
        leaks = [Leak(name, pins, iova, size) for name, _id, pins, iova, size in self.holders(0, _LAST)]
        pinned = {leak.iova for leak in leaks}
        for mapping in self.mappings():
            if mapping.iova in pinned:
                keep_for_ever(mapping.memory)
            else:
                self.unmap(mapping.iova)
        for leak in leaks:
            warnings.warn(
                f"space '{self.name}': {leak.owner} left {leak.pins} pins in {leak.iova:#x}-"
                f"{leak.iova + leak.size - 1:#x}; that memory is never freed",
                ResourceWarning,
                stacklevel=2,
            )
        return leaks

    def stats(self) -> dict[str, Any]:
        """Return figures of the book and what the kernel charges for it.

        Bytes: ``mapped_bytes``, ``bytes_by_kind``, ``pinned_bytes``, ``free_bytes``, ``largest_free_bytes``, and
        what the book itself takes (``book_memory``, of that ``pin_memory``). Numbers: ``mappings``,
        ``mappings_by_kind``, ``mappings_by_state``, ``pins`` (sum of counts), ``pinned_pages``, ``free_ranges``.
        ``fragmentation`` is the part of the free bytes that is outside of the largest free range, 0 to 1.

        ``charged`` says what counts against RLIMIT_MEMLOCK, by rule: ``type1`` charges each mapped page to the
        process, for every container anew (``VmLck``); ``iommufd`` charges a page to the user, over all processes,
        when a device is attached and once for all IOASes that share it, so that it is an upper bound here
        (``VmPin``). ``process`` is what the kernel says of this process now: see :class:`Charges`.
        """
        figures = super().stats()
        by_kind = {_native.MAPPER_TYPE1: 0, _native.MAPPER_IOAS: 0}
        for _token, kind, _fd, _object, _active, _mappings, charged in self.kernel_mappers():
            by_kind[kind] += charged
        figures["charged"] = {
            "type1": by_kind[_native.MAPPER_TYPE1],
            "iommufd": by_kind[_native.MAPPER_IOAS],
            "process": charges(),
        }
        return figures

    def text_map(self, width: int = 64) -> str:
        """Draw the space as text: ranges, windows, mappings by kind, pins; see :mod:`vfiopy.iova.picture`."""
        return text_map(self, width)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draw the space with matplotlib (extra ``plot``); see :mod:`vfiopy.iova.picture`."""
        return plot(self, axes)
