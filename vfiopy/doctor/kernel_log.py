"""What the kernel logged about VFIO, IOMMUs and devices, and what it means.

:mod:`vfiopy.pci.kernel_log` reads it, :mod:`vfiopy.pci.iommu_faults` decodes faults; here is what to do about it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vfiopy.doctor.finding import Finding, Problem, Severity
from vfiopy.doctor.log_patterns import INTERRUPT_FAULT, IOMMU_FAULT, PATTERNS, Pattern
from vfiopy.errors import PciAddressError, VfioError
from vfiopy.pci import PciAddress, System
from vfiopy.pci.iommu_faults import FaultDecoder, IommuFault, is_fault_line
from vfiopy.pci.kernel_log import LogReader

__all__ = ["LogMatch", "LogTail", "match_lines", "read_kernel_log", "study_log"]

_ADDRESS = re.compile(r"(?<![0-9a-fA-F:.])(?:[0-9a-fA-F]{4,8}:)?[0-9a-fA-F]{2}:[0-9a-fA-F]{2}\.[0-7](?![0-9a-fA-F])")
_EVIDENCE = 200  # characters of a line


@dataclass(frozen=True, slots=True)
class LogMatch:
    """A line that says something, or several that tell one fault.

    Attributes:
        pattern: what it matched.
        device: the device that it names, None where it names none.
        line: the line without surrounding white space, or the fault in words.
    """

    pattern: Pattern
    device: PciAddress | None
    line: str


def read_kernel_log(system: System | None = None) -> list[str]:
    """All that the kernel's log holds now, oldest first, one message each.

    Raises:
        PermissionDeniedError: the kernel keeps its log to root (``kernel.dmesg_restrict``).
        VfioError: there is no such log, as in some containers.
    """
    with LogReader(system, from_start=True) as reader:
        return [line.text for line in reader.lines()]


class LogTail:
    """What the kernel logs from now on; nothing where its log cannot be read. A context manager."""

    def __init__(self, system: System | None = None) -> None:
        self.all_lines: list[str] = []
        self._reader: LogReader | None = None
        try:
            self._reader = LogReader(system)
        except VfioError:  # no right to read it, or no such log
            return

    def lines(self) -> list[str]:
        """The lines since the last call."""
        fresh = [] if self._reader is None else [line.text for line in self._reader.lines()]
        self.all_lines += fresh
        return fresh

    def close(self) -> None:
        """Let the log go; safe to call twice."""
        if self._reader is not None:
            self._reader.close()

    def __enter__(self) -> LogTail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def match_lines(lines: Iterable[str]) -> Iterator[LogMatch]:
    """Say what lines of a log mean, in their order; those that nothing is known about are left out."""
    decoder = FaultDecoder()
    for line in lines:
        yield from map(_of_fault, decoder.feed(line))
        if is_fault_line(line):
            continue
        pattern = next((one for one in PATTERNS if one.regex is not None and one.regex.search(line)), None)
        if pattern is not None:
            yield LogMatch(pattern, _device_of(line), line.strip())
    yield from map(_of_fault, decoder.flush())


def _of_fault(fault: IommuFault) -> LogMatch:
    return LogMatch(INTERRUPT_FAULT if fault.interrupt else IOMMU_FAULT, fault.source, str(fault))


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
    for found in match_lines(lines):
        if wanted is not None and found.device is not None and found.device not in wanted:
            continue
        seen.setdefault((found.pattern.name, found.device), []).append(found)
    severities = list(Severity)
    findings = [_finding(several) for several in seen.values()]
    return sorted(findings, key=lambda finding: severities.index(finding.problem.severity))


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
