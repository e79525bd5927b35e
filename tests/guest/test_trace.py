"""Traces of real devices, replays against them, and faults of a real IOMMU in the monitor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from modes import NVME
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app
from vfiopy.drivers.edu import EduDriver
from vfiopy.trace import Collect, Event, JsonLines, tracing
from vfiopy.trace.replay import Replay

UNMAPPED = 0x0DEA_D000
pytestmark = pytest.mark.timeout(300)  # a second interpreter takes its time to start under emulation


def use(device: vfiopy.Device) -> None:
    edu = EduDriver(device)
    device.bus_master = True
    edu.invert(0x12345678)
    edu.enable_interrupts("msi")
    edu.factorial(10)
    with device.dma.allocate(4096) as buffer:
        buffer[:64] = range(64)
        edu.load(buffer.iova, 64)
        edu.store(buffer.iova + 0x800, 64)
    edu.disable_interrupts()


@pytest.fixture(scope="module")
def recorded() -> list[Event]:
    sink = Collect()
    with vfiopy.open("emulated:edu") as device, tracing(device, sink, contents=True):
        use(device)
    return sink.events


def test_what_the_emulated_edu_did_qemus_does_too(bound_edu: str, recorded: list[Event]) -> None:
    with vfiopy.open(bound_edu) as device:
        outcome = Replay(device, recorded, check=True, timeout=5.0).run()
    assert outcome.differences == []
    assert outcome.compared > 10


def test_the_command_tells_a_changed_device(bound_edu: str, recorded: list[Event], tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    sink = JsonLines(path)
    sink.begin({"kind": "begin", "format": 1, "time": 0})
    version = [one._replace(value=0x020000ED) if one.offset == 0 and one.region == "bar0" else one for one in recorded]
    sink.write(version)
    sink.end(len(version), 0)
    answer = CliRunner().invoke(app, ["replay", str(path), bound_edu, "--check", "--json", "--timeout", "5"])
    assert answer.exit_code == 1, answer.output
    assert [one["text"] for one in json.loads(answer.stdout)["differences"]] == ["read 0x10000ed instead of 0x20000ed"]


def test_a_trace_of_the_real_device(bound_edu: str) -> None:
    sink = Collect()
    with vfiopy.open(bound_edu) as device:
        bar = device.bars[0]
        with tracing(device, sink):
            assert bar.state == "traced"
            use(device)
        assert bar.state == "open"
    kinds = {event.kind for event in sink.events}
    assert kinds >= {"open", "read", "write", "irq", "map", "unmap"}
    assert [event.facts["operation"] for event in sink.events if event.kind == "irq"][:2] == ["enable", "taken"]


@contextmanager
def monitoring(*words: str) -> Iterator[Callable[[Callable[[dict[str, Any]], bool]], dict[str, Any]]]:
    """``vfiopy monitor --json``; yields a function that waits for a record."""
    command = [sys.executable, "-m", "vfiopy", "monitor", "--json", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        begin = json.loads(process.stdout.readline())
        assert begin["blind"] == []

        def wait(wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
            assert process.stdout is not None
            for line in process.stdout:
                record = json.loads(line)
                if wanted(record):
                    return dict(record)
            raise AssertionError("the monitor ended")

        try:
            yield wait
        finally:
            process.send_signal(signal.SIGINT)
            try:
                status = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()  # or the guest waits with us, to the end of its time
                raise
        assert status == 0


def test_the_monitor_sees_binding(bdf: Callable[..., str]) -> None:
    nvme = bdf(NVME)
    with monitoring() as wait:
        with vfiopy.bind(nvme):
            assert wait(lambda one: one["driver"] == "vfio-pci")["address"] == nvme
        wait(lambda one: one["kind"] == "unbind" and one["address"] == nvme)


def test_the_monitor_sees_a_fault(bound_edu: str, machine: str) -> None:
    if not machine.startswith("intel"):
        pytest.skip("VT-d's messages are expected here")
    with monitoring() as wait, vfiopy.open(bound_edu) as device:
        EduDriver(device)
        device.bus_master = True
        bar = device.bars[0]
        for destination in (0x40000, UNMAPPED):  # memory to device reads; device to memory writes
            to_memory = destination == UNMAPPED
            bar.write64(0x80, 0x40000 if to_memory else UNMAPPED)
            bar.write64(0x88, destination)
            bar.write64(0x90, 64)
            bar.write64(0x98, 3 if to_memory else 1)
            bar.poll32(0x98, 1, 0, 10.0)
            fault = wait(lambda one: one["kind"] == "fault")["fault"]
            assert (fault["driver"], fault["source"]) == ("intel", bound_edu)
            assert (fault["write"], fault["address"] & ~0xFFF) == (to_memory, UNMAPPED)
            time.sleep(0.2)
