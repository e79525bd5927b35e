"""The PCI function around the controller: its BARs and capabilities (PCIe Transport 1.0, 3)."""

from __future__ import annotations

from typing import Final

from vfiopy.emulated.capabilities import CapabilityDeclaration, Msi, MsiX, PciExpress, PowerManagement
from vfiopy.emulated.config_space import Bar
from vfiopy.emulated.nvme.settings import Settings
from vfiopy.nvme_spec import registers as reg

__all__ = ["BUFFER_BAR", "bars_of", "capabilities_of"]

BUFFER_BAR: Final = 2
_TABLE_BAR: Final = 4
_TABLE_ENTRY: Final = 16


def bars_of(settings: Settings) -> dict[int, Bar]:
    """BAR 0 registers, BAR 2 the memory buffer, BAR 4 the MSI-X table: one page or more, and as much for what pends."""
    registers = reg.DOORBELLS + 2 * (settings.queues + 1) * (4 << settings.stride)
    bars = {0: Bar(max(0x4000, _power_of_two(registers)), address64=True)}
    if settings.memory_buffer:
        bars[BUFFER_BAR] = Bar(settings.memory_buffer, shared=True, address64=True, prefetchable=True)
    if settings.messages == "msix":
        bars[_TABLE_BAR] = Bar(2 * _table_room(settings))
    return bars


def capabilities_of(settings: Settings) -> tuple[CapabilityDeclaration, ...]:
    """Power management, messages, PCI Express with function reset."""
    messages: tuple[CapabilityDeclaration, ...] = ()
    if settings.messages == "msix":
        room = _table_room(settings)
        messages = (MsiX(settings.vectors, table_bar=_TABLE_BAR, table_offset=0, pba_bar=_TABLE_BAR, pba_offset=room),)
    elif settings.messages == "msi":
        messages = (Msi(vectors=settings.vectors),)
    return (PowerManagement(), *messages, PciExpress(function_reset=True))


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _table_room(settings: Settings) -> int:
    return max(4096, _power_of_two(_TABLE_ENTRY * settings.vectors))
