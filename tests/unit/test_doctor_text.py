"""What the doctor reads: the kernel's log, and errors of any program; and that all 46 symptoms are somewhere."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from json_schema import check_schema
from pci_tree import FakeKernel
from typer.testing import CliRunner

from vfiopy.cli.app import app
from vfiopy.doctor import SYMPTOMS, Symptom, explain, read_kernel_log, study_log
from vfiopy.doctor.binding import BINDING_CHECKS
from vfiopy.doctor.kernel_log import LogMatch, match_lines
from vfiopy.doctor.log_patterns import PATTERNS
from vfiopy.doctor.machine import MACHINE_CHECKS
from vfiopy.doctor.opening import OPENING_CHECKS
from vfiopy.errno_table import look_up
from vfiopy.errors import VfioError, from_errno
from vfiopy.pci import PciAddress

runner = CliRunner()
NIC = "0000:02:00.0"

# The kernel's own words, of several versions, and the device that each is about.
LINES = {
    "interrupt fault": (
        (
            "DMAR: [INTR-REMAP] Request device [02:00.0] fault index 0x8080 [fault reason 0x25] Blocked a "
            "compatibility format interrupt request"
        ),
    ),
    "IOMMU fault": (
        "DMAR: [DMA Write NO_PASID] Request device [02:00.0] fault addr 0xdceff000 [fault reason 0x05] PTE Write",
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:02:00.0 domain=0x0007 address=0xffffc02000 flags=0x0000]",
        "vfio-pci 0000:02:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0010 address=0x64a7f000 flags=0x0000]",
        "arm-smmu-v3 arm-smmu-v3.0.auto: event: F_TRANSLATION client: 0000:02:00.0 sid: 0x200 ssid: 0x0 iova: 0x1000",
        "arm-smmu 5000000.smmu: Unhandled context fault: fsr=0x402, iova=0x1000, fsynr=0x1, cb=1",
    ),
    "direct ranges": (
        (
            "vfio-pci 0000:02:00.0: Firmware has requested this device have a 1:1 IOMMU mapping, rejecting configuring "
            "the device without a 1:1 mapping. Contact your platform vendor."
        ),
        (
            "vfio-pci 0000:02:00.0: DMAR: Device is ineligible for IOMMU domain attach due to platform RMRR "
            "requirement.  Contact your platform vendor."
        ),
    ),
    "interrupt remapping": (
        (
            "vfio_iommu_type1_attach_group: No interrupt remapping support.  Use the module param "
            '"allow_unsafe_interrupts" to enable VFIO IOMMU support on this platform'
        ),
    ),
    "memlock": ("vfio_pin_pages_remote: RLIMIT_MEMLOCK (8388608) exceeded",),
    "virtual functions on": ("vfio-pci 0000:02:00.0: Cannot bind to PF with SR-IOV enabled",),
    "token": (
        "vfio-pci 0000:02:00.0: VF token required to access device",
        "vfio-pci 0000:02:00.0: Incorrect VF token provided for device",
    ),
    "token not used": ("vfio-pci 0000:02:00.0: VF token incorrectly provided, PF not bound to vfio-pci",),
    "denylist": ("vfio-pci 0000:02:00.0: 8086:37c8 exists in vfio-pci device denylist, driver probing disallowed.",),
    "probe failed": (
        "vfio-pci: probe of 0000:02:00.0 failed with error -22",
        "vfio-pci 0000:02:00.0: probe with driver vfio-pci failed with error -22",
    ),
    "still in use": (
        "vfio-pci 0000:02:00.0: No device request channel registered, blocked until released by user",
        'vfio-pci 0000:02:00.0: Device is currently in use, task "sh" (812) blocked until device is released',
    ),
    "lost BARs": ("vfio-pci 0000:02:00.0: vfio_bar_restore: reset recovery - restoring BARs",),
    "no IOMMU": (
        "vfio-pci 0000:02:00.0: Adding kernel taint for vfio-noiommu group on device",
        "vfio-pci 0000:02:00.0: vfio-noiommu device opened by user (python3:4711)",
    ),
    "does not wake": (
        "vfio-pci 0000:02:00.0: can't change power state from D3cold to D0 (config space inaccessible)",
        "vfio-pci 0000:02:00.0: Unable to change power state from D3cold to D0, device inaccessible",
        "vfio-pci 0000:02:00.0: Refused to change power state, currently in D3",
    ),
    "reset failed": ("vfio-pci 0000:02:00.0: not ready 65535ms after FLR; giving up",),
    "slow reset": ("vfio-pci 0000:02:00.0: not ready 1023ms after FLR; waiting",),
    "reset while busy": (
        (
            "vfio-pci 0000:02:00.0: timed out waiting for pending transaction; performing function level reset "
            "anyway"
        ),
    ),
    "BAR taken": ("vfio-pci 0000:02:00.0: BAR 1: can't reserve [mem 0xc0000000-0xcfffffff 64bit pref]",),
    "unassigned BAR": (
        "pci 0000:02:00.0: BAR 1 [mem size 0x400000000 64bit pref]: failed to assign",
        "pci 0000:02:00.0: BAR 1: no space for [mem size 0x400000000 64bit pref]",
    ),
    "fatal bus error": (
        "vfio-pci 0000:02:00.0: PCIe Bus Error: severity=Uncorrected (Fatal), type=Transaction Layer, (Requester ID)",
        "pcieport 0000:00:1c.0: AER: Uncorrected (Fatal) error received: 0000:02:00.0",
    ),
    "bus error": (
        "vfio-pci 0000:02:00.0: PCIe Bus Error: severity=Uncorrectable (Non-Fatal), type=Transaction Layer",
        "pcieport 0000:00:01.1: AER: Multiple Uncorrectable (Non-Fatal) error message received from 0000:02:00.0",
    ),
    "corrected bus error": (
        "vfio-pci 0000:02:00.0: PCIe Bus Error: severity=Corrected, type=Physical Layer, (Receiver ID)",
        "pcieport 0000:00:1c.0: AER: Corrected error received: 0000:02:00.0",
    ),
    "ROM": ("vfio-pci 0000:02:00.0: Invalid PCI ROM header signature: expecting 0xaa55, got 0xffff",),
    "link down": ("pcieport 0000:00:1c.0: pciehp: Slot(3): Link Down",),
    "lockdown": ("Lockdown: python3: direct PCI access is restricted; see man kernel_lockdown.7",),
}


def match_line(line: str) -> LogMatch | None:
    return next(match_lines([line]), None)


PAIRS = [(name, line) for name, lines in LINES.items() for line in lines]


@pytest.mark.parametrize(("name", "line"), PAIRS)
def test_a_line_of_the_log_is_recognised(name: str, line: str) -> None:
    found = match_line(f"[  262.094625] {line}")
    assert found is not None
    assert found.pattern.name == name
    if "02:00.0" in line:
        assert str(found.device) == NIC


def test_each_pattern_has_a_line() -> None:
    assert set(LINES) == {pattern.name for pattern in PATTERNS}
    assert len({pattern.name for pattern in PATTERNS}) == len(PATTERNS)


@pytest.mark.parametrize(
    "line",
    [
        "vfio-pci 0000:02:00.0: enabling device (0000 -> 0002)",
        "DMAR: DRHD: handling fault status reg 3",
        "DMAR-IR: Enabled IRQ remapping in x2apic mode",
        "AMD-Vi: Interrupt remapping enabled",
        "usb 1-1: new high-speed USB device number 2 using xhci_hcd",
        "pcieport 0000:00:1c.0: AER: enabled with IRQ 24",
        "pci 0000:02:00.0: BAR 0 [mem 0xfe000000-0xfe01ffff]: assigned",
        # What healthy machines say while they boot.
        "ata3: SATA link down (SStatus 4 SControl 300)",
        "r8169 0000:02:00.0 eth0: link down",
        "DMAR-IR: x2apic is disabled because BIOS sets x2apic opt out bit.",
        "i2c_hid: probe of 0018:04F3:3140.0001 failed with error -22",
        "pci 0000:00:1c.0: BAR 13: no space for [io  size 0x1000]",
        "pci 0000:02:00.0: BAR 6: failed to assign [mem size 0x00080000 pref]",
        "pci 0000:02:00.0: VF BAR 0 [mem size 0x00020000 64bit]: can't assign; no space",
        "pci 0000:02:00.0: BAR 8: can't claim; no compatible bridge window",
        "pcieport 0000:00:1c.0: DPC: error containment capabilities: Int Msg #0, RPExt+ PoisonedTLP+",
        "",
    ],
)
def test_what_says_nothing_is_left_alone(line: str) -> None:
    assert match_line(line) is None


def test_the_same_again_is_one_finding_and_others_devices_are_left_out() -> None:
    fault = "DMAR: [DMA Read NO_PASID] Request device [{}] fault addr {} [fault reason 0x06] PTE Read access is not set"
    lines = [fault.format("02:00.0", "0x1000"), fault.format("03:00.0", "0x2000"), fault.format("02:00.0", "0x3000")]
    lines.append(LINES["memlock"][0])
    every = study_log(lines)
    assert [(one.check, one.object) for one in every] == [
        ("log: IOMMU fault", NIC),
        ("log: IOMMU fault", "0000:03:00.0"),
        ("log: memlock", "machine"),
    ]
    assert "2 times; the last one" in every[0].problem.evidence
    assert "0x3000" in every[0].problem.evidence
    mine = study_log(lines, [PciAddress.parse(NIC)])
    assert [one.object for one in mine] == [NIC, "machine"]


def test_the_worst_of_a_log_comes_first() -> None:
    lines = [LINES["slow reset"][0], LINES["memlock"][0], LINES["ROM"][0], LINES["reset failed"][0]]
    checks = [finding.check for finding in study_log(lines)]
    assert checks == ["log: memlock", "log: reset failed", "log: slow reset", "log: ROM"]


def test_reading_the_log_of_the_kernel(tmp_path: Path) -> None:
    kernel = FakeKernel.make(tmp_path)
    ring = kernel.dev / "kmsg"
    with pytest.raises(VfioError, match="log cannot be opened"):
        read_kernel_log(kernel)
    os.mkfifo(ring)
    end = os.open(ring, os.O_RDWR)  # a FIFO gives what was written, then would block: as /dev/kmsg does
    try:
        os.write(end, b"4,811,262094625,-;pci 0000:02:00.0: BAR 1: no space for [mem size 0x1000]\n SUBSYSTEM=pci\n")
        assert read_kernel_log(kernel) == ["pci 0000:02:00.0: BAR 1: no space for [mem size 0x1000]"]
    finally:
        os.close(end)


def test_a_fault_in_several_lines() -> None:
    smmu = "arm-smmu-v3 arm-smmu-v3.0.auto: "
    lines = [f"{smmu}event 0x10 received:", *(f"{smmu}\t0x{word:016x}" for word in (0x20000000010, 0, 0x1000, 0))]
    (finding,) = study_log(lines)
    assert finding.check == "log: IOMMU fault"


# --- errors ---


@pytest.mark.parametrize(
    ("text", "call", "number", "says"),
    [
        ("EPERM VFIO_SET_IOMMU", "VFIO_SET_IOMMU", "EPERM", "interrupt remapping"),
        ("VFIO_IOMMU_MAP_DMA: EINVAL", "VFIO_IOMMU_MAP_DMA", "EINVAL", "usable IOVAs"),
        ("VFIO_MAP_DMA failed: Cannot allocate memory", "VFIO_IOMMU_MAP_DMA", "ENOMEM", "RLIMIT_MEMLOCK"),
        (
            "qemu: -device vfio-pci: vfio_dma_map(0x55e, 0x0, 0x80000000, 0x7f) = -12 (Cannot allocate memory)",
            "VFIO_IOMMU_MAP_DMA",
            "ENOMEM",
            "RLIMIT_MEMLOCK",
        ),
        (
            (
                "vfio 0000:01:00.0: group 1 is not viable\nPlease ensure all devices within the iommu_group are "
                "bound to their vfio bus driver."
            ),
            "VFIO_GROUP_GET_DEVICE_FD",
            "EPERM",
            "not viable",
        ),
        (
            "vfio 0000:01:00.0: error opening /dev/vfio/1: Device or resource busy",
            "open VFIO group",
            "EBUSY",
            "open already",
        ),
        ("failed to open /dev/vfio/devices/vfio0: No such file", "open VFIO device", "ENOENT", "CDEV"),
        ("iommufd_backend_map_dma: Bad address (os error 14)", "IOMMU_IOAS_MAP", "EFAULT", "BAR"),
        ("Could not open '/dev/iommu': Permission denied", "open iommufd", "EACCES", "/dev/iommu"),
        ("IOVA_RANGES: [Errno 90]", "IOMMU_IOAS_IOVA_RANGES", "EMSGSIZE", "ranges"),
        ("VFIO_DEVICE_RESET ret=-22", "VFIO_DEVICE_RESET", "EINVAL", "no function reset"),
        ("Failed to set up IRQ: VFIO_DEVICE_SET_IRQS failed: error 28", "VFIO_DEVICE_SET_IRQS", "ENOSPC", "vectors"),
    ],
)
def test_an_error_is_explained(text: str, call: str, number: str, says: str) -> None:
    first = explain(text)[0]
    assert (first.about, first.errno) == (call, number)
    assert says in first.cause + first.remedy


def test_our_own_errors_are_explained_by_the_same_table() -> None:
    error = from_errno(errno.EBUSY, call="VFIO_DEVICE_BIND_IOMMUFD", object=NIC)
    first = explain(str(error))[0]
    assert (first.about, first.errno, first.cause) == ("VFIO_DEVICE_BIND_IOMMUFD", "EBUSY", error.meaning)


def test_a_call_alone_and_an_errno_alone() -> None:
    every = explain("VFIO_SET_IOMMU")
    assert [one.errno for one in every] == ["EINVAL", "ENODEV", "EPERM", "EFAULT", "ENOMEM"]
    calls = {one.about for one in explain("EBADFD")}
    assert {"VFIO_GROUP_SET_CONTAINER", "VFIO_DEVICE_BIND_IOMMUFD"} <= calls
    assert explain("my cat sat on the keyboard") == []


def test_a_pasted_log_is_explained_too() -> None:
    assert explain("\n".join(LINES["BAR taken"]))[0].about == "log: BAR taken"


# --- all of them ---


def test_all_symptoms_are_there() -> None:
    assert [one.number for one in SYMPTOMS] == list(range(1, 47))


@pytest.mark.parametrize("symptom", SYMPTOMS, ids=lambda one: str(one.number))
def test_each_symptom_ends_up_somewhere(symptom: Symptom) -> None:
    checks = {check.name for check in (*MACHINE_CHECKS, *BINDING_CHECKS, *OPENING_CHECKS)}
    assert set(symptom.checks) <= checks
    assert set(symptom.log) <= set(LINES)
    assert symptom.checks or symptom.log or symptom.errors or symptom.library
    for name, call in symptom.errors:
        row = look_up(getattr(errno, name), call)
        assert row is not None
        assert any(one.cause == row.meaning for one in explain(f"{call}: {name}"))


# --- the command ---


def test_log_on_the_command_line(tmp_path: Path) -> None:
    kernel = FakeKernel.make(tmp_path)
    kernel.add_driver("vfio-pci")
    kernel.add(NIC, driver="vfio-pci", group=8)
    saved = tmp_path / "dmesg.txt"
    saved.write_text("\n".join(line for _, line in PAIRS))
    answer = runner.invoke(app, ["doctor", NIC, "--log-file", str(saved), "--json"], obj=kernel)
    checks = [each["check"] for each in json.loads(answer.stdout)["findings"]]
    assert {f"log: {name}" for name in LINES} - set(checks) == {"log: link down"}  # the port's, not the NIC's
    piped = runner.invoke(app, ["doctor", NIC, "--log-file", "-"], obj=kernel, input=LINES["memlock"][0])
    assert "evidence: kernel log: vfio_pin_pages_remote" in piped.stdout
    saved.write_bytes(b"\xff\xfe not UTF-8\n" + LINES["memlock"][0].encode())
    assert "log: memlock" in runner.invoke(app, ["doctor", NIC, "--log-file", str(saved), "--json"], obj=kernel).stdout


def test_a_log_that_cannot_be_read_does_not_hide_the_rest(tmp_path: Path) -> None:
    """Distributions keep the log to root; what sysfs says is worth having all the same."""
    kernel = FakeKernel.make(tmp_path)
    kernel.add_driver("vfio-pci")
    kernel.add(NIC, driver="vfio-pci", group=8)
    report = json.loads(runner.invoke(app, ["doctor", NIC, "--log", "--json"], obj=kernel).stdout)
    (reason,) = [each["reason"] for each in report["skipped"] if each["check"] == "log"]
    assert "kernel log cannot be opened" in reason
    assert report["findings"]


def test_what_the_port_above_says_counts_for_the_device(tmp_path: Path) -> None:
    kernel = FakeKernel.make(tmp_path)
    for name in ("vfio-pci", "pcieport"):
        kernel.add_driver(name)
    kernel.add("0000:00:1c.0", class_code=0x060400, driver="pcieport", group=1, header_type=1)
    kernel.add(NIC, driver="vfio-pci", group=8, parent="pci0000:00/0000:00:1c.0")
    words = ["doctor", NIC, "--log-file", "-", "--json"]
    down = LINES["link down"][0]
    lines = f"{down}\n{down.replace('1c.0', '1d.0')}\n"
    findings = json.loads(runner.invoke(app, words, obj=kernel, input=lines).stdout)["findings"]
    assert [each["object"] for each in findings if each["check"] == "log: link down"] == ["0000:00:1c.0"]


def test_explain_on_the_command_line() -> None:
    answer = runner.invoke(app, ["doctor", "--explain", "EPERM VFIO_SET_IOMMU"])
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.startswith("VFIO_SET_IOMMU EPERM: the platform has no interrupt remapping")
    assert "remedy:" in answer.stdout
    assert runner.invoke(app, ["doctor", "--explain", "-"], input="VFIO_SET_IOMMU").exit_code == 0
    unknown = runner.invoke(app, ["doctor", "--explain", "hello"])
    assert (unknown.exit_code, "nothing is known" in unknown.stdout) == (1, True)
    said = json.loads(runner.invoke(app, ["doctor", "--explain", "EPERM VFIO_SET_IOMMU", "--json"]).stdout)
    check_schema("doctor+explain", said)
