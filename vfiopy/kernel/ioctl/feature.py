"""VFIO_DEVICE_FEATURE: one typed method per feature. Source: linux/vfio.h, VFIO_DEVICE_FEATURE_*."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import Final, TypeVar
from uuid import UUID

from vfiopy import uapi
from vfiopy.backend import Area
from vfiopy.errors import NotSupportedError, VfioError
from vfiopy.kernel.ioctl._call import address_of, dirty_bitmap
from vfiopy.kernel.ioctl._fd import Fd
from vfiopy.kernel.ioctl.dmabuf import DmaBufFd
from vfiopy.kernel.ioctl.migration import MigrationFd
from vfiopy.kernel.ioctl.watch import UNWATCHED, DeviceWatch
from vfiopy.layout import Layout

__all__ = ["FEATURE_NAMES", "FeatureCalls", "MigrationFlag", "MigrationState"]


class MigrationFlag(IntFlag):
    """VFIO_MIGRATION_*: which arcs of the state machine a device has."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


class MigrationState(IntEnum):
    """VFIO_DEVICE_STATE_*."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


FEATURE_NAMES: Final = {
    uapi.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN: "PCI_VF_TOKEN",
    uapi.VFIO_DEVICE_FEATURE_MIGRATION: "MIGRATION",
    uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE: "MIG_DEVICE_STATE",
    uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY: "LOW_POWER_ENTRY",
    uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP: "LOW_POWER_ENTRY_WITH_WAKEUP",
    uapi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT: "LOW_POWER_EXIT",
    uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START: "DMA_LOGGING_START",
    uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP: "DMA_LOGGING_STOP",
    uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT: "DMA_LOGGING_REPORT",
    uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE: "MIG_DATA_SIZE",
    uapi.VFIO_DEVICE_FEATURE_BUS_MASTER: "BUS_MASTER",
    uapi.VFIO_DEVICE_FEATURE_DMA_BUF: "DMA_BUF",
    uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: "MIG_PRECOPY_INFOv2",
}
"""Names for messages; a number that is not here is shown as a number."""

_GET: Final = uapi.VFIO_DEVICE_FEATURE_GET
_SET: Final = uapi.VFIO_DEVICE_FEATURE_SET
_PROBE: Final = uapi.VFIO_DEVICE_FEATURE_PROBE
_UNSUPPORTED: Final = (NotSupportedError,)


_Owner = TypeVar("_Owner", bound=Fd)
_HEADER = uapi.vfio_device_feature.size


def _feature_call(number: int, operation: int, data: bytes) -> tuple[str, bytearray, str]:
    """What messages call a VFIO_DEVICE_FEATURE, its argument, and what it is about."""
    layout = uapi.vfio_device_feature
    argument = layout.new(len(data), argsz=layout.size + len(data), flags=number | operation)
    argument[layout.size :] = data
    name = FEATURE_NAMES.get(number, str(number))
    what = {_GET: "get", _SET: "set"}.get(operation, "probe")
    call = f"VFIO_DEVICE_FEATURE_{name}" if number in FEATURE_NAMES else "VFIO_DEVICE_FEATURE"
    return call, argument, f"{what} feature {number}"


class FeatureCalls(Fd):
    """The part of a device fd that answers VFIO_DEVICE_FEATURE.

    Attributes:
        watch: who is to know of calls that take the device's memory away.
    """

    watch: DeviceWatch = UNWATCHED

    def feature(self, number: int, operation: int, data: bytes = b"") -> tuple[int, bytes]:
        """Run VFIO_DEVICE_FEATURE on raw bytes.

        Args:
            number: which feature, VFIO_DEVICE_FEATURE_*.
            operation: VFIO_DEVICE_FEATURE_GET, _SET or _PROBE, or PROBE with one of the others.
            data: the payload; its length is what the kernel may fill.

        Returns:
            What the ioctl returned (an fd for DMA_BUF, which is then the caller's; else 0) and the payload
            after it.
        """
        call, argument, detail = _feature_call(number, operation, data)
        with self.watch.using_feature(number, operation):
            result = self._ioctl(call, uapi.VFIO_DEVICE_FEATURE, argument, detail)
        return result, bytes(argument[_HEADER:])

    def _feature_fd(self, owner: _Owner, number: int, operation: int, data: bytes, field: int = -1) -> _Owner:
        """As :meth:`feature` where it answers with an fd: as its result, or at an offset of the payload."""
        call, argument, detail = _feature_call(number, operation, data)
        at = field if field < 0 else _HEADER + field
        with self.watch.using_feature(number, operation):
            return self._ioctl_fd(owner, call, uapi.VFIO_DEVICE_FEATURE, argument, detail, at=at)

    def feature_probe(self, number: int, operation: int = 0) -> bool:
        """Ask whether the device has a feature, and GET or SET of it if ``operation`` says so.

        False covers all reasons: an older kernel, a kernel built without it, a driver or a device that lacks
        it.
        """
        try:
            self.feature(number, _PROBE | operation)
        except VfioError as error:
            if isinstance(error, _UNSUPPORTED):
                return False
            raise
        return True

    def _get(self, number: int, layout: Layout) -> bytes:
        return self.feature(number, _GET, bytes(layout.size))[1]

    def set_vf_token(self, token: UUID) -> None:
        """Set the UUID that openers of this function's virtual functions must know (Linux 5.7)."""
        self.feature(uapi.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, _SET, token.bytes)

    def migration_flags(self) -> MigrationFlag:
        """Which migration arcs the device has (Linux 5.18)."""
        layout = uapi.vfio_device_feature_migration
        answer = self._get(uapi.VFIO_DEVICE_FEATURE_MIGRATION, layout)
        return MigrationFlag(layout.get(answer, "flags"))

    def migration_state(self) -> MigrationState:
        """Read the migration state."""
        layout = uapi.vfio_device_feature_mig_state
        answer = self._get(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, layout)
        return MigrationState(layout.get(answer, "device_state"))

    def set_migration_state(self, state: MigrationState) -> MigrationFd | None:
        """Move to ``state``; return the data stream where the arc opens one.

        When it raises, the device may be in a state between: read it again.
        """
        layout = uapi.vfio_device_feature_mig_state
        data = bytes(layout.new(device_state=state, data_fd=-1))
        stream = MigrationFd(None, f"{self._label} migration stream ({state.name})")
        number = uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE
        self._feature_fd(stream, number, _SET, data, layout.offset("data_fd"))
        if stream.has_fd:
            return stream
        stream.close()
        return None

    def migration_data_size(self) -> int:
        """Estimate of the bytes that STOP_COPY will produce (Linux 6.2)."""
        layout = uapi.vfio_device_feature_mig_data_size
        answer = self._get(uapi.VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, layout)
        return layout.get(answer, "stop_copy_length")

    def enable_precopy_info_v2(self) -> None:
        """Have VFIO_MIG_GET_PRECOPY_INFO report flags (Linux 7.1)."""
        self.feature(uapi.VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2, _SET)

    def low_power_entry(self, wakeup_eventfd: int | None = None) -> None:
        """Allow the device to be powered down (Linux 6.1). Mapped BARs raise SIGBUS until
        :meth:`low_power_exit`.

        With ``wakeup_eventfd`` the kernel signals when an access has woken the device.
        """
        if wakeup_eventfd is None:
            self.feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, _SET)
            return
        layout = uapi.vfio_device_low_power_entry_with_wakeup
        data = bytes(layout.new(wakeup_eventfd=wakeup_eventfd))
        self.feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP, _SET, data)

    def low_power_exit(self) -> None:
        """Take :meth:`low_power_entry` back."""
        self.feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, _SET)

    def dma_logging_start(self, page_size: int, ranges: Sequence[Area]) -> int:
        """Have the device log the pages that it writes (Linux 6.1); return the page size in bytes that it
        chose.

        Args:
            page_size: wished granularity in bytes.
            ranges: IOVA ranges (offset means IOVA) to watch; the kernel takes at least 256.
        """
        item, control = (
            uapi.vfio_device_feature_dma_logging_range,
            uapi.vfio_device_feature_dma_logging_control,
        )
        table = bytearray(item.size * len(ranges))
        for number, area in enumerate(ranges):
            item.put(table, "iova", area.offset, number * item.size)
            item.put(table, "length", area.size, number * item.size)
        pointer = address_of(table) if ranges else 0
        data = control.new(page_size=page_size, num_ranges=len(ranges), ranges=pointer)
        answer = self.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, _SET, bytes(data))[1]
        return control.get(answer, "page_size")

    def dma_logging_stop(self) -> None:
        """End :meth:`dma_logging_start`."""
        self.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, _SET)

    def dma_logging_report(self, iova: int, length: int, page_size: int) -> bytes:
        """Read and clear the log of a range: one bit for each ``page_size`` bytes, 64-bit little-endian
        words.

        After an error the log is lost: take all memory for dirty.
        """
        layout = uapi.vfio_device_feature_dma_logging_report
        bitmap = dirty_bitmap(length, page_size)
        pointer = address_of(bitmap) if bitmap else 0
        data = layout.new(iova=iova, length=length, page_size=page_size, bitmap=pointer)
        self.feature(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, _GET, bytes(data))
        return bytes(bitmap)

    def bus_master(self, enable: bool) -> None:
        """Switch bus mastering of a device that has no PCI config space (CDX, Linux 6.7)."""
        layout = uapi.vfio_device_feature_bus_master
        op = uapi.VFIO_DEVICE_FEATURE_SET_MASTER if enable else uapi.VFIO_DEVICE_FEATURE_CLEAR_MASTER
        self.feature(uapi.VFIO_DEVICE_FEATURE_BUS_MASTER, _SET, bytes(layout.new(op=op)))

    def dma_buf(self, region: int, areas: Sequence[Area], open_flags: int = os.O_RDWR) -> DmaBufFd:
        """Export parts of a BAR as one dma-buf (Linux 6.19).

        Args:
            region: region index of a memory BAR.
            areas: page-aligned parts, in the order in which they are to follow each other. iommufd imports
                only dma-bufs of one part.
            open_flags: access mode; O_CLOEXEC is added.
        """
        item, layout = uapi.vfio_region_dma_range, uapi.vfio_device_feature_dma_buf
        data = layout.new(
            item.size * len(areas),
            region_index=region,
            open_flags=open_flags | os.O_CLOEXEC,
            nr_ranges=len(areas),
        )
        for number, area in enumerate(areas):
            base = layout.size + number * item.size
            item.put(data, "offset", area.offset, base)
            item.put(data, "length", area.size, base)
        owner = DmaBufFd(None, f"dma-buf of {self._label} region {region}")
        return self._feature_fd(owner, uapi.VFIO_DEVICE_FEATURE_DMA_BUF, _GET, bytes(data))
