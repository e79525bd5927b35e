"""A device's configuration space: typed access and decoded capabilities."""

from __future__ import annotations

from vfiopy.backend import DeviceIo, RegionIndex
from vfiopy.errors import AccessError, AddressRangeError, NotSupportedError
from vfiopy.observing import Observer, told
from vfiopy.pci.capabilities import Capability, walk_capabilities
from vfiopy.pci.ext_capabilities import ExtendedCapability, walk_extended

__all__ = ["COMMAND_BUS_MASTER", "COMMAND_INTX_DISABLE", "COMMAND_IO", "COMMAND_MEMORY", "ConfigSpace"]

# PCI Express Base 6.0, 7.5.1.1.3 (Command Register)
COMMAND = 0x04
COMMAND_IO = 1 << 0
COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10


class ConfigSpace:
    """Configuration space, little-endian as PCI defines it.

    Offsets are bytes from its start. Accesses of 1, 2 and 4 bytes at their natural alignment are one access each; the
    backend virtualises some registers (VFIO: BARs, MSI, parts of the command register).

    Threads: single reads and writes may come from any thread; read-modify-write is the caller's to serialise.

    Attributes:
        name: for messages.
        size: bytes: 256, or 4096 on PCI Express.
        observer: who is told of every access, or None.
    """

    def __init__(self, io: DeviceIo) -> None:
        self._io = io
        self.name = f"{io.name} configuration space"
        info = io.region_info(RegionIndex.CONFIG)
        if not info.size:
            raise NotSupportedError("the device has no configuration space", object=io.name)
        self.size = info.size
        self.observer: Observer | None = None

    def read(self, offset: int, size: int) -> bytes:
        """Read ``size`` bytes."""
        self._check(offset, size)
        if self.observer is None:
            return self._io.read(RegionIndex.CONFIG, offset, size)
        with told(self.observer, "config", operation="read", offset=offset, size=size) as facts:
            data = self._io.read(RegionIndex.CONFIG, offset, size)
            facts["data"] = data
        return data

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes."""
        self._check(offset, len(data))
        if self.observer is None:
            self._io.write(RegionIndex.CONFIG, offset, data)
            return
        with told(self.observer, "config", operation="write", offset=offset, size=len(data), data=data):
            self._io.write(RegionIndex.CONFIG, offset, data)

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 1 or offset + size > self.size:
            raise AddressRangeError(
                f"{size} bytes at offset {offset:#x} are not inside its {self.size:#x} bytes",
                object=self.name,
                hint="extended capabilities exist on PCI Express functions only" if self.size <= 256 else "",
            )

    def _write_value(self, offset: int, value: int, width: int) -> None:
        try:
            data = value.to_bytes(width, "little")
        except OverflowError:
            raise AccessError(
                f"value {value} does not fit into {8 * width} unsigned bits",
                object=self.name,
                hint="mask it to the width of the register; negative numbers have no width of their own",
            ) from None
        self.write(offset, data)

    def read8(self, offset: int) -> int:
        """Read one byte."""
        return self.read(offset, 1)[0]

    def read16(self, offset: int) -> int:
        """Read 16 bits."""
        return int.from_bytes(self.read(offset, 2), "little")

    def read32(self, offset: int) -> int:
        """Read 32 bits."""
        return int.from_bytes(self.read(offset, 4), "little")

    def write8(self, offset: int, value: int) -> None:
        """Write one byte."""
        self._write_value(offset, value, 1)

    def write16(self, offset: int, value: int) -> None:
        """Write 16 bits."""
        self._write_value(offset, value, 2)

    def write32(self, offset: int, value: int) -> None:
        """Write 32 bits."""
        self._write_value(offset, value, 4)

    # --- header (PCI Express Base 6.0, 7.5.1.1) ------------------------------------------------------------------

    @property
    def vendor(self) -> int:
        """Vendor ID."""
        return self.read16(0x00)

    @property
    def device(self) -> int:
        """Device ID."""
        return self.read16(0x02)

    @property
    def command(self) -> int:
        """Command register; assign to write all 16 bits."""
        return self.read16(COMMAND)

    @command.setter
    def command(self, value: int) -> None:
        self.write16(COMMAND, value)

    @property
    def status(self) -> int:
        """Status register."""
        return self.read16(0x06)

    @property
    def revision(self) -> int:
        """Revision ID."""
        return self.read8(0x08)

    @property
    def class_code(self) -> int:
        """Class code, 24 bits: base class, sub-class, programming interface."""
        return self.read32(0x08) >> 8

    def update_command(self, *, set: int = 0, clear: int = 0) -> None:  # noqa: A002  set and clear are the words
        """Set and clear bits of the command register; writes only when that changes it."""
        old = self.command
        new = (old & ~clear) | set
        if new != old:
            self.command = new

    # --- capabilities --------------------------------------------------------------------------------------------

    def capabilities(self) -> list[Capability]:
        """Return the standard capabilities, decoded, in list order (PCI Express Base 6.0, 7.5.1.1.11)."""
        return walk_capabilities(self.read)

    def extended_capabilities(self) -> list[ExtendedCapability]:
        """Return the extended capabilities, decoded (PCI Express Base 6.0, 7.6); empty on conventional functions."""
        return walk_extended(self.read) if self.size > 256 else []
