"""A device that vfiopy serves on the host, driven by vfiopy in the guest through real VFIO: both ends at once.

In between are QEMU's vfio-user-pci, an Intel vIOMMU and Linux. Each page that is mapped here arrives at the server as a
DMA_MAP of its own.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import vfiopy
from vfiopy import selftest
from vfiopy.drivers.edu import BUFFER_SIZE, EduDriver

pytestmark = pytest.mark.machine("vfio-user")

EXAMPLE = Path(__file__).parents[2] / "examples/edu.py"
SERVED = "0000:00:10.0"


@pytest.mark.parametrize("mode", ["iommufd", "type1v2"])
def test_the_example(mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["edu.py", SERVED, "--backend", mode])
    with vfiopy.bind(SERVED), pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    output = capsys.readouterr().out
    assert ended.value.code == 0, output
    assert output.endswith("9 of 9 checks passed\n")


def test_the_selftest() -> None:
    with vfiopy.bind(SERVED):
        report = selftest.run(SERVED)
    assert report.ok, [result for result in report.results if result.status == "failed"]


def test_one_buffer_after_another() -> None:
    """What is unmapped is out of reach, what is mapped in its place is not the old memory."""
    with vfiopy.bind(SERVED), vfiopy.open(SERVED) as device:
        device.bus_master = True
        edu = EduDriver(device)
        for number in range(8):
            with device.dma.allocate(64 * BUFFER_SIZE) as buffer:
                buffer[:BUFFER_SIZE] = np.arange(BUFFER_SIZE) * (number + 1) % 251
                edu.load(buffer.iova, BUFFER_SIZE)
                edu.store(buffer.iova + 63 * BUFFER_SIZE, BUFFER_SIZE)
                assert np.array_equal(buffer[:BUFFER_SIZE], buffer[63 * BUFFER_SIZE :])
