"""The command line as a user or a script meets it."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from vfiopy import __version__
from vfiopy.cli.app import app
from vfiopy.cli.main import main

runner = CliRunner()


def test_version() -> None:
    answer = runner.invoke(app, ["--version"])
    assert (answer.exit_code, answer.stdout) == (0, f"vfiopy {__version__}\n")


def test_selftest_prints_a_report_that_others_can_read() -> None:
    answer = runner.invoke(app, ["selftest", "emulated:edu", "--json"])
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert report["ok"]
    assert report["device"]["vendor"] == "1234"
    assert {"cpu", "kernel", "python", "vfiopy"} <= set(report["machine"])
    statuses = {result["name"]: result["status"] for result in report["results"]}
    assert statuses["map one page"] == "passed"
    assert statuses["msix"] == "skipped"
    assert statuses["nothing left open"] == "passed"


def test_selftest_as_a_table() -> None:
    answer = runner.invoke(app, ["selftest", "emulated:edu"])
    assert answer.exit_code == 0
    assert "0 failed" in answer.stdout


def test_selftest_of_what_is_not_there_fails() -> None:
    answer = runner.invoke(app, ["selftest", "0000:00:1d.7", "--json"])
    assert answer.exit_code == 1
    (result,) = json.loads(answer.stdout)["results"]
    assert result["status"] == "failed"
    assert "0000:00:1d.7" in result["detail"]


def test_unknown_backend_is_bad_usage() -> None:
    answer = runner.invoke(app, ["selftest", "emulated:edu", "--backend", "uio"])
    assert answer.exit_code == 2
    assert "'uio' is none of iommufd" in answer.output


def test_refusals_are_two_lines_and_no_traceback() -> None:
    answer = runner.invoke(app, ["bind", "0000:00:1d.7"])
    assert answer.exit_code == 1
    assert answer.output.startswith("vfiopy: 0000:00:1d.7: ")
    assert "Traceback" not in answer.output
    answer = runner.invoke(app, ["bind", "nonsense"])
    assert answer.exit_code == 1
    assert "not a PCI address" in answer.output


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "vfiopy.cli.app")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pip install 'vfiopy[cli]'" in capsys.readouterr().err
