"""Layouts: where each field of a kernel structure lies, and how to read and write it in a byte buffer.

Requests to the kernel are built in plain ``bytearray`` objects, not in C structures of fixed size: several
end in an array whose length the request decides, and several must be retried with a bigger buffer. A
:class:`Layout` holds the facts (size, offsets, widths); :mod:`vfiopy.uapi` holds one layout per structure.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = ["FieldValue", "Layout"]

FieldValue = int | bytes | tuple[int, ...]
"""What a field holds: an integer, a byte string (``16s``) or a tuple of integers (``6I``)."""

_INTEGER: Final = 0
_BYTES: Final = 1
_ARRAY: Final = 2
_FLEXIBLE: Final = 3


def _kind(code: str) -> int:
    if not code:
        return _FLEXIBLE
    if code[-1] == "s":
        return _BYTES
    return _INTEGER if len(code) == 1 else _ARRAY


class Layout:
    """The size of a structure, and the offset and width of each field. Immutable; threads may share it.

    ``fields`` maps a field's name to ``(offset in bytes, code)``; the code is one of :mod:`struct`, always
    in native byte order with explicit offsets, so nothing is aligned or padded behind one's back: ``I`` an
    unsigned 32-bit integer, ``16s`` sixteen bytes, ``6I`` six integers, and an empty code for the flexible
    array that ends a structure. Such an array has an offset but no size: its content starts there, and
    ``new(extra=...)`` makes room.

    The members of an anonymous union are fields that share an offset. A structure inside a structure
    appears as its leaves: ``header_id`` is what C calls ``header.id``.
    """

    __slots__ = ("_fields", "_name", "_size")

    _fields: dict[str, tuple[int, struct.Struct, int]]
    _name: str
    _size: int

    def __init__(self, name: str, size: int, fields: Mapping[str, tuple[int, str]]) -> None:
        """Precompute one packer per field.

        Raises :class:`ValueError` if a field does not lie inside ``size`` bytes, or its code is not of
        :mod:`struct`.
        """
        table: dict[str, tuple[int, struct.Struct, int]] = {}
        for field, (offset, code) in fields.items():
            try:
                packer = struct.Struct("=" + code)
            except struct.error as error:
                raise ValueError(f"{name}.{field}: {code!r} is not a struct code: {error}") from None
            if offset < 0 or offset + packer.size > size:
                raise ValueError(
                    f"{name}.{field} takes bytes {offset} to {offset + packer.size}, the structure has {size}"
                )
            table[field] = (offset, packer, _kind(code))
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_size", size)
        object.__setattr__(self, "_fields", table)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        """Refuse: a layout is a fact."""
        raise AttributeError(f"layout {self._name} cannot be changed")

    def __delattr__(self, name: str) -> NoReturn:
        """Refuse: a layout is a fact."""
        raise AttributeError(f"layout {self._name} cannot be changed")

    def __reduce__(self) -> tuple[type[Layout], tuple[str, int, dict[str, tuple[int, str]]]]:
        """Pickle and copy by the facts."""
        return Layout, (
            self._name,
            self._size,
            {field: (self.offset(field), self.code(field)) for field in self},
        )

    @property
    def name(self) -> str:
        """The structure's name in the kernel's header."""
        return self._name

    @property
    def size(self) -> int:
        """Bytes of the fixed part: C's ``sizeof``."""
        return self._size

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(self._fields)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the fields, in the order of their declaration."""
        return iter(self._fields)

    def __contains__(self, field: object) -> bool:
        """Tell whether the structure has a field of this name."""
        return field in self._fields

    def __repr__(self) -> str:
        """Name, size and number of fields."""
        return f"<Layout {self._name}: {self._size} bytes, {len(self._fields)} fields>"

    def offset(self, field: str) -> int:
        """Return where ``field`` starts, in bytes from the structure's start; `TypeError` if unknown."""
        return self._find(field)[0]

    def width(self, field: str) -> int:
        """Bytes that ``field`` takes; 0 for a flexible array."""
        return self._find(field)[1].size

    def code(self, field: str) -> str:
        """Return the :mod:`struct` code of ``field``, without byte order; empty for a flexible array."""
        return self._find(field)[1].format[1:]

    def new(self, extra: int = 0, **fields: int | bytes | Sequence[int]) -> bytearray:
        """Return a zeroed buffer of ``size + extra`` bytes with the given fields set.

        ``extra`` is the room behind the fixed part: for a flexible array, or for what the kernel appends.
        Raises :class:`TypeError` naming an unknown field, and as :meth:`put` does.
        """
        if extra < 0:
            raise ValueError(f"{self._name}: extra is {extra} bytes; it cannot be negative")
        buf = bytearray(self._size + extra)
        for field, value in fields.items():
            try:
                offset, packer, kind = self._fields[field]
                if kind == _INTEGER:
                    packer.pack_into(buf, offset, value)
                    continue
            except (KeyError, struct.error):
                pass  # put() says what is wrong
            self.put(buf, field, value)
        return buf

    def get(self, buf: ReadableBuffer, field: str, base: int = 0) -> int:
        """Return the integer in ``field`` of the structure that starts ``base`` bytes into ``buf``.

        Raises :class:`TypeError` if there is no such field or it is not one integer (see :meth:`get_bytes`
        and :meth:`get_array`), :class:`ValueError` if the buffer ends before the field does or ``base`` is
        negative.
        """
        offset, packer, kind = self._find(field)
        if kind != _INTEGER:
            self._refuse(field, kind, "get")
        if base < 0:
            self._short(buf, field, base)
        try:
            value: int = packer.unpack_from(buf, base + offset)[0]
        except struct.error:
            self._short(buf, field, base)
        return value

    def get_bytes(self, buf: ReadableBuffer, field: str, base: int = 0) -> bytes:
        """Return the bytes of a field of any kind, trailing zeros included; errors as :meth:`get`."""
        offset, packer, kind = self._find(field)
        if kind == _FLEXIBLE:
            self._refuse(field, kind, "get_bytes")
        view = memoryview(buf).cast("B")
        start = base + offset
        if base < 0 or start + packer.size > len(view):
            self._short(buf, field, base)
        return bytes(view[start : start + packer.size])

    def get_array(self, buf: ReadableBuffer, field: str, base: int = 0) -> tuple[int, ...]:
        """Return the integers of an array field; errors as :meth:`get`."""
        offset, packer, kind = self._find(field)
        if kind != _ARRAY:
            self._refuse(field, kind, "get_array")
        if base < 0:
            self._short(buf, field, base)
        try:
            values: tuple[int, ...] = packer.unpack_from(buf, base + offset)
        except struct.error:
            self._short(buf, field, base)
        return values

    def put(
        self, buf: WriteableBuffer, field: str, value: int | bytes | Sequence[int], base: int = 0
    ) -> None:
        """Set ``field`` of the structure that starts ``base`` bytes into ``buf``.

        A byte string shorter than its field is followed by zeros; one that is longer is refused. Raises
        :class:`TypeError` if there is no such field or the value is not of its kind, :class:`ValueError` if
        the value does not fit the field's width or the buffer ends before the field does. What was refused
        leaves the field's own content undefined, its neighbours as they were.
        """
        offset, packer, kind = self._find(field)
        values = (value,) if kind == _INTEGER else self._values(field, packer, kind, value)
        try:
            if base < 0:
                self._short(buf, field, base)
            packer.pack_into(buf, base + offset, *values)
        except struct.error as error:
            if base + offset + packer.size > memoryview(buf).nbytes:
                self._short(buf, field, base)
            if kind != _BYTES and not all(hasattr(item, "__index__") for item in values):
                raise TypeError(f"{self._name}.{field} takes an integer: {error}") from None
            raise ValueError(f"{self._name}.{field} cannot hold {value!r}: {error}") from None

    def unpack(self, buf: ReadableBuffer, base: int = 0) -> dict[str, FieldValue]:
        """Return every field but a flexible array, by name; errors as :meth:`get`."""
        values: dict[str, FieldValue] = {}
        for field, (_, _, kind) in self._fields.items():
            if kind == _INTEGER:
                values[field] = self.get(buf, field, base)
            elif kind == _BYTES:
                values[field] = self.get_bytes(buf, field, base)
            elif kind == _ARRAY:
                values[field] = self.get_array(buf, field, base)
        return values

    def _find(self, field: str) -> tuple[int, struct.Struct, int]:
        try:
            return self._fields[field]
        except KeyError:
            raise TypeError(
                f"{self._name} has no field {field!r}; it has {', '.join(self._fields)}"
            ) from None

    def _values(
        self, field: str, packer: struct.Struct, kind: int, value: int | bytes | Sequence[int]
    ) -> tuple[Any, ...]:
        if kind == _FLEXIBLE:
            self._refuse(field, kind, "put")
        if kind == _ARRAY:
            if isinstance(value, int):
                raise TypeError(f"{self._name}.{field} takes a sequence of integers, not one")
            return tuple(value)
        if not isinstance(value, bytes | bytearray | memoryview):
            raise TypeError(f"{self._name}.{field} takes bytes, not {type(value).__name__}")
        if len(value) > packer.size:
            raise ValueError(f"{self._name}.{field} holds {packer.size} bytes, not {len(value)}")
        return (bytes(value),)

    def _refuse(self, field: str, kind: int, method: str) -> NoReturn:
        what = {
            _INTEGER: "is one integer; use get()",
            _BYTES: "is a byte string; use get_bytes()",
            _ARRAY: "is an array of integers; use get_array()",
            _FLEXIBLE: f"is a flexible array; its content starts at offset {self.offset(field)}",
        }[kind]
        raise TypeError(f"{method}(): {self._name}.{field} {what}")

    def _short(self, buf: ReadableBuffer, field: str, base: int) -> NoReturn:
        offset, packer, _ = self._find(field)
        raise ValueError(
            f"{self._name}.{field} takes bytes {base + offset} to {base + offset + packer.size}, "
            f"the buffer has {memoryview(buf).nbytes}"
        ) from None
