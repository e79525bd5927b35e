"""``vfiopy doctor --open`` and ``--fix``: what is tried, what is done, and what is left alone."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pci_tree import FakeKernel
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app
from vfiopy.doctor import SYMPTOMS, Attempt, Fix, Severity, fix, try_out
from vfiopy.doctor.kernel_log import LogTail
from vfiopy.doctor.trying import STEPS
from vfiopy.errors import from_errno
from vfiopy.pci import Function, restore

runner = CliRunner()
NIC, SECOND, NVME = "0000:02:00.0", "0000:02:00.1", "0000:00:05.0"


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    """A machine with a NIC of two functions and a disk; native drivers have them."""
    monkeypatch.setenv("VFIOPY_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr("vfiopy.pci.rebind._PAUSE", 0.0)
    kernel = FakeKernel.make(tmp_path)
    for name in ("vfio-pci", "igb", "nvme", "pcieport"):
        kernel.add_driver(name)
    kernel.add("0000:00:1c.0", class_code=0x060400, driver="pcieport", group=8, header_type=1)
    for address in (NIC, SECOND):
        kernel.add(address, ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=8)
    kernel.add(NVME, ids=(0x1B36, 0x0010), class_code=0x010802, driver="nvme", group=5)
    for node in ("vfio/vfio", "iommu"):
        (kernel.dev / node).write_text("")
    (kernel.proc / "self/status").write_text("CapEff:\t000001ffffffffff\n")
    return kernel


def driver(kernel: FakeKernel, address: str) -> str | None:
    return Function(address, kernel).driver


def mend(kernel: FakeKernel, address: str, *, dry_run: bool = False) -> list[tuple[str, str]]:
    done, _ = fix([Function(address, kernel)], system=kernel, dry_run=dry_run)
    assert all(one.undo for one in done)
    return [(one.action, one.outcome) for one in done]


# --- fixing ---


def test_a_group_is_bound_as_a_whole_and_comes_back(kernel: FakeKernel) -> None:
    words = f"vfiopy bind {NIC} {SECOND}"
    assert mend(kernel, NIC, dry_run=True) == [(words, "planned")]
    assert driver(kernel, NIC) == "igb"
    assert kernel.log == []
    done, report = fix([Function(NIC, kernel)], system=kernel)
    assert [(one.action, one.outcome) for one in done] == [(words, "done")]
    assert report.ok
    assert [driver(kernel, one) for one in (NIC, SECOND, "0000:00:1c.0")] == ["vfio-pci", "vfio-pci", "pcieport"]
    restore(system=kernel)
    assert [driver(kernel, one) for one in (NIC, SECOND)] == ["igb", "igb"]


def test_only_the_others_where_it_is_bound_itself(kernel: FakeKernel) -> None:
    vfiopy.bind(NIC, force=True, system=kernel, timeout=0.05).keep()
    assert mend(kernel, NIC) == [(f"vfiopy bind {SECOND}", "done")]


def test_a_module_is_loaded_first(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in kernel.driver("vfio-pci").iterdir():
        file.unlink()
    kernel.driver("vfio-pci").rmdir()
    asked: list[list[str]] = []

    def run(words: list[str], **_: object) -> None:
        asked.append(words)
        kernel.add_driver("vfio-pci")

    monkeypatch.setattr(subprocess, "run", run)
    assert mend(kernel, NVME, dry_run=True) == [("modprobe vfio-pci", "planned"), (f"vfiopy bind {NVME}", "planned")]
    assert asked == []
    assert mend(kernel, NVME) == [("modprobe vfio-pci", "done"), (f"vfiopy bind {NVME}", "done")]
    assert asked == [["modprobe", "vfio-pci"]]


def test_a_module_that_cannot_be_loaded(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in kernel.driver("vfio-pci").iterdir():
        file.unlink()
    kernel.driver("vfio-pci").rmdir()

    def run(words: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, words, stderr="modprobe: FATAL: Module vfio-pci not found.\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert mend(kernel, NVME) == [  # and nothing that builds on it
        ("modprobe vfio-pci", "failed: modprobe vfio-pci failed: modprobe: FATAL: Module vfio-pci not found.")
    ]
    assert driver(kernel, NVME) == "nvme"


def test_nothing_builds_on_an_override_that_could_not_be_cleared(kernel: FakeKernel) -> None:
    kernel.write(kernel.driver("nvme") / "unbind", NVME)
    kernel.write(kernel.pci_devices / NVME / "driver_override", "uio_pci_generic")
    kernel.fail_at.append(len(kernel.log) + 1)
    ((action, outcome),) = mend(kernel, NVME)
    assert action == "clear driver_override (uio_pci_generic)"
    assert outcome.startswith("failed: ")
    assert driver(kernel, NVME) is None


def test_a_variant_driver_keeps_its_device(kernel: FakeKernel) -> None:
    """Its migration would be gone, and whoever uses the device with it."""
    kernel.add_driver("igb_vfio_pci")
    vfiopy.bind(NIC, "igb_vfio_pci", force=True, system=kernel, timeout=0.05).keep()
    assert mend(kernel, NIC) == [(f"vfiopy bind {SECOND}", "done")]
    assert [driver(kernel, one) for one in (NIC, SECOND)] == ["igb_vfio_pci", "vfio-pci"]


def test_an_override_of_a_driver_that_is_not_there(kernel: FakeKernel) -> None:
    kernel.write(kernel.driver("nvme") / "unbind", NVME)
    kernel.write(kernel.pci_devices / NVME / "driver_override", "uio_pci_generic")
    actions = mend(kernel, NVME)
    assert actions == [("clear driver_override (uio_pci_generic)", "done"), (f"vfiopy bind {NVME}", "done")]
    restore(system=kernel)
    assert Function(NVME, kernel).driver_override == "uio_pci_generic"


def test_an_override_left_behind_on_a_bound_device(kernel: FakeKernel) -> None:
    vfiopy.bind(NVME, system=kernel).keep()
    restore_point = Function(NVME, kernel)
    kernel.write(kernel.pci_devices / NVME / "driver_override", "nvme")
    ((one,), _) = fix([Function(NVME, kernel)], system=kernel)
    assert (one.action, one.outcome) == ("clear driver_override (nvme)", "done")
    assert one.undo == f"echo nvme > {kernel.pci_devices / NVME}/driver_override"  # restore would unbind it
    assert (restore_point.driver, restore_point.driver_override) == ("vfio-pci", None)


def test_nothing_is_handed_over_without_an_iommu(kernel: FakeKernel) -> None:
    switch = kernel.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode"
    switch.parent.mkdir(parents=True)
    switch.write_text("Y\n")
    kernel.add("0000:00:06.0", driver="nvme")
    assert mend(kernel, "0000:00:06.0") == []
    assert kernel.log == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_in_use_is_left_alone(kernel: FakeKernel, dry_run: bool) -> None:
    (kernel.sys / "class/net/eth0").symlink_to(kernel.pci_devices / SECOND)
    (kernel.proc / "net/route").write_text("Iface\neth0 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0\n")
    assert mend(kernel, NIC, dry_run=dry_run) == []  # it is the other function of its group that is in use
    assert mend(kernel, SECOND, dry_run=dry_run) == []
    assert kernel.log == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernel/iommu_groups/5/reserved_regions", "0x0000000079000000 0x0000000079ffffff direct"),
        ("class/iommu/dmar0/intel-iommu/ecap", "f020d2"),
    ],
)
def test_nothing_is_done_behind_what_cannot_be_fixed(kernel: FakeKernel, path: str, text: str) -> None:
    for file, words in ((path, text), ("module/iommufd/parameters/allow_unsafe_interrupts", "N")):
        (kernel.sys / file).parent.mkdir(parents=True, exist_ok=True)
        (kernel.sys / file).write_text(f"{words}\n")
    assert mend(kernel, NVME) == []
    assert kernel.log == []


def test_a_step_that_fails_says_so_and_is_not_tried_again(kernel: FakeKernel) -> None:
    kernel.probe_errors["vfio-pci", NVME] = errno.EINVAL
    ((action, outcome),) = mend(kernel, NVME)
    assert action == f"vfiopy bind {NVME}"
    assert outcome.startswith("failed: vfio-pci does not take it")
    assert "everything was put back" in outcome
    assert driver(kernel, NVME) == "nvme"


def test_fix_on_the_command_line(kernel: FakeKernel) -> None:
    answer = runner.invoke(app, ["doctor", NVME, "--fix", "--dry-run"], obj=kernel)
    assert answer.exit_code == 1
    assert answer.stdout.startswith(f"planned  {NVME}: vfiopy bind {NVME}\n   undo:     vfiopy unbind {NVME}\n")
    answer = runner.invoke(app, ["doctor", NVME, "--fix", "--json"], obj=kernel)
    assert answer.exit_code == 0
    report = json.loads(answer.stdout)
    assert report["fixes"] == [
        {
            "check": "not bound",
            "object": NVME,
            "action": f"vfiopy bind {NVME}",
            "undo": f"vfiopy unbind {NVME}",
            "outcome": "done",
        }
    ]
    assert Fix(**report["fixes"][0]).outcome == "done"
    again = runner.invoke(app, ["doctor", NVME, "--fix"], obj=kernel)
    assert again.stdout.startswith("nothing here that may be fixed without you\n0 found")
    assert runner.invoke(app, ["doctor", NVME, "--dry-run"], obj=kernel).exit_code == 2


# --- trying ---


def attempt(kernel: FakeKernel, opener: Any) -> Attempt:
    return try_out(Function(NIC, kernel), opener=opener)


def test_all_steps_on_a_device_that_works(kernel: FakeKernel) -> None:
    asked: list[tuple[str, Any]] = []

    def opener(target: str, **options: Any) -> vfiopy.Device:
        asked.append((target, options["backend"]))
        return vfiopy.open("emulated:edu")

    result = attempt(kernel, opener)
    assert asked == [(NIC, None)]
    worked = [step for _, step in result.passed]
    assert worked == [step for step in STEPS if step in worked]
    assert {"open", "identity", "bars", "map one page", "msi", "close"} <= set(worked)
    assert {step for _, step, _ in result.skipped} >= {"msix", "dma-buf", "hot reset"}
    (finding,) = result.findings  # edu has none, as QEMU's has none
    assert (finding.check, finding.problem.severity) == ("reset", Severity.LIMITS)
    assert "VFIO_DEVICE_RESET: EINVAL" in finding.problem.evidence


@pytest.mark.parametrize(
    ("number", "call", "says"),
    [
        (errno.EPERM, "VFIO_SET_IOMMU", "no interrupt remapping"),
        (errno.EACCES, "VFIO_GROUP_GET_DEVICE_FD", "VF token"),
        (errno.EBUSY, "open VFIO group", "open already"),
        (errno.EINVAL, "VFIO_DEVICE_ATTACH_IOMMUFD_PT", ""),
    ],
)
def test_an_errno_at_open_is_a_finding(kernel: FakeKernel, number: int, call: str, says: str) -> None:
    def opener(target: str, **_: Any) -> vfiopy.Device:
        raise from_errno(number, call=call, object=target)

    result = attempt(kernel, opener)
    (finding,) = result.findings
    assert (finding.check, finding.problem.severity) == ("open", Severity.BLOCKS)
    assert says in finding.problem.cause
    assert f"{NIC}: {call}: {errno.errorcode[number]} ({os.strerror(number)})" in finding.problem.evidence
    assert finding.problem.remedy
    assert result.passed == []


def test_what_fails_later_limits_and_the_device_is_closed(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[vfiopy.Device] = []

    def opener(_: str, **__: Any) -> vfiopy.Device:
        devices.append(vfiopy.open("emulated:edu"))
        return devices[0]

    def broken(_: object) -> None:
        raise from_errno(errno.ENOSPC, call="VFIO_DEVICE_SET_IRQS", object=NIC)

    monkeypatch.setitem(vfiopy.doctor.trying._CHECKS, "msi", broken)  # type: ignore[attr-defined]
    result = attempt(kernel, opener)
    found = {finding.check: finding.problem.severity for finding in result.findings}
    assert found["msi"] is Severity.LIMITS
    assert not devices[0]
    assert (NIC, "close") in result.passed


def test_what_the_kernel_says_meanwhile_is_evidence(kernel: FakeKernel) -> None:
    ring = kernel.dev / "kmsg"
    ring.write_text("4,1,1,-;vfio-pci 0000:02:00.0: can't change power state from D3cold to D0\n")  # long ago

    def opener(target: str, **_: Any) -> vfiopy.Device:
        with ring.open("a") as log:
            log.write(f"4,2,2,-;vfio-pci {target}: VF token required to access device\n")
        raise from_errno(errno.EACCES, call="VFIO_GROUP_GET_DEVICE_FD", object=target)

    (finding,) = attempt(kernel, opener).findings
    assert "kernel log: vfio-pci 0000:02:00.0: VF token required" in finding.problem.evidence
    assert "D3cold" not in finding.problem.evidence


def test_a_log_that_cannot_be_read_is_empty(tmp_path: Path) -> None:
    with LogTail(FakeKernel.make(tmp_path)) as tail:
        assert tail.lines() == []


def test_open_on_the_command_line(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["doctor", NIC, "--open", "--json"]
    report = json.loads(runner.invoke(app, words, obj=kernel).stdout)
    assert {"object": NIC, "check": "open", "reason": "VFIO does not hold it"} in report["skipped"]
    vfiopy.bind([NIC, SECOND], system=kernel).keep()
    asked: list[dict[str, Any]] = []

    def tried(_: Function, **options: Any) -> Attempt:
        asked.append(options)
        return Attempt(passed=[(NIC, "open")])

    monkeypatch.setattr("vfiopy.cli.doctor.try_out", tried)
    token = "14d6f4a1-3b5e-4a4e-9a53-0c1f5e9a7d10"
    report = json.loads(runner.invoke(app, [*words, "--vf-token", token, "--backend", "type1"], obj=kernel).stdout)
    assert asked == [{"backend": "type1", "vf_token": UUID(token), "noiommu": False}]
    assert {"object": NIC, "check": "open"} in report["passed"]
    (kernel.proc / "42/fd").mkdir(parents=True)
    (kernel.proc / "42/comm").write_text("qemu\n")
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / "vfio/8")
    report = json.loads(runner.invoke(app, words, obj=kernel).stdout)
    assert {"object": NIC, "check": "open", "reason": "somebody has it open"} in report["skipped"]
    assert len(asked) == 1
    assert runner.invoke(app, ["doctor", "--open"], obj=kernel).exit_code == 2


def test_symptoms_name_steps_that_exist() -> None:
    assert {step for symptom in SYMPTOMS for step in symptom.tries} <= set(STEPS)
