"""The doctor over a made-up machine: each symptom that sysfs can show, and the right cause first.

tests/guest/test_doctor.py has most of them on a real kernel. What the lab cannot create is proved here alone: RMRR,
the denylist, a function without a group, an unassigned BAR, lockdown, other page sizes, modules that are not loaded,
variant drivers, AMD's interrupt remapping.
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from pci_tree import FakeKernel
from typer.testing import CliRunner

from vfiopy.cli.app import app
from vfiopy.doctor import Finding, Severity, examine
from vfiopy.doctor.binding import BINDING_CHECKS
from vfiopy.doctor.machine import MACHINE_CHECKS
from vfiopy.doctor.opening import OPENING_CHECKS
from vfiopy.pci import Function

runner = CliRunner()
NIC = "0000:02:00.0"
MEMORY_ON = bytes([0x86, 0x80, 0xC9, 0x10, 2, 0]) + bytes(250)
CAPABLE, NOT_CAPABLE = "CapEff:\t000001ffffffffff\n", "CapEff:\t0000000000000000\n"


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    """A machine where all is well: a port and a NIC that vfio-pci holds, in one group."""
    kernel = FakeKernel.make(tmp_path)
    for name in ("vfio-pci", "igb", "pcieport"):
        kernel.add_driver(name)
    kernel.add("0000:00:1c.0", class_code=0x060400, driver="pcieport", group=8, header_type=1)
    kernel.add(NIC, ids=(0x8086, 0x10C9), class_code=0x020000, driver="vfio-pci", group=8, config=MEMORY_ON)
    for node in ("vfio/vfio", "iommu"):
        (kernel.dev / node).write_text("")
    (kernel.proc / "self/status").write_text(CAPABLE)
    (kernel.proc / "cmdline").write_text("quiet\n")
    return kernel


def found(kernel: FakeKernel, address: str = NIC) -> list[Finding]:
    return list(examine([Function(address, kernel)], system=kernel).findings)


def first(kernel: FakeKernel, address: str = NIC) -> tuple[str, Severity]:
    finding = found(kernel, address)[0]
    return finding.check, finding.problem.severity


def put(kernel: FakeKernel, path: str, text: str) -> None:
    file = kernel.sys / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def function_file(name: str, text: str) -> Callable[[FakeKernel], None]:
    return lambda kernel: (kernel.pci_devices / NIC / name).write_text(f"{text}\n") and None


def unbind(kernel: FakeKernel) -> None:
    kernel._detach(NIC)


def hold(kernel: FakeKernel, node: str) -> None:
    (kernel.proc / "42/fd").mkdir(parents=True)
    (kernel.proc / "42/comm").write_text("qemu\n")
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / node)


def no_groups(kernel: FakeKernel) -> None:
    unbind(kernel)
    for address in ("0000:00:1c.0", NIC):
        (kernel.pci_devices / address / "iommu_group").unlink()
    for folder in (kernel.sys / "kernel/iommu_groups").iterdir():
        for link in (folder / "devices").iterdir():
            link.unlink()
        (folder / "devices").rmdir()
        folder.rmdir()


def no_group_here(kernel: FakeKernel) -> None:
    unbind(kernel)
    (kernel.pci_devices / NIC / "iommu_group").unlink()


def no_module(kernel: FakeKernel) -> None:
    unbind(kernel)
    for file in kernel.driver("vfio-pci").iterdir():
        file.unlink()
    kernel.driver("vfio-pci").rmdir()


def variant_only(kernel: FakeKernel) -> None:
    no_module(kernel)
    kernel.add_driver("mlx5_vfio_pci")


def variant_in_use(kernel: FakeKernel) -> None:
    unbind(kernel)
    for file in kernel.driver("vfio-pci").iterdir():
        file.unlink()
    kernel.driver("vfio-pci").rmdir()
    kernel.add_driver("mlx5_vfio_pci")
    kernel._attach(NIC, "mlx5_vfio_pci")
    (kernel.driver("mlx5_vfio_pci") / NIC).symlink_to(kernel.pci_devices / NIC)


def no_shared_nodes(kernel: FakeKernel) -> None:
    (kernel.dev / "vfio/vfio").unlink()
    (kernel.dev / "iommu").unlink()


def no_remapping(kernel: FakeKernel) -> None:
    put(kernel, "class/iommu/dmar0/intel-iommu/ecap", "f020d2")
    put(kernel, "module/iommufd/parameters/allow_unsafe_interrupts", "N")
    put(kernel, "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y")


def no_remapping_on_amd(kernel: FakeKernel) -> None:
    (kernel.sys / "class/iommu/ivhd0").mkdir(parents=True)
    (kernel.proc / "interrupts").write_text(
        " 24:  0  0  PCI-MSI-0000:00:1c.0    0-edge   PCIe PME\n 1: 9 0 IO-APIC 1-edge\n"
    )
    put(kernel, "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts", "N")


def small_cgroup(kernel: FakeKernel) -> None:
    (kernel.proc / "self/cgroup").write_text("0::/box/inner\n")
    put(kernel, "fs/cgroup/box/memory.max", str(32 << 20))
    put(kernel, "fs/cgroup/box/inner/memory.max", "max")


def other_node(kernel: FakeKernel) -> None:
    put(kernel, "class/vfio/8/dev", "244:8")
    (kernel.dev / "vfio/8").unlink()
    (kernel.dev / "vfio/8").symlink_to("/dev/null")


def native_driver(kernel: FakeKernel) -> None:
    unbind(kernel)
    kernel._attach(NIC, "igb")


def default_route(kernel: FakeKernel) -> None:
    native_driver(kernel)
    (kernel.sys / "class/net/eth0").symlink_to(kernel.pci_devices / NIC)
    (kernel.proc / "net/route").write_text("Iface\neth0 00000000 0101A8C0 0003 0 0 0 00000000 0 0 0\n")


def virtual_functions(kernel: FakeKernel) -> None:
    native_driver(kernel)
    (kernel.pci_devices / NIC / "sriov_totalvfs").write_text("8\n")
    (kernel.pci_devices / NIC / "sriov_numvfs").write_text("2\n")


def denylisted(kernel: FakeKernel) -> None:
    unbind(kernel)
    (kernel.pci_devices / NIC / "device").write_text("0x37c8\n")


def did_not_take(kernel: FakeKernel) -> None:
    unbind(kernel)
    (kernel.pci_devices / NIC / "driver_override").write_text("vfio-pci\n")


def sibling(kernel: FakeKernel) -> None:
    kernel.add("0000:02:00.1", driver="igb", group=8, class_code=0x020000)


def no_cdev(kernel: FakeKernel) -> None:
    (kernel.pci_devices / NIC / "vfio-dev/vfio0/dev").unlink()


def no_node(kernel: FakeKernel) -> None:
    (kernel.dev / "vfio/8").unlink()
    (kernel.dev / "vfio/devices/vfio0").unlink()


def sibling_held(kernel: FakeKernel) -> None:
    kernel.add("0000:02:01.0", driver="vfio-pci", group=8)
    hold(kernel, "vfio/devices/vfio1")


def without_iommu(kernel: FakeKernel) -> None:
    (kernel.sys / "class/vfio/8").rename(kernel.sys / "class/vfio/noiommu-8")
    (kernel.dev / "vfio/8").rename(kernel.dev / "vfio/noiommu-8")
    (kernel.proc / "self/status").write_text(NOT_CAPABLE)


def token(kernel: FakeKernel) -> None:
    kernel.add("0000:03:00.0", driver="vfio-pci", group=9, totalvfs=8)
    (kernel.pci_devices / NIC / "physfn").symlink_to(kernel.pci_devices / "0000:03:00.0")


def memory_off(kernel: FakeKernel) -> None:
    hold(kernel, "vfio/devices/vfio0")
    (kernel.pci_devices / NIC / "config").write_bytes(MEMORY_ON[:4] + bytes(252))


def group_alone(kernel: FakeKernel) -> None:
    memory_off(kernel)
    (kernel.proc / "42/fd/9").unlink()
    (kernel.proc / "42/fd/9").symlink_to(kernel.dev / "vfio/8")


def wide_group(kernel: FakeKernel) -> None:
    kernel.add("0000:02:01.0", group=8)


def multifunction(kernel: FakeKernel) -> None:
    kernel.add("0000:02:00.1", group=8)


def reserved(kernel: FakeKernel) -> None:
    put(kernel, "kernel/iommu_groups/8/reserved_regions", "0x0000000079000000 0x0000000079ffffff direct")


SYMPTOMS: dict[str, tuple[Callable[[FakeKernel], None], str, Severity, str]] = {
    "no IOMMU": (no_groups, "iommu groups", Severity.BLOCKS, "no ACPI table DMAR"),
    "no IOMMU here": (no_group_here, "no group", Severity.BLOCKS, "iommu_group is missing"),
    "module not loaded": (no_module, "vfio module", Severity.BLOCKS, "vfio-pci is missing"),
    "only a variant loaded": (variant_only, "vfio module", Severity.BLOCKS, "vfio-pci is missing"),
    "stale node": (other_node, "stale node", Severity.BLOCKS, "8 is 1:3"),
    "no interrupt remapping, AMD": (no_remapping_on_amd, "interrupt remapping", Severity.BLOCKS, "none is IR-PCI-MSI"),
    "small cgroup": (small_cgroup, "cgroup memory", Severity.LIMITS, "box/memory.max is 33554432"),
    "few mappings": (
        lambda kernel: put(kernel, "module/vfio_iommu_type1/parameters/dma_entry_limit", "100"),
        "mapping limit",
        Severity.NOTE,
        "is 100",
    ),
    "stale /dev": (no_shared_nodes, "shared nodes", Severity.BLOCKS, "neither"),
    "no interrupt remapping": (no_remapping, "interrupt remapping", Severity.BLOCKS, "dmar0 cannot remap"),
    "locked down": (
        lambda kernel: put(kernel, "kernel/security/lockdown", "none [integrity] confidentiality"),
        "lockdown",
        Severity.NOTE,
        "[integrity]",
    ),
    "RMRR": (reserved, "direct ranges", Severity.BLOCKS, "0x79000000 to 0x79ffffff"),
    "default route": (default_route, "in use", Severity.BLOCKS, "eth0 carries the default route"),
    "denylist": (denylisted, "denylist", Severity.BLOCKS, "8086:37c8"),
    "SR-IOV enabled PF": (virtual_functions, "virtual functions on", Severity.BLOCKS, "sriov_numvfs is 2"),
    "bind failed": (did_not_take, "driver override", Severity.BLOCKS, "its driver is none"),
    "stale override": (function_file("driver_override", "igb"), "driver override", Severity.NOTE, "igb"),
    "wrong driver": (native_driver, "not bound", Severity.BLOCKS, "driver is igb"),
    "not bound": (unbind, "not bound", Severity.BLOCKS, "driver is missing"),
    "group not viable": (sibling, "group not viable", Severity.BLOCKS, "do not matter: 0000:00:1c.0"),
    "missing cdev": (no_cdev, "character device", Severity.LIMITS, "CONFIG_VFIO_DEVICE_CDEV"),
    "no node": (no_node, "character device", Severity.BLOCKS, "stale copy"),
    "device busy": (lambda kernel: hold(kernel, "vfio/8"), "held", Severity.BLOCKS, "process 42 (qemu)"),
    "group open, device not": (group_alone, "held", Severity.BLOCKS, "vfio/8"),
    "sibling busy": (sibling_held, "held", Severity.BLOCKS, "vfio1"),
    "noiommu without rights": (without_iommu, "no IOMMU", Severity.BLOCKS, "CAP_SYS_RAWIO: no"),
    "token": (token, "token", Severity.NOTE, "0000:03:00.0 is bound to vfio-pci"),
    "asleep": (function_file("power_state", "D3hot"), "power", Severity.NOTE, "D3hot"),
    "no reset": (function_file("reset_method", ""), "reset", Severity.LIMITS, "empty"),
    "no address": (
        function_file("resource", "0x0 0xffff 0x40200"),
        "unassigned BAR",
        Severity.LIMITS,
        "no address: BAR0",
    ),
    "multifunction": (multifunction, "wide group", Severity.NOTE, "group 8 has also 0000:02:00.1"),
    "wide group": (wide_group, "wide group", Severity.NOTE, "0000:02:01.0"),
}


def test_nothing_is_found_where_all_is_well(kernel: FakeKernel) -> None:
    report = examine([Function(NIC, kernel)], system=kernel)
    assert (report.ok, report.findings) == (True, ())
    assert len(report.passed) == len(MACHINE_CHECKS) + len(BINDING_CHECKS) + len(OPENING_CHECKS)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_the_right_cause_comes_first(kernel: FakeKernel, symptom: str) -> None:
    cause, check, severity, evidence = SYMPTOMS[symptom]
    cause(kernel)
    finding = found(kernel)[0]
    assert (finding.check, finding.problem.severity) == (check, severity), finding
    assert evidence in finding.problem.evidence
    assert finding.problem.remedy


def test_each_check_is_fed_with_its_symptom() -> None:
    elsewhere = {"memlock", "page size", "bridge", "permissions", "memory decode"}
    fed = {check for _, check, _, _ in SYMPTOMS.values()} | elsewhere
    assert fed == {check.name for check in (*MACHINE_CHECKS, *BINDING_CHECKS, *OPENING_CHECKS)}


def test_why_there_is_no_iommu(kernel: FakeKernel) -> None:
    no_groups(kernel)
    put(kernel, "firmware/acpi/tables/DMAR", "")
    assert "intel_iommu=on" in found(kernel)[0].problem.remedy
    (kernel.proc / "cmdline").write_text("quiet intel_iommu=off\n")
    assert "remove intel_iommu=off" in found(kernel)[0].problem.remedy
    put(kernel, "module/vfio/parameters/enable_unsafe_noiommu_mode", "Y")
    assert first(kernel)[0] == "not bound"


def test_only_the_way_that_refuses_is_named(kernel: FakeKernel) -> None:
    no_remapping(kernel)
    remedy = found(kernel)[0].problem.remedy
    assert "module/iommufd/parameters/allow_unsafe_interrupts" in remedy
    assert "type1" not in remedy


def test_interrupts_that_are_remapped(kernel: FakeKernel) -> None:
    no_remapping_on_amd(kernel)
    (kernel.proc / "interrupts").write_text(" 24:  0  0  IR-PCI-MSI-0000:00:1c.0    0-edge\n 25: 0 IO-APIC 9-edge\n")
    assert found(kernel) == []


def test_a_variant_driver_does_for_its_own_devices_only(kernel: FakeKernel) -> None:
    variant_in_use(kernel)
    assert found(kernel)[0].problem.severity is Severity.LIMITS
    kernel.add("0000:05:00.0", driver="igb", group=9)
    finding = found(kernel, "0000:05:00.0")[0]
    assert (finding.check, finding.object, finding.problem.severity) == ("vfio module", "0000:05:00.0", Severity.BLOCKS)


def test_a_bridge_is_not_for_vfio(kernel: FakeKernel) -> None:
    assert first(kernel, "0000:00:1c.0") == ("bridge", Severity.BLOCKS)
    assert [finding.check for finding in found(kernel, "0000:00:1c.0")] == ["bridge"]


def test_memory_decode_of_a_device_that_is_open(kernel: FakeKernel) -> None:
    memory_off(kernel)
    assert [finding.check for finding in found(kernel)] == ["memory decode", "held"]


def test_permissions(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: "devices" not in str(path))
    assert found(kernel) == []  # the other way is open
    monkeypatch.setattr("os.access", lambda path, mode: path.name != "8" and "devices" not in str(path))
    (finding,) = found(kernel)
    assert (finding.check, finding.problem.severity) == ("permissions", Severity.BLOCKS)
    assert f"{kernel.dev}/vfio/8 is 0" in finding.problem.evidence
    assert "iommu " not in finding.problem.evidence


def test_memlock(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (8 << 20, resource.RLIM_INFINITY))
    assert found(kernel) == []  # CAP_IPC_LOCK
    (kernel.proc / "self/status").write_text(NOT_CAPABLE)
    assert first(kernel) == ("memlock", Severity.LIMITS)
    assert "8 MiB only" in found(kernel)[0].problem.cause
    monkeypatch.setattr(resource, "getrlimit", lambda which: (128 << 20, resource.RLIM_INFINITY))
    assert found(kernel) == []
    (kernel.proc / "42").mkdir()
    (kernel.proc / "42/status").write_text(f"Uid:\t{os.getuid()}\t0\t0\t0\nVmPin:\t  102400 kB\n")
    assert first(kernel) == ("memlock", Severity.LIMITS)
    assert f"{100 << 20} pinned by others" in found(kernel)[0].problem.evidence
    (kernel.proc / "42/status").write_text("Uid:\t4242\t0\t0\t0\nVmPin:\t  102400 kB\n")
    assert found(kernel) == []


def test_the_cgroup_of_a_container(kernel: FakeKernel) -> None:
    (kernel.proc / "self/cgroup").write_text("0::/\n")
    put(kernel, "fs/cgroup/memory.max", str(32 << 20))
    assert first(kernel) == ("cgroup memory", Severity.LIMITS)
    put(kernel, "fs/cgroup/memory.max", str(512 << 20))
    assert first(kernel) == ("cgroup memory", Severity.NOTE)
    (kernel.proc / "self/cgroup").write_text("0::/../../elsewhere\n")
    assert found(kernel) == []


def test_big_pages(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 65536)
    assert first(kernel) == ("page size", Severity.NOTE)


def test_what_blocks_comes_before_what_limits(kernel: FakeKernel) -> None:
    put(kernel, "kernel/security/lockdown", "none [integrity] confidentiality")
    (kernel.pci_devices / NIC / "reset_method").write_text("")
    sibling(kernel)
    assert [finding.check for finding in found(kernel)] == ["group not viable", "reset", "lockdown", "wide group"]


def test_a_function_that_goes_while_it_is_looked_at(kernel: FakeKernel) -> None:
    gone = Function("0000:7f:00.0", kernel)
    report = examine([gone], system=kernel)
    assert ("0000:7f:00.0", "bridge") in {(where, check) for where, check, _ in report.skipped}


def test_json_is_what_scripts_rely_on(kernel: FakeKernel) -> None:
    sibling(kernel)
    answer = runner.invoke(app, ["doctor", NIC, "--json"], obj=kernel)
    assert answer.exit_code == 1
    report = json.loads(answer.stdout)
    assert set(report) == {"format", "ok", "findings", "passed", "skipped", "fixes"}
    assert (report["format"], report["ok"]) == (1, False)
    assert [each for each in report["findings"] if each["severity"] == "blocks"] == [
        {
            "check": "group not viable",
            "object": NIC,
            "severity": "blocks",
            "cause": "IOMMU group 8 is not viable: igb holds 0000:02:00.1 (Ethernet controller)",
            "evidence": "members that do not matter: 0000:00:1c.0",
            "remedy": f"vfiopy bind --group {NIC}",
        }
    ]
    assert {"object": "machine", "check": "memlock"} in report["passed"]


def test_for_people_and_exit_status(kernel: FakeKernel) -> None:
    answer = runner.invoke(app, ["doctor"], obj=kernel)
    assert answer.exit_code == 0, answer.output
    assert "0 found" in answer.stdout
    sibling(kernel)
    answer = runner.invoke(app, ["doctor"], obj=kernel)
    assert answer.exit_code == 1
    assert answer.stdout.startswith(f"1. blocks  {NIC}: IOMMU group 8 is not viable")
    assert runner.invoke(app, ["doctor", "rubbish"], obj=kernel).exit_code == 2
    assert runner.invoke(app, ["doctor", "0000:02:00.7"], obj=kernel).exit_code == 1
