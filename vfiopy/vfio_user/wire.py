"""The messages of vfio-user: commands, flags, and which command carries what. The layouts come from ``layouts.py``.

Source: QEMU ``docs/interop/vfio-user.rst``.
"""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from typing import Any, Final, NamedTuple

from vfiopy.errors import VfioError
from vfiopy.vfio_user.layouts import (
    DEVICE_INFO,
    DIRTY_BITMAP,
    DMA_ACCESS,
    DMA_MAP,
    DMA_REPORT,
    DMA_UNMAP,
    FEATURE,
    FEATURE_NUMBER,
    HEADER,
    IO_FD,
    IO_FDS,
    IRQ_INFO,
    MIGRATION_DATA,
    REGION_ACCESS,
    REGION_INFO,
    SET_IRQS,
    VERSION,
    WRITE,
    WRITE_MULTI,
    DeviceInfoRecord,
    DirtyBitmap,
    DmaAccess,
    DmaMap,
    DmaReport,
    DmaUnmap,
    Feature,
    Form,
    Header,
    IoFd,
    IoFds,
    IrqInfoRecord,
    MigrationData,
    RegionAccess,
    RegionInfoRecord,
    SetIrqs,
    Version,
    Write,
    WriteMulti,
    bitmap_size,
    malformed,
)

__all__ = [
    "COMMANDS",
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
    "DmaReport",
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
    "bitmap_size",
    "check_argsz",
    "check_request",
    "malformed",
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


def check_argsz(argsz: int, least: int) -> None:
    """Raise ProtocolError (EINVAL) for an argsz that does not even hold the fixed part of the reply or the request."""
    if argsz < least:
        raise malformed(f"argsz is {argsz}; it has to be {least} at least")
