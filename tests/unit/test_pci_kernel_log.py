# ruff: noqa: E501  the kernel folds no lines
from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vfiopy.errors import ClosedError, PermissionDeniedError, VfioError
from vfiopy.pci import System
from vfiopy.pci.kernel_log import Kind, LogEntry, LogReader, decode_log, parse_record, read_log

FAULT = "DMAR: [DMA Write NO_PASID] Request device [00:04.0] fault addr 0xdead000 [fault reason 0x05] PTE Write access is not set"
DMESG = f"""\
[    0.938401] ACPI: DMAR 0x00000000773D0000 000468 (v01 INTEL  INTEL ID 00000001 INTL 20091013)
[  139.513963] DMAR: DRHD: handling fault status reg 3
[  139.513969] {FAULT}
[  144.480629] dmar_fault: 893 callbacks suppressed
[  150.000000] vfio-pci 0000:00:02.0: Invalid PCI ROM header signature: expecting 0xaa55, got 0x0000
[  151.000000] pcieport 0000:80:1b.4: PCIe Bus Error: severity=Uncorrectable (Non-Fatal), type=Transaction Layer, (Receiver ID)
[  151.000001] pcieport 0000:80:1b.4:   device [8086:7f44] error status/mask=00200000/00000000
[  151.000002] pcieport 0000:80:1b.4:    [21] ACSViol                (First)
[  152.000000] usb 1-1: new high-speed USB device number 2 using xhci_hcd
"""


def test_a_log_as_dmesg_prints_it() -> None:
    entries = decode_log(DMESG.splitlines())
    assert [(entry.kind, entry.time) for entry in entries] == [
        (Kind.FAULT, 139.513969),
        (Kind.LOST, 144.480629),
        (Kind.VFIO, 150.0),
        (Kind.AER, 151.0),
        (Kind.AER, 151.000001),
        (Kind.AER, 151.000002),
    ]
    fault, lost, words, error, *_ = entries
    assert fault.fault is not None
    assert fault.fault.address == 0xDEAD000
    assert fault.text == "0000:00:04.0: write at 0xdead000 refused: PTE Write access is not set"
    assert lost.count == 893
    assert str(words.source) == "0000:00:02.0"
    assert str(error.source) == "0000:80:1b.4"


def test_text_without_times() -> None:
    (entry,) = decode_log([FAULT])
    assert entry.time is None
    assert entry.kind is Kind.FAULT


def test_a_line_after_a_fault_of_many_lines_is_not_swallowed() -> None:
    record = [
        "[1.0] arm-smmu-v3 fc900000.iommu: event 0x10 received:",
        "[1.1] arm-smmu-v3 fc900000.iommu: \t0x0000210000000010",
        "[1.2] arm-smmu-v3 fc900000.iommu: \t0x0000020000000000",
        "[1.3] arm-smmu-v3 fc900000.iommu: \t0x0000000000000000",
        "[1.4] arm-smmu-v3 fc900000.iommu: \t0x0000000000000000",
        "[2.0] vfio-pci 0002:21:00.0: resetting",
    ]
    assert [(entry.kind, entry.time) for entry in decode_log(record)] == [(Kind.FAULT, 1.4), (Kind.VFIO, 2.0)]


def test_a_record() -> None:
    line = parse_record("6,339,5140900,-;NET: Registered \\x09protocol family 10\n SUBSYSTEM=pci\n")
    assert (line.level, line.facility, line.number, line.time) == (6, 0, 339, 5.1409)
    assert line.text == "NET: Registered \tprotocol family 10"


class Log:
    """A pipe that keeps records apart, as /dev/kmsg does: opened again through /proc, it is the same pipe."""

    def __init__(self, folder: Path) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
        self.system = System(dev=folder)
        (folder / "kmsg").symlink_to(f"/proc/self/fd/{self.read_end}")
        self.number = 100

    def write(self, text: str, *, skip: int = 0, facility: int = 0) -> None:
        self.number += 1 + skip
        os.write(self.write_end, f"{facility << 3 | 4},{self.number},{self.number * 1000000},-;{text}\n".encode())

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    made = Log(tmp_path)
    yield made
    made.close()


def test_what_the_log_holds(log: Log) -> None:
    log.write(FAULT)
    log.write("something else")
    log.write("VFIO - User Level meta-driver version: 0.3")
    assert [(entry.kind, entry.time) for entry in read_log(log.system)] == [(Kind.FAULT, 101.0), (Kind.VFIO, 103.0)]


def test_what_was_there_before_is_left_out_when_not_asked_for(log: Log) -> None:
    log.write(FAULT)
    with LogReader(log.system) as reader:
        log.write("VFIO - User Level meta-driver version: 0.3")
        assert [entry.kind for entry in reader.pending()] == [Kind.VFIO]


def test_lost_records_are_told(log: Log) -> None:
    with LogReader(log.system, from_start=True) as reader:
        log.write("one")
        log.write(FAULT, skip=7)
        lost, fault = reader.pending()
        assert (lost.kind, lost.count) == (Kind.LOST, 7)
        assert fault.kind is Kind.FAULT


def test_what_programs_write_is_not_the_kernels_word(log: Log) -> None:
    log.write(FAULT, facility=1)
    assert read_log(log.system) == []


def test_waiting(log: Log) -> None:
    with LogReader(log.system) as reader:
        assert reader.wait(0.01) == []
        timer = threading.Timer(0.05, log.write, [FAULT])
        timer.start()
        (entry,) = reader.wait(10)
        timer.join()
        assert entry.fault is not None


def test_a_fault_that_may_go_on_is_waited_for_a_moment_only(log: Log) -> None:
    with LogReader(log.system) as reader:
        log.write("arm-smmu-v3 fc900000.iommu: event 0x10 received:")
        for word in ("0x0000210000000010", "0x0000020000000000", "0x0000000000001000", "0x0000000000000000"):
            log.write(f"arm-smmu-v3 fc900000.iommu: \t{word}")
        begin = time.monotonic()
        (entry,) = reader.wait(10)
        assert time.monotonic() - begin < 5
        assert entry.fault is not None
        assert entry.fault.address == 0x1000


def test_closed(log: Log) -> None:
    reader = LogReader(log.system)
    reader.close()
    for use in (reader.fileno, lambda: reader.wait(0), lambda: list(reader.pending())):
        with pytest.raises(ClosedError):
            use()


def refuse(log: Log, error: OSError, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[LogEntry]]:
    def open_(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "open", open_)
    return lambda: read_log(log.system)


def test_not_allowed(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PermissionDeniedError, match=r"CAP_SYSLOG"):
        refuse(log, PermissionError(1, "no"), monkeypatch)()


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(VfioError, match=r"kmsg"):
        read_log(System(dev=tmp_path))
