"""The messages of vfio-user: commands, flags, and the layout of every payload, each in one place.

Source: QEMU ``docs/interop/vfio-user.rst``. Payloads are those of linux/vfio.h where there is one, in the byte order of
the host, behind a header of 16 bytes. A request's ``argsz`` is the most payload that its sender takes as the reply; a
reply's ``argsz`` is what all of it needs.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, Final, Generic, NamedTuple, TypeVar

from vfiopy.errors import ProtocolError, VfioError

__all__ = [
    "COMMANDS",
    "DEVICE_INFO",
    "DIRTY_BITMAP",
    "DMA_ACCESS",
    "DMA_MAP",
    "DMA_UNMAP",
    "FEATURE",
    "FEATURE_NUMBER",
    "HEADER",
    "IO_FD",
    "IO_FDS",
    "IRQ_INFO",
    "MAJOR",
    "MANY_FDS",
    "MIGRATION_DATA",
    "MINOR",
    "REGION_ACCESS",
    "REGION_INFO",
    "SET_IRQS",
    "VERSION",
    "WRITE",
    "WRITE_MULTI",
    "Command",
    "DeviceInfoRecord",
    "DirtyBitmap",
    "DmaAccess",
    "DmaMap",
    "DmaUnmap",
    "Feature",
    "Flag",
    "Form",
    "Header",
    "IoFd",
    "IoFds",
    "IrqInfoRecord",
    "MapFlag",
    "MigrationData",
    "RegionAccess",
    "RegionInfoRecord",
    "Rule",
    "SetIrqs",
    "Tail",
    "UnmapFlag",
    "Version",
    "Write",
    "WriteMulti",
    "check_request",
]

MAJOR: Final = 0
MINOR: Final = 2  # the last change was twin_socket
MANY_FDS: Final = 1 << 16


class Command(IntEnum):
    """Commands; DMA_READ and DMA_WRITE go from server to client, all others from client to server."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_REGION_IO_FDS = 6
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    RESET = 13
    REGION_WRITE_MULTI = 15
    FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class Flag(IntFlag):
    """Flags of the header. The low four bits are the type: 0 for a command, 1 for a reply."""

    REPLY = 0x1
    NO_REPLY = 0x10
    ERROR = 0x20
    TYPE_MASK = 0xF


class MapFlag(IntFlag):
    """Flags of DMA_MAP: what the device may do."""

    READ = 1
    WRITE = 2


class UnmapFlag(IntFlag):
    """Flags of DMA_UNMAP, as in linux/vfio.h."""

    GET_DIRTY_BITMAP = 1
    ALL = 2


# --- layouts ---------------------------------------------------------------------------------------------------------


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


FEATURE_NUMBER: Final = 0xFFFF

_Record = TypeVar("_Record", bound=tuple[Any, ...])


class Form(Generic[_Record]):
    """Where the fields of a record lie: :mod:`struct` codes in the order of the fields, without padding.

    Attributes:
        size: bytes.
        pack: lays the fields out; raises ``struct.error`` for what does not fit.
        fields: the fields of a record in a buffer that is known to hold it, as a plain tuple.
    """

    __slots__ = ("_make", "_struct", "fields", "pack", "size")

    def __init__(self, record: type[_Record], codes: str) -> None:
        self._struct = Struct("=" + codes)
        self._make: Any = record._make  # type: ignore[attr-defined]  # of every NamedTuple
        self.size = self._struct.size
        self.pack: Callable[..., bytes] = self._struct.pack
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

# --- which command carries what --------------------------------------------------------------------------------------


class Tail(IntEnum):
    """What may follow the fixed part of a request."""

    NONE = 0
    DATA = 1


class Rule(NamedTuple):
    """What a request of one command looks like.

    Attributes:
        form: the fixed part of request and reply, None for no payload at all.
        tail: what may follow it in a request.
        fds: the most fds that may come with a request.
        from_client: who sends it.
    """

    form: Form[Any] | None
    tail: Tail = Tail.NONE
    fds: int = 0
    from_client: bool = True


COMMANDS: Final[dict[int, Rule]] = {
    Command.VERSION: Rule(VERSION, Tail.DATA),
    Command.DMA_MAP: Rule(DMA_MAP, fds=1),
    Command.DMA_UNMAP: Rule(DMA_UNMAP, Tail.DATA),
    Command.GET_INFO: Rule(DEVICE_INFO),
    Command.GET_REGION_INFO: Rule(REGION_INFO),
    Command.GET_REGION_IO_FDS: Rule(IO_FDS),
    Command.GET_IRQ_INFO: Rule(IRQ_INFO),
    Command.SET_IRQS: Rule(SET_IRQS, Tail.DATA, fds=MANY_FDS),
    Command.REGION_READ: Rule(REGION_ACCESS),
    Command.REGION_WRITE: Rule(REGION_ACCESS, Tail.DATA),
    Command.DMA_READ: Rule(DMA_ACCESS, from_client=False),
    Command.DMA_WRITE: Rule(DMA_ACCESS, Tail.DATA, from_client=False),
    Command.RESET: Rule(None),
    Command.REGION_WRITE_MULTI: Rule(WRITE_MULTI, Tail.DATA),
    Command.FEATURE: Rule(FEATURE, Tail.DATA),
    Command.MIG_DATA_READ: Rule(MIGRATION_DATA),
    Command.MIG_DATA_WRITE: Rule(MIGRATION_DATA, Tail.DATA),
}
_UNMAP_TAILS = (0, DIRTY_BITMAP.size)


def check_request(command: int, size: int, fds: int, *, from_client: bool) -> None:
    """Check what can be checked of a request without looking into it: its command, length and number of fds.

    Args:
        command: as received.
        size: bytes of payload.
        fds: how many came along.
        from_client: who sent it.

    Raises:
        VfioError: (ENOSYS) the other side does not serve this command.
        ProtocolError: (EINVAL) wrong length, or more fds than the command has.
    """
    rule = COMMANDS.get(command)
    if rule is None or rule.from_client is not from_client:
        raise VfioError(f"command {command} is not served here", errno=errno.ENOSYS)
    fixed = rule.form.size if rule.form else 0
    if size < fixed or (rule.tail is Tail.NONE and size != fixed):
        at_least = "at least " if rule.tail is Tail.DATA else ""
        raise malformed(f"{Command(command).name} has {size} bytes of payload, not {at_least}{fixed}")
    if command == Command.DMA_UNMAP and size - fixed not in _UNMAP_TAILS:
        raise malformed(f"DMA_UNMAP has {size - fixed} bytes behind its {fixed}")
    if fds > rule.fds:
        raise malformed(f"{Command(command).name} came with {fds} fds; it takes {rule.fds}")
