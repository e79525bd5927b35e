"""The kernel's side of the seam: a device fd, from a group or a cdev, as a DeviceIo."""

from __future__ import annotations

import mmap
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from vfiopy import uapi
from vfiopy.backend import DeviceInfo, IrqAction, IrqFlag, IrqInfo, RegionFlag, RegionInfo, region_name
from vfiopy.errors import (
    AddressRangeError,
    BusyError,
    DeviceGoneError,
    NotSupportedError,
    StateError,
    VfioError,
)
from vfiopy.kernel.group import Group
from vfiopy.kernel.ioctl import DeviceFd
from vfiopy.kernel.ioctl._call import os_calls
from vfiopy.kernel.memory_watch import KernelMemoryWatch
from vfiopy.lives import Resource, drain_finalizers
from vfiopy.signals import MemorySignals

__all__ = ["KernelDeviceIo", "KernelWindow"]

_RESET_PATIENCE = 2.0  # seconds; the kernel says EAGAIN while another thread is in the device
_RESET_PAUSE = 0.01
_DMA_BUF_GET = uapi.VFIO_DEVICE_FEATURE_DMA_BUF, uapi.VFIO_DEVICE_FEATURE_GET


class KernelWindow(Resource):
    """A part of a region that is mapped into this process; see :class:`vfiopy.backend.Window`."""

    _rank = 25

    def __init__(self, io: KernelDeviceIo, address: int, size: int, label: str) -> None:
        """Take over a mapping."""
        self._io = io  # the device stays open for as long as a part of it is mapped
        self._address = address
        self._size = size
        super().__init__(label)

    @property
    def address(self) -> int:
        """Virtual address of the first byte."""
        self.check_open()
        return self._address

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self._size

    def _release(self) -> None:
        self._io._unmap(self._address)


