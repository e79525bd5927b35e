"""QEMU's educational device, written from its documentation (docs/specs/edu.rst) and its observed behaviour.

===========  ======  ===========================================================================================
offset       width   register
===========  ======  ===========================================================================================
0x00         4       identification, 0x010000ed, read-only
0x04         4       liveness: reads the inverse of what was written
0x08         4       factorial: a written n becomes n! modulo 2**32 when status bit 0 clears
0x20         4       status: bit 0 computing (read-only), bit 7 interrupt when the factorial is done
0x24         4       interrupt status, read-only: 0x01 factorial, 0x100 DMA, or what was raised
0x60         4       raise: ORed into the interrupt status
0x64         4       acknowledge: bits to clear in the interrupt status
0x80         4, 8    DMA source
0x88         4, 8    DMA destination
0x90         4, 8    DMA count in bytes
0x98         4, 8    DMA command: bit 0 start (reads 1 while it runs), bit 1 device to RAM, bit 2 interrupt at the end
===========  ======  ===========================================================================================

The device's own memory is 4096 bytes at 0x40000, seen by its DMA engine only.
"""

from __future__ import annotations

import struct
from typing import Final

from vfiopy.emulated.capabilities import Msi
from vfiopy.emulated.config_space import Bar, Identity
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import NotMappedError

__all__ = ["Edu"]

_IDENTIFICATION: Final = 0x0100_00ED
_ID, _LIVENESS, _FACTORIAL, _STATUS, _IRQ_STATUS, _IRQ_RAISE, _IRQ_ACK = (
    0x00,
    0x04,
    0x08,
    0x20,
    0x24,
    0x60,
    0x64,
)
_DMA_SOURCE, _DMA_DESTINATION, _DMA_COUNT, _DMA_COMMAND = 0x80, 0x88, 0x90, 0x98

_COMPUTING, _IRQ_WHEN_DONE = 0x01, 0x80
_RUN, _TO_RAM, _IRQ_AT_END = 1, 2, 4
_FACTORIAL_IRQ, _DMA_IRQ = 0x001, 0x100
_BUFFER, _BUFFER_SIZE = 0x4_0000, 4096
_BAR_SIZE = 1 << 20
_SAVED: Final = struct.Struct(f"=4I4Q{_BUFFER_SIZE}s")


