"""What the decoders of configuration space share: a reader type, bit fields, the bases of capabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Body", "Capability", "ExtendedCapability", "Read", "bits"]

Read = Callable[[int, int], bytes]
"""``read(offset, size)``: bytes of configuration space; fewer than asked where the space ends."""


def bits(value: int, high: int, low: int) -> int:
    """Bits ``high`` down to ``low`` of a register, both included, as specifications write them."""
    return value >> low & ((1 << (high - low + 1)) - 1)


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability in a function's list (PCI Express Base 6.0, 7.5.1.1.11); also stands for those not decoded
    here.

    Attributes:
        id: capability ID.
        offset: where it is in configuration space, in bytes.
        name: what it is called; ``"unknown (0x42)"`` for an ID that is not in the table.
    """

    id: int
    offset: int
    name: str


@dataclass(frozen=True, slots=True)
class ExtendedCapability:
    """An extended capability (PCI Express Base 6.0, 7.6.3); also stands for those not decoded here.

    Attributes:
        id: extended capability ID.
        offset: where it is in configuration space, in bytes.
        version: capability version.
        name: what it is called; ``"unknown (0x0042)"`` for an ID that is not in the table.
    """

    id: int
    offset: int
    version: int
    name: str


class Body:
    """One capability's registers, addressed from its start. What cannot be read counts as zero."""

    __slots__ = ("_limit", "_read", "offset")

    def __init__(self, read: Read, offset: int, limit: int) -> None:
        self._read = read
        self.offset = offset
        self._limit = limit

    def bytes(self, at: int, size: int) -> bytes:
        """``size`` bytes from ``at``."""
        start = self.offset + at
        there = max(0, min(size, self._limit - start))
        data = self._read(start, there) if there else b""
        return data.ljust(size, b"\0")

    def u8(self, at: int) -> int:
        """One byte."""
        return self.bytes(at, 1)[0]

    def u16(self, at: int) -> int:
        """16 bits."""
        return int.from_bytes(self.bytes(at, 2), "little")

    def u32(self, at: int) -> int:
        """32 bits."""
        return int.from_bytes(self.bytes(at, 4), "little")
