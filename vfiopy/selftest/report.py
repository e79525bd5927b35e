"""What a selftest found, in a form that can be sent to somebody else."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

__all__ = ["Report", "Result", "Status", "machine_facts"]

FORMAT = 1


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """One check: its name, how it ended, why, how long it took in seconds, and what it measured."""

    name: str
    backend: str
    status: Status
    detail: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """All results for one device."""

    target: str
    machine: dict[str, str]
    device: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when no check failed and at least one passed."""
        statuses = [result.status for result in self.results]
        return Status.FAILED not in statuses and Status.PASSED in statuses

    def count(self, status: Status) -> int:
        """Return how many checks ended so."""
        return sum(result.status is status for result in self.results)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {
            "format": FORMAT,
            "target": self.target,
            "ok": self.ok,
            "machine": self.machine,
            "device": self.device,
            "results": [asdict(result) for result in self.results],
        }


def machine_facts() -> dict[str, str]:
    """Return what a figure means nothing without: CPU, kernel, Python, vfiopy."""
    from vfiopy import __version__  # noqa: PLC0415  the package imports nothing of us

    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    hypervisor = Path("/sys/class/dmi/id/product_name")
    try:
        machine = hypervisor.read_text(encoding="utf-8").strip()
    except OSError:
        machine = "unknown"
    return {
        "cpu": model,
        "machine": machine,
        "kernel": platform.release(),
        "python": sys.version.split()[0],
        "vfiopy": __version__,
    }
