"""Runs the checks over every way that reaches the device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import vfiopy
from vfiopy.backend import RegionIndex
from vfiopy.errors import VfiopyError
from vfiopy.selftest.checks import CHECKS, Check, SkipCheckError
from vfiopy.selftest.report import Report, Result, Status, machine_facts

__all__ = ["ALL_BACKENDS", "run"]

ALL_BACKENDS = ("iommufd", "type1v2", "type1", "iommufd-compat-type1v2", "iommufd-compat-type1")


def run(
    target: str,
    *,
    backends: Sequence[str | None] = (None,),
    on_result: Callable[[Result], None] | None = None,
) -> Report:
    """Check a device that is bound to vfio-pci (or ``"emulated:edu"``).

    Args:
        target: what ``vfiopy.open()`` takes.
        backends: the ways to reach it, one after the other; None for the one that ``open()`` picks.
        on_result: called with each result as it comes.
    """
    report = Report(target, machine_facts())

    def add(result: Result) -> None:
        report.results.append(result)
        if on_result is not None:
            on_result(result)

    for backend in backends:
        fds_before = _open_fds()
        begin = time.perf_counter()
        try:
            device = vfiopy.open(target, backend=backend)
        except VfiopyError as error:
            add(Result("open", backend or "auto", Status.FAILED, str(error), time.perf_counter() - begin))
            continue
        name = device.backend
        try:
            add(Result("open", name, Status.PASSED, "", time.perf_counter() - begin))
            report.device = _describe(device)
            for label, check in CHECKS.items():
                add(_run_check(label, name, check, device))
        except BaseException:  # KeyboardInterrupt, or on_result does not want to go on
            device.close()
            raise
        closed = _run_check("close", name, vfiopy.Device.close, device)
        add(_leak_result(name, fds_before) if closed.status is Status.PASSED else closed)
    return report


def _describe(device: vfiopy.Device) -> dict[str, Any]:
    try:
        return {
            "vendor": f"{device.config.vendor:04x}",
            "device": f"{device.config.device:04x}",
            "config_size": device.io.region_info(RegionIndex.CONFIG).size,
        }
    except VfiopyError:
        return {}  # the check of its identity says why


def _run_check(label: str, backend: str, check: Check, device: vfiopy.Device) -> Result:
    begin = time.perf_counter()
    facts = {}
    try:
        facts = check(device) or {}
        status, detail = Status.PASSED, ""
    except SkipCheckError as reason:
        status, detail = Status.SKIPPED, str(reason)
    except Exception as error:  # whatever it is, who runs this is to get a report and not a traceback
        status, detail = Status.FAILED, f"{type(error).__name__}: {error}"
    return Result(label, backend, status, detail, time.perf_counter() - begin, facts)


def _leak_result(backend: str, before: set[str]) -> Result:
    left = _open_fds() - before
    if left:
        return Result("nothing left open", backend, Status.FAILED, f"open after close: {sorted(left)}", 0.0)
    return Result("nothing left open", backend, Status.PASSED, "", 0.0)


def _open_fds() -> set[str]:
    found = set()
    with os.scandir("/proc/self/fd") as entries:
        for entry in entries:
            try:
                found.add(f"{entry.name} {os.readlink(entry.path)}")  # noqa: PTH115  scandir gives strings
            except OSError:
                continue
    # scandir's own fd is among them; it is closed again by now
    return {item for item in found if os.path.exists(f"/proc/self/fd/{item.split()[0]}")}  # noqa: PTH110
