"""The layout of every payload of vfio-user, and of the header in front of it: records, and where their fields lie.

Take them from :mod:`vfiopy.vfio_user.wire`. Source: QEMU ``docs/interop/vfio-user.rst``. Payloads are those of
linux/vfio.h where there is one, in the byte order of the host. A request's ``argsz`` is the most payload that its
sender takes as the reply; a reply's ``argsz`` is what all of it needs.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from struct import Struct
from typing import Any, Final, Generic, NamedTuple, TypeVar

from vfiopy.errors import ProtocolError

__all__ = [
    "DEVICE_INFO",
    "DIRTY_BITMAP",
    "DMA_ACCESS",
    "DMA_MAP",
    "DMA_REPORT",
    "DMA_UNMAP",
    "FEATURE",
    "FEATURE_NUMBER",
    "HEADER",
    "IO_FD",
    "IO_FDS",
    "IRQ_INFO",
    "MIGRATION_DATA",
    "REGION_ACCESS",
    "REGION_INFO",
    "SET_IRQS",
    "VERSION",
    "WRITE",
    "WRITE_MULTI",
    "DeviceInfoRecord",
    "DirtyBitmap",
    "DmaAccess",
    "DmaMap",
    "DmaReport",
    "DmaUnmap",
    "Feature",
    "Form",
    "Header",
    "IoFd",
    "IoFds",
    "IrqInfoRecord",
    "MigrationData",
    "RegionAccess",
    "RegionInfoRecord",
    "SetIrqs",
    "Version",
    "Write",
    "WriteMulti",
    "bitmap_size",
    "malformed",
]


class Header(NamedTuple):
    """What every message begins with.

    Attributes:
        id: chosen by who asks; comes back in the reply.
        command: a :class:`Command`.
        size: bytes of the whole message, header included.
        flags: :class:`Flag`.
        error: errno, in a reply with ERROR; may be 0 even then.
    """

    id: int
    command: int
    size: int
    flags: int
    error: int


class Version(NamedTuple):
    """VERSION; followed by JSON that ends with a NUL, or by nothing."""

    major: int
    minor: int


class DmaMap(NamedTuple):
    """DMA_MAP: ``offset`` is into the file that comes along, ``address`` an IOVA."""

    argsz: int
    flags: int
    offset: int
    address: int
    size: int


class DmaUnmap(NamedTuple):
    """DMA_UNMAP; followed by a :class:`DirtyBitmap` with GET_DIRTY_BITMAP."""

    argsz: int
    flags: int
    address: int
    size: int


class DirtyBitmap(NamedTuple):
    """What is asked of DMA_UNMAP's dirty bitmap: page size, and bytes of the bitmap that follows in the reply."""

    page_size: int
    size: int


class DeviceInfoRecord(NamedTuple):
    """GET_INFO."""

    argsz: int
    flags: int
    num_regions: int
    num_irqs: int


class RegionInfoRecord(NamedTuple):
    """GET_REGION_INFO; a reply may go on with capabilities, at ``cap_offset`` from the start of this record."""

    argsz: int
    flags: int
    region: int
    cap_offset: int
    size: int
    offset: int


class IoFds(NamedTuple):
    """GET_REGION_IO_FDS; a reply goes on with ``entries`` times :class:`IoFd`."""

    argsz: int
    flags: int
    region: int
    entries: int


class IoFd(NamedTuple):
    """A part of a region whose writes may go to an eventfd: ``type`` 0. ``fd_index`` is into the fds of the reply."""

    offset: int
    size: int
    fd_index: int
    type: int
    flags: int
    padding: int
    datamatch: int


class IrqInfoRecord(NamedTuple):
    """GET_IRQ_INFO."""

    argsz: int
    flags: int
    irq: int
    vectors: int


class SetIrqs(NamedTuple):
    """SET_IRQS; followed by ``vectors`` bytes with DATA_BOOL; eventfds come along with DATA_EVENTFD."""

    argsz: int
    flags: int
    irq: int
    start: int
    vectors: int


class RegionAccess(NamedTuple):
    """REGION_READ and REGION_WRITE; data follow."""

    offset: int
    region: int
    size: int


