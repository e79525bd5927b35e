"""The edu example, unchanged, on the real function in all five modes."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from modes import EDU, MODES

import vfiopy

EXAMPLE = Path(__file__).parents[2] / "examples/edu.py"


@pytest.mark.parametrize("mode", MODES)
def test_example(
    mode: str, bdf: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    address = bdf(EDU)
    monkeypatch.setattr(sys, "argv", ["edu.py", address, "--backend", mode])
    with vfiopy.bind(address), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    output = capsys.readouterr().out
    assert ended.value.code == 0, output
    assert f"reached through {mode}\n" in output
    assert output.endswith("9 of 9 checks passed\n")
