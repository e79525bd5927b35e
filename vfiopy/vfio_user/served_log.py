"""The log of what a served device's DMA writes: DEVICE_FEATURE's, and asked for together with DMA_UNMAP."""

from __future__ import annotations

import errno
import logging
from contextlib import suppress
from typing import Final, NamedTuple

from vfiopy import uapi
from vfiopy.backend import DeviceIo
from vfiopy.errors import VfioError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.wire import UnmapFlag

__all__ = ["DirtyQuestion", "ServedLog"]

_LOG = logging.getLogger(__name__)
_START: Final = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
_STOP: Final = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP
_REPORT: Final = uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT
_PAGE: Final = 4096


class DirtyQuestion(NamedTuple):
    """Which pages of a range were written, asked with DMA_UNMAP.

    Attributes:
        iova: first byte.
        length: bytes of the range.
        bitmap: what is asked for.
    """

    iova: int
    length: int
    bitmap: wire.DirtyBitmap


class ServedLog:
    """The log of one device for one client after another.

    Threads: one at a time.

    Args:
        io: the device.
        max_data: the most bytes of a bitmap.
    """

    def __init__(self, io: DeviceIo, max_data: int) -> None:
        self._io = io
        self._max_data = max_data
        self._on = False

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        """Do a DEVICE_FEATURE of the device's, and remember whether its log is on."""
        answer = self._io.feature(number, operation, data)
        if operation == uapi.VFIO_DEVICE_FEATURE_SET and number in (_START, _STOP):
            self._on = number == _START
        return answer

    def report_size(self, number: int, operation: int, data: bytes) -> int:
        """Bytes of a report's answer, to be known before it is asked for: it forgets what it tells. 0 for others."""
        if number != _REPORT or operation != uapi.VFIO_DEVICE_FEATURE_GET or len(data) < wire.DMA_REPORT.size:
            return 0
        _, length, page = wire.DMA_REPORT.unpack(data)
        bitmap = wire.bitmap_size(length, page) if page else 0
        return wire.DMA_REPORT.size + bitmap if bitmap <= self._max_data else 0  # no device tells more at once

    def stop(self) -> None:
        """Switch it off: the client that wanted it is gone."""
        if self._on:
            self._on = False
            with suppress(VfioError):
                self._io.feature(_STOP, uapi.VFIO_DEVICE_FEATURE_SET, b"")

    def question(self, payload: bytes | bytearray) -> DirtyQuestion | None:
        """Read what DMA_UNMAP asks for; None where it asks nothing.

        Raises:
            VfioError: (EINVAL) the log is not on, a page size that is none, a bitmap without room for the range, an
                argsz without room for the bitmap, everything at once, or a question without the flag; (E2BIG) a bitmap
                that no reply can carry.
        """
        record = wire.DMA_UNMAP.unpack(payload)
        asked = len(payload) > wire.DMA_UNMAP.size
        if asked is not bool(record.flags & UnmapFlag.GET_DIRTY_BITMAP):
            raise wire.malformed("DMA_UNMAP whose flags and length do not agree on whether dirty pages are asked for")
        if not asked:
            return None
        if record.flags & UnmapFlag.ALL:
            raise wire.malformed("DMA_UNMAP of everything has no range whose dirty pages could be told")
        bitmap = wire.DIRTY_BITMAP.unpack(payload, wire.DMA_UNMAP.size)
        page, size = bitmap
        if page < _PAGE or page & (page - 1):
            raise wire.malformed(f"a dirty bitmap of pages of {page:#x} bytes")
        if size > self._max_data:
            raise wire.malformed(f"a dirty bitmap of {size} bytes; {self._max_data} at a time", errno.E2BIG)
        if size < wire.bitmap_size(record.size, page) or size % 8:
            raise wire.malformed(f"a dirty bitmap of {size} bytes for {record.size:#x} bytes of memory")
        if record.argsz < len(payload) + size:
            raise wire.malformed(f"argsz is {record.argsz}, the reply has {len(payload) + size} bytes")
        if not self._on:
            raise wire.malformed("dirty pages are asked for, and DMA is not being logged")
        return DirtyQuestion(record.address, record.size, bitmap)

    def answer(self, question: DirtyQuestion) -> tuple[bytes, bytes]:
        """Tell what was written, and forget it: the parts that follow DMA_UNMAP's own in the reply.

        Everything, where the device does not say.
        """
        page = question.bitmap.page_size
        asked = wire.DMA_REPORT.pack(question.iova, question.length, page)
        try:
            told = self._io.feature(_REPORT, uapi.VFIO_DEVICE_FEATURE_GET, asked)[wire.DMA_REPORT.size :]
        except VfioError as error:
            # The memory is unmapped, so that a refusal would be a lie. That all of it may be dirty is none.
            _LOG.warning("%s does not tell dirty pages, all are said to be: %s", self._io.name, error)
            told = ((1 << -(-question.length // page)) - 1).to_bytes(question.bitmap.size, "little")
        return wire.DIRTY_BITMAP.pack(*question.bitmap), told.ljust(question.bitmap.size, b"\0")
