"""Who is to know of the calls that take a device's memory away from those who imported it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from vfiopy.backend import RegionInfo

__all__ = ["UNWATCHED", "DeviceWatch", "WatchedFd"]


class WatchedFd(Protocol):
    """What a watch may ask of a device fd."""

    def pread(self, offset: int, size: int, detail: str = "") -> bytes:
        """Read at an fd offset."""

    def get_region_info(self, index: int) -> RegionInfo:
        """VFIO_DEVICE_GET_REGION_INFO."""

    def reset_along(self) -> list[str]:
        """The functions that a hot reset takes along, by PCI address."""


class DeviceWatch(Protocol):
    """Each method returns a context that the call is made in."""

    def writing(self, fd: WatchedFd, offset: int, data: bytes) -> AbstractContextManager[object]:
        """pwrite at an fd offset."""

    def resetting(self) -> AbstractContextManager[object]:
        """VFIO_DEVICE_RESET."""

    def hot_resetting(self, fd: WatchedFd) -> AbstractContextManager[object]:
        """VFIO_DEVICE_PCI_HOT_RESET."""

    def using_feature(self, number: int, operation: int) -> AbstractContextManager[object]:
        """VFIO_DEVICE_FEATURE."""

    def closing(self) -> AbstractContextManager[object]:
        """close(2)."""


class _Unwatched:
    def writing(self, *_: object) -> AbstractContextManager[object]:
        return nullcontext()

    resetting = hot_resetting = using_feature = closing = writing


UNWATCHED: DeviceWatch = _Unwatched()
