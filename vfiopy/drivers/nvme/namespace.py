"""A namespace as a disk: blocks in, blocks out, split as the controller likes it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vfiopy.device import DeviceDma
from vfiopy.dma import DmaArray
from vfiopy.drivers.nvme import commands
from vfiopy.drivers.nvme.commands import Command
from vfiopy.drivers.nvme.errors import TransferSizeError
from vfiopy.drivers.nvme.identify import NamespaceInfo
from vfiopy.drivers.nvme.queue import QueuePair
from vfiopy.drivers.nvme.request import Request
from vfiopy.errors import AddressRangeError, MemoryKindError, NotSupportedError, VfiopyError
from vfiopy.nvme_spec.structures import RANGE

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Namespace", "Queues"]

_MOST_BLOCKS = 1 << 16  # NLB has 16 bits
_MOST_RANGES = 256

Job = tuple[Command, NDArray[Any] | None]


class Queues(Protocol):
    """Where a namespace's commands go: the controller."""

    name: str

    @property
    def queues(self) -> tuple[QueuePair, ...]:
        """The I/O queue pairs."""


class Namespace:
    """A namespace of the NVM command set: ``controller.namespace(1)``.

    Transfers longer than one command are split, and several commands are kept under way. When one of them fails the
    others are waited for before the error is raised, so no DMA into a buffer is left behind.

    Threads: as the queue that is used.

    Args:
        controller: whose namespace it is.
        info: what Identify says.
        memory: ``device.dma``.
    """

    def __init__(self, controller: Queues, info: NamespaceInfo, memory: DeviceDma) -> None:
        self.info = info
        self.nsid = info.nsid
        self.name = f"{controller.name} namespace {info.nsid}"
        self._controller = controller
        self._memory = memory

    @property
    def blocks(self) -> int:
        """Size in logical blocks."""
        return self.info.blocks

    @property
    def block_size(self) -> int:
        """Bytes per logical block."""
        return self.info.block_size

    # --- data ----------------------------------------------------------------------------------------------------

    def read(
        self,
        lba: int,
        count: int | None = None,
        *,
        into: NDArray[Any] | None = None,
        queue: QueuePair | None = None,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """Read logical blocks.

        Args:
            lba: the first block.
            count: number of blocks; None for as many as ``into`` holds.
            into: a contiguous DMA buffer of exactly that size, which the controller fills directly. Without one, the
                data passes through a DMA buffer of its own and is copied out of it.
            queue: which I/O queue pair; None for the first.
            timeout: seconds for each command; None for the controller's default.

        Returns:
            ``into``, or an ordinary array of bytes.

        Raises:
            AddressRangeError: the namespace ends before.
            TransferSizeError, MemoryKindError: ``into`` does not fit.
            NvmeError, NvmeTimeoutError: see :meth:`Request.wait`.
        """
        if into is not None:
            self._run(self._reads(lba, count, into, queue), queue, timeout)
            return into
        number = self._count(count)
        self._check_range(lba, number)
        with self._memory.allocate(number * self.block_size) as buffer:
            self._run(self._reads(lba, number, buffer, queue), queue, timeout)
            return np.array(buffer, subok=False)

    async def read_async(
        self,
        lba: int,
        count: int | None = None,
        *,
        into: NDArray[Any] | None = None,
        queue: QueuePair | None = None,
        timeout: float | None = None,
    ) -> NDArray[Any]:
        """Read as :meth:`read` does, in an asyncio event loop."""
        if into is not None:
            await self._run_async(self._reads(lba, count, into, queue), queue, timeout)
            return into
        number = self._count(count)
        self._check_range(lba, number)
        with self._memory.allocate(number * self.block_size) as buffer:
            await self._run_async(self._reads(lba, number, buffer, queue), queue, timeout)
            return np.array(buffer, subok=False)

    def write(
        self,
        lba: int,
        data: NDArray[Any] | Buffer,
        *,
        fua: bool = False,
        queue: QueuePair | None = None,
        timeout: float | None = None,
    ) -> None:
        """Write logical blocks.

        Args:
            lba: the first block.
            data: whole blocks. A DMA buffer is read by the controller directly; anything else with the buffer protocol
                is copied into one first.
            fua: each command completes when its data is on non-volatile media.
            queue: which I/O queue pair; None for the first.
            timeout: seconds for each command; None for the controller's default.

        Raises:
            AddressRangeError: the namespace ends before.
            TransferSizeError: ``data`` is not a whole number of blocks.
            NvmeError, NvmeTimeoutError: see :meth:`Request.wait`.
        """
        with self._reachable(data) as buffer:
            self._run(self._writes(lba, buffer, fua, queue), queue, timeout)

    async def write_async(
        self,
        lba: int,
        data: NDArray[Any] | Buffer,
        *,
        fua: bool = False,
        queue: QueuePair | None = None,
        timeout: float | None = None,
    ) -> None:
        """Write as :meth:`write` does, in an asyncio event loop."""
        with self._reachable(data) as buffer:
            await self._run_async(self._writes(lba, buffer, fua, queue), queue, timeout)

    def _reachable(self, data: NDArray[Any] | Buffer) -> AbstractContextManager[DmaArray]:
        if isinstance(data, DmaArray):
            return nullcontext(data)
        plain: Any = data
        return self._memory.bounce(plain)

    # --- the rest ------------------------------------------------------------------------------------------------

    def flush(self, *, queue: QueuePair | None = None, timeout: float | None = None) -> None:
        """Put what was written before onto non-volatile media (Base 2.0, 7.1)."""
        self._queue(queue).execute(commands.flush(self.nsid), None, timeout)

    def write_zeroes(
        self,
        lba: int,
        count: int,
        *,
        deallocate: bool = False,
        queue: QueuePair | None = None,
        timeout: float | None = None,
    ) -> None:
        """Make blocks read as zeroes, without a transfer (NVM 1.0, 3.2.8).

        Args:
            lba: the first block.
            count: number of blocks.
            deallocate: the controller may give up their space.
            queue: which I/O queue pair; None for the first.
            timeout: seconds for each command; None for the controller's default.
        """
        self._check_range(lba, count)
        jobs: Iterator[Job] = (
            (commands.write_zeroes(self.nsid, first, number, deallocate=deallocate), None)
            for first, number in _pieces(lba, count, _MOST_BLOCKS)
        )
        self._run(jobs, queue, timeout)

    def deallocate(
        self, *ranges: tuple[int, int], queue: QueuePair | None = None, timeout: float | None = None
    ) -> None:
        """Tell the controller that the content of blocks is of no use any more (NVM 1.0, 3.2.3).

        Args:
            ranges: up to 256 of (first block, number of blocks).
            queue: which I/O queue pair; None for the first.
            timeout: seconds; None for the controller's default.
        """
        if not 1 <= len(ranges) <= _MOST_RANGES:
            raise AddressRangeError(
                f"{len(ranges)} ranges in one command; 1 to {_MOST_RANGES} are possible", object=self.name
            )
        for lba, count in ranges:
            self._check_range(lba, count)
        with self._memory.allocate(len(ranges), RANGE) as table:
            table[:] = [(0, count, lba) for lba, count in ranges]
            self._queue(queue).execute(commands.dataset_management(self.nsid, len(ranges)), table, timeout)

    # --- splitting -----------------------------------------------------------------------------------------------

    def _count(self, count: int | None) -> int:
        if count is None:
            raise TransferSizeError(
                "neither a number of blocks nor a buffer is given", object=self.name, hint="read(lba, count)"
            )
        return count

    def _check_range(self, lba: int, count: int) -> None:
        if count < 1 or lba < 0 or lba + count > self.blocks:
            raise AddressRangeError(
                f"{count} blocks at LBA {lba} are not inside its {self.blocks} blocks of {self.block_size} bytes",
                object=self.name,
            )

    def _queue(self, queue: QueuePair | None) -> QueuePair:
        if queue is not None:
            return queue
        queues = self._controller.queues
        if not queues:
            raise NotSupportedError(
                "the controller has no I/O queue", object=self.name, hint="open it with queues=1 or more"
            )
        return queues[0]

    def _reads(self, lba: int, count: int | None, into: NDArray[Any], queue: QueuePair | None) -> Iterator[Job]:
        for first, number, piece in self._split(lba, count, into, queue):
            yield commands.read(self.nsid, first, number), piece

    def _writes(self, lba: int, data: NDArray[Any], fua: bool, queue: QueuePair | None) -> Iterator[Job]:
        for first, number, piece in self._split(lba, None, data, queue):
            yield commands.write(self.nsid, first, number, fua=fua), piece

    def _split(
        self, lba: int, count: int | None, buffer: NDArray[Any], queue: QueuePair | None
    ) -> Iterator[tuple[int, int, NDArray[Any]]]:
        if self.info.metadata_size or self.info.protection:
            raise NotSupportedError(
                f"its blocks carry {self.info.metadata_size} bytes of metadata, which this driver does not handle",
                object=self.name,
                hint="submit the commands yourself: controller.queues[0].submit()",
            )
        if not isinstance(buffer, DmaArray) or not buffer.flags.c_contiguous:
            raise MemoryKindError(
                "the buffer has to be a contiguous DMA buffer", object=self.name, hint="use device.dma.allocate()"
            )
        blocks, rest = divmod(buffer.nbytes, self.block_size)
        if rest or (count is not None and count != blocks):
            wanted = "whole" if count is None else count
            raise TransferSizeError(
                f"the buffer has {buffer.nbytes} bytes, which is not {wanted} blocks of {self.block_size} bytes",
                object=self.name,
            )
        self._check_range(lba, blocks)
        flat = buffer.reshape(-1).view(np.uint8)
        most = min(self._queue(queue).max_transfer // self.block_size, _MOST_BLOCKS)
        for first, number in _pieces(lba, blocks, most):
            begin = (first - lba) * self.block_size
            yield first, number, flat[begin : begin + number * self.block_size]

    # --- running -------------------------------------------------------------------------------------------------

    def _run(self, jobs: Iterator[Job], queue: QueuePair | None, timeout: float | None) -> None:
        pair = self._queue(queue)
        pending: deque[Request] = deque()
        try:
            for command, data in jobs:
                while not pair.free and pending:
                    pending[0].wait(timeout)
                    pending.popleft()
                pending.append(pair.submit(command, data))
            while pending:
                pending[0].wait(timeout)
                pending.popleft()
        except BaseException:
            for request in pending:
                with suppress(VfiopyError):  # the first error is the one to tell
                    request.wait(timeout)
            raise

    async def _run_async(self, jobs: Iterator[Job], queue: QueuePair | None, timeout: float | None) -> None:
        pair = self._queue(queue)
        pending: deque[Request] = deque()
        try:
            for command, data in jobs:
                while not pair.free:
                    if pending:
                        await pending[0].wait_async(timeout)
                        pending.popleft()
                    else:
                        # Other tasks hold all places. How their commands end is not our business.
                        await pair.wait_async(pair.under_way[0], timeout)
                pending.append(pair.submit(command, data))
            while pending:
                await pending[0].wait_async(timeout)
                pending.popleft()
        except BaseException:
            # Cancelled or failed: the buffer is the caller's again when this returns, so the DMA has to be over.
            await asyncio.shield(_settle(pending, timeout))
            raise

    def __repr__(self) -> str:
        return f"<Namespace {self.name}: {self.blocks} blocks of {self.block_size} bytes>"


async def _settle(pending: deque[Request], timeout: float | None) -> None:
    for request in pending:
        with suppress(VfiopyError):  # the first error is the one to tell
            await request.wait_async(timeout)


def _pieces(lba: int, count: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield (first block, number of blocks) with at most ``most`` blocks each."""
    end = lba + count
    while lba < end:
        number = min(most, end - lba)
        yield lba, number
        lba += number
