"""SET_IRQS as a server takes it: what a message says, checked, and put together where it came in two."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from vfiopy import uapi
from vfiopy.backend import DeviceIo, IrqAction, IrqIndex
from vfiopy.errors import AddressRangeError, VfioError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import close_fds

__all__ = ["ServedIrqs"]

_DATA: Final = {
    uapi.VFIO_IRQ_SET_DATA_NONE,
    uapi.VFIO_IRQ_SET_DATA_BOOL,
    uapi.VFIO_IRQ_SET_DATA_EVENTFD,
}
_LAST: Final = max(IrqIndex)


class ServedIrqs:
    """The interrupts of one served device.

    MSI has up to 32 vectors and cannot grow; a message takes fewer fds. So vectors that go on where a full message
    ended are enabled together with those before them.

    Threads: one at a time.

    Args:
        io: the device.
        most: fds of a full message.
    """

    def __init__(self, io: DeviceIo, most: int) -> None:
        self._io = io
        self._most = most
        self._msi: list[int] = []  # duplicates of what MSI is enabled with; -1 where a vector has none

    def quiet(self, num_irqs: int) -> None:
        """Disable everything: the client that wanted it is gone."""
        for index in range(min(num_irqs, _LAST + 1)):
            with suppress(VfioError):  # EINVAL where it is not enabled
                self._io.set_irqs(index, IrqAction.TRIGGER, 0, 0)
        self._forget_msi()

    def set(self, payload: bytearray, fds: list[int]) -> None:
        """Do SET_IRQS. The fds stay the caller's.

        Raises:
            VfioError: (EINVAL) flags, lengths or vectors that do not fit; and what the device says.
        """
        record = wire.SET_IRQS.unpack(payload)
        wire.check_argsz(record.argsz, wire.SET_IRQS.size)
        data = record.flags & uapi.VFIO_IRQ_SET_DATA_TYPE_MASK
        action = record.flags & uapi.VFIO_IRQ_SET_ACTION_TYPE_MASK
        if data not in _DATA or action not in tuple(IrqAction) or record.flags & ~(data | action):
            raise wire.malformed(f"SET_IRQS with flags {record.flags:#x}")
        bools = bytes(memoryview(payload)[wire.SET_IRQS.size :])
        if len(bools) != (record.vectors if data == uapi.VFIO_IRQ_SET_DATA_BOOL else 0):
            raise wire.malformed(f"SET_IRQS of {record.vectors} vectors brings {len(bools)} bytes")
        if fds and data != uapi.VFIO_IRQ_SET_DATA_EVENTFD:
            raise wire.malformed("SET_IRQS brings fds, and does not say so")
        if record.start + record.vectors > self._io.irq_info(record.irq).count:
            raise AddressRangeError(f"SET_IRQS of vectors {record.start} to {record.start + record.vectors - 1}")
        where = record.irq, IrqAction(action), record.start, record.vectors
        if data == uapi.VFIO_IRQ_SET_DATA_EVENTFD:
            self._assign(record, IrqAction(action), self._eventfds(record, fds))
        elif data == uapi.VFIO_IRQ_SET_DATA_BOOL:
            self._io.set_irqs(*where, bools=[bool(value) for value in bools])
        else:
            self._io.set_irqs(*where)
            if where == (IrqIndex.MSI, IrqAction.TRIGGER, 0, 0):
                self._forget_msi()

    @staticmethod
    def _eventfds(record: wire.SetIrqs, fds: list[int]) -> list[int]:
        """Return one fd for each vector; without any, all are taken away."""
        if not fds:
            return [-1] * record.vectors
        if len(fds) != record.vectors:
            raise wire.malformed(f"SET_IRQS of {record.vectors} vectors brings {len(fds)} eventfds")
        for fd in fds:
            os.set_blocking(fd, False)  # or a client that never reads it stops the device
        return fds

    def _assign(self, record: wire.SetIrqs, action: IrqAction, fds: list[int]) -> None:
        index, start = record.irq, record.start
        before = self._msi if index == IrqIndex.MSI and action == IrqAction.TRIGGER else []
        if before and start == len(before) and not start % self._most and fds:
            self._io.set_irqs(index, IrqAction.TRIGGER, 0, 0)
            try:
                self._io.set_irqs(index, action, 0, start + len(fds), fds=[*before, *fds])
            except BaseException:
                self._io.set_irqs(index, action, 0, start, fds=before)
                raise
        else:
            self._io.set_irqs(index, action, start, len(fds), fds=fds)
        if index == IrqIndex.MSI and action == IrqAction.TRIGGER:
            self._remember_msi(start, fds)

    def _remember_msi(self, start: int, fds: list[int]) -> None:
        self._msi += [-1] * (start + len(fds) - len(self._msi))
        for vector, fd in enumerate(fds, start):
            old, self._msi[vector] = self._msi[vector], os.dup(fd) if fd != -1 else -1
            close_fds([old] if old != -1 else [])

    def _forget_msi(self) -> None:
        close_fds([fd for fd in self._msi if fd != -1])
        self._msi.clear()
