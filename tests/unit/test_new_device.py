"""The device that `vfiopy new-device` writes: it runs as it is, in every way."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from ways import WAYS, opened

from vfiopy import uapi
from vfiopy.backend import MigrationStream
from vfiopy.cli.app import app

runner = CliRunner()


@pytest.fixture
def made(tmp_path: Path) -> Any:
    answer = runner.invoke(app, ["new-device", "my-first-card", "--folder", str(tmp_path)])
    assert answer.exit_code == 0, answer.output
    path = tmp_path / "my_first_card.py"
    assert f"python {path} /tmp/my-first-card.sock" in answer.stdout.replace("\n", "")
    assert "NewDevice" not in path.read_text()
    return runpy.run_path(str(path))["MyFirstCard"]


@pytest.mark.parametrize("way", WAYS)
def test_it_runs(made: Any, way: str) -> None:
    card = made(delay=(0.0, 0.0))
    assert card.name == "my-first-card"
    with opened(card, way) as device:
        bar = device.bars[0]
        device.bus_master = True
        (vector,) = device.irqs.msix.enable()
        with device.dma.allocate(1, dtype="u4") as buffer:
            for number in (5, 7):
                bar.write32(0x00, number)
            bar.write64(0x08, buffer.iova)
            bar.write32(0x10, 1)
            assert vector.wait(5.0) == 1
            assert int(buffer[0]) == bar.read32(0x00) == 12
            assert bar.read64(0x08) == buffer.iova
        bar.write32(0x10, 1)  # where nothing is mapped any more
        device.reset()
        assert bar.read32(0x00) == 0
        assert bar.read32(0x40) == 0xFFFF_FFFF


def test_it_can_be_migrated(made: Any) -> None:
    with opened(made(), "emulated") as old, opened(made(), "emulated") as new:
        old.bars[0].write32(0, 3)
        assert isinstance(old.io, MigrationStream)
        assert isinstance(new.io, MigrationStream)

        def move(io: Any, state: int) -> None:
            data = state.to_bytes(4, "little") + bytes(4)
            io.feature(uapi.VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE, uapi.VFIO_DEVICE_FEATURE_SET, data)

        move(old.io, uapi.VFIO_DEVICE_STATE_STOP_COPY)
        move(new.io, uapi.VFIO_DEVICE_STATE_RESUMING)
        new.io.migration_write(old.io.migration_read(1 << 20))
        move(new.io, uapi.VFIO_DEVICE_STATE_RUNNING)
        assert new.bars[0].read32(0) == 3


def test_nothing_is_overwritten_and_names_are_checked(made: Any, tmp_path: Path) -> None:
    again = runner.invoke(app, ["new-device", "my-first-card", "--folder", str(tmp_path)])
    assert again.exit_code == 1
    assert "File exists" in again.output
    for name in ("My-Card", "my card", "-x", "x-", "../x", ""):
        assert runner.invoke(app, ["new-device", "--folder", str(tmp_path), "--", name]).exit_code == 2
