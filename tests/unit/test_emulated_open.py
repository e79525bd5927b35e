"""Emulated devices through everything that is above the seam: open, the edu driver, the example, the docs."""

from __future__ import annotations

import asyncio
import gc
import math
import re
import runpy
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from emulated_support import Everything
from ways import WAYS, opened, served

import vfiopy
from vfiopy.drivers.edu import BUFFER_SIZE, EduDriver
from vfiopy.emulated import Edu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def card() -> Edu:
    return Edu(seed=7, delay=(0.0, 0.001))


@pytest.fixture(params=WAYS)
def edu(card: Edu, request: pytest.FixtureRequest) -> Iterator[EduDriver]:
    with opened(card, request.param) as device:
        device.bus_master = True
        yield EduDriver(device)


def test_open_by_name() -> None:
    with vfiopy.open("emulated:edu") as device:
        assert (device.name, device.backend) == ("emulated:edu", "emulated")
        assert not device.bus_master
        assert device.memory_enabled
        assert device.bars[0].size == 1 << 20
        assert [index for index in range(6) if index in device.bars] == [0]
        assert [type(capability).__name__ for capability in device.config.capabilities()] == ["Msi"]
        assert device.irqs.msi.count == 1


def test_an_unknown_name_is_refused_and_leaves_nothing() -> None:
    with pytest.raises(vfiopy.DeviceNotFoundError, match="no emulated device 'nvm'"):
        vfiopy.open("emulated:nvm")


def test_everything_shows_its_capabilities() -> None:
    with vfiopy.open(Everything(manual=True)) as device:
        names = [type(capability).__name__ for capability in device.config.capabilities()]
        assert len(names) == 4
        assert "MsiX" in names
        device.bars[2].write32(0x10, 0x12345678)
        assert device.bars[2].read32(0x10) == 0x12345678
        assert device.can_reset
        device.reset()


def test_mapped_memory_with_decode_off_raises_and_comes_back() -> None:
    with vfiopy.open(Everything(manual=True)) as device:
        bar = device.bars[2]
        bar.write32(0, 7)
        device.memory_enabled = False
        with pytest.raises(vfiopy.DeviceGoneError):
            bar.read32(0)
        device.memory_enabled = True
        assert bar.read32(0) == 7


# --- the driver --------------------------------------------------------------------------------------------------


def test_the_driver_wants_an_edu() -> None:
    with (
        vfiopy.open(Everything(manual=True)) as device,
        pytest.raises(vfiopy.NotSupportedError, match="1b36:00fe, edu is 1234:11e8"),
    ):
        EduDriver(device)


def test_version_and_liveness(edu: EduDriver) -> None:
    assert edu.version == (1, 0)
    assert edu.invert(0x0F0F0F0F) == 0xF0F0F0F0


@pytest.mark.parametrize("kind", [None, "msi", "intx"])
def test_factorials_and_dma(edu: EduDriver, kind: str | None) -> None:
    if kind:
        edu.enable_interrupts(kind)  # type: ignore[arg-type]
    for number in (0, 5, 12, 20):
        assert edu.factorial(number) == math.factorial(number) % 2**32
    with edu.device.dma.allocate(2 * BUFFER_SIZE, dtype="u1") as buffer:
        buffer[:BUFFER_SIZE] = np.arange(BUFFER_SIZE) % 251
        edu.load(buffer.iova, BUFFER_SIZE)
        edu.store(buffer[BUFFER_SIZE:].iova, 100, offset=50)
        assert np.array_equal(buffer[BUFFER_SIZE : BUFFER_SIZE + 100], buffer[50:150])
        assert not buffer[BUFFER_SIZE + 100 :].any()
    edu.disable_interrupts()


def test_buffers_are_within_the_devices_reach(edu: EduDriver) -> None:
    with edu.device.dma.allocate(4096) as buffer:
        assert buffer.iova + 4096 <= 1 << 28
    with pytest.raises(vfiopy.IovaRangeError):
        edu.device.dma.allocate(4096, iova=1 << 28)


def test_a_lost_interrupt_is_a_timeout(edu: EduDriver, card: Edu) -> None:
    edu.enable_interrupts("msi")
    card.inject.lost_interrupts = 1
    with pytest.raises(vfiopy.VfioTimeoutError):
        edu.factorial(5, timeout=0.05)
    assert edu.factorial(6, timeout=5.0) == 720


def test_a_device_that_hangs_is_a_timeout(edu: EduDriver, card: Edu) -> None:
    card.inject.lost_work = 1
    with edu.device.dma.allocate(16) as buffer, pytest.raises(vfiopy.VfioTimeoutError, match="16 bytes did not end"):
        edu.load(buffer.iova, 16, timeout=0.05)


