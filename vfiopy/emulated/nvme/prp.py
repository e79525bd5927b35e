"""Physical Region Pages: where a command's data lie (Base 2.0, 4.1.1)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from vfiopy.emulated.nvme.command import RefusedError
from vfiopy.emulated.nvme.memory import Memory, Piece
from vfiopy.nvme_spec.status import Code

__all__ = ["walk_prps"]

_PRP1, _PRP2 = 24, 32


def walk_prps(memory: Memory, prp1: int, prp2: int, size: int, page: int) -> list[Piece]:
    """Return where ``size`` bytes lie; what is contiguous is one piece.

    Args:
        memory: where PRP lists are read from.
        prp1, prp2: from the command.
        size: bytes, more than 0.
        page: the memory page size that the host chose (CC.MPS), bytes.

    Raises:
        RefusedError: PRP Offset Invalid: PRP 1 is not a multiple of 4, the first list of 8, another PRP or list of the
            page size.
        NotMappedError: the host has no list there.
    """
    if prp1 & 3:
        raise RefusedError(Code.PRP_OFFSET_INVALID, _PRP1)
    length = min(size, page - prp1 % page)
    left = size - length
    if not left:
        return [(prp1, length)]
    pieces: list[Piece] = []
    start = prp1
    entries = iter((prp2,)) if left <= page else _list(memory, prp2, -(-left // page), page)
    for iova in entries:
        if iova % page:
            raise RefusedError(Code.PRP_OFFSET_INVALID, _PRP2)
        take = min(left, page)
        if iova == start + length:
            length += take
        else:
            pieces.append((start, length))
            start, length = iova, take
        left -= take
    pieces.append((start, length))
    return pieces


def _list(memory: Memory, iova: int, count: int, page: int) -> Iterator[int]:
    """Yield the entries of a list, which may begin anywhere in a page; a page's last one may point to the next page."""
    if iova & 7:
        raise RefusedError(Code.PRP_OFFSET_INVALID, _PRP2)
    while True:
        room = (page - iova % page) // 8
        entries = struct.unpack(f"<{min(room, count)}Q", memory.read(iova, 8 * min(room, count)))
        if count <= room:
            yield from entries
            return
        yield from entries[:-1]
        count -= room - 1
        iova = entries[-1]
        if iova % page:  # or a list of its own last entry alone could lead to itself for ever
            raise RefusedError(Code.PRP_OFFSET_INVALID, _PRP2)