class KernelDeviceIo(Resource):
    """A VFIO device. ``.calls`` is the typed fd below, with every ioctl.

    Threads: may be shared; ``close()`` must be the last call.

    Attributes:
        calls: the device fd.
        group: the VFIO group that it was opened through, or None.
        iommufd_id: its id in the iommufd that it is bound to, or None.
        signals: tells those who imported its memory when that goes away; also by calls through ``.calls``.
    """

    _rank = 20

    def __init__(
        self,
        calls: DeviceFd,
        backend: str,
        *,
        on_close: Callable[[KernelDeviceIo], None] | None = None,
        group: Group | None = None,
        iommufd_id: int | None = None,
    ) -> None:
        """Take over an open device.

        Args:
            calls: the device fd.
            backend: how it was opened.
            on_close: called after the fd is closed, so that the mapper can let go of the group.
            group: the group that it was opened through.
            iommufd_id: from VFIO_DEVICE_BIND_IOMMUFD.
        """
        self.calls = calls
        self.group = group
        self.iommufd_id = iommufd_id
        self._backend = backend
        self._on_close = on_close
        self._info: DeviceInfo | None = None
        self._regions: dict[int, RegionInfo] = {}
        self._irqs: dict[int, IrqInfo] = {}
        self._windows: dict[int, tuple[int, str]] = {}
        super().__init__(calls.label)
        self.signals = MemorySignals.opened(calls.label)
        calls.watch = KernelMemoryWatch(self.signals)

    @property
    def name(self) -> str:
        """The PCI address."""
        return self._label

    @property
    def backend(self) -> str:
        """How it was opened: ``"iommufd"``, ``"type1v2"``, ..."""
        return self._backend

    def fileno(self) -> int:
        """The device fd; still owned by this object. For handing it to another process with SCM_RIGHTS."""
        return self.calls.fileno()

    # --- what it is -----------------------------------------------------------------------------------------

    def info(self) -> DeviceInfo:
        """Describe the device; asked once, because it never changes while the device is open."""
        self.check_open()
        if self._info is None:
            self._info = self.calls.get_info()
        return self._info

    def region_info(self, index: int) -> RegionInfo:
        """Describe a region; asked once. Size 0 where the device has none of this index."""
        self.check_open()
        found = self._regions.get(index)
        if found is None:
            try:
                found = self.calls.get_region_info(index)
            except AddressRangeError:
                # vfio-pci refuses VGA on what is not VGA; an absent BAR has size 0. Absent is absent.
                if not 0 <= index < self.info().num_regions:
                    raise
                found = RegionInfo(index, 0, RegionFlag(0))
            self._regions[index] = found
        return found

    def irq_info(self, index: int) -> IrqInfo:
        """Describe an interrupt index; asked once. Count 0 where the device has none of this kind."""
        self.check_open()
        found = self._irqs.get(index)
        if found is None:
            try:
                found = self.calls.get_irq_info(index)
            except AddressRangeError:
                if not 0 <= index < self.info().num_irqs:
                    raise
                found = IrqInfo(index, 0, IrqFlag(0))
            self._irqs[index] = found
        return found

    # --- regions --------------------------------------------------------------------------------------------

    def _span(self, index: int, offset: int, size: int) -> tuple[RegionInfo, str]:
        info = self.region_info(index)
        detail = f"{region_name(index)}, offset {offset:#x}, {size} bytes"
        if not info.size:
            raise AddressRangeError(f"the device has no {region_name(index)}", object=self._label)
        if offset < 0 or size < 0 or offset + size > info.size:
            raise AddressRangeError(
                f"{detail}: outside of its {info.size:#x} bytes", object=self._label, call="region access"
            )
        return info, detail

    def read(self, index: int, offset: int, size: int) -> bytes:
        """Read bytes from a region through the kernel.

        An aligned read of 1, 2, 4 or 8 bytes is one access of that width; older kernels make two of 8.

        Raises:
            AddressRangeError: outside of the region.
            DeviceGoneError: memory decode is off, or the device is gone.
        """
        info, detail = self._span(index, offset, size)
        data = self.calls.pread(info.offset + offset, size, detail)
        while len(data) < size:
            more = self.calls.pread(info.offset + offset + len(data), size - len(data), detail)
            if not more:
                raise self._short(detail, len(data))
            data += more
        return data

    def write(self, index: int, offset: int, data: bytes) -> None:
        """Write bytes to a region through the kernel; widths and errors as :meth:`read`."""
        info, detail = self._span(index, offset, len(data))
        done = self.calls.pwrite(info.offset + offset, data, detail)
        while done < len(data):
            more = self.calls.pwrite(info.offset + offset + done, data[done:], detail)
            if not more:
                raise self._short(detail, done)
            done += more

    def _short(self, detail: str, done: int) -> DeviceGoneError:
        return DeviceGoneError(
            f"the kernel stopped after {done} bytes ({detail})",
            object=self._label,
            hint="see the kernel's log",
        )

    def map_region(self, index: int, offset: int, size: int) -> KernelWindow:
        """Map a part of a region into this process.

        The address is congruent to the offset modulo a large power of two, so that the kernel can use huge
        pages.

        Raises:
            NotSupportedError: the region, or this part of it, cannot be mapped.
        """
        if self.region_info(index).size and RegionFlag.MMAP not in self.region_info(index).flags:
            raise NotSupportedError(
                f"{region_name(index)} cannot be mapped (I/O ports, or less than a page)",
                object=self._label,
                hint="use read() and write()",
            )
        info, detail = self._span(index, offset, size)
        if info.sparse is not None and not any(
            area.offset <= offset and offset + size <= area.offset + area.size for area in info.sparse
        ):
            raise NotSupportedError(
                f"only parts of {region_name(index)} can be mapped, and not this one ({detail})",
                object=self._label,
                hint="region_info().sparse lists them; use read() and write() for the rest",
            )
        protection = mmap.PROT_READ if RegionFlag.READ in info.flags else 0
        if RegionFlag.WRITE in info.flags:
            protection |= mmap.PROT_WRITE
        address = self.calls.map(info.offset + offset, size, protection, 0, detail)
        label = f"{self._label} {detail}"
        self._windows[address] = size, label
        try:
            return KernelWindow(self, address, size, label)
        except BaseException:
            self._unmap(address)
            raise

    def _unmap(self, address: int) -> None:
        size, _ = self._windows.pop(address, (0, ""))
        if size:
            os_calls().munmap(address, size)

    # --- interrupts, reset, features ------------------------------------------------------------------------

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
        """VFIO_DEVICE_SET_IRQS; see :meth:`vfiopy.kernel.ioctl.DeviceFd.set_irqs`.

        Raises:
            AddressRangeError: no such index or vector.
            IrqCountError: the system has fewer vectors; ``.available`` says how many.
        """
        self.calls.set_irqs(index, action, start, count, fds=fds, bools=bools)

    def reset(self) -> None:
        """Reset the function; waits a little while others are in the device.

        Raises:
            NotSupportedError: it has no function reset.
            BusyError: somebody stays in it.
        """
        deadline = time.monotonic() + _RESET_PATIENCE
        while True:
            try:
                return self.calls.reset()
            except BusyError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_RESET_PAUSE)

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        """VFIO_DEVICE_FEATURE; returns the payload as the kernel left it.

        DMA_BUF with GET is the one feature whose answer is an fd: that is returned instead, as a native
        32-bit integer, and belongs to the caller. ``calls.dma_buf()`` is the typed way.
        """
        result, payload = self.calls.feature(number, operation, data)
        if (number, operation) == _DMA_BUF_GET:
            return result.to_bytes(4, sys.byteorder, signed=True)
        return payload

    # --- end ------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        drain_finalizers()
        if self._windows:
            # The kernel keeps the group in its container for as long as a part of the device is mapped.
            labels = "; ".join(label for _, label in self._windows.values())
            raise StateError(f"{self._label} cannot be closed while parts of it are mapped: {labels}")
        if self.iommufd_id is not None and self.calls:
            # Another process may share the open file (SCM_RIGHTS); then close() alone would not detach.
            with suppress(VfioError):
                self.calls.detach_iommufd_pt()
        self.calls.close()
        if self._on_close is not None:
            self._on_close(self)

    def _leftover(self) -> Callable[[], None]:
        return self.abandon

    def abandon(self) -> None:
        """Close, windows and all: a window that somebody could still reach would keep this object alive."""
        for address in list(self._windows):
            self._unmap(address)
        self.close()
