"""What the kernel and firmware do before a driver sees a PCI function: switch it on and place its BARs.

A server may start like a device after power-on: BARs at 0, memory decode off. Registers: PCI Express Base 6.0, 7.5.1
and 7.5.2.
"""

from __future__ import annotations

from typing import Final

from vfiopy.backend import DeviceIo, RegionIndex

__all__ = ["PowerState", "power_up"]

_CONFIG: Final = RegionIndex.CONFIG
_COMMAND, _STATUS, _BARS, _POINTER = 0x04, 0x06, 0x10, 0x34
_MEMORY, _BUS_MASTER, _INTX_DISABLE = 1 << 1, 1 << 2, 1 << 10
_HAS_CAPABILITIES: Final = 1 << 4
_POWER_MANAGEMENT: Final = 0x01
_STATE_MASK: Final = 3
_TOP: Final = 0xFEBF_0000  # where firmware of a PC puts 32-bit BARs, downwards
_LONGEST_LIST: Final = 48


class PowerState:
    """Whether the memory BARs of a function answer.

    Args:
        control: offset of the power management control register in configuration space, 0 for none, -1 for no PCI.
    """

    def __init__(self, control: int) -> None:
        self._control = control

    @property
    def known(self) -> bool:
        """It is a PCI function with a configuration space."""
        return self._control >= 0

    def concerned(self, offset: int, size: int) -> bool:
        """Whether a write to configuration space may change it."""
        end = offset + size
        return (offset < _COMMAND + 2 and end > _COMMAND) or (
            self._control > 0 and offset < self._control + 2 and end > self._control
        )

    def memory_answers(self, io: DeviceIo) -> bool:
        """Look: memory decode is on and the function is in D0."""
        on = bool(_read(io, _COMMAND, 2) & _MEMORY)
        return on and not (self._control and _read(io, self._control, 2) & _STATE_MASK)


def power_up(io: DeviceIo) -> PowerState:
    """Put a function into D0, place its memory BARs where they have no address, and switch memory decode on.

    Bus mastering goes off and INTx is allowed, as vfio-pci leaves them.
    """
    state = PowerState(_find_control(io))
    if state._control and _read(io, state._control, 2) & _STATE_MASK:
        _write(io, state._control, _read(io, state._control, 2) & ~_STATE_MASK, 2)
    command = _read(io, _COMMAND, 2)
    if command & _BUS_MASTER:
        command &= ~_BUS_MASTER
        _write(io, _COMMAND, command, 2)
    if not _are_placed(io):
        _write(io, _COMMAND, command & ~_MEMORY, 2)  # a BAR must not answer where it is about to leave
        _place(io)
    wanted = (command | _MEMORY) & ~_INTX_DISABLE
    if _read(io, _COMMAND, 2) != wanted:
        _write(io, _COMMAND, wanted, 2)
    return state


def _find_control(io: DeviceIo) -> int:
    if not _read(io, _STATUS, 2) & _HAS_CAPABILITIES:
        return 0
    offset = _read(io, _POINTER, 1) & ~3
    for _ in range(_LONGEST_LIST):
        if offset < 0x40:
            break
        header = _read(io, offset, 2)
        if header & 0xFF == _POWER_MANAGEMENT:
            return offset + 4
        offset = header >> 8 & ~3
    return 0


def _memory_bars(io: DeviceIo) -> list[tuple[int, int, int]]:
    """Return index, size and register value of the memory BARs that there are."""
    found = []
    for index in range(RegionIndex.BAR5 + 1):
        size = io.region_info(index).size
        value = _read(io, _BARS + 4 * index, 4)
        if size and not value & 1:
            found.append((index, size, value))
    return found


def _are_placed(io: DeviceIo) -> bool:
    for index, _, value in _memory_bars(io):
        is_wide = value & 6 == 4 and index < RegionIndex.BAR5
        high = _read(io, _BARS + 4 * index + 4, 4) if is_wide else 0
        if not value & ~0xF and not high:
            return False
    return True


def _place(io: DeviceIo) -> None:
    top = _TOP
    for index, size, value in _memory_bars(io):
        if value & 6 == 4 and index < RegionIndex.BAR5 and size >= 1 << 31:
            address = max(size, 1 << 40) * (index + 1)  # too large for below 4 GiB
            _write(io, _BARS + 4 * index + 4, address >> 32, 4)
        else:
            top = address = (top - size) & -size
        _write(io, _BARS + 4 * index, address & 0xFFFF_FFF0, 4)


def _read(io: DeviceIo, offset: int, size: int) -> int:
    return int.from_bytes(io.read(_CONFIG, offset, size), "little")


def _write(io: DeviceIo, offset: int, value: int, size: int) -> None:
    io.write(_CONFIG, offset, value.to_bytes(size, "little"))
