"""Which pages a device's DMA has written: VFIO_DEVICE_FEATURE_DMA_LOGGING_* of linux/vfio.h."""

from __future__ import annotations

import errno
import struct
import threading
from typing import Final

from vfiopy import uapi
from vfiopy.errors import NotSupportedError, VfioError

__all__ = ["DirtyLog"]

_START: Final = struct.Struct("=QII")  # page size, number of ranges, reserved
_RANGE: Final = struct.Struct("=QQ")
_REPORT: Final = struct.Struct("=QQQ")  # IOVA, length, page size
_PAGE: Final = 4096
_LARGEST_PAGE: Final = 1 << 30
_MOST_RANGES: Final = 1024
_MOST_BITMAP: Final = 1 << 20  # bytes
_WRAP: Final = 1 << 64


class DirtyLog:
    """The log of one device; off until it is started.

    Threads: any.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._pages: set[int] = set()
        self._ranges: list[tuple[int, int]] = []  # first and last IOVA; empty for everything
        self._page = _PAGE
        self.on = False

    def note(self, iova: int, size: int) -> None:
        """Log a write."""
        if not self.on or not size:
            return
        first, last = iova, iova + size - 1
        with self._lock:
            for begin, end in self._ranges or [(0, _WRAP - 1)]:
                low, high = max(first, begin), min(last, end)
                if low <= high:
                    self._pages.update(range(low // self._page, high // self._page + 1))

    def stop(self) -> None:
        """Forget everything."""
        with self._lock:
            self.on = False
            self._pages.clear()

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        """Do VFIO_DEVICE_FEATURE_DMA_LOGGING_START, _STOP and _REPORT.

        A report clears what it reports, but for pages of the log that it shows a part of.

        Raises:
            NotSupportedError: (ENOTTY) the feature has no such operation.
            VfioError: (EINVAL) the log is not on, or is on already; data that do not fit.
        """
        report = number == uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
        right = uapi.VFIO_DEVICE_FEATURE_GET if report else uapi.VFIO_DEVICE_FEATURE_SET
        asked = operation & (uapi.VFIO_DEVICE_FEATURE_GET | uapi.VFIO_DEVICE_FEATURE_SET)
        if asked & ~right:
            raise NotSupportedError(f"feature {number} cannot do that", errno=errno.ENOTTY, object=self._name)
        if operation & uapi.VFIO_DEVICE_FEATURE_PROBE:
            return b""
        if report:
            return self._report(data)
        if number == uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START:
            return self._start(data)
        self.stop()
        return b""

    def _start(self, data: bytes) -> bytes:
        if self.on:
            raise self._bad("DMA is being logged already")
        if len(data) < _START.size:
            raise self._bad("the request is too short")
        page, count, _ = _START.unpack_from(data)
        if count > _MOST_RANGES or len(data) != _START.size + count * _RANGE.size:
            raise self._bad(f"{count} ranges in {len(data)} bytes")
        ranges = [_RANGE.unpack_from(data, _START.size + number * _RANGE.size) for number in range(count)]
        if any(not size or iova + size > _WRAP for iova, size in ranges):
            raise self._bad("a range is empty, or beyond 64 bits")
        if page < _PAGE or page > _LARGEST_PAGE or page & (page - 1):
            page = _PAGE  # it is a hint
        with self._lock:
            self._page = page
            self._ranges = [(iova, iova + size - 1) for iova, size in ranges]
            self._pages.clear()
            self.on = True
        return _START.pack(page, count, 0) + data[_START.size :]

    def _report(self, data: bytes) -> bytes:
        if not self.on:
            raise self._bad("DMA is not being logged")
        if len(data) < _REPORT.size:
            raise self._bad("the request is too short")
        iova, size, page = _REPORT.unpack_from(data)
        if not size or iova + size > _WRAP or page < _PAGE or page & (page - 1):
            raise self._bad(f"{size:#x} bytes at IOVA {iova:#x} in pages of {page:#x}")
        bits = (size + page - 1) // page
        if bits > _MOST_BITMAP * 8:
            raise self._bad(f"a bitmap of {bits} bits")
        bitmap = bytearray((bits + 63) // 64 * 8)
        with self._lock:
            first, last = iova // self._page, (iova + size - 1) // self._page
            found = {number for number in self._pages if first <= number <= last}
            # A page of the log that reaches beyond the range stays: the rest of it may be asked for later.
            self._pages -= {n for n in found if iova <= n * self._page and (n + 1) * self._page <= iova + size}
        for number in found:
            low = max(number * self._page, iova)
            high = min((number + 1) * self._page, iova + size) - 1
            for bit in range((low - iova) // page, (high - iova) // page + 1):
                bitmap[bit // 8] |= 1 << bit % 8
        return data[: _REPORT.size] + bytes(bitmap)

    def _bad(self, why: str) -> VfioError:
        return VfioError(why, errno=errno.EINVAL, object=self._name, call="VFIO_DEVICE_FEATURE")
