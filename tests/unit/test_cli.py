"""The command line as a user or a script meets it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vfiopy
from vfiopy import __version__
from vfiopy.cli.app import app
from vfiopy.cli.main import main

runner = CliRunner()


def test_version() -> None:
    answer = runner.invoke(app, ["--version"])
    assert (answer.exit_code, answer.stdout) == (0, f"vfiopy {__version__}\n")


def test_commands_that_the_documentation_names_exist() -> None:
    tree = Path(__file__).resolve().parents[2]
    named = set()
    for page in (tree / "README.md", *(tree / "docs").glob("*.md")):
        text = page.read_text().partition("**Not yet**")[0]  # what is to come is named there
        text = re.sub(r"^vfiopy(?= lets a)", "It", text, flags=re.MULTILINE)  # prose
        named |= set(re.findall(r"(?:`|^ *|sudo |bin/)vfiopy ([a-z-]+)", text, re.MULTILINE))
    assert {"bind", "new-device", "restore", "selftest", "serve"} <= named
    assert [name for name in sorted(named) if runner.invoke(app, [name, "--help"]).exit_code] == []


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
    assert answer.exit_code == 2
    assert "not a PCI address" in answer.output


def test_without_typer_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "typer", None)
    monkeypatch.delitem(sys.modules, "vfiopy.cli.commands")
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "pip install 'vfiopy[cli]'" in capsys.readouterr().err


def test_serve_prints_what_to_say_and_ends_clean(tmp_path: Path) -> None:
    path = tmp_path / "new" / "edu.sock"
    command = [sys.executable, "-m", "vfiopy", "serve", "edu", "--socket", os.fspath(path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(5)]
        try:
            assert lines[0] == f"serving emulated:edu at {path}\n"
            option = shlex.split(lines[1])[2]
            assert json.loads(option) == {"driver": "vfio-user-pci", "socket": {"path": str(path), "type": "unix"}}
            assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
            with vfiopy.open(lines[4].split("'")[1]) as device:
                assert device.bars[0].read32(0) == 0x010000ED
            again = runner.invoke(app, ["serve", "edu", "--socket", str(path)])
            assert again.exit_code == 1
            assert "a server listens there already" in again.output
        finally:
            server.terminate()
        assert server.wait(10) == 0
    assert not path.exists()


def test_serving_what_does_not_exist(tmp_path: Path) -> None:
    answer = runner.invoke(app, ["serve", "nothing", "--socket", str(tmp_path / "x.sock")])
    assert answer.exit_code == 1
    assert "there is no emulated device 'nothing'" in answer.output
