"""tools/test adds its parts up, and nothing that failed gets lost."""

from __future__ import annotations

from pathlib import Path

import lab_import  # noqa: F401

from tools._setup.environment import COMPILER
from tools._setup.results import Results

JUNIT = '<testsuites><testsuite name="pytest" errors="{}" failures="{}" skipped="{}" tests="{}"/></testsuites>'


def junit(folder: Path, errors: int, failures: int, skipped: int, tests: int) -> Path:
    path = folder / "results.xml"
    path.write_text(JUNIT.format(errors, failures, skipped, tests))
    return path


def test_counts_of_suites_and_checks_add_up(tmp_path: Path) -> None:
    results = Results()
    results.check("lint", ok=True, seconds=1.0)
    results.suite("unit", junit(tmp_path, 1, 2, 3, 20), 1, 2.0)
    assert results.summary(61.0).splitlines()[-1] == "15 passed, 3 failed, 3 skipped in 61 s"
    assert not results.ok


def test_suite_without_results_failed(tmp_path: Path) -> None:
    results = Results()
    part = results.suite("guest", tmp_path / "absent.xml", 125, 2.0)
    assert (part.failed, part.note) == (1, "no results came back")


def test_exit_status_that_the_counts_do_not_explain_is_a_failure(tmp_path: Path) -> None:
    results = Results()
    part = results.suite("guest", junit(tmp_path, 0, 0, 0, 5), 121, 2.0)
    assert (part.passed, part.failed, part.note) == (5, 1, "exit status 121")


def test_missing_results_of_a_successful_run_are_a_failure_too(tmp_path: Path) -> None:
    results = Results()
    results.suite("unit", tmp_path / "absent.xml", 0, 2.0)
    assert not results.ok


def test_compiler_warnings_are_told_from_pips_remarks() -> None:
    assert COMPILER.search("  native/iova/space.c:12:3: warning: unused variable 'x' [-Wunused-variable]")
    assert COMPILER.search("  /usr/bin/ld: warning: x.o: missing .note.GNU-stack section implies executable stack")
    assert not COMPILER.search("  SetuptoolsDeprecationWarning: warning: no files found matching")
    assert not COMPILER.search("  gcc -Wall -Wextra -c native/iova/space.c -o build/space.o")
