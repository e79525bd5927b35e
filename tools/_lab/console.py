"""Reading the guest's console: what counts as the kernel complaining."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Console", "complaints"]

# Lines by which the kernel says that something is broken in it; a test that provokes one has found a bug.
COMPLAINT = re.compile(
    "|".join(
        [
            r"WARNING: ",
            r"BUG: |kernel BUG at |Oops|Kernel panic",
            r"general protection fault|unable to handle (page fault|kernel)",
            r"(UBSAN|KASAN|KFENCE|ODEBUG|refcount_t): ",
            r"self-detected stall|detected stalls on CPUs|blocked for more than \d+ sec",
            r"possible (circular locking|recursive locking|irq lock inversion)|inconsistent lock state",
            r"suspicious RCU usage|sleeping function called from invalid context|scheduling while atomic",
            r"DMA-API: .*(leak|not allocated|different)",
            r"list_(add|del) corruption|Bad page (state|map)",
        ]
    )
)

# Said by a healthy kernel about the machine it runs on, not about itself.
HARMLESS = re.compile(r"WARNING: (Unprivileged|unmet|no console)")

TAIL = 60


def complaints(lines: Iterable[str]) -> list[str]:
    """The lines among ``lines`` in which the kernel reports a defect."""
    return [line for line in lines if COMPLAINT.search(line) and not HARMLESS.search(line)]


class Console:
    """Collects the console's bytes: the whole text to a file, the last lines and all complaints in memory."""

    def __init__(self, log: Path) -> None:
        """Write to ``log``, replacing what was there."""
        self._file = log.open("wb")
        self._rest = b""
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self.complaints: list[str] = []

    def feed(self, data: bytes) -> None:
        """Take in what the serial port delivered."""
        self._file.write(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for raw in lines:
            line = raw.decode("utf-8", "replace").rstrip("\r")
            self.tail.append(line)
            self.complaints += complaints([line])

    def close(self) -> None:
        """Flush the log; an unfinished last line is taken in too."""
        if self._rest:
            self.feed(b"\n")
        self._file.close()
