"""Enabling, disabling and shutting down a controller: nothing but its registers.

Source: NVM Express Base Specification 2.0, 3.5.1 (initialization), 3.6.1 (shutdown), 3.7.2 (controller level reset).
"""

from __future__ import annotations

import time
from contextlib import suppress

from vfiopy.drivers.nvme.errors import ControllerFailedError
from vfiopy.errors import DeviceGoneError, VfioTimeoutError
from vfiopy.mmio import Region
from vfiopy.nvme_spec import registers as reg

__all__ = ["Lifecycle"]

_ALL_ONES = 0xFFFFFFFF
_INTERVAL = 0.001


class Lifecycle:
    """The registers that say whether a controller works, and make it.

    64-bit registers are accessed as two halves, low half first, which every controller has to accept.

    Args:
        registers: BAR 0.
        name: for messages.
    """

    def __init__(self, registers: Region, name: str) -> None:
        self._registers = registers
        self._name = name
        self.refresh()

    def refresh(self) -> None:
        """Read what does not change while the controller works: CAP, VS, and how long enabling may take."""
        low = self._registers.read32(reg.CAP)
        high = self._registers.read32(reg.CAP + 4)
        if low == _ALL_ONES and high == _ALL_ONES:
            raise self._gone()
        self.capabilities = reg.Capabilities.decode(high << 32 | low)
        self.version = self._registers.read32(reg.VS)
        crto = self._registers.read32(reg.CRTO) if self.capabilities.ready_modes else 0
        self.ready_timeout = reg.ready_timeout(self.capabilities, crto)

    def _gone(self) -> DeviceGoneError:
        return DeviceGoneError(
            "the controller's registers read as all ones",
            object=self._name,
            hint="it was removed or reset, or its memory decode is off: see device.memory_enabled",
        )

    def status(self) -> int:
        """Read CSTS.

        Raises:
            DeviceGoneError: the register reads as all ones.
        """
        value = self._registers.read32(reg.CSTS)
        if value == _ALL_ONES:
            raise self._gone()
        return value

    @property
    def enabled(self) -> bool:
        """Whether CC.EN is set."""
        return bool(self._registers.read32(reg.CC) & reg.CC_EN)

    def _await_status(self, mask: int, value: int, timeout: float, what: str, *, may_fail: bool) -> None:
        deadline = time.monotonic() + timeout
        while True:
            # The time is taken first: a thread that did not run for a while still looks once more.
            late = time.monotonic() >= deadline
            status = self.status()
            if status & mask == value:
                return
            if status & reg.CSTS_CFS and not may_fail:
                raise ControllerFailedError(
                    f"it reports a fatal error (CSTS.CFS) instead of {what}",
                    object=self._name,
                    hint="controller.reset(function=True) resets the whole function",
                )
            if late:
                raise VfioTimeoutError(
                    f"{what} did not happen within {timeout:.1f} s (CSTS is {status:#x})",
                    object=self._name,
                    hint="controller.reset(function=True) resets the whole function",
                )
            time.sleep(_INTERVAL)

    def disable(self) -> None:
        """Clear CC.EN and wait until the controller has stopped: no DMA is under way then (3.7.2).

        Raises:
            VfioTimeoutError: it did not stop within CAP.TO.
            DeviceGoneError: it does not answer.
        """
        status = self.status()
        control = self._registers.read32(reg.CC)
        if control & reg.CC_EN:
            if not status & (reg.CSTS_RDY | reg.CSTS_CFS):
                # It is still on its way up, and must arrive before it may be sent down (3.5.1).
                with suppress(VfioTimeoutError, ControllerFailedError):
                    self._await_status(
                        reg.CSTS_RDY, reg.CSTS_RDY, self.ready_timeout, "the end of an earlier enabling", may_fail=False
                    )
            self._registers.write32(reg.CC, control & ~(reg.CC_EN | reg.CC_SHN_MASK))
        self._await_status(reg.CSTS_RDY, 0, self.ready_timeout, "disabling (CC.EN = 0)", may_fail=True)

    def enable(self, page: int, depth: int, submission: int, completion: int) -> None:
        """Tell a disabled controller where its admin queues are, and enable it.

        Args:
            page: memory page size, bytes.
            depth: entries of each admin queue, 2 to 4096.
            submission: IOVA of the submission ring.
            completion: IOVA of the completion ring.

        Raises:
            VfioTimeoutError: it was not ready within CAP.TO.
            ControllerFailedError: it reports a fatal error.
        """
        write = self._registers.write32
        write(reg.AQA, (depth - 1) << 16 | depth - 1)
        for register, value in ((reg.ASQ, submission), (reg.ACQ, completion)):
            write(register, value & 0xFFFFFFFF)
            write(register + 4, value >> 32)
        control = reg.configuration(self.capabilities, page)
        write(reg.CC, control)
        write(reg.CC, control | reg.CC_EN)
        self._await_status(reg.CSTS_RDY, reg.CSTS_RDY, self.ready_timeout, "enabling (CC.EN = 1)", may_fail=False)

    def shut_down(self, timeout: float) -> None:
        """Announce a normal shutdown and wait until caches are on media (3.6.1). The controller stays enabled.

        Raises:
            VfioTimeoutError: it was not done within ``timeout`` seconds.
        """
        control = self._registers.read32(reg.CC)
        self._registers.write32(reg.CC, control & ~reg.CC_SHN_MASK | reg.CC_SHN_NORMAL)
        self._await_status(
            reg.CSTS_SHST_MASK, reg.CSTS_SHST_DONE, timeout, "a normal shutdown (CC.SHN = 1)", may_fail=False
        )
