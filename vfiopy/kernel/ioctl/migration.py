"""The stream through which a device's state leaves or enters (data_fd of
VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE).
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiopy import uapi
from vfiopy.kernel.ioctl._call import os_calls, restarted
from vfiopy.kernel.ioctl._fd import Fd

__all__ = ["MigrationFd", "PrecopyInfo"]


@dataclass(frozen=True, slots=True)
class PrecopyInfo:
    """What VFIO_MIG_GET_PRECOPY_INFO says, in bytes still to come.

    ``reinitialized`` (VFIO_PRECOPY_INFO_REINIT) means that initial data has come again; known only after
    :meth:`vfiopy.kernel.ioctl.feature.FeatureCalls.enable_precopy_info_v2`.
    """

    initial_bytes: int
    dirty_bytes: int
    reinitialized: bool


class MigrationFd(Fd):
    """A migration data stream: read it while saving, write it while resuming."""

    kind = "VFIO migration stream"
    node = r"anon_inode:.*mig.*"

    def get_precopy_info(self) -> PrecopyInfo:
        """VFIO_MIG_GET_PRECOPY_INFO (Linux 6.2)."""
        layout = uapi.vfio_precopy_info
        argument = layout.new(argsz=layout.size)
        self._ioctl("VFIO_MIG_GET_PRECOPY_INFO", uapi.VFIO_MIG_GET_PRECOPY_INFO, argument)
        return PrecopyInfo(
            layout.get(argument, "initial_bytes"),
            layout.get(argument, "dirty_bytes"),
            bool(layout.get(argument, "flags") & uapi.VFIO_PRECOPY_INFO_REINIT),
        )

    def read(self, size: int) -> bytes:
        """Read up to ``size`` bytes of state; empty at the end of the stream."""
        fd, buffer = self.fileno(), bytearray(size)
        count = restarted(lambda: os_calls().read(fd, buffer))
        return bytes(buffer[: self._fail("read migration stream", count)])

    def write(self, data: bytes) -> int:
        """Write state; return how many bytes the device took."""
        fd = self.fileno()
        count = restarted(lambda: os_calls().write(fd, data))
        return self._fail("write migration stream", count, f"{len(data)} bytes")
