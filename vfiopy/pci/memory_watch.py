"""Which writes to configuration space take a function's memory away, or give it back.

As vfio-pci judges them (drivers/vfio/pci/vfio_pci_config.c): the memory bit of the command register, D3hot in the power
management capability, and a function level reset through the PCI Express or the advanced features capability. Bus
mastering does not count. A virtual function has no memory bit (PCI Express Base 6.0, 9.3.4.1.3): its memory stays, but
vfio-pci ends imports of it when a 0 is written there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vfiopy.pci.capabilities import AdvancedFeatures, PowerManagement, walk_capabilities
from vfiopy.pci.express import PciExpress
from vfiopy.signals import Cause, MemorySignals, taking

__all__ = ["MemoryWatch"]

Read = Callable[[int, int], bytes]

_COMMAND = 0x04
_COMMAND_MEMORY = 1 << 1
_HEADER_END = 0x40
# Bytes of capabilities, from their start (PCI Express Base 6.0, 7.5.2.2, 7.5.3.4, 7.9.21.4)
_PMCSR = 4
_D3HOT = 3
_DEVCTL_HIGH = 9
_DEVCTL_FLR = 1 << 7
_AF_CONTROL = 4
_AF_FLR = 1 << 0


class MemoryWatch:
    """The watch over one function's configuration space.

    Args:
        signals: who is told.
        is_virtual: whether it is a virtual function; asked once, when it matters.
    """

    def __init__(self, signals: MemorySignals, is_virtual: Callable[[], bool] = lambda: False) -> None:
        self.signals = signals
        self._is_virtual = is_virtual
        self._off: Cause | None = None
        self._power: int | None = None
        self._resets: dict[int, int] = {}
        self._decoded = False

    def _decode(self, read: Read) -> None:
        """Find the registers that count; where they are never changes."""
        for capability in walk_capabilities(read):
            match capability:
                case PowerManagement():
                    self._power = capability.offset + _PMCSR
                case PciExpress() if capability.flr:
                    self._resets[capability.offset + _DEVCTL_HIGH] = _DEVCTL_FLR
                case AdvancedFeatures() if capability.flr:
                    self._resets[capability.offset + _AF_CONTROL] = _AF_FLR
        self._decoded = True

    def _decode_off(self) -> Cause:
        if self._off is None:
            self._off = Cause.DECODE_TOUCHED if self._is_virtual() else Cause.DECODE
        return self._off

    @contextmanager
    def writing(self, offset: int, data: bytes, read: Read) -> Iterator[None]:
        """Run a write to configuration space, inside a ``with`` block.

        Args:
            offset: bytes from the start of configuration space.
            data: what is written.
            read: reads configuration space, ``read(offset, size)``.
        """
        taken, given = self._effects(offset, data, read)
        if not taken and not given:
            yield
            return
        # What is given back is told in the order of the writes: another thread may take it away right after.
        with taking([(self.signals, cause) for cause in taken]), self.signals.lock:
            yield
            for cause in given:
                self.signals.returned(cause)

    def _effects(self, offset: int, data: bytes, read: Read) -> tuple[list[Cause], list[Cause]]:
        taken: list[Cause] = []
        given: list[Cause] = []

        def byte(at: int | None) -> int | None:
            return data[at - offset] if at is not None and offset <= at < offset + len(data) else None

        command = byte(_COMMAND)
        if command is not None:
            if command & _COMMAND_MEMORY:
                given.append(Cause.DECODE)
            else:
                taken.append(self._decode_off())
        if offset + len(data) <= _HEADER_END:
            return taken, given
        if not self._decoded:
            self._decode(read)
        power = byte(self._power)
        if power is not None:
            (taken if power & 3 == _D3HOT else given).append(Cause.POWER)
        taken += [Cause.RESET for at, flr in self._resets.items() if (byte(at) or 0) & flr]
        return taken, given
