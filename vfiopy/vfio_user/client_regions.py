"""The regions of a device behind a socket: what the server says of them, and what of them it lets this process map."""

from __future__ import annotations

import os
import stat
from typing import Final, Protocol

from vfiopy.backend import RegionFlag, RegionInfo, region_name
from vfiopy.errors import AddressRangeError, NotSupportedError, ProtocolError
from vfiopy.file_window import FileWindow
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import close_fds
from vfiopy.vfio_user.doorbells import DoorbellFd, decode_io_fds
from vfiopy.vfio_user.region_info import decode_region_info
from vfiopy.vfio_user.wire import Command

__all__ = ["FIRST_ARGSZ", "Ask", "ClientRegions"]

FIRST_ARGSZ: Final = 1024
"""How much of a reply is taken before it is known how much there is."""
_MOST_ARGSZ: Final = 1 << 16


class Ask(Protocol):
    """Sends a request; returns the reply's payload, and its fds, which are the caller's."""

    def __call__(self, command: Command, *parts: bytes) -> tuple[bytearray, list[int]]:
        """Do it; raises VfioError."""


class ClientRegions:
    """What one device has of regions, files behind them, and windows into those.

    Args:
        name: of the device, for messages.
        ask: to the server.
    """

    def __init__(self, name: str, ask: Ask) -> None:
        self._name = name
        self._ask = ask
        self.known: dict[int, RegionInfo] = {}
        """Those that were asked for."""
        self.windows: list[FileWindow] = []
        """Those that are, or were, mapped."""
        self._files: dict[int, int] = {}

    def ask(self, index: int) -> RegionInfo:
        """Ask for a region, and keep what is said, and the fd to map it by."""
        info = self.known[index] = self._ask_region(index)
        return info

    def _ask_region(self, index: int) -> RegionInfo:
        argsz = FIRST_ARGSZ
        while True:
            try:
                payload, fds = self._ask(
                    Command.GET_REGION_INFO, wire.REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
                )
            except AddressRangeError:  # some servers refuse what is absent
                return RegionInfo(index, 0, RegionFlag(0))
            try:
                needed = wire.REGION_INFO.unpack(payload).argsz
                if argsz < needed <= _MOST_ARGSZ:
                    argsz = needed
                    continue
                info, _ = decode_region_info(payload)
                if info.index != index:
                    raise self.malformed(f"region {info.index} instead of {index}")
                return self._keep_file(info, fds)
            finally:
                close_fds(fds)

    def _keep_file(self, info: RegionInfo, fds: list[int]) -> RegionInfo:
        """Keep the fd that a region can be mapped by; without a good one it cannot."""
        if RegionFlag.MMAP in info.flags and fds and self._fits(info, fds[0]):
            self._files[info.index] = fds.pop(0)
            return info
        return RegionInfo(info.index, info.size, info.flags & ~RegionFlag.MMAP, type=info.type)

    @staticmethod
    def _fits(info: RegionInfo, fd: int) -> bool:
        status = os.fstat(fd)
        end = max((area.offset + area.size for area in info.sparse or ()), default=info.size)
        return not stat.S_ISREG(status.st_mode) or info.offset + end <= status.st_size

    def check(self, info: RegionInfo, offset: int, size: int) -> None:
        """Raise AddressRangeError for what is not inside of the region."""
        if offset < 0 or size < 0 or offset + size > info.size:
            if not info.size:
                raise AddressRangeError(f"the device has no {region_name(info.index)}", object=self._name)
            raise AddressRangeError(
                f"{region_name(info.index)}, offset {offset:#x}, {size} bytes: outside of its {info.size:#x} bytes",
                object=self._name,
            )

    def map(self, info: RegionInfo, offset: int, size: int) -> FileWindow:
        """Map a part of a region that the server shares.

        Raises:
            NotSupportedError: the server does not share the region, or this part of it.
            AddressRangeError: outside of the region.
            AlignmentError: not whole pages.
        """
        index = info.index
        self.check(info, offset, size)
        fd = self._files.get(index, -1)
        areas = info.sparse
        inside = areas is None or any(
            area.offset <= offset and offset + size <= area.offset + area.size for area in areas
        )
        if fd < 0 or not inside:
            raise NotSupportedError(
                f"{region_name(index)} is served by messages and cannot be mapped there",
                object=self._name,
                hint="use its read and write methods; region_info().flags says MMAP where a region can be mapped",
            )
        window = FileWindow(fd, info.offset + offset, size, writable=RegionFlag.WRITE in info.flags)
        self.windows = [old for old in self.windows if old] + [window]
        return window

    def doorbell_fds(self, index: int) -> list[DoorbellFd]:
        """Ask for the eventfds that do what a write to certain registers does; they are the caller's."""
        argsz = FIRST_ARGSZ
        while True:
            payload, fds = self._ask(Command.GET_REGION_IO_FDS, wire.IO_FDS.pack(argsz, 0, index, 0))
            try:
                needed = wire.IO_FDS.unpack(payload).argsz
                if not argsz < needed <= _MOST_ARGSZ:
                    return decode_io_fds(payload, fds, index)
                argsz = needed
            finally:
                close_fds(fds)

    def forget(self) -> None:
        """Close the files, and know nothing any more. Windows stay."""
        self.known.clear()
        files, self._files = list(self._files.values()), {}
        close_fds(files)

    def malformed(self, what: str) -> ProtocolError:
        """Make the error for an answer that cannot be."""
        return ProtocolError(f"the server's answer is malformed: {what}", object=self._name)
