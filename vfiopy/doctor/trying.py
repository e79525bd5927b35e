"""Opening a device as its user would, and trying what VFIO owns of it: what does not work shows with its errno."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from vfiopy.backend import RegionFlag
from vfiopy.device import Device
from vfiopy.dmabuf import DmaBuf
from vfiopy.doctor.finding import Finding, Problem, Severity
from vfiopy.doctor.kernel_log import LogTail, study_log
from vfiopy.errors import NotSupportedError, VfioError, VfiopyError, from_errno
from vfiopy.kernel.device_io import KernelDeviceIo
from vfiopy.kernel.hot_reset import hot_reset_info
from vfiopy.opening import open as open_device
from vfiopy.pci import Function
from vfiopy.selftest.checks import CHECKS, Check, CheckError, Facts, SkipCheckError

__all__ = ["STEPS", "Attempt", "try_out"]

Opener = Callable[..., Device]
_LITTLE_BAR = 4096  # bytes; what is less cannot be exported


@dataclass(slots=True)
class Attempt:
    """What trying found.

    Attributes:
        findings: what did not work, in the order in which it was tried.
        passed: (object, step) of what worked.
        skipped: (object, step, reason) of what the device does not have.
    """

    findings: list[Finding] = field(default_factory=list)
    passed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)


def _dma_buf(device: Device) -> None:
    """A BAR can be exported for peer-to-peer DMA; nothing reads or writes it."""
    for index in range(6):
        info = device.bars.info(index)
        if info.size >= _LITTLE_BAR and RegionFlag.MMAP in info.flags:
            DmaBuf.of_bar(device.bars[index]).close()
            return
    raise SkipCheckError("the device has no BAR that could be exported")


def _hot_reset(device: Device) -> None:
    """What a hot reset would take along is known, and is this process's."""
    if not isinstance(device.io, KernelDeviceIo):
        raise SkipCheckError("only the kernel's devices have it")
    try:
        hot_reset_info(device.io)
    except NotSupportedError as error:
        raise SkipCheckError(error.meaning) from error


def _reset(device: Device) -> Facts | None:
    """The function resets; that it cannot is worth knowing, where sysfs promised it above all."""
    if not device.can_reset:
        raise from_errno(errno.EINVAL, call="VFIO_DEVICE_RESET", object=device.name)
    return CHECKS["reset"](device)


# A function reset belongs to it: VFIO does one at open, too.
_OF_SELFTEST = (
    "identity",
    "bus master",
    "bars",
    "map one page",
    "map big",
    "last page",
    "locked memory",
    "msi",
    "msix",
    "intx",
)
_CHECKS: dict[str, Check] = {name: CHECKS[name] for name in _OF_SELFTEST} | {
    "reset": _reset,
    "dma-buf": _dma_buf,
    "hot reset": _hot_reset,
}
_NEEDED = ("open", "identity", "map one page")
_NOT_MISSED = ("dma-buf", "hot reset")

STEPS = ("open", *_CHECKS, "other way", "close")
"""Names of what is tried, in order; they stay the same, scripts match them."""


def try_out(
    function: Function,
    *,
    backend: str | None = None,
    vf_token: UUID | None = None,
    noiommu: bool = False,
    opener: Opener = open_device,
) -> Attempt:
    """Open a function that is bound to VFIO, and try what ``vfiopy selftest`` tries; no register of it is touched.

    Opening resets the device, as opening by any program does. Whoever has it open keeps it: then opening fails.

    Args:
        function: the function.
        backend: the way; None: what :func:`vfiopy.open` picks, and the other one of iommufd and type1v2, too.
        vf_token: see :func:`vfiopy.open`.
        noiommu: see :func:`vfiopy.open`.
        opener: :func:`vfiopy.open`, or what stands in for it.
    """
    attempt = Attempt()
    options = {"vf_token": vf_token, "noiommu": noiommu}
    with LogTail(function.system) as tail:
        device: Device | None = None
        with _noted(attempt, function, "open", tail):
            device = opener(str(function), backend=backend, **options)
        if device is not None:
            used = device.backend
            try:
                for name, check in _CHECKS.items():
                    with _noted(attempt, function, name, tail):
                        check(device)
            finally:
                with _noted(attempt, function, "close", tail):
                    device.close()
            other = _other_way(function, used) if backend is None else None
            if other is not None:
                with _noted(attempt, function, "other way", tail):
                    opener(str(function), backend=other, **options).close()
        tail.lines()
        # What nobody was refused for, an IOMMU fault above all, is in the log alone.
        told = {finding.problem.evidence for finding in attempt.findings}
        for finding in study_log(tail.all_lines, [function.address]):
            line = finding.problem.evidence.partition(": ")[2]
            if not any(line in evidence for evidence in told):
                attempt.findings.append(finding)
    return attempt


def _other_way(function: Function, used: str) -> str | None:
    dev = function.system.dev
    ways = {
        "iommufd": (function.cdev_node, dev / "iommu"),
        "type1v2": (function.group_node, dev / "vfio/vfio"),
    }
    for name, nodes in ways.items():
        if used in ways and name != used and all(node is not None and node.exists() for node in nodes):
            return name
    return None


@contextmanager
def _noted(attempt: Attempt, function: Function, name: str, tail: LogTail) -> Iterator[None]:
    where = str(function)
    try:
        yield
    except SkipCheckError as reason:
        attempt.skipped.append((where, name, str(reason)))
    except NotSupportedError as error:
        if name not in _NOT_MISSED:
            attempt.findings.append(_finding(where, name, error, tail.lines()))
        else:
            attempt.findings.append(_finding(where, name, error, tail.lines(), Severity.NOTE))
    except (VfiopyError, CheckError, OSError, ValueError) as error:
        attempt.findings.append(_finding(where, name, error, tail.lines()))
    else:
        attempt.passed.append((where, name))


def _finding(where: str, name: str, error: Exception, lines: list[str], severity: Severity | None = None) -> Finding:
    if severity is None:
        severity = Severity.BLOCKS if name in _NEEDED else Severity.LIMITS
    logged = study_log(lines)
    words = [one.problem.evidence for one in logged]
    if isinstance(error, VfioError):
        number = error.errno or 0
        what = f"{errno.errorcode.get(number, str(number))} ({os.strerror(number)})"
        evidence = f"{error.object}: {error.call or name}: {what}" if error.object else f"{error.call or name}: {what}"
        cause, remedy = error.meaning, error.hint
    else:
        evidence, cause, remedy = f"while trying: {name}", str(error) or type(error).__name__, ""
    if not remedy:
        remedy = logged[0].problem.remedy if logged else "see the kernel's log, and 'vfiopy selftest' for more"
    return Finding(name, where, Problem(severity, cause, "; ".join([evidence, *words]), remedy))
