"""The two rings of a queue pair, as they lie in memory (NVM Express Base Specification 2.0, 3.3.1 and 3.3.3).

The order of accesses is what makes them work. Submission: the entry is in memory before the doorbell is written, which
``Region.write32`` sees to. Completion: the dword with the phase tag is read first, and the rest of the entry after it,
which ``Region.read32`` sees to. So the completion ring is looked at through a :class:`~vfiopy.mmio.Region` of its own.
"""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np

from vfiopy.dma import DmaArray
from vfiopy.drivers.nvme.commands import Command
from vfiopy.errors import VfioTimeoutError
from vfiopy.mmio import Region
from vfiopy.nvme_spec.structures import CQE

__all__ = ["Completion", "CompletionRing", "SubmissionRing"]

_ENTRY = struct.Struct("<IIHHHH")
_LAST_DWORD = 12
_PHASE = 1 << 16


class Completion(NamedTuple):
    """One completion queue entry; ``status`` still has the phase tag in bit 0."""

    dw0: int
    dw1: int
    sqhd: int
    sqid: int
    cid: int
    status: int


class SubmissionRing:
    """The host's end of a submission queue.

    Args:
        memory: one-dimensional array of SQE; zeroed.
    """

    def __init__(self, memory: DmaArray) -> None:
        self.memory = memory
        self.entries = len(memory)
        self.tail = 0

    def clear(self) -> None:
        """Start over, as after a reset."""
        self.memory.view(np.uint8)[:] = 0
        self.tail = 0

    def put(self, command: Command, cid: int, prp1: int, prp2: int) -> int:
        """Write the entry at the tail; return the new tail, for the doorbell. The caller keeps it from overflowing."""
        self.memory[self.tail] = (
            command.opcode, 0, cid, command.nsid, command.cdw2, command.cdw3, 0, prp1, prp2,
            command.cdw10, command.cdw11, command.cdw12, command.cdw13, command.cdw14, command.cdw15,
        )  # fmt: skip
        self.tail = (self.tail + 1) % self.entries
        return self.tail


class CompletionRing:
    """The host's end of a completion queue.

    The controller inverts the phase tag with each pass over the ring; memory starts zeroed, so the first pass has 1.

    Args:
        memory: one-dimensional array of CQE; zeroed.
        name: for messages.
    """

    def __init__(self, memory: DmaArray, name: str) -> None:
        self.memory = memory
        self.entries = len(memory)
        self.head = 0
        self.phase = 1
        octets: Any = memory.view(np.uint8)
        self._bytes = memoryview(octets)
        self._region = Region(name, memory.nbytes, [(0, memory.address, memory.nbytes)], writable=False)

    def clear(self) -> None:
        """Start over, as after a reset."""
        self._bytes[:] = bytes(len(self._bytes))
        self.head = 0
        self.phase = 1

    def take(self) -> Completion | None:
        """Return the next completion, or None where the controller has not written it yet."""
        offset = self.head * CQE.itemsize
        if self._region.read32(offset + _LAST_DWORD) >> 16 & 1 != self.phase:
            return None
        completion = Completion(*_ENTRY.unpack_from(self._bytes, offset))
        self.head += 1
        if self.head == self.entries:
            self.head = 0
            self.phase ^= 1
        return completion

    def poll(self, timeout: float) -> bool:
        """Wait in native code until there is a completion; False when there is none after ``timeout`` seconds."""
        try:
            self._region.poll32(
                self.head * CQE.itemsize + _LAST_DWORD, _PHASE, _PHASE if self.phase else 0, timeout
            )
        except VfioTimeoutError:
            return False
        return True

    def close(self) -> None:
        """Let the memory go. Idempotent."""
        self._region.close()
        self._bytes.release()
