"""The memory that the controller reaches: the host's by DMA, and its own memory buffer at the host's addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from vfiopy.backend import Prot
from vfiopy.emulated.nvme.command import RefusedError
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.nvme_spec.status import Code

__all__ = ["Memory", "Piece"]

Piece = tuple[int | None, int]
"""Address and bytes of a part of a command's data; no address where the data are to be dropped (a bit bucket)."""


class Memory:
    """Where queues and data lie.

    Args:
        device: does the DMA.
        buffer: the controller memory buffer; None where there is none.

    Attributes:
        window: the addresses that mean the controller memory buffer; empty while it is off (Base 2.0, 8.5).
    """

    def __init__(self, device: PciDevice, buffer: memoryview | None) -> None:
        self._device = device
        self._buffer = buffer
        self.window = range(0)

    def place_buffer(self, base: int | None) -> bool:
        """Have the memory buffer answer at an address, or at none; whether it fits there."""
        size = len(self._buffer) if self._buffer is not None else 0
        self.window = range(0)
        if base is not None:
            if base + size > 1 << 64:
                return False
            self.window = range(base, base + size)
        return True

    def access(self, iova: int, size: int, prot: Prot) -> AbstractContextManager[list[memoryview]]:
        """Give views of a range, in order, for the length of a ``with`` block.

        Raises:
            NotMappedError: the host has nothing there.
            RefusedError: it begins or ends in the memory buffer, but does not lie in it.
        """
        window = self.window
        if window and iova < window.stop and iova + size > window.start:
            if iova < window.start or iova + size > window.stop or self._buffer is None:
                raise RefusedError(Code.INVALID_CMB_USE)
            start = iova - window.start
            return nullcontext([self._buffer[start : start + size]])
        return self._device.dma(iova, size, prot)

    def gather(self, pieces: Sequence[Piece], prot: Prot) -> AbstractContextManager[list[memoryview]]:
        """Give views of all parts of a command's data; raises as :meth:`access` does."""
        if len(pieces) == 1 and pieces[0][0] is not None:
            return self.access(pieces[0][0], pieces[0][1], prot)
        return self._gather(pieces, prot)

    @contextmanager
    def _gather(self, pieces: Sequence[Piece], prot: Prot) -> Iterator[list[memoryview]]:
        with ExitStack() as stack:
            found: list[memoryview] = []
            for iova, size in pieces:
                if iova is None:
                    found.append(memoryview(bytearray(size)))
                else:
                    found += stack.enter_context(self.access(iova, size, prot))
            yield found

    def read(self, iova: int, size: int) -> bytes:
        """Read a range; raises as :meth:`access` does."""
        with self.access(iova, size, Prot.READ) as views:
            return b"".join(views)

    def write(self, iova: int, data: bytes) -> None:
        """Write a range; raises as :meth:`access` does."""
        self.store([(iova, len(data))], data)

    def load(self, pieces: Sequence[Piece]) -> bytes:
        """Read a command's data."""
        with self.gather(pieces, Prot.READ) as views:
            return b"".join(views)

    def store(self, pieces: Sequence[Piece], data: bytes) -> None:
        """Write a command's data; ``data`` is as long as the pieces are."""
        with self.gather(pieces, Prot.WRITE) as views:
            done = 0
            for view in views:
                view[:] = data[done : done + len(view)]
                done += len(view)
