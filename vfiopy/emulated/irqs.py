"""VFIO's interrupt model (VFIO_DEVICE_GET_IRQ_INFO, VFIO_DEVICE_SET_IRQS) for an emulated device.

It behaves as vfio-pci does, errors included: one of INTx, MSI and MSI-X at a time; INTx masks itself when it fires and
fires again at unmask while the line is still asserted; vectors signal eventfds.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vfiopy.backend import IrqAction, IrqFlag, IrqIndex, IrqInfo
from vfiopy.emulated.capabilities import Msi, MsiX
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import AddressRangeError, NotSupportedError, VfioError

__all__ = ["IrqRequest", "IrqTable"]

_CALL = "VFIO_DEVICE_SET_IRQS"
_MESSAGES: dict[int, type[Msi] | type[MsiX]] = {IrqIndex.MSI: Msi, IrqIndex.MSIX: MsiX}
_OWN = (IrqIndex.ERR, IrqIndex.REQ)  # VFIO's own signals: independent of the other three


@dataclass(frozen=True, slots=True)
class IrqRequest:
    """The arguments of VFIO_DEVICE_SET_IRQS; neither ``fds`` nor ``bools`` is DATA_NONE."""

    index: int
    action: IrqAction
    start: int
    count: int
    fds: Sequence[int] | None = None
    bools: Sequence[bool] | None = None

    @property
    def has_data(self) -> bool:
        """DATA_EVENTFD or DATA_BOOL."""
        return self.fds is not None or self.bools is not None

    def wants(self, position: int) -> bool:
        """Whether the vector at a position is meant: always with DATA_NONE, else as its bool says."""
        return self.bools is None or self.bools[position]


class IrqTable:
    """Which interrupts of one device are enabled, and what they signal.

    Eventfds are duplicated: the caller may close its own.

    Threads: everything happens under the device's lock.
    """

    def __init__(self, device: PciDevice, name: str) -> None:
        self._device = device
        self._name = name
        self._active: IrqIndex | None = None
        self._fds: dict[int, int] = {}  # vector → eventfd, of the active index
        self._allocated = 0
        self._own_fds: dict[int, int] = {}
        self._asserted = False
        self._masked = False

    # --- VFIO_DEVICE_GET_IRQ_INFO --------------------------------------------------------------------------------

    def info(self, index: int) -> IrqInfo:
        """Describe an interrupt index."""
        if index not in tuple(IrqIndex):
            raise AddressRangeError(
                f"there is no interrupt index {index}", object=self._name, call="VFIO_DEVICE_GET_IRQ_INFO"
            )
        count = self._count(IrqIndex(index))
        flags = IrqFlag.EVENTFD
        if index == IrqIndex.INTX:
            flags |= IrqFlag.MASKABLE | IrqFlag.AUTOMASKED
        elif index != IrqIndex.MSIX or not count:
            flags |= IrqFlag.NORESIZE
        return IrqInfo(index, count, flags)

    def _count(self, index: IrqIndex) -> int:
        config = self._device.config
        if index == IrqIndex.INTX:
            return int(config.interrupt_pin != 0)
        if index in _MESSAGES:
            found = config.find(_MESSAGES[index])
            return found[0].vectors if found else 0
        return 1

    # --- VFIO_DEVICE_SET_IRQS ------------------------------------------------------------------------------------

    def set(self, request: IrqRequest) -> None:
        """Do what the ioctl does: see :meth:`vfiopy.backend.DeviceIo.set_irqs`.

        Raises:
            AddressRangeError: (EINVAL) no such index, or vectors out of range.
            NotSupportedError: (ENOTTY) this kind cannot be masked.
            VfioError: (EINVAL) another kind is enabled, this one is not, or data that do not fit; (EBADF) a bad fd.
        """
        with self._device.lock:
            self._check(request)
            kind = IrqIndex(request.index)
            if request.action != IrqAction.TRIGGER:
                self._mask(kind, request)
            elif kind in _OWN:
                self._trigger_own(kind, request)
            elif not request.count and not request.has_data and self._active == kind:
                self._disable()
            elif self._active not in (None, kind):
                active = self._active.name if self._active else ""
                raise self._invalid(f"{active} is enabled, and a function uses one kind at a time", "disable it first")
            elif request.fds is not None:
                self._assign(kind, request.start, request.fds)
            elif self._active != kind:
                raise self._invalid(f"{kind.name} is not enabled", "enable it with eventfds first")
            else:
                self._fire(kind, request)

    def _check(self, request: IrqRequest) -> None:
        index, start, count = request.index, request.start, request.count
        available = self.info(index).count
        if start < 0 or count < 0 or start >= available or start + count > available:
            raise AddressRangeError(
                f"vectors {start} to {start + count - 1} are asked for, {IrqIndex(index).name} has {available}",
                object=self._name,
                call=_CALL,
            )
        if request.action not in (IrqAction.MASK, IrqAction.UNMASK, IrqAction.TRIGGER):
            raise self._invalid(f"{request.action!r} is not one action")
        if request.fds is not None and request.bools is not None:
            raise self._invalid("eventfds and bools cannot both be given")
        for data in (request.fds, request.bools):
            if data is not None and len(data) != count:
                raise self._invalid(f"{len(data)} values are given for {count} vectors")

    def _invalid(self, meaning: str, hint: str = "") -> VfioError:
        return VfioError(meaning, errno=errno.EINVAL, object=self._name, call=_CALL, hint=hint)

    def _mask(self, kind: IrqIndex, request: IrqRequest) -> None:
        if kind != IrqIndex.INTX:
            raise NotSupportedError(
                f"{kind.name} cannot be masked through VFIO",
                errno=errno.ENOTTY,
                object=self._name,
                call=_CALL,
                hint="use the device's own mask register",
            )
        if self._active != IrqIndex.INTX or request.start or request.count != 1:
            raise self._invalid("INTX is not enabled, or not vector 0 alone was named")
        if request.fds is not None:
            raise NotSupportedError(
                "an eventfd cannot mask or unmask INTx here",
                errno=errno.ENOTTY,
                object=self._name,
                call=_CALL,
            )
        if request.wants(0):
            self._masked = request.action == IrqAction.MASK
            self._update_line()

    def _trigger_own(self, kind: IrqIndex, request: IrqRequest) -> None:
        current = self._own_fds.get(kind)
        if request.has_data and not request.count:
            raise self._invalid("no value is given", "count 0 without any disables the index")
        if request.fds is not None:
            self._assign_own(kind, request.fds[0])
        elif current is None:
            if not request.has_data:
                raise self._invalid(f"{kind.name} is not enabled", "enable it with an eventfd first")
        elif not request.count:
            self._drop_own(kind)
        elif request.wants(0):
            _notify(current)

    def _assign_own(self, kind: IrqIndex, fd: int) -> None:
        (new,) = self._duplicate([fd])
        self._drop_own(kind)
        if new != -1:
            self._own_fds[kind] = new

    def _drop_own(self, kind: IrqIndex) -> None:
        old = self._own_fds.pop(kind, None)
        if old is not None:
            os.close(old)

    def _assign(self, kind: IrqIndex, start: int, fds: Sequence[int]) -> None:
        if not fds:
            if kind in _MESSAGES and self._active == kind:
                return
            raise VfioError(
                "no eventfd is given",
                errno=errno.ERANGE if kind in _MESSAGES else errno.EINVAL,
                object=self._name,
                call=_CALL,
                hint="count 0 without eventfds disables the whole index",
            )
        if self._active == IrqIndex.MSI and start + len(fds) > self._allocated:
            raise self._invalid(
                f"{self._allocated} vectors of MSI are enabled, and MSI cannot grow (VFIO_IRQ_INFO_NORESIZE)",
                "disable it and enable as many as you need",
            )
        for vector, fd in enumerate(self._duplicate(fds), start):
            old = self._fds.pop(vector, None)
            if old is not None:
                os.close(old)
            if fd != -1:
                self._fds[vector] = fd
        if self._active is None:
            self._active, self._masked = kind, False
        self._allocated = max(self._allocated, start + len(fds))
        if kind in _MESSAGES:
            # A function that sends messages does not drive its pin (PCI Express Base 6.0, 6.1.4).
            self._device.deassert()
            self._device.config.enable_messages(_MESSAGES[kind], self._allocated)
        self._update_line()

    def _duplicate(self, fds: Sequence[int]) -> list[int]:
        """Duplicate all eventfds or none; -1 stays."""
        for fd in fds:  # before the first is duplicated: that might get the number of one that is closed
            self._check_fd(fd)
        new: list[int] = []
        with ExitStack() as stack:
            for fd in fds:
                new.append(fd if fd == -1 else os.dup(fd))
                if fd != -1:
                    stack.callback(os.close, new[-1])
            stack.pop_all()
        return new

    def _check_fd(self, fd: int) -> None:
        """Refuse what is neither an eventfd nor -1."""
        if fd == -1:
            return
        try:
            kind = str(Path(f"/proc/self/fd/{fd}").readlink())
        except OSError:
            raise VfioError(f"fd {fd} is not open", errno=errno.EBADF, object=self._name, call=_CALL) from None
        if kind != "anon_inode:[eventfd]":
            raise self._invalid(f"fd {fd} is {kind}, not an eventfd", "make one with os.eventfd()")

    def _fire(self, kind: IrqIndex, request: IrqRequest) -> None:
        """Software trigger: signals as the device would, but leaves INTx's mask alone."""
        if kind == IrqIndex.INTX and (request.start or request.count != 1):
            raise self._invalid("INTX has vector 0 alone")
        for position in range(request.count):
            if request.wants(position):
                self._signal(request.start + position)

    def _disable(self) -> None:
        kind, self._active = self._active, None
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()
        self._allocated = 0
        self._masked = False
        if kind in _MESSAGES:
            self._device.config.enable_messages(_MESSAGES[kind], 0)

    # --- from the device -----------------------------------------------------------------------------------------

    @property
    def msi_field(self) -> int:
        """The largest value of Multiple Message Enable: the logarithm of the vectors that MSI is enabled with."""
        return (self._allocated - 1).bit_length() if self._active == IrqIndex.MSI else 0

    @property
    def active(self) -> IrqIndex | None:
        """Which of INTx, MSI and MSI-X is enabled."""
        return self._active

    def trigger(self, index: IrqIndex, vector: int) -> None:
        """Take an interrupt from the device: a message, or INTx asserted."""
        with self._device.lock:
            if index == IrqIndex.INTX:
                self._asserted = True
                self._update_line()
            elif index == self._active:
                self._signal(vector)

    def deassert(self) -> None:
        """Take INTx back."""
        with self._device.lock:
            self._asserted = False

    def config_changed(self) -> None:
        """Look again whether INTx may pass: its disable bit may have changed."""
        with self._device.lock:
            self._update_line()

    def _update_line(self) -> None:
        if (
            self._active == IrqIndex.INTX
            and self._asserted
            and not self._masked
            and not self._device.config.intx_disabled
        ):
            self._masked = True
            self._signal(0)

    def _signal(self, vector: int) -> None:
        fd = self._fds.get(vector)
        if fd is not None:
            _notify(fd)

    def close(self) -> None:
        """Disable everything. Idempotent."""
        with self._device.lock:
            if self._active is not None:
                self._disable()
            for kind in _OWN:
                self._drop_own(kind)


def _notify(fd: int) -> None:
    room = select.poll()  # whether the fd blocks is also up to who gave it
    room.register(fd, select.POLLOUT)
    if room.poll(0):  # else its count is at its highest: nobody can miss it
        with suppress(BlockingIOError):
            os.eventfd_write(fd, 1)
