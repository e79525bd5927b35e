"""Registers that are rung through an eventfd instead of a message: GET_REGION_IO_FDS of type ioeventfd, both ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from vfiopy.backend import DeviceIo, Doorbell, DoorbellIo
from vfiopy.errors import VfiopyError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import close_fds

__all__ = ["Bells", "DoorbellFd", "ServedDoorbells", "decode_io_fds"]

_LOG = logging.getLogger(__name__)
_IOEVENTFD: Final = 0
_DATAMATCH: Final = 1  # KVM_IOEVENTFD_FLAG_DATAMATCH, linux/kvm.h
_NO_FD: Final = 0xFFFF_FFFF
_MOST: Final = 16


class DoorbellFd(NamedTuple):
    """A doorbell as a client has it.

    Attributes:
        doorbell: which writes it stands for.
        fd: the eventfd that does the same as the write; the receiver's to close.
    """

    doorbell: Doorbell
    fd: int


class ServedDoorbells:
    """The eventfds that one client has been given, and what happens when it rings them.

    What is rung is done once, however often it was rung before somebody looked: so an eventfd fits registers that say
    "look again". It is not ordered with messages.

    Threads: one at a time.
    """

    def __init__(self, io: DeviceIo) -> None:
        self._io = io
        self._fds: dict[int, list[int]] = {}  # by region, in the order of its doorbells
        self._rung: dict[int, tuple[int, Doorbell]] = {}

    def reply(self, payload: bytes | bytearray, most: int) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
        """Do GET_REGION_IO_FDS: return the parts and fds of the reply.

        Args:
            payload: of the request.
            most: fds that the client takes with one message; doorbells beyond it are left to messages.
        """
        record = wire.IO_FDS.unpack(payload)
        if record.argsz < wire.IO_FDS.size or record.flags or record.entries:
            raise wire.malformed("GET_REGION_IO_FDS with flags or a count, or an argsz of less than its reply")
        self._io.region_info(record.region)
        doorbells = self._io.doorbells(record.region) if isinstance(self._io, DoorbellIo) else ()
        doorbells = doorbells[: min(most, _MOST)]
        needed = wire.IO_FDS.size + len(doorbells) * wire.IO_FD.size
        if needed > record.argsz:
            return (wire.IO_FDS.pack(needed, 0, record.region, 0),), ()
        fds = self._make(record.region, doorbells)
        entries = b"".join(
            wire.IO_FD.pack(
                one.offset, one.size, number, _IOEVENTFD, _DATAMATCH if one.value is not None else 0, 0, one.value or 0
            )
            for number, one in enumerate(doorbells)
        )
        return (wire.IO_FDS.pack(needed, 0, record.region, len(doorbells)), entries), tuple(fds)

    def _make(self, region: int, doorbells: Sequence[Doorbell]) -> list[int]:
        fds = self._fds.setdefault(region, [])
        for doorbell in doorbells[len(fds) :]:
            fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._rung[fds[-1]] = region, doorbell
        return fds

    def filenos(self) -> Collection[int]:
        """The eventfds, to be watched."""
        return self._rung

    def ring(self, ready: Collection[int]) -> None:
        """Do the writes that were asked for by the eventfds that are ready."""
        for fd in ready:
            found = self._rung.get(fd)
            if found is not None and _take(fd):
                region, doorbell = found
                try:
                    self._io.write(region, doorbell.offset, (doorbell.value or 0).to_bytes(doorbell.size, "little"))
                except VfiopyError as error:
                    _LOG.debug("a doorbell of region %d: %s", region, error)  # as for a posted write
                except Exception:  # a register handler is a user's code
                    _LOG.exception("a doorbell of region %d", region)

    def close(self) -> None:
        """Close the eventfds. Idempotent."""
        self._rung.clear()
        for fds in self._fds.values():
            close_fds(fds)


def _take(fd: int) -> bool:
    """Take the eventfd's count, and never wait: the client shares its flags and may have made it a blocking one."""
    with suppress(BlockingIOError):
        return os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT) == 8
    return False


class Bells:
    """The doorbells that a client writes by eventfd.

    Threads: any.
    """

    def __init__(self) -> None:
        self._fds: dict[tuple[int, int], list[DoorbellFd]] = {}
        self._regions: dict[int, None] = {}

    def __bool__(self) -> bool:
        return bool(self._fds)

    def take(self, region: int, bells: list[DoorbellFd]) -> int:
        """Use these from now on, and own their fds; return how many there are for the region now."""
        self._regions[region] = None
        for bell in bells:
            others = self._fds.setdefault((region, bell.doorbell.offset), [])
            if any(other.doorbell == bell.doorbell for other in others):
                os.close(bell.fd)
            else:
                others.append(bell)
        return sum(len(found) for (index, _), found in self._fds.items() if index == region)

    def ring(self, region: int, offset: int, data: bytes) -> bool:
        """Ring the doorbell that stands for this write; return whether there is one."""
        for bell in self._fds.get((region, offset), ()):
            size, value = bell.doorbell.size, bell.doorbell.value
            if len(data) == size and (value is None or int.from_bytes(data, "little") == value):
                with suppress(BlockingIOError):  # rung 2**64 times, and still to be looked at
                    os.eventfd_write(bell.fd, 1)
                return True
        return False

    def forget(self) -> list[int]:
        """Close the eventfds; return the regions that had some. Idempotent."""
        regions, self._regions = list(self._regions), {}
        fds, self._fds = self._fds, {}
        for bells in fds.values():
            close_fds([bell.fd for bell in bells])
        return regions


def decode_io_fds(payload: bytes | bytearray, fds: list[int], region: int) -> list[DoorbellFd]:
    """Read a reply; what it uses of the fds is taken out of the list, duplicated where two doorbells share one.

    Raises:
        ProtocolError: (EINVAL) it ends early, or names an fd that did not come along.
    """
    record = wire.IO_FDS.unpack(payload)
    found: list[DoorbellFd] = []
    # The specification lets entries grow; libvfio-user's have 48 bytes.
    size = (len(payload) - wire.IO_FDS.size) // record.entries if record.entries else 0
    try:
        for number in range(record.entries):
            one = wire.IO_FD.unpack(payload, wire.IO_FDS.size + number * max(size, wire.IO_FD.size))
            if one.type != _IOEVENTFD or one.fd_index == _NO_FD:
                continue
            if one.fd_index >= len(fds):
                raise wire.malformed(f"doorbell {number} of region {region} has fd {one.fd_index} of {len(fds)}")
            value = one.datamatch if one.flags & _DATAMATCH else None
            found.append(DoorbellFd(Doorbell(one.offset, one.size, value), os.dup(fds[one.fd_index])))
    except BaseException:
        close_fds([one.fd for one in found])
        raise
    return found
