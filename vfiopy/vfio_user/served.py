"""What a served device answers to each command: from payload and fds to the parts and fds of the reply."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from vfiopy import uapi
from vfiopy.backend import DeviceIo, FileRegions, MigrationStream, RegionFlag, RegionInfo
from vfiopy.errors import NotSupportedError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.region_info import encode_region_info
from vfiopy.vfio_user.served_irqs import ServedIrqs
from vfiopy.vfio_user.served_log import ServedLog
from vfiopy.vfio_user.wire import Command

__all__ = ["Reply", "ServedDevice"]

Reply = tuple[tuple[bytes, ...], tuple[int, ...]]
"""Parts of the payload, and fds, which stay their owner's."""

_OPERATIONS: Final = uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_SET | uapi.VFIO_DEVICE_FEATURE_PROBE
# What the protocol has. Others hand out fds, or tokens of the kernel.
_FEATURES: Final = frozenset(
    {
        uapi.VFIO_DEVICE_FEATURE_MIGRATION,
        uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
        uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START,
        uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP,
        uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT,
    }
)
_NOTHING: Final[Reply] = ((), ())


class ServedDevice:
    """The commands that are the device's own business: regions, interrupts, reset, features.

    Threads: one at a time.

    Args:
        io: the device.
        max_data: the most bytes of one access.
        max_fds: the most fds that come with one message.

    Attributes:
        commands: what to do for each of them.
        log: of what the device's DMA writes.
    """

    def __init__(self, io: DeviceIo, max_data: int, max_fds: int) -> None:
        self.io = io
        self.log = ServedLog(io, max_data)
        self._irqs = ServedIrqs(io, max_fds)
        self._max_data = max_data
        self._info = io.info()
        self.commands: dict[int, Callable[[bytearray, list[int]], Reply]] = {
            Command.GET_INFO: self._get_info,
            Command.GET_REGION_INFO: self._get_region_info,
            Command.GET_IRQ_INFO: self._get_irq_info,
            Command.SET_IRQS: self._set_irqs,
            Command.REGION_READ: self._region_read,
            Command.REGION_WRITE: self._region_write,
            Command.REGION_WRITE_MULTI: self._region_write_multi,
            Command.RESET: self._reset,
            Command.FEATURE: self._feature,
        }
        if isinstance(io, MigrationStream):
            self.commands[Command.MIG_DATA_READ] = partial(self._migration_read, io)
            self.commands[Command.MIG_DATA_WRITE] = partial(self._migration_write, io)

    def quiet(self) -> None:
        """Disable all interrupts, and the log: the client that wanted them is gone."""
        self._irqs.quiet(self._info.num_irqs)
        self.log.stop()

    # --- what it is --------------------------------------------------------------------------------------------------

    def _get_info(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        wire.check_argsz(wire.DEVICE_INFO.unpack(payload).argsz, wire.DEVICE_INFO.size)
        info = self._info
        flags = uapi.VFIO_DEVICE_FLAGS_PCI if info.is_pci else 0
        if info.can_reset:
            flags |= uapi.VFIO_DEVICE_FLAGS_RESET
        return (wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, flags, info.num_regions, info.num_irqs),), ()

    def _get_region_info(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        record = wire.REGION_INFO.unpack(payload)
        wire.check_argsz(record.argsz, wire.REGION_INFO.size)
        info, fd = self._region(record.region)
        reply = encode_region_info(info, record.argsz)
        whole = wire.REGION_INFO.unpack(reply).argsz <= record.argsz
        return (reply,), (fd,) if fd >= 0 and whole else ()

    def _region(self, index: int) -> tuple[RegionInfo, int]:
        """Describe a region as the client may use it, with the fd to map it by or -1."""
        info = self.io.region_info(index)
        if RegionFlag.MMAP in info.flags and isinstance(self.io, FileRegions):
            with suppress(NotSupportedError):
                fd, offset = self.io.region_file(index)
                return RegionInfo(index, info.size, info.flags, offset, info.sparse, info.msix_mappable, info.type), fd
        return RegionInfo(index, info.size, info.flags & ~RegionFlag.MMAP, type=info.type), -1

    def _get_irq_info(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        record = wire.IRQ_INFO.unpack(payload)
        wire.check_argsz(record.argsz, wire.IRQ_INFO.size)
        info = self.io.irq_info(record.irq)
        return (wire.IRQ_INFO.pack(wire.IRQ_INFO.size, int(info.flags), info.index, info.count),), ()

    # --- registers ---------------------------------------------------------------------------------------------------

    def _region_read(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        offset, region, size = wire.REGION_ACCESS.unpack(payload)
        if size > self._max_data:
            raise wire.malformed(f"REGION_READ of {size} bytes; {self._max_data} at a time", errno.E2BIG)
        return (bytes(payload), self.io.read(region, offset, size)), ()

    def _region_write(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        offset, region, size = wire.REGION_ACCESS.unpack(payload)
        data = bytes(memoryview(payload)[wire.REGION_ACCESS.size :])
        if len(data) != size:
            raise wire.malformed(f"REGION_WRITE of {size} bytes brings {len(data)}")
        self.io.write(region, offset, data)
        return (wire.REGION_ACCESS.pack(offset, region, size),), ()

    def _region_write_multi(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        count = wire.WRITE_MULTI.unpack(payload).writes
        if len(payload) != wire.WRITE_MULTI.size + count * wire.WRITE.size:
            raise wire.malformed(f"REGION_WRITE_MULTI of {count} writes has {len(payload)} bytes")
        writes = list(wire.WRITE.each(memoryview(payload)[wire.WRITE_MULTI.size :]))
        if any(size > len(data) for _, _, size, data in writes):
            raise wire.malformed("REGION_WRITE_MULTI with a write of more than 8 bytes")
        write = self.io.write
        for offset, region, size, data in writes:
            write(region, offset, data[:size])
        return (wire.WRITE_MULTI.pack(count),), ()

    # --- the rest ----------------------------------------------------------------------------------------------------

    def _set_irqs(self, payload: bytearray, fds: list[int]) -> Reply:
        self._irqs.set(payload, fds)
        return _NOTHING

    def _reset(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        self.io.reset()
        return _NOTHING

    def _feature(self, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        record = wire.FEATURE.unpack(payload)
        number, operation = record.flags & wire.FEATURE_NUMBER, record.flags & ~wire.FEATURE_NUMBER
        if not operation or operation & ~_OPERATIONS:
            raise wire.malformed(f"DEVICE_FEATURE with flags {record.flags:#x}")
        if number not in _FEATURES:
            raise NotSupportedError(f"feature {number} is not of vfio-user", errno=errno.ENOTTY)
        data = bytes(memoryview(payload)[wire.FEATURE.size :])
        wire.check_argsz(record.argsz, wire.FEATURE.size)
        needed = wire.FEATURE.size + self.log.report_size(number, operation, data)
        if record.argsz < needed:
            return (wire.FEATURE.pack(needed, record.flags),), ()
        answer = self.log.feature(number, operation, data)
        if operation != uapi.VFIO_DEVICE_FEATURE_GET:  # the request again, with what the device chose otherwise
            return (bytes(payload[: wire.FEATURE.size]), answer if len(answer) == len(data) else data), ()
        needed = wire.FEATURE.size + len(answer)
        head = wire.FEATURE.pack(needed, record.flags)
        return (head, answer) if needed <= record.argsz else (head,), ()


    def _migration_read(self, stream: MigrationStream, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        record = wire.MIGRATION_DATA.unpack(payload)
        fixed = wire.MIGRATION_DATA.size
        wire.check_argsz(record.argsz, fixed + record.size)
        if record.size > self._max_data:
            raise wire.malformed(f"MIG_DATA_READ of {record.size} bytes; {self._max_data} at a time", errno.E2BIG)
        data = stream.migration_read(record.size)
        return (wire.MIGRATION_DATA.pack(fixed + len(data), len(data)), data), ()

    def _migration_write(self, stream: MigrationStream, payload: bytearray, fds: list[int]) -> Reply:  # noqa: ARG002
        argsz, size = wire.MIGRATION_DATA.unpack(payload)
        wire.check_argsz(argsz, wire.MIGRATION_DATA.size)
        data = bytes(memoryview(payload)[wire.MIGRATION_DATA.size :])
        if len(data) != size:
            raise wire.malformed(f"MIG_DATA_WRITE of {size} bytes brings {len(data)}")
        stream.migration_write(data)
        return _NOTHING
