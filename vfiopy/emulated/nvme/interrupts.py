"""When a completion queue interrupts: MSI-X, MSI, or INTx, masks, and coalescing (PCIe Transport 1.0, 3.5)."""

from __future__ import annotations

from collections.abc import Callable

from vfiopy.emulated.nvme.features import Features
from vfiopy.emulated.nvme.properties import Properties
from vfiopy.emulated.nvme.queues import CompletionQueue, Queues
from vfiopy.emulated.pci_device import PciDevice

__all__ = ["Interrupts"]


class Interrupts:
    """Sends the interrupts of a controller.

    Args:
        device: the function.
        vectors: how many messages it has.
        registers: INTMS and INTMC.
        queues: whose entries wait.
        features: coalescing.
    """

    def __init__(
        self, device: PciDevice, vectors: int, registers: Properties, queues: Queues, features: Features
    ) -> None:
        self._device = device
        self._vectors = vectors
        self._registers = registers
        self._queues = queues
        self._features = features
        self._held: dict[int, int] = {}  # vector → completions that no interrupt was sent for

    def reset(self) -> None:
        """Forget what is held, and take INTx back."""
        self._held.clear()
        self._device.deassert()

    @property
    def by_message(self) -> bool:
        """MSI-X or MSI is enabled."""
        return self._device.config.msix_enabled or self._device.config.msi_enabled

    @property
    def vectors(self) -> int:
        """How many vectors a completion queue can choose from."""
        return self._vectors if self.by_message else 1

    def raise_for(self, cq: CompletionQueue, count: int) -> None:
        """So many completions were written."""
        if cq.vector is None:
            return
        threshold, seconds = self._features.coalescing(cq.vector)
        if not cq.number or not seconds or self._held.get(cq.vector, 0) + count > threshold:
            self._send(cq.vector)
        elif cq.vector in self._held:
            self._held[cq.vector] += count
        else:
            self._held[cq.vector] = count
            self._device.later(self._send_later(cq.vector), delay=seconds)

    def _send_later(self, vector: int) -> Callable[[], None]:
        def send() -> None:
            if vector in self._held:
                self._send(vector)

        return send

    def _send(self, vector: int) -> None:
        self._held.pop(vector, None)
        if self._device.config.msix_enabled or not self._registers.interrupt_mask >> vector & 1:
            self._device.interrupt(vector)

    def write_mask(self, bits: int, *, clear: bool) -> None:
        """Write INTMS, or INTMC, which sends the messages that were held back."""
        self._registers.mask_interrupts(bits, clear=clear)
        self.update_line()
        if clear and self._device.config.msi_enabled:
            for vector in {cq.vector for cq in self._queues.completions.values() if cq.head != cq.tail}:
                if vector is not None and bits >> vector & 1:
                    self._device.interrupt(vector)

    def update_line(self) -> None:
        """Drive INTx, which is a level: asserted while a queue has entries that the host has not taken."""
        if self.by_message:
            return
        mask = self._registers.interrupt_mask
        if any(
            cq.head != cq.tail and cq.vector is not None and not mask >> cq.vector & 1
            for cq in self._queues.completions.values()
        ):
            self._device.interrupt()
        else:
            self._device.deassert()
