"""What the kernel logged about VFIO, IOMMUs and devices, and what it means."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vfiopy.doctor.finding import Finding, Problem
from vfiopy.doctor.log_patterns import PATTERNS, Pattern
from vfiopy.errors import PciAddressError, PermissionDeniedError, VfioError
from vfiopy.pci import PciAddress

__all__ = ["LogMatch", "LogTail", "match_line", "read_kernel_log", "study_log"]

_ADDRESS = re.compile(r"(?<![0-9a-fA-F:.])(?:[0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7](?![0-9a-fA-F])")
_RECORD = 8192  # bytes; the longest record of /dev/kmsg (Documentation/ABI/testing/dev-kmsg)
_EVIDENCE = 200  # characters of a line


@dataclass(frozen=True, slots=True)
class LogMatch:
    """A line that says something.

    Attributes:
        pattern: what it matched.
        device: the device that it names, None where it names none.
        line: the line, without surrounding white space.
    """

    pattern: Pattern
    device: PciAddress | None
    line: str


def read_kernel_log(path: Path = Path("/dev/kmsg")) -> list[str]:
    """All that the kernel's log holds now, oldest first, one message each.

    Raises:
        PermissionDeniedError: the kernel keeps its log to root (``kernel.dmesg_restrict``).
        VfioError: there is no such log, as in some containers.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return _drain(fd)
        finally:
            os.close(fd)
    except OSError as error:
        kind = PermissionDeniedError if isinstance(error, PermissionError) else VfioError
        raise kind(
            "the kernel's log cannot be read",
            errno=error.errno,
            object=str(path),
            call="open",
            hint="run as root (kernel.dmesg_restrict), or save the log and give it with --log-file",
        ) from error


class LogTail:
    """What the kernel logs from now on; nothing where its log cannot be read. A context manager."""

    def __init__(self, path: Path = Path("/dev/kmsg")) -> None:
        self.all_lines: list[str] = []
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:  # no right to read it, or no such log
            self.close()

    def lines(self) -> list[str]:
        """The lines since the last call."""
        fresh = [] if self._fd < 0 else _drain(self._fd)
        self.all_lines += fresh
        return fresh

    def close(self) -> None:
        """Let the log go; safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> LogTail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _drain(fd: int) -> list[str]:
    lines: list[str] = []
    while True:
        try:
            record = os.read(fd, _RECORD)
        except BlockingIOError:
            return lines
        except BrokenPipeError:  # the ring has overtaken us: go on with what is left of it
            continue
        if not record:
            return lines
        # "priority,sequence,time,flags;message", then lines of properties that begin with a blank
        lines.append(record.decode("utf-8", "replace").partition(";")[2].split("\n", 1)[0])


def match_line(line: str) -> LogMatch | None:
    """Say what a line of the log means; None for one that nothing is known about."""
    for pattern in PATTERNS:
        if pattern.regex.search(line):
            return LogMatch(pattern, _device_of(line), line.strip())
    return None


def _device_of(line: str) -> PciAddress | None:
    # The last one: an error's reporter ("pcieport ...: AER: ... from 0000:01:00.0") comes before its source.
    for text in reversed(_ADDRESS.findall(line)):
        try:
            return PciAddress.parse(text)
        except PciAddressError:
            continue
    return None


def study_log(lines: Iterable[str], addresses: Iterable[PciAddress] | None = None) -> list[Finding]:
    """Find in a log what stood in a device's way; worst first, then in order of the log.

    Args:
        lines: of ``dmesg``, ``journalctl -k`` or :func:`read_kernel_log`.
        addresses: devices to look for; lines that name no device count for each. None: all lines.
    """
    wanted = None if addresses is None else set(addresses)
    seen: dict[tuple[str, PciAddress | None], list[LogMatch]] = {}
    for line in lines:
        found = match_line(line)
        if found is None or (wanted is not None and found.device is not None and found.device not in wanted):
            continue
        seen.setdefault((found.pattern.name, found.device), []).append(found)
    return [_finding(several) for several in seen.values()]


def _finding(several: list[LogMatch]) -> Finding:
    last = several[-1]
    line = last.line if len(last.line) <= _EVIDENCE else f"{last.line[:_EVIDENCE]}..."
    times = f" ({len(several)} times; the last one)" if len(several) > 1 else ""
    pattern = last.pattern
    where = "machine" if last.device is None else str(last.device)
    return Finding(
        f"log: {pattern.name}",
        where,
        Problem(pattern.severity, pattern.cause, f"kernel log{times}: {line}", pattern.remedy),
    )
