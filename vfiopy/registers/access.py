"""Registers by width in bytes: what a register map and the command line need of a BAR or of configuration space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from vfiopy.device import ConfigSpace
from vfiopy.errors import AccessError, AddressRangeError
from vfiopy.mmio import Region

__all__ = ["WIDTHS", "Access", "RegisterSpace", "access_of"]

WIDTHS = (1, 2, 4, 8)


class RegisterSpace(Protocol):
    """What has registers. Each call is one access."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Access widths that it has, in bytes."""

    def read(self, offset: int, width: int) -> int:
        """Read ``width`` bytes at ``offset``, naturally aligned, as one access."""

    def write(self, offset: int, width: int, value: int) -> None:
        """Write ``width`` bytes at ``offset``, naturally aligned, as one access."""


class Access:
    """A :class:`~vfiopy.mmio.Region` or a :class:`~vfiopy.device.ConfigSpace` as a :class:`RegisterSpace`.

    Configuration space has accesses of 1, 2 and 4 bytes; a region has 8 too, where the bus has.

    Threads: as those of what it is made from.
    """

    def __init__(self, target: Region | ConfigSpace) -> None:
        self.name = target.name
        self.size = target.size
        self._read: dict[int, Callable[[int], int]] = {1: target.read8, 2: target.read16, 4: target.read32}
        self._write: dict[int, Callable[[int, int], None]] = {1: target.write8, 2: target.write16, 4: target.write32}
        if isinstance(target, Region):
            self._read[8] = target.read64
            self._write[8] = target.write64

    @property
    def widths(self) -> tuple[int, ...]:
        """Access widths that it has, in bytes."""
        return tuple(self._read)

    def __repr__(self) -> str:
        return f"<registers of {self.name}, {self.size:#x} bytes>"

    def check(self, offset: int, width: int) -> None:
        """Refuse an access that is not one.

        Raises:
            AccessError: not naturally aligned, or a width that there is not.
            AddressRangeError: outside.
        """
        if width not in self._read:
            raise AccessError(
                f"it has no accesses of {width} bytes",
                object=self.name,
                hint=f"widths are {', '.join(map(str, self._read))} bytes",
            )
        if offset < 0 or offset + width > self.size:
            raise AddressRangeError(
                f"{width} bytes at {offset:#x} are outside of its {self.size:#x} bytes",
                object=self.name,
                hint=f"the last one is at {self.size - width:#x}",
            )
        if offset % width:
            fitting = max(one for one in self._read if offset % one == 0 and one < width)
            below = offset & -width
            raise AccessError(
                f"offset {offset:#x} is not a multiple of the width, {width} bytes",
                object=self.name,
                hint=f"take width {fitting}, or offset {below:#x} or {below + width:#x}",
            )

    def read(self, offset: int, width: int) -> int:
        """Read ``width`` bytes at ``offset`` as one access; raises as :meth:`check` and as the region."""
        self.check(offset, width)
        return self._read[width](offset)

    def write(self, offset: int, width: int, value: int) -> None:
        """Write ``width`` bytes at ``offset`` as one access; raises as :meth:`read`.

        Raises:
            AccessError: ``value`` does not fit.
        """
        self.check(offset, width)
        if not 0 <= value < 1 << 8 * width:
            raise AccessError(
                f"{value:#x} does not fit into {width} bytes",
                object=self.name,
                hint="a negative number has no width of its own: mask it",
            )
        self._write[width](offset, value)


Target: TypeAlias = "Region | ConfigSpace | RegisterSpace"


def access_of(target: Target) -> RegisterSpace:
    """Return the register space of a region or configuration space; one of your own is taken as it is."""
    return Access(target) if isinstance(target, Region | ConfigSpace) else target
