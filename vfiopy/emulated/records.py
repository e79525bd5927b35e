"""What an emulated device remembers of things gone wrong, and what it is told to do wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["DeviceError", "Fault", "Injections"]


class Fault(NamedTuple):
    """A DMA that did not happen: what an IOMMU would report.

    Attributes:
        iova, size: the range that the device asked for, bytes.
        write: from the device to memory.
        reason: why, for people.
    """

    iova: int
    size: int
    write: bool
    reason: str


class DeviceError(NamedTuple):
    """Something that the driver, or the device's own code, did wrong.

    Attributes:
        text: what.
        exception: set where the device's code raised it.
    """

    text: str
    exception: BaseException | None = None


@dataclass(slots=True)
class Injections:
    """How many of the next operations fail. Set the counters; each failure takes one off.

    Attributes:
        dma_faults: DMA operations that fault although the memory is mapped.
        lost_interrupts: interrupts that are not sent.
        lost_work: pieces of work that are never done, as in a device that hangs.
    """

    dma_faults: int = 0
    lost_interrupts: int = 0
    lost_work: int = 0

    def take(self, what: str) -> bool:
        """Whether the next operation of a kind fails."""
        left = int(getattr(self, what))
        if left:
            setattr(self, what, left - 1)
        return bool(left)
