"""tools/bench on the lab's devices: that all of it runs and says what was measured; the figures are TCG's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

TREE = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["dma_map", "irq", "p2p"])
def test_a_smoke_test_of_each_benchmark(name: str, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [sys.executable, str(TREE / "tools" / "bench"), name, "--quick", "--json", str(file)]
    # A session of its own: the processes that a benchmark starts must not outlive it and keep the device.
    with subprocess.Popen(command, stdout=PIPE, stderr=PIPE, text=True, start_new_session=True) as process:
        try:
            _, complaints = process.communicate(timeout=110)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, complaints
    results = json.loads(file.read_text())
    assert results["machine"]["virtualization"] in ("TCG", "KVM")
    groups: dict[str, list[dict[str, object]]] = {}
    for row in results["benchmarks"][name]:
        groups.setdefault(row["group"], []).append(row)
    wanted = {
        "dma_map": [f"{backend}, {size}" for backend in ("type1v2", "iommufd") for size in ("4 KiB", "64 x 4 KiB")],
        "irq": ["edu, MSI, raised by register", "82576 (igb), MSI-X, cause set by register"],
        "p2p": ["map, 4 KiB", "map, 16 MiB", "disk to BAR, 64 KiB", "disk to BAR, 1 MiB"],
    }
    assert set(wanted[name]) <= set(groups)
    for rows in groups.values():
        assert [row["name"] for row in rows if row["baseline"]] == [rows[0]["name"]]
        assert name == "p2p" or str(rows[0]["name"]).startswith("C: ")
        assert name == "p2p" or any(row["goal"] is not None for row in rows)
        assert all(float(str(row["value"])) > 0 for row in rows)
