"""Shadow doorbells: the host writes memory instead of registers while the controller is busy (Base 2.0, 5.8).

Of the I/O queues only: hosts ring the admin queue's registers as ever.
"""

from __future__ import annotations

from typing import Final

from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.memory import Memory
from vfiopy.emulated.nvme.queues import CompletionQueue, Queues, SubmissionQueue

__all__ = ["OACS", "ShadowDoorbells"]

OACS: Final = 1 << 8
"""Optional Admin Command Support: Doorbell Buffer Config."""
_PRP1, _PRP2 = 24, 32


class ShadowDoorbells:
    """The two buffers: what the host has written, and when it shall ring (EventIdx).

    Methods raise as ``Memory.access`` does where a buffer is out of reach.

    Args:
        memory: where the buffers are.
        stride: bytes from one entry to the next.
    """

    def __init__(self, memory: Memory, stride: int) -> None:
        self._memory = memory
        self._stride = stride
        self._shadow = self._events = 0
        self.on = False

    def reset(self) -> None:
        """Forget the buffers, as a controller reset does."""
        self.on = False

    def configure(self, command: Command, queues: Queues) -> None:
        """Doorbell Buffer Config; raises RefusedError where a buffer is not a page."""
        for address, at in ((command.prp1, _PRP1), (command.prp2, _PRP2)):
            if address % queues.page:
                raise RefusedError.field(at)
        self._shadow, self._events, self.on = command.prp1, command.prp2, True
        try:
            for sq in queues.submissions.values():
                self._expect(2 * sq.number, sq.tail)
            for cq in queues.completions.values():
                self._expect(2 * cq.number + 1, cq.head)
        except BaseException:
            self.on = False
            raise

    def begin(self, number: int, *, completion: bool) -> None:
        """An I/O queue was created: have the host ring for its first entry."""
        if self.on:
            self._expect(2 * number + completion, 0)

    def _read(self, index: int) -> int:
        return int.from_bytes(self._memory.read(self._shadow + index * self._stride, 4), "little")

    def _expect(self, index: int, value: int) -> None:
        self._memory.write(self._events + index * self._stride, value.to_bytes(4, "little"))

    def look(self, sq: SubmissionQueue) -> bool:
        """Take a submission queue's tail from its shadow; whether it is one that the queue can have."""
        if self.on and sq.number:
            tail = self._read(2 * sq.number)
            if tail >= sq.entries:
                return False
            sq.tail = tail
        return True

    def rest(self, sq: SubmissionQueue) -> bool:
        """Have the host ring for the next command; whether one came meanwhile."""
        if not self.on or not sq.number:
            return False
        self._expect(2 * sq.number, sq.tail)
        return self.look(sq) and sq.head != sq.tail

    def look_at(self, cq: CompletionQueue) -> None:
        """Take a completion queue's head from its shadow."""
        if self.on and cq.number:
            head = self._read(2 * cq.number + 1)
            if head < cq.entries and (head - cq.head) % cq.entries <= (cq.tail - cq.head) % cq.entries:
                cq.head = head

    def watch(self, cq: CompletionQueue) -> bool:
        """Have the host ring when it takes the next completion; whether it took some meanwhile, and will not."""
        if not self.on or not cq.number:
            return False
        head = cq.head
        self._expect(2 * cq.number + 1, head)
        self.look_at(cq)
        return cq.head != head
