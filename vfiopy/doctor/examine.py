"""Running the checks, and the order in which to fix what they find."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from vfiopy.doctor.binding import BINDING_CHECKS
from vfiopy.doctor.finding import Finding, Problem, Severity
from vfiopy.doctor.machine import MACHINE_CHECKS
from vfiopy.doctor.opening import OPENING_CHECKS
from vfiopy.errors import VfioError
from vfiopy.pci import Function, System

__all__ = ["Report", "examine"]

_RANK = {severity: rank for rank, severity in enumerate(Severity)}


@dataclass(frozen=True, slots=True)
class Report:
    """What an examination found.

    Attributes:
        findings: in order of what to fix first.
        passed: (object, check) of those that found nothing.
        skipped: (object, check, reason) of those that could not look.
    """

    findings: tuple[Finding, ...]
    passed: tuple[tuple[str, str], ...]
    skipped: tuple[tuple[str, str, str], ...]

    @property
    def ok(self) -> bool:
        """Nothing keeps the devices from being used."""
        return all(finding.problem.severity is not Severity.BLOCKS for finding in self.findings)

    def joined(
        self,
        findings: Iterable[Finding],
        passed: Iterable[tuple[str, str]] = (),
        skipped: Iterable[tuple[str, str, str]] = (),
    ) -> Report:
        """This report with more findings, which come after its own of the same severity."""
        both = sorted((*self.findings, *findings), key=lambda finding: _RANK[finding.problem.severity])
        return Report(tuple(both), (*self.passed, *passed), (*self.skipped, *skipped))


def examine(functions: Iterable[Function], *, system: System | None = None) -> Report:
    """Check the machine, then each function. Opens nothing, changes nothing.

    Args:
        functions: which ones; none checks the machine alone.
        system: other roots than /sys, /proc and /dev, for the machine's checks.
    """
    system = System() if system is None else system
    findings: list[Finding] = []
    passed: list[tuple[str, str]] = []
    skipped: list[tuple[str, str, str]] = []

    def look(where: str, name: str, run: Callable[[], Iterator[Problem]]) -> None:
        try:
            problems = list(run())
        except VfioError as error:
            skipped.append((where, name, error.meaning))
        except OSError as error:
            skipped.append((where, name, str(error)))
        else:
            findings.extend(Finding(name, where, problem) for problem in problems)
            if not problems:
                passed.append((where, name))

    for check in MACHINE_CHECKS:
        look("machine", check.name, partial(check.run, system))
    for one in functions:
        for each in (*BINDING_CHECKS, *OPENING_CHECKS):
            look(str(one), each.name, partial(each.run, one))
    if os.geteuid():
        skipped.append(("machine", "other users", "without root, processes of other users are not seen"))
    findings.sort(key=lambda finding: _RANK[finding.problem.severity])  # stable: the checks' order stays
    return Report(tuple(findings), tuple(passed), tuple(skipped))
