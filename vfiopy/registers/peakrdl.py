"""What a package that PeakRDL-python generated calls: its four callbacks, over a region.

Addresses are bytes from the start of the map, widths are bits, as PeakRDL-python has them (peakrdl-python 4,
``lib/callbacks.py``). A register that is wider than its access width takes several accesses, ascending, the lowest bits
first; nothing else is read or written than what is called for.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from vfiopy.errors import AccessError, NotSupportedError
from vfiopy.registers.access import access_of

if TYPE_CHECKING:
    from vfiopy.registers.access import Target

__all__ = ["PeakRdlCallbacks", "peakrdl_async_callbacks", "peakrdl_callbacks"]

_Set = TypeVar("_Set")
_CODES = {8: "B", 16: "H", 32: "L" if array("L").itemsize == 4 else "I", 64: "Q"}


class PeakRdlCallbacks:
    """The callbacks as methods, for who wants to hand them over one by one.

    Args:
        target: a BAR, configuration space, or a ``RegisterSpace``.
        offset: where in it the map begins, bytes.
        arrays: blocks are ``array.array`` as PeakRDL-python's older, legacy block callbacks have them.
    """

    def __init__(self, target: Target, offset: int = 0, *, arrays: bool = False) -> None:
        self._space = access_of(target)
        self._offset = offset
        self._arrays = arrays

    def __repr__(self) -> str:
        return f"<PeakRDL callbacks of {self._space.name} from {self._offset:#x}>"

    def _words(self, width: int, accesswidth: int) -> tuple[int, int]:
        """Bytes of an access, and how many make up ``width`` bits."""
        access = min(width, accesswidth)
        if access % 8 or width % access:
            raise AccessError(f"{width} bits by accesses of {accesswidth} are no register", object=self._space.name)
        return access // 8, width // access

    def read(self, addr: int, width: int, accesswidth: int) -> int:
        """``read_callback``."""
        size, count = self._words(width, accesswidth)
        value = 0
        for index in range(count):
            value |= self._space.read(self._offset + addr + index * size, size) << 8 * size * index
        return value

    def write(self, addr: int, width: int, accesswidth: int, data: int) -> None:
        """``write_callback``."""
        size, count = self._words(width, accesswidth)
        word = (1 << 8 * size) - 1
        if not 0 <= data < 1 << width:
            raise AccessError(f"{data:#x} does not fit into {width} bits", object=self._space.name)
        for index in range(count):
            self._space.write(self._offset + addr + index * size, size, data >> 8 * size * index & word)

    def read_block(self, addr: int, width: int, accesswidth: int, length: int) -> Any:
        """``read_block_callback``: a list, or an array for legacy callbacks, of ``length`` entries."""
        values = (self.read(addr + index * width // 8, width, accesswidth) for index in range(length))
        return array(_CODES[width], values) if self._arrays else list(values)

    def write_block(self, addr: int, width: int, accesswidth: int, data: Iterable[int]) -> None:
        """``write_block_callback``."""
        for index, value in enumerate(data):
            self.write(addr + index * width // 8, width, accesswidth, value)

    def as_set(self, kind: Callable[..., _Set]) -> _Set:
        """Make a callback set of a class that takes the four by keyword."""
        return kind(
            read_callback=self.read,
            write_callback=self.write,
            read_block_callback=self.read_block,
            write_block_callback=self.write_block,
        )


def peakrdl_callbacks(
    target: Target, kind: Callable[..., _Set] | None = None, *, offset: int = 0, arrays: bool = False
) -> _Set:
    """Make a callback set for a generated package: ``edu_cls(callbacks=peakrdl_callbacks(bar, NormalCallbackSet))``.

    Args:
        target: a BAR, configuration space, or a ``RegisterSpace``.
        kind: the class of the set, from the generated package's ``lib``; None for the one in peakrdl_python.lib.
        offset: where in the target the map begins, bytes.
        arrays: for ``NormalCallbackSetLegacy`` and its like.

    Raises:
        NotSupportedError: no ``kind`` was given, and peakrdl-python is not installed.
    """
    make: Callable[..., _Set] = kind or _installed("NormalCallbackSet")
    return PeakRdlCallbacks(target, offset, arrays=arrays).as_set(make)


def peakrdl_async_callbacks(
    target: Target, kind: Callable[..., _Set] | None = None, *, offset: int = 0, arrays: bool = False
) -> _Set:
    """Make the set for a package that was generated with ``asyncoutput``; arguments as :func:`peakrdl_callbacks`.

    A register access does not wait for anything, so neither do these: they are coroutines because they have to be.
    """
    plain = PeakRdlCallbacks(target, offset, arrays=arrays)

    async def read(addr: int, width: int, accesswidth: int) -> int:
        return plain.read(addr, width, accesswidth)

    async def write(addr: int, width: int, accesswidth: int, data: int) -> None:
        plain.write(addr, width, accesswidth, data)

    async def read_block(addr: int, width: int, accesswidth: int, length: int) -> Any:
        return plain.read_block(addr, width, accesswidth, length)

    async def write_block(addr: int, width: int, accesswidth: int, data: Iterable[int]) -> None:
        plain.write_block(addr, width, accesswidth, data)

    make: Callable[..., _Set] = kind or _installed("AsyncCallbackSet")
    return make(
        read_callback=read,
        write_callback=write,
        read_block_callback=read_block,
        write_block_callback=write_block,
    )


def _installed(name: str) -> Any:
    try:
        from peakrdl_python import lib  # noqa: PLC0415  only where no class was given
    except ModuleNotFoundError:
        raise NotSupportedError(
            f"peakrdl-python is not installed, and no class for the {name} was given",
            object="register map",
            hint=f"give kind=YOUR_PACKAGE.lib.{name}",
        ) from None
    return getattr(lib, name)
