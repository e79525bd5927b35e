"""What the lab takes for a complaint of the guest's kernel."""

from __future__ import annotations

from pathlib import Path

import lab_import  # noqa: F401
import pytest

from tools._lab.console import Console, complaints


@pytest.mark.parametrize(
    "line",
    [
        "[    0.000000] WARNING: at topology_sane.isra.0+0x48/0x60, CPU#1: swapper/1/0",
        "[   12.345678] WARNING: CPU: 1 PID: 77 at drivers/vfio/vfio_main.c:123 vfio_foo+0x12/0x34",
        "[    1.0] BUG: kernel NULL pointer dereference, address: 0000000000000008",
        "[    1.0] BUG: KASAN: slab-use-after-free in vfio_pci_core_disable+0x1/0x2",
        "[    1.0] Oops: Oops: 0002 [#1] SMP",
        "[    1.0] Kernel panic - not syncing: Fatal exception",
        "[    1.0] WARNING: possible circular locking dependency detected",
        "[    1.0] INFO: task python:99 blocked for more than 120 seconds.",
        "[    1.0] refcount_t: underflow; use-after-free.",
        "[    1.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
    ],
)
def test_complaint(line: str) -> None:
    assert complaints([line]) == [line]


@pytest.mark.parametrize(
    "line",
    [
        "[    1.0] vfio-pci 0000:00:04.0: Adding to iommu group 1",
        "[    1.0] FAULT_INJECTION: forcing a failure.",
        "[    1.0] DMAR: [DMA Write NO_PASID] Request device [00:04.0] fault addr 0x1000 [fault reason 0x05]",
        "[    1.0] debugfs: warning level set",
        "[    1.0] Call Trace:",
    ],
)
def test_no_complaint(line: str) -> None:
    assert complaints([line]) == []


def test_console_puts_split_lines_together_and_logs_all(tmp_path: Path) -> None:
    console = Console(tmp_path / "log")
    for chunk in (b"one\r\ntw", b"o WARN", b"ING: x\r\n", b"BUG: unfinished"):
        console.feed(chunk)
    assert console.complaints == ["two WARNING: x"]
    console.close()
    assert console.complaints == ["two WARNING: x", "BUG: unfinished"]
    assert list(console.tail) == ["one", "two WARNING: x", "BUG: unfinished"]
    assert (tmp_path / "log").read_bytes().startswith(b"one\r\ntwo WARNING: x\r\nBUG: unfinished")


def test_console_keeps_only_the_last_lines(tmp_path: Path) -> None:
    console = Console(tmp_path / "log")
    console.feed(b"".join(b"line %d\n" % number for number in range(1000)))
    console.close()
    assert console.tail[-1] == "line 999"
    assert len(console.tail) < 100
