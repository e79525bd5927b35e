"""The controller's end of the queues (Base 2.0, 3.3), and which of them there are."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from vfiopy.backend import Prot
from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.memory import Memory
from vfiopy.nvme_spec.status import Code

__all__ = ["CompletionQueue", "Queues", "SubmissionQueue"]

_SQE: Final = 64
_CQE: Final = 16
_LAST_DWORD: Final = 12


@dataclass(slots=True, eq=False)
class CompletionQueue:
    """A completion queue.

    Attributes:
        number, iova, entries: as created.
        vector: where its interrupts go; None for none.
        head: what the host has taken, as it says.
        tail, phase: where the next entry goes, and its phase tag.
        users: submission queues that complete here.
        backlog: completions that the queue has no room for yet, without their phase tag.
        stalls: something waits for the host to take entries.
    """

    number: int
    iova: int
    entries: int
    vector: int | None
    head: int = 0
    tail: int = 0
    phase: int = 1
    users: int = 0
    backlog: deque[bytes] = field(default_factory=deque)
    stalls: bool = False

    @property
    def room(self) -> int:
        """How many entries may be written before the host takes one."""
        return (self.head - self.tail - 1) % self.entries

    @property
    def full(self) -> bool:
        """So much waits already that no more commands are to be fetched."""
        return len(self.backlog) >= self.entries

    def take(self, head: int) -> bool:
        """The host says what it has taken; whether that can be."""
        if head >= self.entries or not 0 < (head - self.head) % self.entries <= (self.tail - self.head) % self.entries:
            return False
        self.head = head
        return True

    def post(self, memory: Memory) -> int:
        """Write what there is room for; return how many entries that were. Raises as ``Memory.access`` does."""
        posted = 0
        while self.backlog and (room := self.room):
            count = min(room, len(self.backlog), self.entries - self.tail)
            with memory.access(self.iova + _CQE * self.tail, _CQE * count, Prot.WRITE) as views:
                if len(views) > 1:
                    count = len(views[0]) // _CQE
                with views[0].cast("I") as words:
                    for number in range(count):
                        entry = self.backlog.popleft()
                        start = _CQE * number
                        # the dword with the phase tag comes last: a host that polls looks at nothing else
                        views[0][start : start + _LAST_DWORD] = entry[:_LAST_DWORD]
                        words[(start + _LAST_DWORD) // 4] = (
                            int.from_bytes(entry[_LAST_DWORD:], "little") | self.phase << 16
                        )
            self.tail += count
            if self.tail == self.entries:
                self.tail, self.phase = 0, self.phase ^ 1
            posted += count
        return posted


@dataclass(slots=True, eq=False)
class SubmissionQueue:
    """A submission queue.

    Attributes:
        number, iova, entries: as created.
        cq: where its commands complete.
        head: what was fetched.
        tail: what the host has put in, as it says.
        under_way: commands that were fetched and are to be executed later, by identifier.
    """

    number: int
    iova: int
    entries: int
    cq: CompletionQueue
    head: int = 0
    tail: int = 0
    under_way: dict[int, Command] = field(default_factory=dict)

    def take(self, tail: int) -> bool:
        """The host says what it has put in; whether that can be."""
        if tail >= self.entries or not 0 < (tail - self.tail) % self.entries < self.entries - self.pending:
            return False
        self.tail = tail
        return True

    @property
    def pending(self) -> int:
        """How many entries wait."""
        return (self.tail - self.head) % self.entries

    def peek(self, memory: Memory, most: int) -> bytes:
        """Read the next entries, at most to the end of the ring; raises as ``Memory.access`` does."""
        count = min(self.pending, most, self.entries - self.head)
        return memory.read(self.iova + _SQE * self.head, _SQE * count)


class Queues:
    """All queues of a controller.

    Args:
        most: I/O queue pairs.
        entries: of an I/O queue, at most.
    """

    def __init__(self, most: int, entries: int) -> None:
        self.most = most
        self.entries = entries
        self.page = 4096
        self.entry_sizes_set = True
        self.submissions: dict[int, SubmissionQueue] = {}
        self.completions: dict[int, CompletionQueue] = {}

    def clear(self) -> None:
        """Forget all, as a controller reset does."""
        self.submissions.clear()
        self.completions.clear()

    def make_admin(self, asq: int, acq: int, aqa: int) -> None:
        """Make the admin queues that the registers describe."""
        cq = CompletionQueue(0, acq, (aqa >> 16 & 0xFFF) + 1, 0, users=1)
        self.completions[0] = cq
        self.submissions[0] = SubmissionQueue(0, asq, (aqa & 0xFFF) + 1, cq)

    @property
    def has_io(self) -> bool:
        """An I/O queue was created."""
        return len(self.submissions) > 1 or len(self.completions) > 1

    def create_cq(self, command: Command, vectors: int) -> None:
        """Create I/O Completion Queue (Base 2.0, 5.4); ``vectors`` is how many interrupts there are."""
        number, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        if not 1 <= number <= self.most or number in self.completions:
            raise RefusedError(Code.INVALID_QUEUE_ID, 40)
        self._check(command, size)
        vector = command.cdw11 >> 16
        if vector >= vectors:
            raise RefusedError(Code.INVALID_INTERRUPT_VECTOR, 46)
        interrupts = bool(command.cdw11 & 2)
        self.completions[number] = CompletionQueue(number, command.prp1, size, vector if interrupts else None)

    def create_sq(self, command: Command) -> None:
        """Create I/O Submission Queue (Base 2.0, 5.5)."""
        number, size = command.cdw10 & 0xFFFF, (command.cdw10 >> 16) + 1
        target = command.cdw11 >> 16
        if not 1 <= number <= self.most or number in self.submissions:
            raise RefusedError(Code.INVALID_QUEUE_ID, 40)
        if not 1 <= target <= self.most:
            raise RefusedError(Code.INVALID_QUEUE_ID, 46)
        cq = self.completions.get(target)
        if cq is None:
            raise RefusedError(Code.CQ_INVALID, 46)
        self._check(command, size)
        self.submissions[number] = SubmissionQueue(number, command.prp1, size, cq)
        cq.users += 1

    def _check(self, command: Command, size: int) -> None:
        if not 2 <= size <= self.entries or not self.entry_sizes_set:
            raise RefusedError(Code.INVALID_QUEUE_SIZE, 42)
        if not command.cdw11 & 1:  # CAP.CQR: contiguous queues only
            raise RefusedError.field(44)
        if command.prp1 % self.page:
            raise RefusedError(Code.PRP_OFFSET_INVALID, 24)

    def delete_sq(self, command: Command) -> SubmissionQueue:
        """Delete I/O Submission Queue (Base 2.0, 5.7); returns it, for what is under way."""
        number = command.cdw10 & 0xFFFF
        queue = self.submissions.get(number) if number else None
        if queue is None:
            raise RefusedError(Code.INVALID_QUEUE_ID, 40)
        del self.submissions[number]
        queue.cq.users -= 1
        return queue

    def delete_cq(self, command: Command) -> None:
        """Delete I/O Completion Queue (Base 2.0, 5.6)."""
        number = command.cdw10 & 0xFFFF
        queue = self.completions.get(number) if number else None
        if queue is None:
            raise RefusedError(Code.INVALID_QUEUE_ID, 40)
        if queue.users:
            raise RefusedError(Code.INVALID_QUEUE_DELETION, 40)
        del self.completions[number]
