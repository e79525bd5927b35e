"""Scatter Gather Lists: the other way to say where a command's data lie (Base 2.0, 4.1.2)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from vfiopy.emulated.nvme.command import RefusedError
from vfiopy.emulated.nvme.memory import Memory, Piece
from vfiopy.nvme_spec.status import Code

__all__ = ["DESCRIPTOR", "SUPPORT", "DescriptorType", "walk_sgl"]

DESCRIPTOR: Final = struct.Struct("<QI3xB")
"""Address, length, and type and sub type in one byte (figure 87)."""
SUPPORT: Final = 1 << 0 | 1 << 16
"""SGLS: data of any alignment, bit buckets (Base 2.0, figure 275)."""
_MOST_DESCRIPTORS: Final = 1 << 12  # each costs time that others wait; and a chain that goes in circles has to end
_DPTR: Final = 24


class DescriptorType(IntEnum):
    """Descriptors that this controller knows (Base 2.0, figure 88)."""

    DATA_BLOCK = 0
    BIT_BUCKET = 1
    SEGMENT = 2
    LAST_SEGMENT = 3


class _Descriptor(NamedTuple):
    address: int
    length: int
    kind: DescriptorType

    @property
    def leads_on(self) -> bool:
        return self.kind >= DescriptorType.SEGMENT


def walk_sgl(memory: Memory, prp1: int, prp2: int, size: int, *, to_host: bool) -> list[Piece]:
    """Return where ``size`` bytes lie; what is contiguous is one piece.

    Args:
        memory: where segments are read from.
        prp1, prp2: the 16 bytes of the command that are the first descriptor.
        size: bytes, more than 0.
        to_host: the data go to the host; where they come from there, a bit bucket is of no length.

    Raises:
        RefusedError: with the status that the specification has for what is wrong with the list.
        NotMappedError: the host has no segment there.
    """
    pieces: list[Piece] = []
    left = size
    for one in _descriptors(memory, _decode(struct.pack("<QQ", prp1, prp2), 0)):
        bucket = one.kind == DescriptorType.BIT_BUCKET
        if bucket and not to_host:
            continue
        if one.length > left:
            raise RefusedError(Code.SGL_LENGTH_INVALID, _DPTR)
        if not one.length:
            continue
        left -= one.length
        last = pieces[-1] if pieces else (None, 0)
        if not bucket and last[0] is not None and last[0] + last[1] == one.address:
            pieces[-1] = (last[0], last[1] + one.length)
        else:
            pieces.append((None if bucket else one.address, one.length))
    if left:
        raise RefusedError(Code.SGL_LENGTH_INVALID, _DPTR)
    return pieces


def _decode(data: bytes, start: int) -> _Descriptor:
    address, length, kind = DESCRIPTOR.unpack_from(data, start)
    if kind >> 4 > DescriptorType.LAST_SEGMENT or kind & 0xF:
        raise RefusedError(Code.SGL_TYPE_INVALID, _DPTR)
    return _Descriptor(address, length, DescriptorType(kind >> 4))


def _descriptors(memory: Memory, first: _Descriptor) -> Iterator[_Descriptor]:
    """Yield what describes data, segment after segment."""
    lead, count = first, 0
    if not lead.leads_on:
        yield lead
        return
    while True:
        count += lead.length // DESCRIPTOR.size
        data = _read_segment(memory, lead, count)
        found = [_decode(data, start) for start in range(0, len(data), DESCRIPTOR.size)]
        last = lead.kind == DescriptorType.LAST_SEGMENT
        for number, one in enumerate(found, 1):
            if one.leads_on:
                if last:
                    raise RefusedError(Code.INVALID_SGL_SEGMENT, _DPTR)
                if number < len(found):
                    raise RefusedError(Code.INVALID_SGL_COUNT, _DPTR)
                lead = one
            else:
                yield one
        if not found[-1].leads_on:
            return


def _read_segment(memory: Memory, lead: _Descriptor, count: int) -> bytes:
    if lead.address & 7 or not lead.length or lead.length % DESCRIPTOR.size:
        raise RefusedError(Code.INVALID_SGL_SEGMENT, _DPTR)
    if count > _MOST_DESCRIPTORS:
        raise RefusedError(Code.INVALID_SGL_COUNT, _DPTR)
    return memory.read(lead.address, lead.length)
