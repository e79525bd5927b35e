from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from json_schema import check_schema
from test_pci_kernel_log import FAULT, Log
from typer.testing import CliRunner

from vfiopy.cli import monitor as command
from vfiopy.cli.app import app
from vfiopy.pci import Event, PciAddress
from vfiopy.pci.events import _of_node

ROOT = Path(__file__).parents[2]
EDU = PciAddress.parse("0000:00:04.0")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path)
    yield made
    made.close()


def unread(log: Log) -> int:
    return int.from_bytes(fcntl.ioctl(log.read_end, termios.FIONREAD, bytes(4)), sys.byteorder)


def said(log: Log, *words: str, texts: tuple[str, ...] = (FAULT,), seconds: str = "0.4") -> str:
    log.write("VFIO - User Level meta-driver version: 0.3")  # before anybody looks

    def kernel() -> None:
        while unread(log):  # skipped by who begins to look
            time.sleep(0.01)
        for text in texts:
            log.write(text)

    thread = threading.Thread(target=kernel)
    thread.start()
    answer = CliRunner().invoke(app, ["monitor", "--for", seconds, *words], obj=log.system)
    thread.join()
    assert answer.exit_code == 0, answer.output
    return answer.stdout


def records(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_fault_on_the_screen(log: Log) -> None:
    lines = said(log).splitlines()
    assert lines[0] == "watching; Ctrl-C ends it"
    assert lines[1].endswith("fault   0000:00:04.0  write at 0xdead000 refused: PTE Write access is not set")
    assert len(lines) == 2


def test_schema_of_json(log: Log, tmp_path: Path) -> None:
    texts = (
        FAULT,
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=00:04.0 domain=0x000d address=0xcff49550 flags=0x0000]",
        "arm-smmu 5000000.iommu: Blocked unknown Stream ID 0x429; boot with ...",
        "DMAR: [DMA Write PASID 0x5] Request device [6a:01.0] fault addr 0x1000 [fault reason 0x71] SM",
    )
    begin, *rest = records(said(log, "--json", texts=texts))
    (blind,) = [one for one in records(_without_log(tmp_path)) if one["kind"] == "begin"]
    rest += [
        command._bus_record(Event("bind", EDU, "vfio-pci")),
        command._bus_record(Event("add", EDU, None, "vfio0")),
        command._record("lost", "gone"),
    ]
    check_schema("monitor", {**begin, "records": rest}, {**blind, "records": rest})


def _without_log(folder: Path) -> str:
    from vfiopy.pci import System  # noqa: PLC0415

    empty = folder / "empty"
    empty.mkdir()
    return CliRunner().invoke(app, ["monitor", "--json", "--for", "0"], obj=System(dev=empty)).stdout


def test_only_some_functions(log: Log) -> None:
    other = FAULT.replace("00:04.0", "00:05.0")
    found = records(said(log, "00:05.0", "--json", texts=(FAULT, other)))
    assert [record.get("address") for record in found] == [None, "0000:00:05.0"]


def test_what_cannot_be_seen_is_said(tmp_path: Path) -> None:
    (begin,) = records(_without_log(tmp_path))
    (blind,) = begin["blind"]
    assert blind["what"].startswith("IOMMU faults")
    assert "cannot be opened" in blind["reason"]


def test_bad_address() -> None:
    answer = CliRunner().invoke(app, ["monitor", "hello"])
    assert answer.exit_code == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vfiopy", "monitor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("watching"):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Event("bind", EDU, "vfio-pci"), "vfio-pci has it"),
        (Event("unbind", EDU, None), "its driver let it go"),
        (Event("remove", EDU, None), "the function is gone"),
        (Event("add", EDU, None, "vfio3"), "/dev/vfio/devices/vfio3 is there"),
        (Event("remove", EDU, None, "vfio3"), "/dev/vfio/devices/vfio3 is gone"),
        (Event("online", EDU, None), "online"),
    ],
)
def test_words(event: Event, text: str) -> None:
    assert command._bus_record(event)["text"] == text


def test_lost_events_of_the_bus() -> None:
    class Overrun:
        def wait(self, timeout: float) -> None:
            raise OSError(105, "No buffer space available")

    (record,) = command._bus_records(Overrun())  # type: ignore[arg-type]
    assert record["kind"] == "lost"


def test_character_devices() -> None:
    path = "/devices/pci0000:00/0000:00:1c.0/0000:01:00.0/vfio-dev/vfio0"
    assert _of_node("add", path) == Event("add", PciAddress.parse("01:00.0"), None, "vfio0")
    assert _of_node("add", "/devices/virtual/mtty/mtty/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001/vfio-dev/vfio0") is None
    assert _of_node("add", "/") is None
