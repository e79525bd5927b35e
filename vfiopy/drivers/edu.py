"""A driver of QEMU's educational device (docs/specs/edu.rst in QEMU): small enough to read, complete enough to copy.

It runs unchanged on a real function that QEMU emulates and on ``emulated:edu``.
"""

from __future__ import annotations

import time
from typing import Final, Literal

from vfiopy.device import Device, Vector
from vfiopy.errors import NotSupportedError, StateError, VfioTimeoutError

__all__ = ["BUFFER_SIZE", "EduDriver"]

VENDOR, DEVICE = 0x1234, 0x11E8
BUFFER_SIZE: Final = 4096
"""Bytes of the device's own memory."""

_ID, _LIVENESS, _FACTORIAL, _STATUS = 0x00, 0x04, 0x08, 0x20
_IRQ_STATUS, _IRQ_RAISE, _IRQ_ACKNOWLEDGE = 0x24, 0x60, 0x64
_DMA_SOURCE, _DMA_DESTINATION, _DMA_COUNT, _DMA_COMMAND = 0x80, 0x88, 0x90, 0x98
_ID_MAGIC = 0xED
_COMPUTING, _IRQ_WHEN_DONE = 0x01, 0x80
_DMA_START, _DMA_TO_RAM, _DMA_IRQ_AT_END = 1, 2, 4
_FACTORIAL_DONE, _DMA_DONE = 0x001, 0x100
_BUFFER = 0x4_0000  # where the DMA engine sees that memory


