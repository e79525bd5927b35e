"""The watch over a device fd: what takes the memory of its BARs away is told to the hub."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Final

from vfiopy import uapi
from vfiopy.backend import RegionIndex
from vfiopy.errors import PciAddressError, VfioError
from vfiopy.kernel.ioctl.watch import WatchedFd
from vfiopy.pci import Function
from vfiopy.pci.memory_watch import MemoryWatch
from vfiopy.signals import Cause, MemorySignals, taking

__all__ = ["KernelMemoryWatch"]

_LOW_POWER: Final = (
    uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY,
    uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP,
)
# Before these the kernel has not touched anything (drivers/vfio/pci/vfio_pci_core.c).
_RESET_UNTOUCHED: Final = (errno.EINVAL,)
_HOT_RESET_UNTOUCHED: Final = (errno.ENODEV, errno.E2BIG, errno.EPERM)
# Of several functions it takes one after the other, and may find the next one busy or not the caller's.
_HOT_RESET_OF_ONE_UNTOUCHED: Final = (*_HOT_RESET_UNTOUCHED, errno.EINVAL, errno.EBUSY)
_LOW_POWER_UNTOUCHED: Final = (errno.EINVAL, errno.ENOTTY)


class KernelMemoryWatch:
    """Implements :class:`vfiopy.kernel.ioctl.watch.DeviceWatch`.

    Closing the fd takes the memory away only if nobody else has the same open file (a launcher that passed it on).
    That cannot be seen from here: closing counts as the end.
    """

    def __init__(self, signals: MemorySignals) -> None:
        self.signals = signals
        self._config_space = MemoryWatch(signals, lambda: _is_virtual(signals.name))
        self._config: range | None = None

    def writing(self, fd: WatchedFd, offset: int, data: bytes) -> AbstractContextManager[object]:
        """Only writes to configuration space matter."""
        config = self._config
        if config is None:
            config = self._config = _config_of(fd)
        if offset not in config:
            return nullcontext()

        def read(at: int, size: int) -> bytes:
            return fd.pread(config.start + at, size)

        return self._config_space.writing(offset - config.start, data, read)

    def resetting(self) -> AbstractContextManager[object]:
        """A function reset."""
        return self.signals.taking(Cause.RESET, _RESET_UNTOUCHED)

    def hot_resetting(self, fd: WatchedFd) -> AbstractContextManager[object]:
        """A reset of the bus: all devices on it that this process has open."""
        along = fd.reset_along()
        siblings = [found for name in along if (found := MemorySignals.known(name)) is not None]
        everyone = {id(one): (one, Cause.HOT_RESET) for one in (self.signals, *siblings)}
        return taking(everyone.values(), _HOT_RESET_UNTOUCHED if len(along) > 1 else _HOT_RESET_OF_ONE_UNTOUCHED)

    def using_feature(self, number: int, operation: int) -> AbstractContextManager[object]:
        """Low power."""
        if operation != uapi.VFIO_DEVICE_FEATURE_SET:
            return nullcontext()
        if number in _LOW_POWER:
            return self.signals.taking(Cause.LOW_POWER, _LOW_POWER_UNTOUCHED)
        return self._leaving_low_power() if number == uapi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT else nullcontext()

    @contextmanager
    def _leaving_low_power(self) -> Iterator[None]:
        with self.signals.lock:  # another thread may enter it again right after
            yield
            self.signals.returned(Cause.LOW_POWER)

    def closing(self) -> AbstractContextManager[object]:
        """The end."""
        return self.signals.closing()


def _is_virtual(name: str) -> bool:
    with suppress(PciAddressError):
        return Function(name).physfn is not None
    return False  # not on the PCI bus: a mediated device


def _config_of(fd: WatchedFd) -> range:
    try:
        info = fd.get_region_info(RegionIndex.CONFIG)
    except VfioError:
        return range(0)
    return range(info.offset, info.offset + info.size)
