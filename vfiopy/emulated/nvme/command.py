"""A submission queue entry as the controller takes it apart, and how a command ends that is not to be done."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from vfiopy.nvme_spec.status import Code

__all__ = ["ENTRY", "Command", "RefusedError"]

ENTRY: Final = struct.Struct("<BBHIQQQQ6I")
"""The 64 bytes of an entry, in the order of :class:`Command` (Base 2.0, 3.3.3.1)."""


class Command(NamedTuple):
    """A submission queue entry (Base 2.0, 3.3.3.1)."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    cdw23: int
    mptr: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int


class RefusedError(Exception):
    """A command ends with this status.

    Args:
        code: the status.
        at: byte of the submission queue entry that is wrong, for the error log; None where it is none.
        retry: the same command may succeed later: Do Not Retry stays clear.
        lba: the first logical block with the error, for the error log.
    """

    def __init__(self, code: int, at: int | None = None, *, retry: bool = False, lba: int = 0) -> None:
        super().__init__(f"status {code:#x}")
        self.code = code
        self.at = at
        self.retry = retry
        self.lba = lba

    @classmethod
    def field(cls, at: int) -> RefusedError:
        """Invalid Field in Command: the byte at ``at``."""
        return cls(Code.INVALID_FIELD, at)
