"""``vfiopy list`` over a made-up sysfs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pci_tree import FakeKernel
from typer.testing import CliRunner

from vfiopy.cli.app import app
from vfiopy.pci import Function
from vfiopy.pci.readiness import State, readiness

runner = CliRunner()
NVME, NIC, PORT = "0000:01:00.0", "0000:02:00.0", "0000:00:1c.0"
IDS = "1b36  Red Hat, Inc.\n\t0010  QEMU NVM Express Controller\n8086  Intel Corporation\n"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel.make(tmp_path)
    for name in ("vfio-pci", "igb", "nvme", "pcieport"):
        kernel.add_driver(name)
    (kernel.share[0] / "pci.ids").write_text(IDS)
    kernel.add(PORT, ids=(0x8086, 0xA110), class_code=0x060400, driver="pcieport", group=7, header_type=1)
    kernel.add(NVME, ids=(0x1B36, 0x0010), class_code=0x010802, driver="vfio-pci", group=7)
    kernel.add(NIC, ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=8, totalvfs=8)
    return kernel


def listed(kernel: FakeKernel, *words: str) -> dict[str, dict[str, Any]]:
    answer = runner.invoke(app, ["list", *words, "--json"], obj=kernel)
    assert answer.exit_code == 0, answer.output
    return {row["address"]: row for group in json.loads(answer.stdout)["groups"] for row in group["functions"]}


def test_json_is_what_scripts_rely_on(kernel: FakeKernel) -> None:
    answer = runner.invoke(app, ["list", "--json"], obj=kernel)
    assert answer.exit_code == 0, answer.output
    report = json.loads(answer.stdout)
    assert (report["format"], [group["iommu_group"] for group in report["groups"]]) == (1, [7, 8])
    assert report["groups"][1]["functions"] == [
        {
            "address": NIC,
            "name": "Intel Corporation",
            "vendor": "8086",
            "device": "10c9",
            "class": "020000",
            "class_name": "Ethernet controller",
            "driver": "igb",
            "iommu_group": 8,
            "numa_node": None,
            "reset_methods": ["flr", "bus"],
            "sriov": {"total": 8, "enabled": 0},
            "physical_function": None,
            "vfio": {"state": "bindable", "reasons": []},
        }
    ]


def test_the_tree_is_plain_when_piped_and_keeps_its_lines(kernel: FakeKernel) -> None:
    answer = runner.invoke(app, ["list"], obj=kernel)
    assert answer.exit_code == 0, answer.output
    assert "\x1b" not in answer.stdout
    lines = [line.strip(" │├└─") for line in answer.stdout.splitlines()]
    assert lines[1] == "IOMMU group 7"
    assert f"{NVME}  Red Hat, Inc. QEMU NVM Express Controller [1b36:0010]  vfio-pci  ready" in lines
    assert "Ethernet controller; SR-IOV 0 of 8 VFs; reset: flr, bus" in lines


def test_filters(kernel: FakeKernel) -> None:
    assert list(listed(kernel, NVME)) == [NVME]
    assert list(listed(kernel, "--class", "nvme")) == [NVME]
    assert list(listed(kernel, "--id", "8086:")) == [PORT, NIC]
    assert list(listed(kernel, "--id", "8086:10c9")) == [NIC]
    assert list(listed(kernel, "--driver", "igb")) == [NIC]
    assert list(listed(kernel, "--group", "7")) == [PORT, NVME]
    assert list(listed(kernel, "--state", "ready")) == [NVME]


def test_exit_status(kernel: FakeKernel) -> None:
    def status(*words: str) -> int:
        return runner.invoke(app, ["list", *words], obj=kernel).exit_code

    assert status("--class", "audio") == 1
    assert [
        status("--class", "rubbish"),
        status("--id", "8086"),
        status("--state", "good"),
        status("nonsense"),
    ] == [2, 2, 2, 2]


def state_of(kernel: FakeKernel, address: str) -> tuple[State, str]:
    found = readiness(Function(address, kernel))
    return found.state, " ".join(found.reasons)


def test_readiness_names_what_stands_in_the_way(kernel: FakeKernel) -> None:
    assert state_of(kernel, PORT)[0] is State.BRIDGE
    assert state_of(kernel, NVME) == (State.READY, "")  # the port of its group does not count
    (kernel.proc / "42/fd").mkdir(parents=True)
    (kernel.proc / "42/comm").write_text("qemu\n")
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / "vfio/7")
    assert state_of(kernel, NVME) == (
        State.BUSY,
        f"process 42 (qemu) has {kernel.dev}/vfio/7 open",
    )
    kernel.add("0000:01:00.1", driver="igb", group=7)
    assert state_of(kernel, NVME) == (State.BLOCKED, "igb holds 0000:01:00.1 of its group")
    for node in ("vfio/7", "vfio/devices/vfio0"):
        (kernel.dev / node).unlink()
    state, reason = state_of(kernel, NVME)
    assert state is State.NO_NODE
    assert "stale copy" in reason


def test_a_function_that_the_system_needs_or_that_has_no_iommu(kernel: FakeKernel) -> None:
    (kernel.sys / "class/net/eth0").symlink_to(kernel.pci_devices / NIC)
    (kernel.proc / "net/route").write_text("Iface\neth0 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0\n")
    assert state_of(kernel, NIC) == (State.IN_USE, "interface eth0 carries the default route")
    (kernel.sys / "class/tty/console").mkdir(parents=True)
    (kernel.sys / "class/tty/console/active").write_text("ttyS4\n")
    kernel.add("0000:03:00.0")
    assert state_of(kernel, "0000:03:00.0") == (State.NO_IOMMU, "")
    (kernel.sys / "class/tty/ttyS4").symlink_to(kernel.pci_devices / "0000:03:00.0")
    assert state_of(kernel, "0000:03:00.0") == (State.NO_IOMMU, "the kernel's console is on its ttyS4")


def test_nodes_that_this_user_may_not_open(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    state, reason = state_of(kernel, NVME)
    assert state is State.DENIED
    assert f"may not open {kernel.dev}/vfio/7" in reason