class EduDriver:
    """The edu device, ready for use.

    Interrupts are off until :meth:`enable_interrupts`; without them, operations poll. DMA needs
    ``device.bus_master = True`` and buffers from ``device.dma``, which this class limits to the 28 address bits that
    the device has.

    Threads: one at a time.

    Args:
        device: an open edu.

    Raises:
        NotSupportedError: it is another device.
    """

    def __init__(self, device: Device) -> None:
        config = device.config
        if (config.vendor, config.device) != (VENDOR, DEVICE):
            raise NotSupportedError(
                f"it is {config.vendor:04x}:{config.device:04x}, edu is {VENDOR:04x}:{DEVICE:04x}",
                object=device.name,
                hint="lspci -d 1234:11e8 lists edu devices; emulated:edu is always there",
            )
        self.device = device
        self._bar = device.bars[0]
        identification = self._bar.read32(_ID)
        if identification & 0xFF != _ID_MAGIC:
            raise NotSupportedError(
                f"its identification register reads {identification:#010x}, not 0xRRrr00ed", object=device.name
            )
        self.version = (identification >> 24, identification >> 16 & 0xFF)
        self._vector: Vector | None = None
        device.dma.bits = 28

    # --- interrupts ----------------------------------------------------------------------------------------------

    def enable_interrupts(self, kind: Literal["msi", "intx"] = "msi") -> Vector:
        """Have operations end with an interrupt; return its vector.

        MSI is a DMA write and needs bus mastering, as DMA does.
        """
        self.disable_interrupts()
        interrupt = self.device.irqs.msi if kind == "msi" else self.device.irqs.intx
        if kind == "msi":
            self._check_bus_master("MSI")
        self._bar.write32(_IRQ_ACKNOWLEDGE, 0xFFFF_FFFF)  # what an earlier user left
        self._vector = interrupt.enable(1)[0]
        return self._vector

    def disable_interrupts(self) -> None:
        """Go back to polling. Idempotent."""
        self._vector = None
        for interrupt in (self.device.irqs.msi, self.device.irqs.intx):
            interrupt.disable()

    def raise_interrupt(self, bits: int = 1) -> None:
        """Have the device interrupt with these bits of its interrupt status set."""
        self._bar.write32(_IRQ_RAISE, bits)

    def wait_interrupt(self, bits: int = 0xFFFF_FFFF, timeout: float | None = 5.0) -> int:
        """Wait until one of these bits of the interrupt status is set, acknowledge it, and return what was set.

        Raises:
            StateError: interrupts are not enabled.
            VfioTimeoutError: none came within ``timeout`` seconds.
        """
        if self._vector is None:
            raise StateError(f"interrupts of {self.device.name} are not enabled; call enable_interrupts()")
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._vector.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
            status = self._bar.read32(_IRQ_STATUS)
            self._bar.write32(_IRQ_ACKNOWLEDGE, status)
            if self.device.irqs.intx.enabled:
                self.device.irqs.intx.unmask()  # it masked itself; the device is served now
            if status & bits:
                return status

    # --- liveness and factorial ----------------------------------------------------------------------------------

    def invert(self, value: int) -> int:
        """Write 32 bits to the liveness register and return what it reads: the inverse, if the device lives."""
        self._bar.write32(_LIVENESS, value)
        return self._bar.read32(_LIVENESS)

    def factorial(self, number: int, timeout: float = 5.0) -> int:
        """Return ``number!`` modulo 2**32, computed by the device.

        Raises:
            VfioTimeoutError: it took longer than ``timeout`` seconds.
        """
        by_interrupt = self._vector is not None
        self._bar.write32(_STATUS, _IRQ_WHEN_DONE if by_interrupt else 0)
        self._bar.write32(_FACTORIAL, number)
        if by_interrupt:
            self.wait_interrupt(_FACTORIAL_DONE, timeout)
        else:
            self._bar.poll32(_STATUS, _COMPUTING, 0, timeout)
        return self._bar.read32(_FACTORIAL)

    # --- DMA -----------------------------------------------------------------------------------------------------

    def load(self, iova: int, size: int, offset: int = 0, timeout: float = 5.0) -> None:
        """Copy ``size`` bytes from memory at ``iova`` into the device's memory at ``offset``.

        Raises:
            ValueError: the device has 4096 bytes.
            StateError: bus mastering is off.
            VfioTimeoutError: it took longer than ``timeout`` seconds.
        """
        self._check_range(offset, size)
        self._dma(iova, _BUFFER + offset, size, _DMA_START, timeout)

    def store(self, iova: int, size: int, offset: int = 0, timeout: float = 5.0) -> None:
        """Copy ``size`` bytes from the device's memory at ``offset`` to memory at ``iova``; raises as :meth:`load`."""
        self._check_range(offset, size)
        self._dma(_BUFFER + offset, iova, size, _DMA_START | _DMA_TO_RAM, timeout)

    def _dma(self, source: int, destination: int, size: int, command: int, timeout: float) -> None:
        self._check_bus_master("DMA")
        by_interrupt = self._vector is not None
        self._bar.write64(_DMA_SOURCE, source)
        self._bar.write64(_DMA_DESTINATION, destination)
        self._bar.write64(_DMA_COUNT, size)
        self._bar.write64(_DMA_COMMAND, command | (_DMA_IRQ_AT_END if by_interrupt else 0))
        try:
            if by_interrupt:
                self.wait_interrupt(_DMA_DONE, timeout)
            else:
                self._bar.poll32(_DMA_COMMAND, _DMA_START, 0, timeout)
        except VfioTimeoutError as error:
            raise VfioTimeoutError(
                f"a DMA of {size} bytes did not end within {timeout} s",
                object=self.device.name,
                hint="QEMU's edu takes 100 ms for each",
            ) from error

    @staticmethod
    def _check_range(offset: int, size: int) -> None:
        if offset < 0 or size < 1 or offset + size > BUFFER_SIZE:
            raise ValueError(f"{size} bytes at {offset:#x} are not inside the device's {BUFFER_SIZE} bytes")

    def _check_bus_master(self, what: str) -> None:
        # The device would ignore it without a word.
        if not self.device.bus_master:
            raise StateError(f"{what} of {self.device.name} needs bus mastering; set device.bus_master = True")
