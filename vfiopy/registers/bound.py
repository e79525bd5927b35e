"""A register map on a region: names that read and write.

Nothing is read that was not asked for: neither by looking a name up, nor by showing an object, nor by completing a
name. ``read()`` reads its register and no other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from math import prod
from typing import Any, TypeAlias

from vfiopy.errors import AccessError, AddressRangeError, RegisterNameError
from vfiopy.registers.access import RegisterSpace
from vfiopy.registers.spec import FieldSpec, GroupSpec, MemberSpec, MemorySpec, RegisterSpec

__all__ = ["Array", "Field", "Memory", "Node", "Register", "Registers"]

_STEP = re.compile(r"([^.\[\]]+)((?:\[\d+\])*)")


class Field:
    """Some bits of a register."""

    __slots__ = ("register", "spec")

    def __init__(self, register: Register, spec: FieldSpec) -> None:
        self.register = register
        self.spec = spec

    @property
    def path(self) -> str:
        """Its name from the top of the map: ``"status.computing"``."""
        return f"{self.register.path}.{self.spec.name}"

    def __repr__(self) -> str:
        return f"<field {self.path}, bits {self.spec.bits}>"

    def read(self) -> int:
        """Read the register and return this field of it.

        Raises:
            AccessError: it is write-only.
        """
        if not self.spec.readable:
            raise AccessError("it is write-only", object=self.path, hint="reading the register says nothing of it")
        return self.spec.extract(self.register.read())

    def write(self, value: int | str) -> None:
        """Change this field and no other: see :meth:`Register.modify`."""
        self.register.modify(**{self.spec.name: value})


class Register:
    """One register. Its fields are attributes: ``regs.status.computing.read()``.

    Threads: single reads and writes may come from any; ``modify`` is the caller's to serialise.

    Attributes:
        spec: what the map says of it.
        path: its name from the top of the map: ``"channel[2].control"``.
        offset: bytes from the start of the region.
    """

    __slots__ = ("_space", "offset", "path", "spec")

    def __init__(self, space: RegisterSpace, spec: RegisterSpec, offset: int, path: str) -> None:
        self._space = space
        self.spec = spec
        self.offset = offset
        self.path = path

    @property
    def size(self) -> int:
        """Bytes."""
        return self.spec.size

    @property
    def fields(self) -> tuple[Field, ...]:
        """Its fields, from the lowest bit up."""
        return tuple(Field(self, one) for one in self.spec.fields)

    def __repr__(self) -> str:
        return f"<register {self.path} at {self.offset:#x} of {self._space.name}, {self.spec.size} bytes>"

    def __getitem__(self, name: str) -> Field:
        for one in self.spec.fields:
            if one.name == name:
                return Field(self, one)
        raise _unknown(self.path, "field", name, [one.name for one in self.spec.fields])

    def __getattr__(self, name: str) -> Field:
        if name.startswith("__"):  # copy, pickle and the like ask for what they may find
            raise AttributeError(name)
        try:
            return self[name]
        except RegisterNameError as error:
            raise AttributeError(str(error)) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(one.name for one in self.spec.fields)]

    def _accesses(self) -> Iterator[tuple[int, int]]:
        """Yield offset and shift of each access, ascending."""
        spec = self.spec
        count = spec.size // spec.access
        for index in range(count):
            place = count - 1 - index if spec.big_endian else index
            yield self.offset + index * spec.access, 8 * spec.access * place

    def read(self) -> int:
        """Read it: one access of its access width, or as many, ascending, as make up the register.

        Raises:
            AccessError: it is write-only.
            DeviceGoneError: the device does not answer.
        """
        if not self.spec.readable:
            raise AccessError("it is write-only", object=self.path, hint="the map says so of each of its fields")
        value = 0
        for offset, shift in self._accesses():
            value |= self._space.read(offset, self.spec.access) << shift
        return value

    def write(self, value: int) -> None:
        """Write all of it, as :meth:`read` reads it.

        Raises:
            AccessError: it is read-only, or ``value`` does not fit.
        """
        if not self.spec.writable:
            raise AccessError("it is read-only", object=self.path, hint="the map says so of each of its fields")
        if not 0 <= value < 1 << 8 * self.spec.size:
            raise AccessError(f"{value:#x} does not fit into {self.spec.size} bytes", object=self.path)
        word = (1 << 8 * self.spec.access) - 1
        for offset, shift in self._accesses():
            self._space.write(offset, self.spec.access, value >> shift & word)

    def decode(self, value: int) -> dict[str, int]:
        """Return name → value of each field in a value of this register. Reads nothing."""
        return {one.name: one.extract(value) for one in self.spec.fields}

    def compose(self, **fields: int | str) -> int:
        """Return a value of this register with these fields; others have their reset value, or 0. Reads nothing.

        Raises:
            RegisterNameError: no such field.
            AccessError: a field is read-only, or a value does not fit.
        """
        given = self._given(fields)
        value = 0
        for one in self.spec.fields:
            if one.name not in given and one.writable and not one.on_write:
                value |= (one.reset or 0) << one.low
        return value | sum(given.values())

    def modify(self, **fields: int | str) -> None:
        """Change these fields and no other: one read, one write. Not atomic: the device may change it in between.

        Fields that act on what is written, such as write one to clear, are written so that they do nothing. Of a
        write-only register nothing can be read: the others are written as 0.

        Raises:
            RegisterNameError: no such field.
            AccessError: a field is read-only; a value does not fit; the register cannot be read without doing
                something, or another field cannot be left as it is.
        """
        if self.spec.side_effect:
            raise AccessError(
                f"changing a part takes a read, and {self.spec.side_effect}",
                object=self.path,
                hint="write all of it: write(compose(...))",
            )
        self.merge(0, **fields)  # what cannot be is refused before anything is read
        self.write(self.merge(self.read() if self.spec.readable else 0, **fields))

    def merge(self, value: int, **fields: int | str) -> int:
        """Return what to write to change these fields, and no other, of a value that was read. Reads nothing.

        Raises:
            RegisterNameError, AccessError: as :meth:`modify`.
        """
        given = self._given(fields)
        others = [one for one in self.spec.fields if one.name not in given]
        for one in others:
            if one.kept(0) is None:
                raise AccessError(
                    f"its field {one.name} cannot be left as it is: any write does something to it",
                    object=self.path,
                    hint=f"say what to write to {one.name} too, or write all of it",
                )
        covered = sum(one.mask for one in self.spec.fields)  # what is no field stays as it was read
        kept = sum(one.kept(value) or 0 for one in others)
        return value & ~covered | kept | sum(given.values())

    def _given(self, fields: dict[str, int | str]) -> dict[str, int]:
        encoded = {}
        for name, value in fields.items():
            spec = self[name].spec
            if not spec.writable:
                raise AccessError("it is read-only", object=f"{self.path}.{name}")
            encoded[name] = spec.encode(value, self.path)
        return encoded


class Memory:
    """A memory in the map: entries by number."""

    __slots__ = ("_space", "offset", "path", "spec")

    def __init__(self, space: RegisterSpace, spec: MemorySpec, offset: int, path: str) -> None:
        self._space = space
        self.spec = spec
        self.offset = offset
        self.path = path

    def __repr__(self) -> str:
        return f"<memory {self.path} at {self.offset:#x}, {self.spec.entries} times {self.spec.width} bytes>"

    def __len__(self) -> int:
        return self.spec.entries

    def _place(self, index: int) -> int:
        if not 0 <= index < self.spec.entries:
            raise AddressRangeError(f"there is no entry {index}; it has {self.spec.entries}", object=self.path)
        return self.offset + index * self.spec.width

    def read(self, index: int) -> int:
        """Read one entry as one access; raises AddressRangeError, and AccessError where it is write-only."""
        if not self.spec.readable:
            raise AccessError("it is write-only", object=self.path)
        return self._space.read(self._place(index), self.spec.width)

    def write(self, index: int, value: int) -> None:
        """Write one entry as one access; raises as :meth:`read`."""
        if not self.spec.writable:
            raise AccessError("it is read-only", object=self.path)
        self._space.write(self._place(index), self.spec.width, value)


class Array:
    """Registers, groups or memories by number; of several dimensions, arrays by number."""

    __slots__ = ("_make", "dims", "offset", "path", "stride")

    def __init__(
        self, make: Callable[[int, str], Node], offset: int, path: str, dims: tuple[int, ...], stride: int
    ) -> None:
        self._make = make
        self.offset = offset
        self.path = path
        self.dims = dims
        self.stride = stride

    def __repr__(self) -> str:
        return f"<array {self.path}{''.join(f'[{one}]' for one in self.dims)} at {self.offset:#x}>"

    def __len__(self) -> int:
        return self.dims[0]

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.dims[0]:
            raise AddressRangeError(f"there is no element {index}; it has {self.dims[0]}", object=self.path)
        rest = self.dims[1:]
        offset = self.offset + index * self.stride * prod(rest)
        path = f"{self.path}[{index}]"
        return Array(self._make, offset, path, rest, self.stride) if rest else self._make(offset, path)

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


class Registers:
    """A group of registers on a region: names as attributes, or by path: ``regs["channel[2].control"]``.

    A name that is also a method's (``find``, ``registers``) is reached by path.

    Attributes:
        spec: what the map says.
        path: its name from the top of the map; empty at the top.
        offset: bytes from the start of the region.
    """

    __slots__ = ("_space", "offset", "path", "spec")

    def __init__(self, space: RegisterSpace, spec: GroupSpec, offset: int = 0, path: str = "") -> None:
        self._space = space
        self.spec = spec
        self.offset = offset
        self.path = path

    def __repr__(self) -> str:
        return (
            f"<registers {self.path or self.spec.name} at {self.offset:#x} of {self._space.name}: "
            f"{', '.join(self.spec.members)}>"
        )

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.spec.members]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._member(name)
        except RegisterNameError as error:
            raise AttributeError(str(error)) from None

    def _member(self, name: str) -> Node:
        member = self.spec.members.get(name)
        if member is None:
            raise _unknown(self.path or self.spec.name, "register", name, self.spec.members)
        path = f"{self.path}.{name}" if self.path else name
        return _bind(self._space, member, self.offset + member.offset, path)

    def __getitem__(self, path: str) -> Any:
        """Find by path. Raises RegisterNameError."""
        here: Any = self
        rest = path
        while rest:
            step = _STEP.match(rest)
            if step is None or (step.end() < len(rest) and rest[step.end()] != "."):
                raise RegisterNameError(f"'{path}' is not a path", object=repr(self), hint="such as channel[2].control")
            if not isinstance(here, Registers | Register):
                raise RegisterNameError(f"it has no member {step[1]}", object=here.path or self.spec.name)
            here = here._member(step[1]) if isinstance(here, Registers) else here[step[1]]
            for index in re.findall(r"\d+", step[2]):
                if not isinstance(here, Array):
                    raise RegisterNameError("it is no array", object=here.path)
                here = here[int(index)]
            rest = rest[step.end() + 1 :]
        return here

    def registers(self, start: int = 0, end: int | None = None) -> Iterator[Register]:
        """Iterate over all registers that lie in ``[start, end)`` of the region, by offset. Reads nothing."""
        for name in sorted(self.spec.members, key=lambda one: self.spec.members[one].offset):
            yield from _walk(self._member(name), self.spec.members[name], start, end)


Node: TypeAlias = Registers | Register | Memory | Array


def _bind(space: RegisterSpace, spec: MemberSpec, offset: int, path: str) -> Node:
    def make(offset: int, path: str) -> Node:
        match spec:
            case GroupSpec():
                return Registers(space, spec, offset, path)
            case RegisterSpec():
                return Register(space, spec, offset, path)
            case MemorySpec():
                return Memory(space, spec, offset, path)

    return Array(make, offset, path, spec.dims, spec.stride) if spec.dims else make(offset, path)


def _walk(node: Node, spec: MemberSpec, start: int, end: int | None) -> Iterator[Register]:
    if isinstance(node, Array):
        if node.offset + spec.span > start and (end is None or node.offset < end):
            for one in node:
                yield from _walk(one, spec, start, end)
    elif isinstance(node, Registers):
        if node.offset + node.spec.size > start and (end is None or node.offset < end):
            yield from node.registers(start, end)
    elif isinstance(node, Register) and node.offset >= start and (end is None or node.offset + node.size <= end):
        yield node


def _unknown(where: str, what: str, name: str, known: Any) -> RegisterNameError:
    names = list(known)
    near = get_close_matches(name, names, 3) or names[:12]
    more = "; it has more" if len(names) > len(near) else ""
    hint = f"it has {', '.join(near)}{more}" if names else f"it has no {what}s"
    return RegisterNameError(f"there is no {what} '{name}'", object=where, hint=hint)
