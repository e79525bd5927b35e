"""The BARs of an emulated device as a driver reaches them: registers, shared memory, and the hidden MSI-X table."""

from __future__ import annotations

import errno

from vfiopy.backend import region_name
from vfiopy.emulated.bar_memory import BarMemory
from vfiopy.emulated.capabilities import MsiX
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import AddressRangeError, DeviceGoneError, NotSupportedError

__all__ = ["Bars", "check_range"]

_WIDTHS = (8, 4, 2, 1)


class Bars:
    """Any access to the BARs of one device.

    Threads: any; the device's lock serialises its handlers.

    Args:
        device: the device.
        name: for messages.

    Attributes:
        registers: BARs that are nothing but registers, and their sizes in bytes.
    """

    def __init__(self, device: PciDevice, name: str) -> None:
        self._device = device
        self._name = name
        self._hidden = self._msix_areas()
        self.registers = {
            index: bar.size for index, bar in device.bars.items() if not bar.shared and index not in self._hidden
        }

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Read bytes; what is not an aligned access becomes the widest aligned ones that fit.

        Raises:
            AddressRangeError: outside of the region.
            DeviceGoneError: memory decode is off, or the function is in D3hot.
        """
        self._check_bar(index, offset, size)
        return b"".join(self._read_piece(index, at, width) for at, width in _pieces(offset, size))

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write bytes: see :meth:`read`."""
        self._check_bar(index, offset, len(data))
        for at, width in _pieces(offset, len(data)):
            self._write_piece(index, at, data[at - offset : at - offset + width])

    def _read_piece(self, index: int, offset: int, width: int) -> bytes:
        device = self._device
        if self._is_hidden(index, offset, width):
            return b"\xff" * width
        if device.bars[index].is_memory(offset):
            return bytes(device.memories[index].view[offset : offset + width])
        return device.handle_read(index, offset, width).to_bytes(width, "little")

    def _write_piece(self, index: int, offset: int, data: bytes) -> None:
        device, width = self._device, len(data)
        if self._is_hidden(index, offset, width):
            return
        if device.bars[index].is_memory(offset):
            device.memories[index].view[offset : offset + width] = data
        else:
            device.handle_write(index, offset, width, int.from_bytes(data, "little"))

    def _check_bar(self, index: int, offset: int, size: int) -> None:
        bar = self._device.bars.get(index)
        check_range(self._name, index, bar.size if bar else 0, offset, size)
        if not self._device.config.memory_enabled:
            raise DeviceGoneError(
                f"BAR {index} does not answer: memory decode is off or the function is not in D0",
                errno=errno.EIO,
                object=self._name,
                hint="set bit 1 of the command register (device.memory_enabled = True)",
            )

    def _msix_areas(self) -> dict[int, range]:
        """Where the MSI-X table lies: vfio-pci owns it; it reads as ones and does not take writes."""
        found = self._device.config.find(MsiX)
        if found is None:
            return {}
        table = found[0]
        return {table.table_bar: range(table.table_offset, table.table_offset + table.table_size)}

    def _is_hidden(self, index: int, offset: int, width: int) -> bool:
        area = self._hidden.get(index)
        return area is not None and offset < area.stop and area.start < offset + width

    def memory(self, index: int) -> BarMemory:
        """Return the shared memory that a BAR is; raises NotSupportedError for one of registers."""
        memory = self._device.memories.get(index)
        if memory is None:
            raise NotSupportedError(
                f"{region_name(index)} is served by code and cannot be mapped",
                object=self._name,
                hint="use its read and write methods; region_info().flags says MMAP where a region can be mapped",
            )
        return memory

    def area(self, index: int, offset: int, size: int) -> BarMemory:
        """Return the memory behind a part of a BAR that can be mapped.

        Raises:
            NotSupportedError: there are registers in it.
            AddressRangeError: outside of the region.
        """
        memory = self.memory(index)
        check_range(self._name, index, memory.size, offset, size)
        areas = self._device.bars[index].areas
        if areas is not None and not any(
            area.offset <= offset and offset + size <= area.offset + area.size for area in areas
        ):
            raise NotSupportedError(
                f"{region_name(index)}, offset {offset:#x}, {size} bytes: has registers in it and cannot be mapped",
                object=self._name,
                hint="region_info().sparse says which parts can be mapped",
            )
        return memory


def check_range(name: str, index: int, region: int, offset: int, size: int) -> None:
    """Raise AddressRangeError for what is not inside of a region of ``region`` bytes; 0 for one that is not there."""
    if not region:
        raise AddressRangeError(f"the device has no {region_name(index)}", object=name)
    if offset < 0 or size < 0 or offset + size > region:
        raise AddressRangeError(
            f"{region_name(index)}, offset {offset:#x}, {size} bytes: outside of its {region:#x} bytes",
            object=name,
        )


def _pieces(offset: int, size: int) -> list[tuple[int, int]]:
    """Cut a range into aligned accesses of 8, 4, 2 and 1 bytes, as vfio-pci does."""
    pieces = []
    end = offset + size
    while offset < end:
        width = next(w for w in _WIDTHS if not offset % w and offset + w <= end)
        pieces.append((offset, width))
        offset += width
    return pieces
