"""``vfiopy read``, ``write``, ``dump``, ``watch``, ``shell`` and ``run`` on real functions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from modes import EDU, IGB, IVSHMEM
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app

runner = CliRunner()
RDL = str(Path(__file__).parents[2] / "examples/edu.rdl")


def ran(*words: str, status: int = 0) -> str:
    answer = runner.invoke(app, list(words))
    assert answer.exit_code == status, answer.output
    return answer.output


@pytest.mark.parametrize("backend", ["iommufd", "type1v2"])
def test_registers_of_edu(backend: str, bdf: Callable[..., str]) -> None:
    edu = bdf(EDU)
    way = ("--backend", backend)
    with vfiopy.bind(edu):
        assert ran("read", edu, "bar0", "0", *way) == "0x010000ed\n"
        assert "major  1" in ran("read", edu, "bar0", "identification", "--map", RDL, *way)
        said = ran("write", edu, "bar0", "liveness", "0x12345678", "--map", RDL, "--read-back", *way)
        assert said.startswith("liveness: 0x12345678 reads 0xedcba987\n")
        assert "not read: write-only" in ran("dump", edu, "bar0", "0", "0xa0", "--map", RDL, *way)
        assert ran("read", edu, "config", "vendor", "--no-fields", *way) == "0x1234\n"
        (line,) = ran("watch", edu, "bar0", "0", "--times", "2", "--interval", "0.01", *way).splitlines()
        assert line.endswith("0x0000  0x010000ed")


def test_what_is_written_is_lost_with_a_reset_and_that_is_told(bdf: Callable[..., str], tmp_path: Path) -> None:
    igb = bdf(IGB)
    with vfiopy.bind(igb):
        said = ran("write", igb, "bar0", "0x170", "0x1234", "--read-back")  # FCTTV, the 82576's flow control timer
        assert said.startswith("0x170: 0x00001234 reads 0x00001234\n")
        assert "what was written is lost: the kernel resets it when it is closed" in said
        assert ran("read", igb, "bar0", "0x170") == "0x00000000\n"
        with vfiopy.serve(igb, tmp_path / "igb.sock") as server:
            server.start()
            served = f"vfio-user:{tmp_path / 'igb.sock'}"
            assert "who opens it next resets it" in ran("write", served, "bar0", "0x170", "0x5678")
            assert ran("read", served, "bar0", "0x170") == "0x00000000\n"
        report = json.loads(ran("read", igb, "config", "express.link_status", "--json"))
        fields = {one["name"]: one["words"] for one in report["samples"][0]["values"][0]["fields"]}
        assert fields["speed"].endswith("GT/s")
        assert "--force writes it anyway" in ran("write", igb, "config", "pm.control.power_state", "D3hot", status=2)


def test_a_range_of_memory_into_a_file(bdf: Callable[..., str], tmp_path: Path) -> None:
    memory = bdf(IVSHMEM)
    with vfiopy.bind(memory):
        ran("write", memory, "bar2", "0x100", "0x1122334455667788", "--width", "8")
        file = tmp_path / "dump"
        ran("dump", memory, "bar2", "0x100", "0x10", "--width", "8", "-o", str(file))
        assert file.read_bytes()[:8] == bytes.fromhex("8877665544332211")


def test_a_shell_and_a_script_close_the_device_under_views_of_a_bar(bdf: Callable[..., str], tmp_path: Path) -> None:
    memory = bdf(IVSHMEM)
    tree = Path(__file__).parents[2]
    script = tmp_path / "script.py"
    script.write_text(
        "from vfiopy.mmio import numpy_view\n"
        "view = numpy_view(device.bars[2], 0, 4096)\n"
        "device.bus_master = True\n"
        "print(view.shape)\n"
        "raise ValueError('with a view alive')\n"
    )
    with vfiopy.bind(memory):
        answer = subprocess.run(
            [sys.executable, "-m", "vfiopy", "run", str(script), memory],
            cwd=tree,
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 1
        assert answer.stdout == "(4096,)\n"
        assert answer.stderr.splitlines()[-1] == "ValueError: with a view alive"
        typed = "from vfiopy.mmio import numpy_view\nview = numpy_view(bar2, 0, 4096)\nprint(view.shape)\n1/0\n"
        answer = subprocess.run(
            [sys.executable, "-m", "vfiopy", "shell", memory, "--plain"],
            cwd=tree,
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, answer.stderr
        assert "(4096,)" in answer.stdout
        with vfiopy.open(memory) as device:
            assert not device.bus_master
