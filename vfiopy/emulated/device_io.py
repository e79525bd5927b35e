"""Reach an emulated device in this process: the seam's ``DeviceIo``, behaving as vfio-pci does."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from functools import cache
from weakref import WeakSet

from vfiopy import uapi
from vfiopy.backend import (
    DeviceInfo,
    Doorbell,
    IrqAction,
    IrqIndex,
    IrqInfo,
    RegionFlag,
    RegionIndex,
    RegionInfo,
    Window,
)
from vfiopy.emulated.bars import Bars, check_range
from vfiopy.emulated.capabilities import MsiX
from vfiopy.emulated.host import EmulatedHost, EmulatedMapper
from vfiopy.emulated.irqs import IrqRequest, IrqTable
from vfiopy.emulated.migration import Migration
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.emulated.virtual_config import VirtualConfig
from vfiopy.errors import AddressRangeError, NotSupportedError, StateError
from vfiopy.file_window import FileWindow
from vfiopy.lives import Resource
from vfiopy.pci.memory_watch import MemoryWatch
from vfiopy.signals import Cause, MemorySignals

__all__ = ["EmulatedDeviceIo"]

_BAR_WINDOW_TOP = 0xFEBF_0000  # where firmware of a PC puts 32-bit BARs, downwards
_ALIGNED = frozenset((8, 4, 2, 1))
_MIGRATION = (uapi.VFIO_DEVICE_FEATURE_MIGRATION, uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE)
_LOGGING = (
    uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
    uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
    uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
)
_users: WeakSet[EmulatedDeviceIo] = WeakSet()


class EmulatedDeviceIo(Resource):
    """A device that is a Python object, opened.

    Opening leaves it as vfio-pci does: BARs placed, memory decode on, bus mastering off, INTx not disabled. Closing is
    a power cycle.

    Threads: any method from any thread; the device's lock serialises.

    Raises:
        BusyError: the device is open already.
    """

    _rank = 20

    def __init__(self, device: PciDevice, mapper: EmulatedMapper) -> None:
        super().__init__(f"emulated:{device.name}")
        self._open = self._usable = False  # until the device is ours
        self.device = device
        self.signals = MemorySignals(self._label)
        self._watch = MemoryWatch(self.signals)
        self._irqs = IrqTable(device, self._label)
        self._windows: list[FileWindow] = []
        self._bars = Bars(device, self._label)
        self._registers = self._bars.registers
        host = EmulatedHost(device, mapper, self._irqs)
        self._log = host.log
        self._migration = Migration(device)
        device.plug(host)
        try:
            self._power_up()
        except BaseException:
            self._release()
            raise

    def _power_up(self) -> None:
        device = self.device
        with device.lock:
            device.config.place_bars(device.bars, _BAR_WINDOW_TOP)
            device.config.enable(memory=True, bus_master=False, intx=True)
            self._config = VirtualConfig(device.config, self._irqs)
            device.config.on_change = _follow(device, self._irqs, self._windows)
            device.config.on_function_reset = _reset(device, self._migration)
        _watch_forks()
        _users.add(self)
        self._open = self._usable = True

    def _release(self) -> None:
        if any(self._windows):
            raise StateError(f"{self.name} cannot be closed while parts of its BARs are mapped")
        self._usable = False
        with self.signals.taking(Cause.CLOSED):
            self._irqs.close()
            self.device.config.on_change = lambda: None
            self.device.config.on_function_reset = self.device.function_reset
            self.device.unplug()

    def _leftover(self) -> Callable[[], None]:
        return self.abandon

    def abandon(self) -> None:
        """Close, windows and all."""
        for window in self._windows:
            window.close()
        self.close()

    @property
    def name(self) -> str:
        """``emulated:`` and the device's name."""
        return self._label

    @property
    def backend(self) -> str:
        """``"emulated"``."""
        return "emulated"

    # --- what it is ----------------------------------------------------------------------------------------------

    def info(self) -> DeviceInfo:
        """Describe the device."""
        self.check_open()
        return DeviceInfo(
            num_regions=RegionIndex.VGA + 1,
            num_irqs=IrqIndex.REQ + 1,
            can_reset=self.device.has_function_reset,
        )

    def region_info(self, index: int) -> RegionInfo:
        """Describe a region; size 0 where it does not exist."""
        self.check_open()
        if not 0 <= index <= RegionIndex.VGA:
            raise AddressRangeError(f"there is no region {index}", object=self.name, call="VFIO_DEVICE_GET_REGION_INFO")
        both = RegionFlag.READ | RegionFlag.WRITE
        if index == RegionIndex.CONFIG:
            return RegionInfo(index, self.device.config.size, both)
        bar = self.device.bars.get(index)
        if bar is None:
            return RegionInfo(index, 0, RegionFlag(0))
        table = self.device.config.find(MsiX)
        return RegionInfo(
            index,
            bar.size,
            both | RegionFlag.MMAP if bar.shared else both,
            sparse=bar.areas,
            msix_mappable=bar.shared and table is not None and table[0].table_bar == index,
        )

    def irq_info(self, index: int) -> IrqInfo:
        """Describe an interrupt index; count 0 where it has no vector."""
        self.check_open()
        return self._irqs.info(index)

    # --- registers -----------------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Read bytes; what is not an aligned access becomes the widest aligned ones that fit.

        Raises:
            AddressRangeError: outside of the region.
            DeviceGoneError: memory decode is off, or the function is in D3hot.
        """
        # The way of nearly all calls, flat because each level costs as much as a register's own code.
        limit = self._registers.get(index)
        if (
            limit is not None
            and self._usable
            and size in _ALIGNED
            and 0 <= offset <= limit - size
            and not offset & size - 1
            and self.device.config.memory_enabled
        ):
            return self.device.handle_read(index, offset, size).to_bytes(size, "little")
        return self._read_carefully(index, offset, size)

    def _read_carefully(self, index: int, offset: int, size: int) -> bytes:
        self.check_open()
        if index == RegionIndex.CONFIG:
            check_range(self.name, index, self.device.config.size, offset, size)
            return self._read_config(offset, size)
        return self._bars.read(index, offset, size)

    def _read_config(self, offset: int, size: int) -> bytes:
        with self.device.lock:
            return self._config.read(offset, size)

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write bytes; what is not an aligned access becomes the widest aligned ones that fit.

        Raises:
            AddressRangeError: outside of the region.
            DeviceGoneError: memory decode is off, or the function is in D3hot.
        """
        size = len(data)
        limit = self._registers.get(index)
        if (
            limit is not None
            and self._usable
            and size in _ALIGNED
            and 0 <= offset <= limit - size
            and not offset & size - 1
            and self.device.config.memory_enabled
        ):
            self.device.handle_write(index, offset, size, int.from_bytes(data, "little"))
        else:
            self._write_carefully(index, offset, data)

    def _write_carefully(self, index: int, offset: int, data: bytes) -> None:
        self.check_open()
        if index == RegionIndex.CONFIG:
            check_range(self.name, index, self.device.config.size, offset, len(data))
            with self._watch.writing(offset, data, self._read_config), self.device.lock:
                self._config.write(offset, data)
            return
        self._bars.write(index, offset, data)

    def map_region(self, index: int, offset: int, size: int) -> Window:
        """Map a part of a BAR that is shared memory. With memory decode off, touching it is a SIGBUS.

        Raises:
            NotSupportedError: the region, or this part of it, has handlers: there is nothing to map.
            AddressRangeError: outside of the region.
            AlignmentError: not whole pages.
        """
        self.check_open()
        memory = self._bars.area(index, offset, size)
        window = FileWindow(memory.fd, offset, size, owner=memory)
        with self.device.lock:
            self._windows[:] = [old for old in self._windows if old] + [window]
            window.show(self.device.config.memory_enabled)
        return window

    def region_file(self, index: int) -> tuple[int, int]:
        """Return the fd behind a BAR of shared memory, and where in it: see :class:`vfiopy.backend.FileRegions`.

        Raises:
            NotSupportedError: the region has handlers.
        """
        self.check_open()
        return self._bars.memory(index).fd, 0

    def doorbells(self, index: int) -> Sequence[Doorbell]:
        """Return the doorbells that the device declares in a region: see :class:`vfiopy.backend.DoorbellIo`."""
        self.check_open()
        return self.device.doorbells.get(index, ())

    # --- the rest ------------------------------------------------------------------------------------------------

    def set_irqs(
        self,
        index: int,
        action: IrqAction,
        start: int,
        count: int,
        *,
        fds: Sequence[int] | None = None,
        bools: Sequence[bool] | None = None,
    ) -> None:
        """VFIO_DEVICE_SET_IRQS: see :meth:`IrqTable.set`."""
        self.check_open()
        self._irqs.set(IrqRequest(index, action, start, count, fds, bools))

    def reset(self) -> None:
        """Reset the function; configuration space stays, as the kernel saves and restores it.

        Raises:
            NotSupportedError: (EINVAL) it has no function reset.
        """
        self.check_open()
        if not self.device.has_function_reset:
            raise NotSupportedError(
                "the device has no function reset",
                errno=errno.EINVAL,
                object=self.name,
                call="VFIO_DEVICE_RESET",
                hint="closing and opening an emulated device is a power cycle",
            )
        with self.signals.taking(Cause.RESET):
            _reset(self.device, self._migration)()

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        """VFIO_DEVICE_FEATURE: migration, where the device can save itself, and the log of what its DMA writes.

        Raises:
            NotSupportedError: (ENOTTY) the device does not have it.
            VfioError: (EINVAL, EBUSY) what :class:`Migration` and :class:`DirtyLog` say.
        """
        self.check_open()
        if number in _MIGRATION:
            return self._migration.feature(number, operation, data)
        if number in _LOGGING:
            return self._log.feature(number, operation, data)
        raise NotSupportedError(
            f"the device does not have feature {number}",
            errno=errno.ENOTTY,
            object=self.name,
            call="VFIO_DEVICE_FEATURE",
        )

    def migration_read(self, size: int) -> bytes:
        """Return the next bytes of the device's state: see :class:`vfiopy.backend.MigrationStream`."""
        self.check_open()
        return self._migration.read(size)

    def migration_write(self, data: bytes) -> None:
        """Take the next bytes of a device's state: see :class:`vfiopy.backend.MigrationStream`."""
        self.check_open()
        self._migration.write(data)


def _reset(device: PciDevice, migration: Migration) -> Callable[[], None]:
    """Return what resets the function; it knows nothing of the DeviceIo, as :func:`_follow`."""

    def reset() -> None:
        device.function_reset()
        migration.reset()

    return reset


@cache
def _watch_forks() -> None:
    """Have forked children find their parent's devices unusable: cheaper than a getpid() with each access."""
    os.register_at_fork(after_in_child=_after_fork)


def _after_fork() -> None:
    for io in _users:
        io._usable = False


def _follow(device: PciDevice, irqs: IrqTable, windows: list[FileWindow]) -> Callable[[], None]:
    """Return what follows a change of configuration space.

    It knows nothing of the DeviceIo: the device's thread must not keep alive what its user has dropped.
    """

    def config_changed() -> None:
        irqs.config_changed()
        for window in windows:
            window.show(device.config.memory_enabled)

    return config_changed
