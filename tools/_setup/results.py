"""Adding up what the parts of a test run found."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

__all__ = ["Part", "Results"]


@dataclasses.dataclass
class Part:
    """One part's outcome: a test suite's counts, or 1 for a check that either holds or does not."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return self.failed == 0


class Results:
    """All parts of a run."""

    def __init__(self) -> None:
        """Start empty."""
        self.parts: list[Part] = []

    def check(self, name: str, ok: bool, seconds: float, note: str = "") -> Part:
        """Add a check that is not a test suite."""
        part = Part(name, int(ok), int(not ok), 0, seconds, note)
        self.parts.append(part)
        return part

    def suite(self, name: str, junit: Path, status: int, seconds: float) -> Part:
        """Add a pytest run by its JUnit file; an exit status that this does not explain is a failure too."""
        part = Part(name, seconds=seconds)
        self.parts.append(part)
        try:
            for suite in ET.parse(junit).getroot().iter("testsuite"):
                tests, failures, errors, skipped = (
                    int(suite.get(key, "0")) for key in ("tests", "failures", "errors", "skipped")
                )
                part.failed += failures + errors
                part.skipped += skipped
                part.passed += max(0, tests - failures - errors - skipped)
        except (OSError, ET.ParseError):
            part.note = "no results came back"
        if part.ok and (status or part.note):
            part.failed += 1
            part.note = part.note or f"exit status {status}"
        return part

    @property
    def ok(self) -> bool:
        """Whether every part is."""
        return all(part.ok for part in self.parts)

    def summary(self, seconds: float) -> str:
        """A table, and last a line in pytest's own form."""
        lines = ["", "part                      passed  failed  skipped   seconds"]
        for part in self.parts:
            counts = f"{part.passed:8d}{part.failed:8d}{part.skipped:9d}{part.seconds:10.1f}"
            lines.append(f"{part.name:24}{counts}{'  ' + part.note if part.note else ''}")
        total = [sum(getattr(part, key) for part in self.parts) for key in ("passed", "failed", "skipped")]
        last = "{} passed, {} failed, {} skipped".format(*total)
        return "\n".join([*lines, "", f"{last} in {seconds:.0f} s"])