class DmaAccess(NamedTuple):
    """DMA_READ and DMA_WRITE; data follow."""

    address: int
    size: int


class WriteMulti(NamedTuple):
    """REGION_WRITE_MULTI; followed by ``writes`` times :class:`Write`. The reply says how many were done."""

    writes: int


class Write(NamedTuple):
    """One write of REGION_WRITE_MULTI: ``size`` of the 8 bytes of ``data``."""

    offset: int
    region: int
    size: int
    data: bytes


class Feature(NamedTuple):
    """DEVICE_FEATURE: number in the low 16 bits of ``flags``, GET, SET and PROBE above; data follow."""

    argsz: int
    flags: int


class MigrationData(NamedTuple):
    """MIG_DATA_READ and MIG_DATA_WRITE; data follow. A read of fewer bytes than asked for is the end of the stream."""

    argsz: int
    size: int


class DmaReport(NamedTuple):
    """DEVICE_FEATURE's DMA_LOGGING_REPORT; in a reply the bitmap follows."""

    iova: int
    length: int
    page_size: int


def bitmap_size(length: int, page_size: int) -> int:
    """Return how many bytes a bitmap of dirty pages has: words of 64 bits."""
    return -(-length // (64 * page_size)) * 8


FEATURE_NUMBER: Final = 0xFFFF

_Record = TypeVar("_Record", bound=tuple[Any, ...])


class Form(Generic[_Record]):
    """Where the fields of a record lie: :mod:`struct` codes in the order of the fields, without padding.

    Attributes:
        size: bytes.
        pack: lays the fields out; raises ``struct.error`` for what does not fit.
        fields: the fields of a record in a buffer that is known to hold it, as a plain tuple.
        each: the same of one record after another, in a buffer of nothing else.
    """

    __slots__ = ("_make", "_struct", "each", "fields", "pack", "size")

    def __init__(self, record: type[_Record], codes: str) -> None:
        self._struct = Struct("=" + codes)
        self._make: Any = record._make  # type: ignore[attr-defined]  # of every NamedTuple
        self.size = self._struct.size
        self.pack: Callable[..., bytes] = self._struct.pack
        self.each: Callable[..., Iterator[tuple[Any, ...]]] = self._struct.iter_unpack
        self.fields: Callable[..., tuple[Any, ...]] = self._struct.unpack_from

    def unpack(self, data: bytes | bytearray | memoryview, offset: int = 0) -> _Record:
        """Read the fields.

        Raises:
            ProtocolError: (EINVAL) the data end before the record does.
        """
        if not 0 <= offset <= len(data) - self.size:
            raise malformed(f"{len(data)} bytes of payload do not hold {self.size} at {offset}")
        record: _Record = self._make(self._struct.unpack_from(data, offset))
        return record


def malformed(meaning: str, number: int = errno.EINVAL) -> ProtocolError:
    """Make the error for a message that cannot be what its sender meant."""
    return ProtocolError(meaning, errno=number)


HEADER: Final = Form(Header, "HHIII")
VERSION: Final = Form(Version, "HH")
DMA_MAP: Final = Form(DmaMap, "IIQQQ")
DMA_UNMAP: Final = Form(DmaUnmap, "IIQQ")
DIRTY_BITMAP: Final = Form(DirtyBitmap, "QQ")
DEVICE_INFO: Final = Form(DeviceInfoRecord, "IIII")
REGION_INFO: Final = Form(RegionInfoRecord, "IIIIQQ")
IO_FDS: Final = Form(IoFds, "IIII")
IO_FD: Final = Form(IoFd, "QQIIIIQ")
IRQ_INFO: Final = Form(IrqInfoRecord, "IIII")
SET_IRQS: Final = Form(SetIrqs, "IIIII")
REGION_ACCESS: Final = Form(RegionAccess, "QII")
DMA_ACCESS: Final = Form(DmaAccess, "QQ")
WRITE_MULTI: Final = Form(WriteMulti, "Q")
WRITE: Final = Form(Write, "QII8s")
FEATURE: Final = Form(Feature, "II")
MIGRATION_DATA: Final = Form(MigrationData, "II")
DMA_REPORT: Final = Form(DmaReport, "QQQ")
