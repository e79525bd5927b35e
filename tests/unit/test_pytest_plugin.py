"""The fixtures for other people's driver tests."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest

import vfiopy

pytest_plugins = ["pytester"]

SCRIPT = """
def test_reads_its_id(vfiopy_device, vfiopy_space):
    assert vfiopy_device.space is vfiopy_space
    assert vfiopy_device.config.vendor == 0x1234
    assert vfiopy_device.dma.allocate(16).iova

def test_without_a_device():
    pass
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("VFIOPY_BDF", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(Path(vfiopy.__file__).parents[1]))
    pytester.makepyfile(SCRIPT)
    return pytester


def run(suite: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # An installed vfiopy announces its plugin by itself; naming it again would register it twice.
    installed = any(point.name == "vfiopy" for point in entry_points(group="pytest11"))
    named = () if installed else ("-p", "vfiopy.pytest_plugin")
    return suite.runpytest_subprocess(*named, "-p", "no:cacheprovider", *arguments)


def test_skips_with_a_usage_text_where_no_device_is_named(suite: pytest.Pytester) -> None:
    result = run(suite, "-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*name a device: pytest --bdf 0000:00:05.0*"])


def test_runs_once_per_device(suite: pytest.Pytester) -> None:
    result = run(suite, "--bdf", "emulated:edu", "--bdf", "emulated:edu")
    result.assert_outcomes(passed=3)


def test_takes_the_device_from_the_environment(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFIOPY_BDF", "emulated:edu")
    run(suite).assert_outcomes(passed=2)
