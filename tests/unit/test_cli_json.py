"""The schema of each command's ``--json`` is what was committed: see json_schema.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from config_space import with_list
from json_schema import SNAPSHOTS, check_schema, schema
from pci_tree import FakeKernel
from typer.main import get_command
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app

runner = CliRunner()
NVME, NIC, VF, PORT = "0000:01:00.0", "0000:02:00.0", "0000:02:10.0", "0000:00:1c.0"


def said(*words: str, kernel: FakeKernel | None = None) -> Any:
    answer = runner.invoke(app, [*words, "--json"], obj=kernel)
    return json.loads(answer.stdout)


# --- the mechanism itself ---


def test_a_schema_has_paths_and_types() -> None:
    one = {
        "format": 2,
        "rows": [{"a": 1, "b": None}, {"a": 2.5, "b": "x"}],
        "by_irq": {"30": "msix"},
        "facts": {"q": 1},
    }
    assert schema(one, keyed=("by_irq",), free=("facts",)) == {
        "format": 2,
        "paths": {
            "by_irq": "object",
            "by_irq.*": "string",
            "facts": "object",
            "format": "integer",
            "rows": "array",
            "rows[]": "object",
            "rows[].a": "integer, number",
            "rows[].b": "null, string",
        },
    }


def test_what_a_script_would_notice_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("json_schema.SNAPSHOTS", tmp_path)
    answer = {"format": 1, "a": 1, "b": None}
    with pytest.raises(AssertionError, match="was written"):
        check_schema("x", answer, {**answer, "b": "text"})
    check_schema("x", answer)
    for other, text in (
        ({"format": 1, "a": 1, "b": None, "c": 1}, "c: not in x.json"),
        ({"format": 1, "b": None}, "a: in x.json, in no answer"),
        ({"format": 1, "a": "1", "b": None}, "a: string, in x.json integer"),
        ({"format": 1, "a": True, "b": None}, "a: boolean, in x.json integer"),
        ({"format": 2, "a": 1, "b": None}, "another format number"),
    ):
        with pytest.raises(AssertionError, match=text):
            check_schema("x", other)


def test_each_command_with_json_has_a_snapshot() -> None:
    commands = getattr(get_command(app), "commands")  # noqa: B009  typer's group has it, its type does not say so
    with_json = {
        name for name, command in commands.items() if any("--json" in option.opts for option in command.params)
    }
    assert with_json == {path.stem.partition("+")[0] for path in SNAPSHOTS.glob("*.json")}  # COMMAND+OPTION


# --- one for each command ---


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A machine with a disk, a network card with a virtual function, and a bridge."""
    kernel = FakeKernel.make(tmp_path)
    for name in ("vfio-pci", "igb", "pcieport"):
        kernel.add_driver(name)
    kernel.add(PORT, ids=(0x8086, 0xA110), class_code=0x060400, driver="pcieport", group=7, header_type=1)
    nvme = kernel.add(NVME, ids=(0x1B36, 0x0010), class_code=0x010802, driver="vfio-pci", group=7, config=_disk())
    nic = kernel.add(NIC, ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=8, totalvfs=8)
    virtual = kernel.add(VF, ids=(0x8086, 0x10CA), class_code=0x020000)
    (virtual / "physfn").symlink_to(nic)
    kernel.add("0000:03:00.0", group=7)
    kernel.add("0000:01:00.1", driver="igb", group=7)  # so that the disk is not to be had, for a reason
    unit = kernel.sys / "class/iommu/dmar0"
    (unit / "intel-iommu").mkdir(parents=True)
    (unit / "intel-iommu/cap").write_text("d2008c40660462\n")
    (unit / "intel-iommu/ecap").write_text("f050da\n")
    (nvme / "iommu").symlink_to(unit)
    group = kernel.sys / "kernel/iommu_groups/7"
    (group / "type").write_text("DMA-FQ\n")
    (group / "reserved_regions").write_text("0x00000000fee00000 0x00000000feefffff msi\n")
    for name, text in {
        "irq": "24",
        "msi_irqs/30": "msix",
        "power_state": "D0",
        "power/runtime_status": "active",
        "power/control": "on",
        "driver_override": "vfio-pci",
        "numa_node": "1",
    }.items():
        (nvme / name).parent.mkdir(exist_ok=True)
        (nvme / name).write_text(f"{text}\n")
    return kernel


def _disk() -> bytes:
    space = with_list((0x40, 0x01), (0x50, 0x05), (0x70, 0x11))
    space.put(0x00, "HH", 0x1B36, 0x0010).put(0x04, "H", 0x0406).put(0x08, "I", 0x01080202).put(0x3D, "B", 1)
    space.put(0x42, "HH", 0x0003, 0x0008).put(0x72, "HII", 0x8040, 0x0000_2000, 0x0000_3000)
    return bytes(space.data)


def test_list(kernel: FakeKernel) -> None:
    check_schema("list", said("list", kernel=kernel))


def test_info(kernel: FakeKernel) -> None:
    check_schema(
        "info",
        *(said("info", one, kernel=kernel) for one in (NVME, NIC, VF)),
        keyed=("interrupts.allocated", "config.rows"),
    )


def test_info_diff(kernel: FakeKernel, tmp_path: Path) -> None:
    file = tmp_path / "before.json"
    file.write_text(json.dumps(said("info", NVME, kernel=kernel)))
    answer = said("info", NIC, "--diff", str(file), kernel=kernel)
    check_schema("info+diff", answer, free=("changes[].before", "changes[].after"))


def test_doctor(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)  # who is told what was not looked at
    first = said("doctor", NVME, kernel=kernel)
    (kernel.dev / "iommu").write_text("")
    check_schema("doctor", first, said("doctor", NVME, "--fix", "--dry-run", kernel=kernel))


def test_selftest() -> None:
    answers = [said("selftest", target) for target in ("emulated:edu", "0000:00:1d.7")]
    check_schema("selftest", *answers, keyed=("machine",), free=("results[].facts", "device"))


RDL = str(Path(__file__).parents[2] / "examples/edu.rdl")


def test_registers(tmp_path: Path) -> None:
    edu = "emulated:edu"
    check_schema("read", said("read", edu, "config", "msi.control"), said("read", edu, "bar0", "0x10"))
    check_schema(
        "write",
        said("write", edu, "bar0", "0x4", "1"),
        said("write", edu, "bar0", "status.irq_when_done", "1", "--map", RDL, "--read-back"),
        free=("notes",),
    )
    by_name = said("dump", edu, "bar0", "0", "0xa0", "--map", RDL)
    in_file = said("dump", edu, "bar0", "0", "16", "-o", str(tmp_path / "dump.bin"))
    check_schema("dump", said("dump", edu, "bar0", "0", "16"), by_name, in_file, free=("notes",))


def test_watch() -> None:
    answer = runner.invoke(app, ["watch", "emulated:edu", "config", "status", "0", "--times", "1", "--json"])
    check_schema("watch", *(json.loads(line) for line in answer.stdout.splitlines()))


def test_new_device(tmp_path: Path) -> None:
    check_schema("new-device", said("new-device", "my-device", "--folder", str(tmp_path)))


def test_serve(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "vfiopy", "serve", "edu", "--socket", str(tmp_path / "edu.sock"), "--json"]
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            lines = list(iter(server.stdout.readline, "}\n"))
            answer = json.loads("".join([*lines, "}"]))
            check_schema("serve", answer)
            with vfiopy.open(answer["vfiopy"]) as device:
                assert device.bars[0].read32(0) == 0x010000ED
        finally:
            server.terminate()
