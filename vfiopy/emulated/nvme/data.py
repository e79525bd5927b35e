"""From a command to the memory that its data are in: the data pointer (Base 2.0, 4.1)."""

from __future__ import annotations

from typing import Final

from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.memory import Memory, Piece
from vfiopy.emulated.nvme.prp import walk_prps
from vfiopy.emulated.nvme.sgl import walk_sgl

__all__ = ["Data"]

_FLAGS: Final = 1  # byte of the entry, for the error log
_PSDT: Final = 0xC0
_SGL: Final = 0x40  # with a metadata pointer that is an address; there are no metadata


class Data:
    """Finds and moves the data of commands.

    Args:
        memory: where they are.
        limit: most bytes that a command may move (MDTS); 0 for no limit.
        sgls: SGLs are allowed; admin commands use PRPs (Base 2.0, 4.1).

    Attributes:
        memory: see above.
        page: the memory page size that the host chose (CC.MPS), bytes.
    """

    def __init__(self, memory: Memory, limit: int, *, sgls: bool) -> None:
        self.memory = memory
        self.limit = limit
        self.page = 4096
        self._sgls = sgls

    def locate(self, command: Command, size: int, *, to_host: bool) -> list[Piece]:
        """Return where the ``size`` bytes of a command's data are.

        Raises:
            RefusedError: the data pointer is wrong.
            NotMappedError: the host has no list there.
        """
        kind = command.flags & _PSDT
        if not kind:
            return walk_prps(self.memory, command.prp1, command.prp2, size, self.page)
        if kind != _SGL or not self._sgls:
            raise RefusedError.field(_FLAGS)
        return walk_sgl(self.memory, command.prp1, command.prp2, size, to_host=to_host)

    def load(self, command: Command, size: int) -> bytes:
        """Read a command's data; raises as :meth:`locate` does."""
        return self.memory.load(self.locate(command, size, to_host=False))

    def store(self, command: Command, data: bytes) -> None:
        """Write a command's data; raises as :meth:`locate` does."""
        self.memory.store(self.locate(command, len(data), to_host=True), data)
