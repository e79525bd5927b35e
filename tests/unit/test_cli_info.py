"""``vfiopy info`` over a made-up sysfs, and capabilities in words."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
from config_space import Space, express_with, with_list
from hypothesis import given
from hypothesis import strategies as st
from pci_tree import FakeKernel
from typer.testing import CliRunner

from vfiopy.cli.app import app
from vfiopy.pci.config import decode
from vfiopy.pci.words import capability_words, size_words

runner = CliRunner()
NVME = "0000:01:00.0"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel.make(tmp_path)
    for name in ("vfio-pci", "nvme"):
        kernel.add_driver(name)
    space = with_list((0x40, 0x01), (0x70, 0x11))
    space.put(0x04, "H", 0x0406).put(0x08, "I", 0x01080202).put(0x3D, "B", 1)
    space.put(0x42, "HH", 0x0003, 0x0008).put(0x72, "HII", 0x8040, 0x0000_2000, 0x0000_3000)
    folder = kernel.add(
        NVME, ids=(0x1B36, 0x0010), class_code=0x010802, driver="nvme", group=7, config=bytes(space.data)
    )
    kernel.add("0000:01:00.1", group=7)
    files = {"irq": "24", "msi_irqs/30": "msix", "power_state": "D0", "power/runtime_status": "active"}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{text}\n")
    group = kernel.sys / "kernel/iommu_groups/7"
    (group / "type").write_text("DMA-FQ\n")
    (group / "reserved_regions").write_text("0x00000000fee00000 0x00000000feefffff msi\n")
    unit = kernel.sys / "class/iommu/dmar0"
    (unit / "intel-iommu").mkdir(parents=True)
    (unit / "intel-iommu/cap").write_text("d2008c40660462\n")
    (unit / "intel-iommu/ecap").write_text("f050da\n")
    (folder / "iommu").symlink_to(unit)
    return kernel


def info(kernel: FakeKernel) -> dict[str, Any]:
    answer = runner.invoke(app, ["info", NVME, "--json"], obj=kernel)
    assert answer.exit_code == 0, answer.output
    report: dict[str, Any] = json.loads(answer.stdout)
    return report


def test_json_is_what_scripts_rely_on(kernel: FakeKernel) -> None:
    listed = json.loads(runner.invoke(app, ["list", NVME, "--json"], obj=kernel).stdout)["groups"][0]["functions"][0]
    report = info(kernel)
    assert {key: report.pop(key) for key in listed} == listed
    assert report == {
        "format": 1,
        "subsystem": "1af4:1100",
        "revision": 0x10,
        "driver_override": None,
        "power": {"state": "D0", "runtime": "active", "control": None},
        "command": ["memory", "bus master", "intx disable"],
        "status": ["capabilities"],
        "regions": [
            {
                "name": "BAR0",
                "start": 0xFEBF0000,
                "size": 0x10000,
                "kind": "memory",
                "bits": 32,
                "prefetchable": False,
            }
        ],
        "interrupts": {"pin": "A", "irq": 24, "msi": None, "msix": 65, "allocated": {"30": "msix"}},
        "capabilities": [
            {
                "id": 1,
                "extended": False,
                "offset": 0x40,
                "name": "Power Management",
                "says": ["now in D0", "has D0, D3hot", "keeps its state in D3hot"],
            },
            {
                "id": 17,
                "extended": False,
                "offset": 0x70,
                "name": "MSI-X",
                "says": ["on", "65 vectors", "table in BAR0 at 0x2000", "pending bits in BAR0 at 0x3000"],
            },
        ],
        "capabilities_missing": None,
        "config": {
            "size": 4096,
            "rows": {
                "000": "36 1b 10 00 06 04 10 00 02 02 08 01 00 00 00 00",
                "030": "00 00 00 00 40 00 00 00 00 00 00 00 00 01 00 00",
                "040": "01 70 03 00 08 00 00 00 00 00 00 00 00 00 00 00",
                "070": "11 00 40 80 00 20 00 00 00 30 00 00 00 00 00 00",
            },
        },
        "iommu": {
            "group": 7,
            "members": [
                {"address": NVME, "driver": "nvme"},
                {"address": "0000:01:00.1", "driver": None},
            ],
            "hardware": "dmar0",
            "domain": "DMA-FQ",
            "address_bits": 39,
            "page_sizes": [4096, 1 << 21, 1 << 30],
            "interrupt_remapping": True,
            "snoop_control": True,
            "reserved": [{"first": 0xFEE00000, "last": 0xFEEFFFFF, "kind": "msi"}],
        },
    }


def test_for_people(kernel: FakeKernel) -> None:
    answer = runner.invoke(app, ["info", NVME], obj=kernel)
    assert answer.exit_code == 0, answer.output
    assert "\x1b" not in answer.stdout
    lines = [line.rstrip() for line in answer.stdout.splitlines()]
    assert "  BAR0  64 KiB  0xfebf0000  32-bit memory" in lines
    assert "  interrupts  INTA as IRQ 24, 65 MSI-X, 1 allocated now" in lines
    assert "  reserved  0xfee00000 to 0xfeefffff (msi)" in lines
    assert "  hardware  dmar0, 39-bit addresses, pages of 4 KiB, 2 MiB, 1 GiB" in lines


def test_without_root_it_says_what_is_left_out(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread

    def first_64(fd: int, size: int, offset: int) -> bytes:
        # what drivers/pci/pci-sysfs.c does without CAP_SYS_ADMIN
        return pread(fd, max(0, min(size, 64 - offset)), offset)

    monkeypatch.setattr("os.pread", first_64)
    report = info(kernel)
    assert report["capabilities"] == []
    assert "root" in report["capabilities_missing"]
    assert report["command"] == ["memory", "bus master", "intx disable"]
    assert "may be read by root only" in runner.invoke(app, ["info", NVME], obj=kernel).stdout


def with_snapshot(kernel: FakeKernel, path: Path, *words: str) -> tuple[int, str]:
    answer = runner.invoke(app, ["info", NVME, "--diff", str(path), *words], obj=kernel)
    return answer.exit_code, answer.output


def change(kernel: FakeKernel) -> None:
    """What a hand or a driver does: bus mastering off, an interrupt masked, D3hot."""
    folder = kernel.pci_devices / NVME
    data = bytearray((folder / "config").read_bytes())
    data[0x04] &= ~4
    data[0x44] |= 3
    data[0x73] |= 0x40
    (folder / "config").write_bytes(data)
    (folder / "power_state").write_text("D3hot\n")


def test_what_changed_since_a_snapshot(kernel: FakeKernel, tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    assert runner.invoke(app, ["info", NVME, "--save", str(file)], obj=kernel).exit_code == 0
    assert json.loads(file.read_text()) == info(kernel)
    assert with_snapshot(kernel, file) == (0, f"{NVME}: as it was\n")
    change(kernel)
    status, said = with_snapshot(kernel, file)
    assert status == 1
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert "power.state D0 D3hot" in lines
    assert "command bus master -" in lines
    assert "config 0x004 command 06 02" in lines
    assert "config 0x044 pm.control 08 0b" in lines
    assert "config 0x073 msix.control+1 80 c0" in lines
    assert "\x1b" not in said
    status, said = with_snapshot(kernel, file, "--json")
    report = json.loads(said)
    assert (status, report["different"], report["config_compared"]) == (1, True, 4096)
    assert {"path": "power.state", "before": "D0", "after": "D3hot"} in report["changes"]
    assert report["config"][0] == {"offset": 4, "before": "06", "after": "02", "where": "command"}
    assert {one["path"] for one in report["changes"]} == {
        "power.state",
        "command",
        "capabilities[Power Management@0x40].says",
        "capabilities[MSI-X@0x70].says",
    }
    ignored = ("--ignore", "power", "--ignore", "command", "--ignore", "capabilities", "--ignore", "config")
    assert with_snapshot(kernel, file, *ignored)[0] == 0


def test_a_capability_that_came_or_went(kernel: FakeKernel, tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    facts = info(kernel)
    facts["capabilities"] = facts["capabilities"][:1]
    facts["regions"][0]["start"] = 0
    file.write_text(json.dumps(facts))
    report = json.loads(with_snapshot(kernel, file, "--json")[1])
    assert {"path": "capabilities[MSI-X@0x70].name", "before": None, "after": "MSI-X"} in report["changes"]
    assert {"path": "regions[BAR0].start", "before": 0, "after": 0xFEBF0000} in report["changes"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not what"),
        ("[]", "not what"),
        ('{"format": 9}', "format 9"),
        ('{"format": 1}', "not what"),
        (None, "No such"),
    ],
)
def test_files_that_are_no_snapshot(kernel: FakeKernel, tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    status, said = with_snapshot(kernel, file)
    assert status == 2
    assert message in said
    assert runner.invoke(app, ["info", NVME, "--save", "/nonexistent/x"], obj=kernel).exit_code == 1


def test_what_is_not_there(kernel: FakeKernel) -> None:
    answer = runner.invoke(app, ["info", "0000:01:00.5"], obj=kernel)
    assert answer.exit_code == 1
    assert "the device has other functions: 0000:01:00.0" in answer.output
    assert runner.invoke(app, ["info", "rubbish"], obj=kernel).exit_code == 2


def test_without_iommu(kernel: FakeKernel) -> None:
    kernel.add("0000:02:00.0")
    answer = runner.invoke(app, ["info", "0000:02:00.0"], obj=kernel)
    assert answer.exit_code == 0, answer.output
    assert "none: the IOMMU is off, or there is none" in answer.stdout


def words_of(space: Space, offset: int) -> str:
    decoded = decode(space.read)
    return "; ".join(
        phrase
        for one in (*decoded.capabilities, *decoded.extended)
        if one.offset == offset
        for phrase in capability_words(one)
    )


def test_capabilities_in_words() -> None:
    space = with_list((0xA0, 0x10)).put(0xA2, "H", 0x0002)
    space.put(0xA4, "IHH", 1 << 28 | 1 << 15 | 2, 0x2810 | 1 << 5, 0)
    space.put(0xAC, "IHH", 8 << 4 | 4, 0, 0x1043)
    assert words_of(space, 0xA0) == (
        "endpoint; link 8.0 GT/s x4 of 16.0 GT/s x8; payload 256 of 512 bytes; "
        "read requests up to 512 bytes; function level reset"
    )
    space = express_with((0x100, 0x10, 1)).put(0x10C, "HHH", 8, 8, 2).put(0x114, "HH", 0x180, 2)
    space.put(0x108, "H", 1).put(0x11A, "H", 0x10CA)
    assert words_of(space, 0x100) == "on; 2 of 8 VFs; VF device 10ca; first VF 384 after it, then every 2"
    # one without words of its own: its fields
    assert words_of(with_list((0x48, 0x09)).put(0x4A, "B", 4), 0x48) == "length: 0x4; data: 09 00 04 00"


@given(st.integers(0, 2**32))
def test_whatever_a_device_says_there_are_words(seed: int) -> None:
    space = Space()
    space.data[:] = Random(seed).randbytes(4096)
    space.data[0x06] |= 0x10
    decoded = decode(space.read)
    for one in (*decoded.capabilities, *decoded.extended):
        assert all(isinstance(phrase, str) and phrase for phrase in capability_words(one))


def test_sizes() -> None:
    assert [size_words(size) for size in (0, 256, 4096, 3 << 20, 1 << 40)] == [
        "0 bytes",
        "256 bytes",
        "4 KiB",
        "3 MiB",
        "1 TiB",
    ]
