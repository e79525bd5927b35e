"""The doctor on real devices: each symptom that the lab can create, the right cause first; and what binding leaves."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from modes import E1000E, EDU, IGB, NVME
from typer.testing import CliRunner

import vfiopy
from vfiopy.cli.app import app
from vfiopy.doctor import examine
from vfiopy.drivers.edu import EduDriver
from vfiopy.pci import Function, System, bind, grant, persist, restore

Bdf = Callable[..., str]
runner = CliRunner()
NOBODY = 65534
PARAMETERS = Path("/sys/module")
BEHIND_BRIDGE = ("0000:02:01.0", "0000:02:02.0")
TOKEN = UUID("14d6f4a1-3b5e-4a4e-9a53-0c1f5e9a7d10")


@pytest.fixture(autouse=True)
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VFIOPY_STATE_DIR", str(tmp_path / "state"))
    yield
    assert restore() == []


def say(*words: str) -> Any:
    answer = runner.invoke(app, [*words, "--json"])
    assert answer.stdout, answer.output
    return json.loads(answer.stdout)


def found(address: str, *options: str) -> list[dict[str, str]]:
    findings: list[dict[str, str]] = say("doctor", address, *options)["findings"]
    return findings


def first(address: str, *options: str) -> str:
    """The check that found what to fix first."""
    findings = found(address, *options)
    return findings[0]["check"] if findings else ""


@contextmanager
def written(path: Path, text: str, after: str | None = None) -> Iterator[None]:
    """A file of sysfs with another content for a while."""
    before = path.read_text() if after is None else after
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def moved(*nodes: Path) -> Iterator[None]:
    for node in nodes:
        node.rename(f"{node}.away")
    try:
        yield
    finally:
        for node in nodes:
            Path(f"{node}.away").rename(node)


def as_nobody(address: str, memlock: int | None = None, cgroup: Path | None = None) -> list[str]:
    """What the doctor finds for a user without any right, in order."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            if memlock is not None:
                resource.setrlimit(resource.RLIMIT_MEMLOCK, (memlock, memlock))
            if cgroup is not None:
                (cgroup / "cgroup.procs").write_text(str(os.getpid()))
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writing, json.dumps([one.check for one in examine([Function(address)]).findings]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    data = os.read(reading, 4096)
    os.close(reading)
    return list(json.loads(data))


# --- before it is bound ---


def test_wrong_driver(bdf: Bdf) -> None:
    assert first(bdf(NVME)) == "not bound"
    assert first(bdf(EDU)) == "not bound"


def test_a_bridge(bdf: Bdf) -> None:
    assert first(str(Path(f"/sys/bus/pci/devices/{BEHIND_BRIDGE[0]}").resolve().parent.name)) == "bridge"


def test_group_that_is_not_viable() -> None:
    """pci-pf-stub takes any function and leaves DMA to the kernel, so it stands for any native driver."""
    edu, other = BEHIND_BRIDGE
    with bind(other, "pci-pf-stub"):
        (problem,) = [each for each in found(edu) if each["check"] == "not bound"]
        assert problem["remedy"] == f"vfiopy bind --group {edu}"
        with bind(edu, force=True):
            assert first(edu) == "group not viable"
            assert "pci-pf-stub holds 0000:02:02.0" in found(edu)[0]["cause"]
            assert "0000:00:0b.0" in found(edu)[0]["evidence"]  # the bridge does not matter


def test_virtual_functions_on(bdf: Bdf) -> None:
    igb = bdf(IGB)
    with written(Path(f"/sys/bus/pci/devices/{igb}/sriov_numvfs"), "1", "0"):
        assert first(igb) == "virtual functions on"
    assert first(igb) == "not bound"


def test_in_use(bdf: Bdf) -> None:
    nvme = bdf(NVME)
    deadline = time.monotonic() + 20
    while not (nodes := list(Path(f"/sys/bus/pci/devices/{nvme}").glob("nvme/nvme*/nvme*n1"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with (Path("/dev") / nodes[0].name).open("rb"):
        assert first(nvme) == "in use"
        assert "this process" in found(nvme)[0]["evidence"]
        report = say("doctor", nvme, "--fix")
        assert report["fixes"] == []
    assert Function(nvme).driver == "nvme"


def test_overrides(bdf: Bdf) -> None:
    edu = Function(bdf(EDU))
    override = edu.sysfs / "driver_override"
    with written(override, "uio_pci_generic\n", "\n"):
        assert first(str(edu)) == "driver override"
        assert "not loaded" in found(str(edu))[0]["cause"]
    with written(override, "vfio-pci\n", "\n"):
        assert first(str(edu)) == "driver override"
        assert "did not take it" in found(str(edu))[0]["cause"]
    nvme = Function(bdf(NVME))
    with bind(nvme):
        (nvme.sysfs / "driver_override").write_text("igb\n")
        assert first(str(nvme)) == "driver override"


# --- bound, and not to be opened ---


def test_device_busy(bdf: Bdf) -> None:
    with bind(bdf(NVME)) as binding:
        (nvme,) = binding.functions
        fd = os.open(str(nvme.group_node), os.O_RDWR | os.O_CLOEXEC)
        try:
            with subprocess.Popen(["sleep", "60"], pass_fds=[fd]) as other:
                try:
                    assert first(str(nvme)) == "held"
                    deadline = time.monotonic() + 20
                    while "(sleep)" not in found(str(nvme))[0]["evidence"]:  # until it has become sleep
                        assert time.monotonic() < deadline
                    skipped = say("doctor", str(nvme), "--open")["skipped"]
                    assert {"object": str(nvme), "check": "open", "reason": "somebody has it open"} in skipped
                finally:
                    other.kill()
        finally:
            os.close(fd)


def test_nodes_that_are_missing_or_stale(bdf: Bdf) -> None:
    with bind(bdf(NVME)) as binding:
        (nvme,) = binding.functions
        cdev, group = nvme.cdev_node, nvme.group_node
        assert cdev is not None
        assert group is not None
        with moved(cdev):
            assert first(str(nvme)) == "character device"
            assert found(str(nvme))[0]["severity"] == "limits"
        with moved(cdev, group):
            assert first(str(nvme)) == "character device"
            assert found(str(nvme))[0]["severity"] == "blocks"
        with moved(cdev):
            os.mknod(cdev, 0o600 | 0o020000, os.makedev(1, 3))
            try:
                assert first(str(nvme)) == "stale node"
            finally:
                cdev.unlink()
        with moved(Path("/dev/vfio/vfio"), Path("/dev/iommu")):
            assert first(str(nvme)) == "shared nodes"


def test_permissions_then_memlock(bdf: Bdf) -> None:
    nvme = bdf(NVME)
    with bind(nvme):
        assert as_nobody(nvme, 8 << 20)[0] == "permissions"
        grant(nvme, "nobody")
        assert as_nobody(nvme, 8 << 20)[0] == "memlock"
        assert "memlock" not in as_nobody(nvme, 256 << 20)


def test_a_small_cgroup(bdf: Bdf) -> None:
    root = Path("/sys/fs/cgroup")
    if not (root / "cgroup.controllers").exists():
        subprocess.run(["mount", "-t", "cgroup2", "none", root], check=True)
    (root / "cgroup.subtree_control").write_text("+memory")
    box = root / "vfiopy"
    box.mkdir()
    try:
        (box / "memory.max").write_text(str(900 << 20))
        with bind(bdf(NVME)):
            grant(bdf(NVME), "nobody")
            assert as_nobody(bdf(NVME), 256 << 20, box)[0] == "cgroup memory"
    finally:
        box.rmdir()


def test_token(bdf: Bdf) -> None:
    igb = bdf(IGB)
    sysfs = Path(f"/sys/bus/pci/devices/{igb}")
    with written(PARAMETERS / "vfio_pci/parameters/enable_sriov", "Y"), bind(igb):
        with written(sysfs / "sriov_numvfs", "1", "0"):
            virtual = (sysfs / "virtfn0").resolve().name
            with bind(virtual):
                assert first(virtual) == "token"
                problem = found(virtual, "--open")[0]
                assert (problem["check"], problem["severity"]) == ("open", "blocks")
                assert "VF token" in problem["cause"]
                assert "EACCES" in problem["evidence"]
                assert "kernel log: " in problem["evidence"]
                assert "VF token required" in problem["evidence"]
                with vfiopy.open(igb) as physical:
                    physical.io.feature(0, 1 << 17, TOKEN.bytes)
                    passed = say("doctor", virtual, "--open", "--vf-token", str(TOKEN))["passed"]
                    assert {"object": virtual, "check": "open"} in passed
        wrong = found(igb, "--open", "--vf-token", str(TOKEN))
        assert [each for each in wrong if each["severity"] == "blocks"] == []  # a physical function may be given one
    with bind(bdf(NVME)):
        problem = found(bdf(NVME), "--open", "--vf-token", str(TOKEN))[0]
        assert (problem["check"], "token" in problem["cause"]) == ("open", True)


def test_memory_decode_off(bdf: Bdf) -> None:
    with bind(bdf(NVME)) as binding, vfiopy.open(str(binding.functions[0])) as device:
        assert first(device.name) == "held"
        device.memory_enabled = False
        assert first(device.name) == "memory decode"


# --- what will not work ---


def test_what_a_device_does_not_have(bdf: Bdf) -> None:
    with bind(bdf(EDU)):
        assert first(bdf(EDU)) == "reset"
    with bind(bdf(E1000E)):
        assert first(bdf(E1000E)) == "power"


def test_a_group_of_several_devices() -> None:
    with bind(BEHIND_BRIDGE[0], whole_group=True):
        (problem,) = [each for each in found(BEHIND_BRIDGE[0]) if each["check"] == "wide group"]
        assert "bridge to conventional PCI 0000:00:0b.0 does not keep them apart" in problem["cause"]
        assert BEHIND_BRIDGE[1] in problem["evidence"]
        assert problem["remedy"] == "another slot: nothing splits a conventional bus"
        # sysfs has a bus reset for it, which VFIO does not count: the bus is another device's, too
        assert first(BEHIND_BRIDGE[0], "--open") == "reset"


def test_limits_of_the_kernel(bdf: Bdf) -> None:
    limit = PARAMETERS / "vfio_iommu_type1/parameters/dma_entry_limit"
    if not limit.exists():
        pytest.skip("this kernel has no type1")
    with bind(bdf(NVME)), written(limit, "100"):
        assert "mapping limit" in [each["check"] for each in found(bdf(NVME))]


# --- what only shows at run time ---


def test_a_fault_in_the_log(bdf: Bdf) -> None:
    edu = bdf(EDU)
    with bind(edu), vfiopy.open(edu) as device:
        device.bus_master = True
        EduDriver(device).load(0x100000, 256)  # nothing is mapped there
    faults = [each for each in found(edu, "--log") if each["check"] == "log: IOMMU fault"]
    assert [each["object"] for each in faults] == [edu]
    assert "0x100000" in faults[0]["evidence"]
    assert "log: IOMMU fault" not in [each["check"] for each in found(bdf(NVME), "--log")]


def test_opening_what_is_well(bdf: Bdf, machine: str) -> None:
    nvme = bdf(NVME)
    with bind(nvme):
        report = say("doctor", nvme, "--open")
        worked = [each["check"] for each in report["passed"] if each["object"] == nvme]
        assert {"open", "identity", "bars", "map one page", "map big", "last page", "msix", "reset", "close"} <= set(
            worked
        )
        assert "dma-buf" in worked
        if machine != "compat":
            assert "other way" in worked
            assert report["ok"], report["findings"]


@pytest.mark.machine("no-remapping")
def test_no_interrupt_remapping(bdf: Bdf) -> None:
    nvme = bdf(NVME)
    with bind(nvme):
        report = found(nvme, "--open")
        assert (report[0]["check"], report[0]["severity"]) == ("interrupt remapping", "blocks")
        (problem,) = [each for each in report if each["check"] == "open"]
        assert "VFIO_DEVICE_BIND_IOMMUFD: EPERM" in problem["evidence"]
        (problem,) = [each for each in found(nvme, "--open", "--backend", "type1v2") if each["check"] == "open"]
        assert "VFIO_SET_IOMMU: EPERM" in problem["evidence"]
        # only iommufd's is wanted then
        with written(PARAMETERS / "iommufd/parameters/allow_unsafe_interrupts", "Y", "N"):
            report = found(nvme, "--open")
            assert "type1" in report[0]["cause"]
            (other,) = [each for each in report if each["check"] == "other way"]
            assert "VFIO_SET_IOMMU: EPERM" in other["evidence"]
            assert "No interrupt remapping support" in other["evidence"]
            with written(PARAMETERS / "vfio_iommu_type1/parameters/allow_unsafe_interrupts", "Y", "N"):
                assert say("doctor", nvme, "--open")["ok"]


@pytest.mark.machine("noiommu")
def test_without_an_iommu(bdf: Bdf) -> None:
    edu = Function(bdf(EDU))
    with bind(edu):
        assert [each["severity"] for each in found(str(edu)) if each["check"] == "no IOMMU"] == ["note"]
        assert edu.group_node is not None
        os.chown(edu.group_node, NOBODY, NOBODY)
        assert as_nobody(str(edu))[0] == "no IOMMU"
        refused = found(str(edu), "--open")[0]
        assert (refused["check"], "no IOMMU" in refused["cause"]) == ("open", True)
        passed = say("doctor", str(edu), "--open", "--noiommu")["passed"]
        assert {"object": str(edu), "check": "open"} in passed
    with written(PARAMETERS / "vfio/parameters/enable_unsafe_noiommu_mode", "N", "Y"):
        assert first(str(edu)) == "iommu groups"


@pytest.mark.machine("old")
def test_kernel_without_character_devices(bdf: Bdf) -> None:
    with bind(bdf(NVME)):
        problem = found(bdf(NVME))[0]
        assert (problem["check"], problem["severity"]) == ("character device", "limits")


# --- fixing ---


def test_fixing(bdf: Bdf) -> None:
    nvme, edu = Function(bdf(NVME)), Function(bdf(EDU))
    planned = say("doctor", str(nvme), "--fix", "--dry-run")
    assert [(each["action"], each["outcome"]) for each in planned["fixes"]] == [(f"vfiopy bind {nvme}", "planned")]
    assert (nvme.driver, planned["ok"]) == ("nvme", False)
    report = say("doctor", str(nvme), "--fix")
    assert [each["outcome"] for each in report["fixes"]] == ["done"]
    assert (nvme.driver, report["ok"]) == ("vfio-pci", True)
    say("unbind", str(nvme))
    (edu.sysfs / "driver_override").write_text("uio_pci_generic\n")
    try:
        report = say("doctor", str(edu), "--fix")
        assert [each["check"] for each in report["fixes"]] == ["driver override", "not bound"]
        assert (edu.driver, report["ok"]) == ("vfio-pci", True)
        say("restore")
        assert (edu.driver, edu.driver_override) == (None, "uio_pci_generic")
    finally:
        (edu.sysfs / "driver_override").write_text("\n")


def test_fixing_a_group() -> None:
    edu, other = BEHIND_BRIDGE
    with bind(other, "pci-pf-stub"):
        report = say("doctor", edu, "--fix")
        assert [each["action"] for each in report["fixes"]] == [f"vfiopy bind {edu} {other}"]
        assert report["ok"]
        say("restore", edu)
        say("unbind", other)
        with bind(other, "pci-pf-stub"):
            assert Function(edu).driver is None


# --- binding ---


def test_nodes_for_a_user_and_back(bdf: Bdf) -> None:
    nvme, shared = bdf(NVME), Path("/dev/iommu")
    before = shared.stat()
    (entry,) = say("bind", nvme, "--user", "nobody")["functions"]
    nodes = [Path(node) for node in (entry["group_node"], entry["cdev_node"])]
    assert [node.stat().st_uid for node in nodes] == [NOBODY, NOBODY]
    assert entry["granted"][:2] == [str(node) for node in nodes]
    assert (entry["driver"], entry["was"]) == ("vfio-pci", "nvme")
    (entry,) = say("unbind", nvme)["functions"]
    assert (entry["driver"], entry["group_node"]) == ("nvme", None)
    after = shared.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert not any(node.exists() for node in nodes)


def test_unbinding_what_nobody_wrote_down(bdf: Bdf) -> None:
    nvme = Function(bdf(NVME))
    (nvme.sysfs / "driver_override").write_text("vfio-pci\n")
    Path("/sys/bus/pci/drivers/nvme/unbind").write_text(str(nvme))
    Path("/sys/bus/pci/drivers_probe").write_text(str(nvme))
    assert nvme.driver == "vfio-pci"
    (entry,) = say("unbind", str(nvme))["functions"]
    assert (entry["driver"], nvme.driver_override) == ("nvme", None)


def test_unbinding_leaves_who_has_it_open(bdf: Bdf) -> None:
    nvme = bdf(NVME)
    (entry,) = say("bind", nvme)["functions"]
    fd = os.open(entry["cdev_node"], os.O_RDWR | os.O_CLOEXEC)
    try:
        refused = runner.invoke(app, ["unbind", nvme])
        assert refused.exit_code == 1
        assert "this process" in refused.output
    finally:
        os.close(fd)
    assert say("unbind", nvme)["functions"][0]["driver"] == "nvme"


UDEVD = Path("/lib/systemd/systemd-udevd")


@pytest.mark.skipif(not UDEVD.exists(), reason="no udev on this host")
def test_the_rule_for_each_boot_binds(bdf: Bdf, tmp_path: Path) -> None:
    """udev itself reads the rule, and takes the device from the driver that it has already."""
    nvme = Function(bdf(NVME))
    (written_rule,) = persist(nvme.address, user="nobody", system=System(etc=tmp_path))
    rules = Path("/run/udev/rules.d")
    rules.mkdir(parents=True, exist_ok=True)
    rule = rules / written_rule.name
    rule.write_text(written_rule.read_text())
    with subprocess.Popen([UDEVD], stderr=subprocess.DEVNULL) as daemon:
        try:
            command = ["udevadm", "trigger", "--action=add", "--settle", str(nvme.sysfs)]
            subprocess.run(command, check=True, timeout=120)
            assert (nvme.driver, nvme.driver_override) == ("vfio-pci", "vfio-pci")
            subprocess.run(["udevadm", "settle"], check=True, timeout=120)
            assert nvme.cdev_node is not None
            assert nvme.cdev_node.stat().st_uid == NOBODY
            assert nvme.group_node is not None
            assert nvme.group_node.stat().st_uid == NOBODY
        finally:
            rule.unlink()
            daemon.terminate()
            state = Path("/run/vfiopy")
            restore(state_dir=state)
            nvme.system.write(nvme.sysfs / "driver_override", "\n")
            Path("/dev/iommu").chmod(0o600)