class Edu(PciDevice):
    """The ``edu`` device: 1234:11e8, one BAR, one MSI vector or INTA, no function reset.

    Differences from QEMU: the DMA takes as long as a factorial (QEMU: 100 ms; ask for ``delay=(0.1, 0.1)``); what DMA
    finds outside of the device's memory ends in ``errors`` and moves nothing; a DMA that faults moves nothing.

    Args:
        dma_bits: address bits of its DMA engine; higher ones are cut off.
    """

    name = "edu"
    identity = Identity(
        vendor=0x1234,
        device=0x11E8,
        class_code=0x00FF00,
        revision=0x10,
        subsystem_vendor=0x1AF4,
        subsystem=0x1100,
    )
    bars = {0: Bar(_BAR_SIZE)}  # noqa: RUF012  declared ClassVar by the base
    capabilities = (Msi(vectors=1, address64=True),)
    interrupt_pin = 1

    def __init__(
        self,
        *,
        seed: int = 0,
        delay: tuple[float, float] = (0.0002, 0.002),
        manual: bool = False,
        dma_bits: int = 28,
    ) -> None:
        super().__init__(seed=seed, delay=delay, manual=manual)
        self.dma_mask = (1 << dma_bits) - 1

    def reset(self) -> None:
        """Power-on state."""
        self._liveness = 0
        self._factorial = 0
        self._status = 0
        self._irq_status = 0
        self._dma = {_DMA_SOURCE: 0, _DMA_DESTINATION: 0, _DMA_COUNT: 0, _DMA_COMMAND: 0}
        self._buffer = bytearray(_BUFFER_SIZE)

    def save(self) -> bytes:
        """Registers and memory; what is running shows in them."""
        registers = (self._liveness, self._factorial, self._status, self._irq_status)
        return _SAVED.pack(*registers, *self._dma.values(), bytes(self._buffer))

    def load(self, data: bytes) -> None:
        """Go on; a factorial or DMA that was running takes its time anew."""
        if len(data) != _SAVED.size:
            raise ValueError(f"an edu is saved in {_SAVED.size} bytes, not {len(data)}")
        *registers, buffer = _SAVED.unpack(data)
        self._liveness, self._factorial, self._status, self._irq_status = registers[:4]
        self._dma = dict(zip(self._dma, registers[4:], strict=True))
        self._buffer[:] = buffer
        if self._status & _COMPUTING:
            self.later(self._finish_factorial)
        if self._dma[_DMA_COMMAND] & _RUN:
            self.later(self._finish_dma)
        if self._irq_status and not self.config.msi_enabled:
            self.interrupt()

    def read(self, bar: int, offset: int, width: int) -> int:  # noqa: ARG002  there is one BAR
        """Read a register; what is not one reads as all ones."""
        if width < 4:
            return 0  # QEMU's bus refuses it before the device sees it
        if offset < _DMA_SOURCE:
            return self._read_low(offset) if width == 4 else -1
        return self._dma.get(offset, -1)

    def _read_low(self, offset: int) -> int:
        match offset:
            case 0x00:
                return _IDENTIFICATION
            case 0x04:
                return self._liveness
            case 0x08:
                return self._factorial
            case 0x20:
                return self._status
            case 0x24:
                return self._irq_status
            case _:
                return -1

    def write(self, bar: int, offset: int, width: int, value: int) -> None:  # noqa: ARG002
        """Write a register; writes of a wrong width, or to what is not one, do nothing."""
        if width < 4 or (offset < _DMA_SOURCE and width != 4):
            return
        match offset:
            case 0x04:
                self._liveness = ~value & 0xFFFF_FFFF
            case 0x08:
                self._start_factorial(value)
            case 0x20:
                self._status = self._status & ~_IRQ_WHEN_DONE | value & _IRQ_WHEN_DONE
            case 0x60:
                self._raise(value)
            case 0x64:
                self._acknowledge(value)
            case 0x80 | 0x88 | 0x90 | 0x98:
                self._write_dma(offset, value)

    # --- factorial and interrupts --------------------------------------------------------------------------------

    def _start_factorial(self, number: int) -> None:
        if not self._status & _COMPUTING:
            self._factorial = number
            self._status |= _COMPUTING
            self.later(self._finish_factorial)

    def _finish_factorial(self) -> None:
        self._factorial = _factorial(self._factorial)
        self._status &= ~_COMPUTING
        if self._status & _IRQ_WHEN_DONE:
            self._raise(_FACTORIAL_IRQ)

    def _raise(self, bits: int) -> None:
        self._irq_status |= bits
        if self._irq_status:
            self.interrupt()

    def _acknowledge(self, bits: int) -> None:
        self._irq_status &= ~bits
        if not self._irq_status and not self.config.msi_enabled:
            self.deassert()

    # --- DMA -----------------------------------------------------------------------------------------------------

    def _write_dma(self, offset: int, value: int) -> None:
        if self._dma[_DMA_COMMAND] & _RUN:
            return  # the registers are the running command's
        if offset != _DMA_COMMAND:
            self._dma[offset] = value
        elif value & _RUN:
            self._dma[offset] = value
            self.later(self._finish_dma)

    def _finish_dma(self) -> None:
        try:
            self._move()
        except NotMappedError:
            pass  # on record; the device has no error register, so to its driver the command just ends
        finally:
            self._dma[_DMA_COMMAND] &= ~_RUN
        if self._dma[_DMA_COMMAND] & _IRQ_AT_END:
            self._raise(_DMA_IRQ)

    def _move(self) -> None:
        to_ram = bool(self._dma[_DMA_COMMAND] & _TO_RAM)
        ours, theirs = (_DMA_SOURCE, _DMA_DESTINATION) if to_ram else (_DMA_DESTINATION, _DMA_SOURCE)
        start, count = self._dma[ours] - _BUFFER, self._dma[_DMA_COUNT]
        if start < 0 or start + count > _BUFFER_SIZE:
            self.record_error(
                f"DMA of {count:#x} bytes at {self._dma[ours]:#x} leaves the device's memory, "
                f"{_BUFFER:#x} to {_BUFFER + _BUFFER_SIZE - 1:#x}"
            )
            return
        if not count:
            return
        iova = self._dma[theirs] & self.dma_mask
        if to_ram:
            self.dma_write(iova, bytes(self._buffer[start : start + count]))
        else:
            self._buffer[start : start + count] = self.dma_read(iova, count)


def _factorial(number: int) -> int:
    """Return ``number!`` modulo 2**32."""
    result = 1
    # 34! has 32 factors of two: from there on the product is 0
    for factor in range(2, min(number, 34) + 1):
        result = result * factor & 0xFFFF_FFFF
    return result
