"""Commands in the background of tools/test: what they print and how they end gets to who waits."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import lab_import  # noqa: F401
import pytest

from tools._setup.beside import Beside


def test_output_and_exit_status_come_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = "import os, sys, time; print(os.environ['WHERE'], flush=True); time.sleep(1.2); print('late'); sys.exit(3)"
    beside = Beside([sys.executable, "-c", script], tmp_path / "deep" / "log", {"WHERE": "beside"})
    assert not beside.ended
    assert beside.follow() == 3
    assert capsys.readouterr().out == "beside\nlate\n"
    assert beside.ended
    assert not beside.succeeded
    assert 1.0 < beside.seconds < 60.0
    assert beside.follow() == 3
    beside.stop()


def test_what_still_runs_is_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = Beside([sys.executable, "-c", "import time; time.sleep(1000)"], tmp_path / "log")
    started = time.monotonic()
    beside.stop()
    assert time.monotonic() - started < 60
    assert beside.ended
    assert not beside.succeeded
    assert "==> stopping" in capsys.readouterr().out