def test_dma_after_unmap_is_a_fault_not_a_crash(edu: EduDriver, card: Edu) -> None:
    buffer = edu.device.dma.allocate(4096)
    iova = buffer.iova
    buffer.free()
    edu.store(iova, 16)
    assert [fault[:3] for fault in card.faults] == [(iova, 16, True)]


def test_without_bus_mastering_the_driver_says_so(edu: EduDriver) -> None:
    edu.device.bus_master = False
    with pytest.raises(vfiopy.StateError, match="bus_master = True"):
        edu.load(0x1000, 4)
    with pytest.raises(vfiopy.StateError, match="bus_master = True"):
        edu.enable_interrupts("msi")


def test_ranges_are_checked(edu: EduDriver) -> None:
    for offset, size in ((0, BUFFER_SIZE + 1), (BUFFER_SIZE, 1), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match="not inside"):
            edu.load(0x1000, size, offset=offset)
    with pytest.raises(vfiopy.StateError, match="enable_interrupts"):
        edu.wait_interrupt()


def test_interrupts_in_asyncio(edu: EduDriver) -> None:
    vector = edu.enable_interrupts("msi")

    async def main() -> int:
        asyncio.get_running_loop().call_later(0.01, edu.raise_interrupt, 0x10)
        return await vector.wait_async(5.0)

    assert asyncio.run(main()) == 1


def test_two_devices_in_one_space() -> None:
    with (
        vfiopy.AddressSpace("shared") as space,
        vfiopy.open(Edu(delay=(0.0, 0.0)), space=space) as first,
        vfiopy.open(Edu(delay=(0.0, 0.0)), space=space) as second,
    ):
        first.bus_master = second.bus_master = True
        one, two = EduDriver(first), EduDriver(second)
        with space.allocate(64, limit=(1 << 28) - 1) as buffer:
            buffer[:] = np.arange(64)
            one.load(buffer.iova, 64)
            buffer[:] = 0
            one.store(buffer.iova, 32)
            two.load(buffer.iova, 64)
            two.store(buffer.iova + 32, 32)
            assert np.array_equal(buffer, np.concatenate([np.arange(32), np.arange(32)]))


def test_closing_with_work_pending_leaves_nothing() -> None:
    gc.collect()
    threads, fds = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        with vfiopy.open(Edu(delay=(0.0, 0.002))) as device:
            device.bus_master = True
            edu = EduDriver(device)
            edu.enable_interrupts()
            buffer = device.dma.allocate(4096)
            device.bars[0].write64(0x80, 0x40000)
            device.bars[0].write64(0x88, buffer.iova)
            device.bars[0].write64(0x90, 4096)
            device.bars[0].write64(0x98, 7)
            device.bars[0].write32(0x08, 5)
            device.space.close()  # closes its devices first
            buffer.free()
    del buffer, device, edu
    gc.collect()
    assert threading.active_count() == threads
    assert len(list(Path("/proc/self/fd").iterdir())) == fds


# --- the example and the docs ------------------------------------------------------------------------------------


def run_example(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["edu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples/edu.py"), run_name="__main__")
    return ended.value.code


def test_the_example_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_example(monkeypatch, "emulated:edu") == 0
    output = capsys.readouterr().out
    assert output.endswith("9 of 9 checks passed\n")
    assert "FAILED" not in output


def test_the_example_passes_through_a_socket(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(Edu()) as path:
        assert run_example(monkeypatch, f"vfio-user:{path}") == 0
    assert capsys.readouterr().out.endswith("9 of 9 checks passed\n")


def test_the_example_notices_a_broken_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write_nothing(self: Edu, iova: int, data: bytes) -> None:
        pass

    monkeypatch.setattr(Edu, "dma_write", write_nothing)
    assert run_example(monkeypatch, "emulated:edu") == 1
    assert capsys.readouterr().out.count("FAILED  DMA") == 3


def test_the_example_says_what_is_wrong_with_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there is no emulated device 'edo'" in str(run_example(monkeypatch, "emulated:edo"))


def test_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/emulated.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/emulated.md", "exec"), names)
    assert "3628800" in capsys.readouterr().out
    for name in ("device", "io", "mapper"):
        names[name].close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("width", "value"), [(8, 300), (16, -1), (32, 1 << 32)])
def test_config_value_that_does_not_fit(width: int, value: int) -> None:
    with vfiopy.open("emulated:edu") as device:
        with pytest.raises(vfiopy.AccessError, match=f"{value} does not fit into {width} unsigned") as caught:
            getattr(device.config, f"write{width}")(0x3C, value)
        assert "configuration space" in str(caught.value)
