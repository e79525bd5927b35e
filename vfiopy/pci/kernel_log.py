"""The kernel log, as far as it is about PCI devices in the hands of VFIO: IOMMU faults, AER errors, VFIO's own words.

The kernel writes its messages to ``/dev/kmsg`` (Documentation/ABI/testing/dev-kmsg), which takes root or CAP_SYSLOG
where ``kernel.dmesg_restrict`` is 1, as most distributions have it.
"""

from __future__ import annotations

import errno
import os
import re
import select
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from vfiopy.errors import PermissionDeniedError, VfioError
from vfiopy.lives import Resource
from vfiopy.pci.address import PciAddress
from vfiopy.pci.iommu_faults import FaultDecoder, IommuFault, is_fault_line
from vfiopy.pci.system import System

__all__ = ["Kind", "LogEntry", "LogLine", "LogReader", "decode_log", "read_log"]

_ROOM = 8192  # PRINTK_MESSAGE_MAX is 2048, and the continuation lines name the device
_SETTLE = 0.05  # seconds that a fault told in several lines is waited for


class Kind(StrEnum):
    """What a line of the log is about."""

    FAULT = "fault"
    """An IOMMU refused an access."""
    AER = "aer"
    """PCI Express advanced error reporting."""
    VFIO = "vfio"
    """VFIO, iommufd or an IOMMU driver says something else."""
    LOST = "lost"
    """Messages were dropped: by the kernel's rate limit, or because the log wrapped around before it was read."""


@dataclass(frozen=True, slots=True)
class LogLine:
    """One record of the log.

    Attributes:
        time: seconds since boot (CLOCK_MONOTONIC, near enough).
        level: 0 (emergency) to 7 (debug).
        facility: 0 where the kernel wrote it; others are programs that write to ``/dev/kmsg``.
        number: of the record; gaps mean that records were lost.
        text: the message.
    """

    time: float
    level: int
    facility: int
    number: int
    text: str


@dataclass(frozen=True, slots=True)
class LogEntry:
    """What a line, or several that belong together, says.

    Attributes:
        kind: what it is about.
        time: of the last of its lines, seconds since boot; None where the source has no times.
        text: the message, or the fault in words.
        source: the function that it is about, where it names one.
        fault: of an IOMMU fault, its fields.
        count: of lost messages, how many; 0 where the log does not say.
    """

    kind: Kind
    time: float | None
    text: str
    source: PciAddress | None = None
    fault: IommuFault | None = None
    count: int = 0


_ADDRESS = re.compile(r"\b([0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7])\b")
_SUPPRESSED = re.compile(r"(?:dmar_fault|viommu_fault_handler|\w*(?:iommu|smmu)\w*): (\d+) callbacks suppressed")
_AER = re.compile(r"\bAER: |PCIe Bus Error: |\berror status/mask=|\b(?:pcieport|aer) .*: +\[ ?\d+\] ")
_VFIO = re.compile(r"\bvfio|\bVFIO|\biommufd\b|^iommu: |\b(?:DMAR|AMD-Vi): |\barm-smmu|\bvirtio_iommu\b")
_ROUTINE = re.compile(r"DRHD: handling fault status reg|GFSR 0x|FSR\s+= |FSYNR0\s+= ")  # a fault's other lines
_TIME = re.compile(r"^(?:<\d+>)?\[ *(\d+\.\d+)\] ?")


class _Decoder:
    """Sorts lines; holds back faults that may go on in the next line."""

    def __init__(self) -> None:
        self._faults = FaultDecoder()
        self._time: float | None = None

    def feed(self, text: str, at: float | None) -> Iterator[LogEntry]:
        before, self._time = self._time, at
        told_here = is_fault_line(text)
        faults = self._faults.feed(text)
        for fault in faults:
            yield _of_fault(fault, at if told_here and fault is faults[-1] else before)
        entry = None if told_here else _classify(text, at)
        if entry is not None:
            yield entry

    def flush(self) -> Iterator[LogEntry]:
        for fault in self._faults.flush():
            yield _of_fault(fault, self._time)


def _of_fault(fault: IommuFault, at: float | None) -> LogEntry:
    return LogEntry(Kind.FAULT, at, str(fault), fault.source, fault)


def _classify(text: str, at: float | None) -> LogEntry | None:
    suppressed = _SUPPRESSED.search(text)
    if suppressed:
        return LogEntry(Kind.LOST, at, text, count=int(suppressed[1]))
    kind = Kind.AER if _AER.search(text) else Kind.VFIO if _VFIO.search(text) else None
    if kind is None or _ROUTINE.search(text):
        return None
    named = _ADDRESS.search(text)
    return LogEntry(kind, at, text.strip(), PciAddress.parse(named[1]) if named else None)


