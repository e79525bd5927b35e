"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from vfiopy.pci import Function, System

__all__ = ["DeviceCheck", "Finding", "MachineCheck", "Problem", "Severity"]


class Severity(Enum):
    """How bad, worst first."""

    BLOCKS = "blocks"
    """The device cannot be used until this is fixed."""
    LIMITS = "limits"
    """It can be used, but something that a driver may need does not work."""
    NOTE = "note"
    """Nothing is wrong; whoever is surprised later should have known."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a check yields.

    Attributes:
        severity: how bad.
        cause: what is wrong, one sentence.
        evidence: what was read, and where.
        remedy: what to do.
    """

    severity: Severity
    cause: str
    evidence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem, where it is and which check found it.

    Attributes:
        check: name of the check.
        object: PCI address, or ``machine``.
        problem: cause, evidence, remedy.
    """

    check: str
    object: str
    problem: Problem


@dataclass(frozen=True, slots=True)
class MachineCheck:
    """One symptom's check of the machine.

    Attributes:
        name: what it looks at; stays the same, scripts match it.
        run: yields a problem for each that it finds.
    """

    name: str
    run: Callable[[System], Iterator[Problem]]


@dataclass(frozen=True, slots=True)
class DeviceCheck:
    """One symptom's check of a function.

    Attributes:
        name: what it looks at; stays the same, scripts match it.
        run: yields a problem for each that it finds.
    """

    name: str
    run: Callable[[Function], Iterator[Problem]]
