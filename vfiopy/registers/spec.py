"""What a register map says: groups, registers, fields. Frozen, and bound to nothing.

The words are SystemRDL 2.0's (Accellera, chapters 9 to 13), so that a compiled file and a table in Python come to the
same. Offsets and sizes are bytes; a field's place is bits of its register.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

from vfiopy.errors import AccessError

__all__ = ["FieldSpec", "GroupSpec", "MemberSpec", "MemorySpec", "RegisterSpec"]

_KEPT_BY_ZERO = {"woset", "woclr", "wot"}  # a 0 written changes nothing (SystemRDL 2.0, table 9)
_KEPT_BY_ONE = {"wzs", "wzc", "wzt"}


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """Some bits of a register.

    Attributes:
        name: as in the map.
        low: lowest bit.
        width: number of bits.
        readable, writable: what software may do.
        on_read: what a read does to it (``"rclr"``, ``"rset"``, ``"ruser"``), or None.
        on_write: what a write does where it is not to store (``"woclr"``, ``"wclr"``, ...), or None.
        reset: value after reset, or None where that is not known.
        names: value → what it is called.
        text: what it is for, one line.
    """

    name: str
    low: int
    width: int = 1
    readable: bool = True
    writable: bool = True
    on_read: str | None = None
    on_write: str | None = None
    reset: int | None = None
    names: Mapping[int, str] = field(default_factory=dict)
    text: str = ""

    @property
    def high(self) -> int:
        """Highest bit."""
        return self.low + self.width - 1

    @property
    def bits(self) -> str:
        """Its place, as specifications write it: ``"7:4"``, ``"0"``."""
        return str(self.low) if self.width == 1 else f"{self.high}:{self.low}"

    @property
    def mask(self) -> int:
        """Its bits in the register."""
        return ((1 << self.width) - 1) << self.low

    def extract(self, value: int) -> int:
        """Its value in a register's value."""
        return (value & self.mask) >> self.low

    def words(self, value: int) -> str:
        """What its value is called; empty where the map has no name for it."""
        return self.names.get(value, "")

    def encode(self, value: int | str, where: str) -> int:
        """The register's bits for a value or one of its names.

        Raises:
            AccessError: the value does not fit, or there is no such name.
        """
        if isinstance(value, str):
            for number, name in self.names.items():
                if name.lower() == value.lower():
                    return number << self.low
            known = f"it has {', '.join(self.names.values())}" if self.names else "it has no names for its values"
            raise AccessError(f"there is no value '{value}'", object=f"{where}.{self.name}", hint=known)
        if not 0 <= value < 1 << self.width:
            raise AccessError(
                f"{value:#x} does not fit into its bits {self.bits}",
                object=f"{where}.{self.name}",
                hint=f"it takes 0 to {(1 << self.width) - 1:#x}",
            )
        return value << self.low

    def kept(self, value: int) -> int | None:
        """What to write so that it stays as it is, in the register's bits, where ``value`` was just read.

        None where any write does something to it.
        """
        if not self.writable or self.on_write in _KEPT_BY_ZERO:
            return 0
        if self.on_write in _KEPT_BY_ONE:
            return self.mask
        return None if self.on_write else value & self.mask


@dataclass(frozen=True, slots=True)
class RegisterSpec:
    """A register, or an array of them.

    Attributes:
        name: as in the map.
        offset: from the start of its group.
        size: bytes.
        access: bytes of one access, at most ``size`` and 8; a wider register takes several, ascending.
        fields: from the lowest bit up.
        dims: lengths of an array, outermost first; empty for a single one.
        stride: bytes from one element to the next.
        big_endian: of several accesses the first has the highest bits.
        text: what it is for, one line.
    """

    name: str
    offset: int
    size: int
    access: int
    fields: tuple[FieldSpec, ...] = ()
    dims: tuple[int, ...] = ()
    stride: int = 0
    big_endian: bool = False
    text: str = ""

    @property
    def span(self) -> int:
        """Bytes from its start to its end, all elements."""
        return self.stride * (prod(self.dims) - 1) + self.size if self.dims else self.size

    @property
    def readable(self) -> bool:
        """Software may read it."""
        return not self.fields or any(one.readable for one in self.fields)

    @property
    def writable(self) -> bool:
        """Software may write it."""
        return not self.fields or any(one.writable for one in self.fields)

    @property
    def side_effect(self) -> str | None:
        """What reading it does, in words, or None where it does nothing."""
        for one in self.fields:
            if one.on_read:
                what = {"rclr": "clears", "rset": "sets"}.get(one.on_read, "does something to")
                return f"reading {what} {one.name}"
        return None


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """A memory in the map: entries of one width, without registers.

    Attributes:
        width: bytes of an entry.
        entries: how many.
    """

    name: str
    offset: int
    width: int
    entries: int
    readable: bool = True
    writable: bool = True
    dims: tuple[int, ...] = ()
    stride: int = 0
    text: str = ""

    @property
    def span(self) -> int:
        """Bytes from its start to its end, all elements."""
        size = self.width * self.entries
        return self.stride * (prod(self.dims) - 1) + size if self.dims else size


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """Registers that belong together (addrmap, regfile), or an array of such.

    Attributes:
        members: by name, in the order of the map.
        size: bytes that it takes.
    """

    name: str
    offset: int
    size: int
    members: Mapping[str, MemberSpec]
    dims: tuple[int, ...] = ()
    stride: int = 0
    text: str = ""

    @property
    def span(self) -> int:
        """Bytes from its start to its end, all elements."""
        return self.stride * (prod(self.dims) - 1) + self.size if self.dims else self.size

    def __iter__(self) -> Iterator[MemberSpec]:
        return iter(self.members.values())


MemberSpec: TypeAlias = GroupSpec | RegisterSpec | MemorySpec
