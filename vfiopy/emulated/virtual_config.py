"""What vfio-pci shows of a function's configuration space where that is not the function's own.

Seen on Linux 7.3: the low byte of MSI's control register is a copy that software may write as it likes; its enable
bit stays 0 until MSI is set up by VFIO_DEVICE_SET_IRQS, and does not follow that by itself. MSI-X is read-only.
"""

from __future__ import annotations

from vfiopy.backend import IrqIndex
from vfiopy.emulated.capabilities import Msi, MsiX
from vfiopy.emulated.config_space import ConfigSpace
from vfiopy.emulated.irqs import IrqTable

__all__ = ["VirtualConfig"]


class VirtualConfig:
    """Configuration space as the user of a VFIO device sees it.

    Threads: the device's lock is held by the caller.
    """

    def __init__(self, config: ConfigSpace, irqs: IrqTable) -> None:
        self._config = config
        self._irqs = irqs
        msi, msix = config.find(Msi), config.find(MsiX)
        self._msi_control = msi[1] + Msi.CONTROL if msi else -1
        self._msi_flags = config.read(self._msi_control, 1)[0] if msi else 0
        self._read_only = range(msix[1], msix[1] + len(msix[0].layout().data)) if msix else range(0)

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes. The caller has checked the range."""
        data = bytearray(self._config.read(offset, size))
        if offset <= self._msi_control < offset + size:
            data[self._msi_control - offset] = self._msi_flags
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes. The caller has checked the range."""
        changed = bytearray(data)
        for position in range(len(changed)):
            if offset + position in self._read_only:
                changed[position] = self._config.read(offset + position, 1)[0]
        if offset <= self._msi_control < offset + len(data):
            position = self._msi_control - offset
            changed[position] = self._msi_flags = self._allowed(changed[position])
        self._config.write(offset, bytes(changed))

    def _allowed(self, flags: int) -> int:
        if self._irqs.active != IrqIndex.MSI:
            flags &= ~Msi.ENABLE
        return flags & ~0x70 | min(flags >> 4 & 7, self._irqs.msi_field) << 4