def decode_log(lines: Iterable[str | LogLine]) -> list[LogEntry]:
    """Decode lines of a log: records, or text as ``dmesg`` prints it, with or without time stamps."""
    decoder = _Decoder()
    entries: list[LogEntry] = []
    for line in lines:
        at: float | None
        if isinstance(line, LogLine):
            at, text = line.time, line.text
        else:
            stamp = _TIME.match(line)
            at, text = (float(stamp[1]), line[stamp.end() :]) if stamp else (None, line)
        entries += decoder.feed(text.rstrip("\n"), at)
    return [*entries, *decoder.flush()]


def read_log(system: System | None = None) -> list[LogEntry]:
    """Read what the kernel's log holds now.

    Raises:
        PermissionDeniedError: this user may not read it.
        VfioError: there is no log, as in some containers.
    """
    with LogReader(system, from_start=True) as reader:
        return list(reader.pending())


class LogReader(Resource):
    """The kernel log as it grows. Wait on :meth:`fileno` or iterate :meth:`follow`.

    Threads: one at a time.

    Args:
        system: whose ``/dev/kmsg``.
        from_start: begin with the oldest record that is kept, and not with the next one.

    Raises:
        PermissionDeniedError: this user may not read it.
        VfioError: there is no log.
    """

    def __init__(self, system: System | None = None, *, from_start: bool = False) -> None:
        path = (system or System()).dev / "kmsg"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except PermissionError as error:
            raise PermissionDeniedError(
                "this user may not read the kernel log",
                errno=error.errno,
                object=str(path),
                hint="run as root, give CAP_SYSLOG, or set kernel.dmesg_restrict=0",
            ) from None
        except OSError as error:
            raise VfioError(
                "the kernel log cannot be opened",
                errno=error.errno,
                object=str(path),
                hint="is /dev the machine's own?",
            ) from None
        try:
            super().__init__(f"reader of {path}")
            self._decoder = _Decoder()
            self._next: int | None = None
            if not from_start:
                self._skip()
        except BaseException:
            os.close(self._fd)
            raise

    def _skip(self) -> None:
        try:
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:
            while self._read_line() is not None:  # a file in its place, as a test has
                pass

    def fileno(self) -> int:
        """Descriptor that becomes readable when there is something new."""
        self.check_open()
        return self._fd

    def _read_line(self) -> LogLine | int | None:
        """Return the next record, how many were lost, or None where there is no more now."""
        try:
            record = os.read(self._fd, _ROOM)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.EPIPE:  # overwritten before it was read; the next read goes on behind the gap
                return 0
            raise
        return parse_record(record.decode("utf-8", "replace")) if record else None

    def lines(self) -> Iterator[LogLine]:
        """Yield what is there as it is, without waiting: each line of the kernel, whatever it is about."""
        self.check_open()
        while (line := self._read_line()) is not None:
            if isinstance(line, LogLine) and not line.facility:
                yield line

    def pending(self) -> Iterator[LogEntry]:
        """Yield what is there, without waiting, and what was still waited for."""
        yield from self._new()
        yield from self._decoder.flush()

    def _new(self) -> Iterator[LogEntry]:
        self.check_open()
        while (line := self._read_line()) is not None:
            if isinstance(line, int):
                continue  # the number of the next record says how many
            if self._next is not None and line.number > self._next:
                lost = line.number - self._next
                text = f"{lost} records of the kernel log were overwritten unread"
                yield LogEntry(Kind.LOST, line.time, text, count=lost)
            self._next = line.number + 1
            if not line.facility:
                yield from self._decoder.feed(line.text, line.time)

    def wait(self, timeout: float | None = None) -> list[LogEntry]:
        """Wait for entries; an empty list after ``timeout`` seconds, never where that is None."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            entries = list(self._new())
            if entries or not select.select([self._fd], [], [], _SETTLE)[0]:
                entries += self._decoder.flush()
            if entries:
                return entries
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return []
            select.select([self._fd], [], [], left)

    def _release(self) -> None:
        os.close(self._fd)


def parse_record(record: str) -> LogLine:
    """Parse one record of ``/dev/kmsg``: ``priority,number,microseconds,flags;text``, continuation lines after it."""
    head, _, body = record.partition(";")
    priority, number, microseconds = head.split(",")[:3]
    text = body.split("\n", 1)[0]
    text = re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), text)
    return LogLine(int(microseconds) / 1e6, int(priority) & 7, int(priority) >> 3, int(number), text)
