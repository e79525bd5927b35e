"""What is known of the kernel's headers: names as they are read, facts as the compiler states them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = [
    "Aggregate",
    "Constant",
    "Facts",
    "Leaf",
    "Macro",
    "Member",
    "Names",
    "StructFacts",
    "UapiError",
]


class UapiError(Exception):
    """The headers, the compiler and the readers do not agree, or one of them is missing."""


@dataclass(frozen=True)
class Leaf:
    """A member that holds a number, a pointer, or an array of numbers or structures."""

    name: str
    ctype: str
    """The type as the header spells it: ``__u32``, ``struct vfio_iova_range``, ``__u64 *``."""
    array: bool = False
    flexible: bool = False


@dataclass(frozen=True)
class Aggregate:
    """A member that is a structure or a union; anonymous when it has no name, restated by name otherwise."""

    kind: str
    name: str | None
    tag: str | None
    members: tuple[Member, ...]


Member = Leaf | Aggregate


@dataclass(frozen=True)
class Macro:
    """An object-like macro: its name, and what kind of number its text suggests."""

    name: str
    ioctl: bool
    hexadecimal: bool


@dataclass
class Names:
    """What one header declares. Nothing here is a fact yet: the compiler has not been asked."""

    header: str
    macros: list[Macro] = field(default_factory=list)
    enumerators: list[str] = field(default_factory=list)
    structs: dict[str, tuple[Member, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class LeafFacts:
    """Where a leaf lies. ``count`` is None for a single value and 0 for a flexible array."""

    path: tuple[str, ...]
    offset: int
    size: int
    element: int
    signed: bool
    pointer: bool
    count: int | None
    ctype: str

    @property
    def code(self) -> str:
        """Code of the :mod:`struct` module; empty for a flexible array."""
        if self.count == 0:
            return ""
        if self.pointer:
            return "Q"
        letter = {1: "b", 2: "h", 4: "i", 8: "q"}[self.element]
        letter = letter if self.signed else letter.upper()
        if self.count is None:
            return letter
        return f"{self.count}s" if self.element == 1 else f"{self.count}{letter}"

    @property
    def flat(self) -> str:
        """The name of the leaf when structures inside structures are flattened."""
        return "_".join(self.path)


@dataclass
class StructFacts:
    """Size and leaves of one structure, and its members for the restatement in C."""

    name: str
    size: int
    leaves: list[LeafFacts]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Constant:
    """A number under its kernel name."""

    name: str
    value: int
    ioctl: bool
    hexadecimal: bool


@dataclass
class Facts:
    """All the compiler said, by header, in the order of the headers."""

    version: tuple[int, int]
    constants: dict[str, list[Constant]] = field(default_factory=dict)
    structs: dict[str, list[StructFacts]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Names that are not restated, with the reason."""
    stale: list[str] = field(default_factory=list)
    """Entries of the tables of choices that apply to nothing in these headers."""

    def all_constants(self) -> Iterator[Constant]:
        """Iterate over the constants of all headers."""
        for constants in self.constants.values():
            yield from constants

    def all_structs(self) -> Iterator[StructFacts]:
        """Iterate over the structures of all headers."""
        for structs in self.structs.values():
            yield from structs
