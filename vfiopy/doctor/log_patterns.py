"""Lines of the kernel's log that matter to who drives a device from user space: pure data.

Texts were read from the sources named with each group (Linux 5.10 to 7.2); a changed text keeps its old form here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vfiopy.doctor.finding import Severity

__all__ = ["INTERRUPT_FAULT", "IOMMU_FAULT", "PATTERNS", "Pattern"]


@dataclass(frozen=True, slots=True)
class Pattern:
    """One thing that the kernel says.

    Attributes:
        name: what it is about; stays the same, scripts match it.
        regex: finds it in a line; None for faults, which :mod:`vfiopy.pci.iommu_faults` finds.
        severity: how bad it was; a line of the past does not block.
        cause: what it means, one sentence.
        remedy: what to do.
    """

    name: str
    regex: re.Pattern[str] | None
    severity: Severity
    cause: str
    remedy: str


def _pattern(name: str, regex: str, severity: Severity, cause: str, remedy: str) -> Pattern:
    return Pattern(name, re.compile(regex, re.IGNORECASE), severity, cause, remedy)


_LIMITS, _NOTE = Severity.LIMITS, Severity.NOTE

INTERRUPT_FAULT: Final = Pattern(
    "interrupt fault",
    None,
    _LIMITS,
    "the IOMMU stopped an interrupt of the device: its vector was gone or never set up",
    "switch interrupts off in the device before vectors are disabled, and enable them again after a reset",
)
IOMMU_FAULT: Final = Pattern(
    "IOMMU fault",
    None,
    _LIMITS,
    "the IOMMU stopped DMA of the device: the address was not mapped then, or not for that direction",
    "compare the address with the mappings: unmapped too early, a physical address instead of an IOVA, read-only "
    "memory that is written, or a device still running after its driver ended",
)

# drivers/iommu/iommu.c, intel/iommu.c, vfio_iommu_type1.c
_IOMMU: Final = (
    INTERRUPT_FAULT,
    IOMMU_FAULT,
    _pattern(
        "direct ranges",
        r"requested this device have a 1:1 IOMMU mapping|platform RMRR requirement",
        _LIMITS,
        "the firmware wants memory mapped one to one for the device (RMRR, IVMD), so the kernel does not hand it over",
        "switch off in the firmware what shares that memory: USB legacy support, management controller, HP shared "
        "memory",
    ),
    _pattern(
        "interrupt remapping",
        r"No interrupt remapping support|interrupt remapping (is being )?disabled|Failed to enable irq remapping",
        _LIMITS,
        "interrupts are not remapped, so VFIO refuses to attach devices (EPERM)",
        "switch interrupt remapping on (firmware, x2APIC); or, where all devices are trusted, set "
        "vfio_iommu_type1.allow_unsafe_interrupts=1 or iommufd.allow_unsafe_interrupts=1 (each way has its own)",
    ),
)

# drivers/vfio/vfio_main.c, vfio_iommu_type1.c, pci/vfio_pci.c, pci/vfio_pci_core.c, pci/vfio_pci_config.c
_VFIO: Final = (
    _pattern(
        "memlock",
        r"RLIMIT_MEMLOCK .*exceeded",
        _LIMITS,
        "a process may not lock as much memory as it mapped for DMA (it got ENOMEM)",
        "ulimit -l, or /etc/security/limits.d: '@vfio - memlock 8388608'; a service takes LimitMEMLOCK=",
    ),
    _pattern(
        "virtual functions on",
        r"Cannot bind to PF with SR-IOV enabled",
        _LIMITS,
        "its virtual functions were on, and vfio-pci does not take such a physical function (EBUSY)",
        "use a virtual function, or write 0 to sriov_numvfs first",
    ),
    _pattern(
        "token",
        r"VF token required|Incorrect VF token",
        _LIMITS,
        "opening it needs the token of its physical function, and none or another one was given (EACCES)",
        "pass vf_token= to open(), the same for the physical function and its virtual ones",
    ),
    _pattern(
        "token not used",
        r"VF token incorrectly provided",
        _LIMITS,
        "a token was given for a device that does not use one (EINVAL)",
        "leave vf_token= out",
    ),
    _pattern(
        "denylist",
        r"exists in vfio-pci device (denylist|blacklist)",
        _LIMITS,
        "vfio-pci refuses it by default: known not to be safe in a user's hands",
        "where its user is trusted: 'options vfio-pci disable_denylist=1' in /etc/modprobe.d/vfio.conf, and load the "
        "module again (modprobe -r vfio-pci; modprobe vfio-pci)",
    ),
    _pattern(
        "probe failed",
        r"vfio[-_]pci.*probe.* failed with error",
        _LIMITS,
        "the driver did not take the device: -22 without an IOMMU group or cache coherency, -16 with virtual "
        "functions on",
        "ls /sys/kernel/iommu_groups must show groups; 'vfiopy doctor' with the device's address says which it is",
    ),
    _pattern(
        "still in use",
        r"No device request channel registered|Device is currently in use, task|Relaying device request to user",
        _LIMITS,
        "somebody tried to take the device from its user, and waits until that one closes it",
        "end or tell the process ('vfiopy doctor ADDRESS' names it); a driver should close on the device's request "
        "event",
    ),
    _pattern(
        "lost BARs",
        r"reset recovery - restoring BARs",
        _NOTE,
        "the device was reset by other means than VFIO's (by itself, by a register, by its bus), and its BARs were "
        "put back",
        "if nobody did that on purpose: the device fell over, or lost power; look for errors before this line",
    ),
    _pattern(
        "no IOMMU",
        r"vfio-noiommu (group|device)",
        _NOTE,
        "it was handed to a user without an IOMMU: nothing keeps its DMA in bounds, the kernel is tainted",
        "where there is an IOMMU switch it on, and noiommu mode off",
    ),
)

# drivers/pci/pci.c, setup-res.c, rom.c, pcie/aer.c, pcie/dpc.c, hotplug/pciehp_ctrl.c
_PCI: Final = (
    _pattern(
        "does not wake",
        r"(can't|unable to|refused to|cannot) change power state",
        _LIMITS,
        "the device does not come back from its sleep: its registers and configuration space read as ones",
        "'options vfio-pci disable_idle_d3=1' in /etc/modprobe.d/vfio.conf, and load the module again; or echo on > "
        ".../power/control before binding; a device that is gone "
        "already needs a power cycle, or 1 in .../remove and in /sys/bus/pci/rescan",
    ),
    _pattern(
        "reset failed",
        r"not ready \d+ms after .*giving up",
        _LIMITS,
        "the device did not come back from its reset",
        "choose another way in .../reset_method (cat shows them), or power cycle",
    ),
    _pattern(
        "slow reset",
        r"not ready \d+ms after .*waiting",
        _NOTE,
        "the device takes longer than usual to come back from its reset",
        "wait; nothing if it does not end in 'giving up'",
    ),
    _pattern(
        "reset while busy",
        r"timed out waiting for pending transaction",
        _NOTE,
        "the device was reset while its own requests were still under way",
        "let the driver stop DMA and wait for it before a reset, or before it closes the device",
    ),
    _pattern(
        "BAR taken",
        r"can't reserve \[|can't claim; address conflict|resource collision",
        _LIMITS,
        "something else has claimed a BAR's addresses, so the driver cannot have it (EBUSY)",
        "grep the addresses in /proc/iomem; a boot framebuffer goes with video=efifb:off or "
        "initcall_blacklist=sysfb_init",
    ),
    _pattern(
        "unassigned BAR",
        r"(?<!VF )BAR [0-5]\b.*: (failed to assign|no space for|can't assign)",
        _LIMITS,
        "the system has no addresses for a BAR, so it cannot be reached",
        "firmware: above 4G decoding, resizable BAR; kernel: pci=realloc",
    ),
    _pattern(
        "fatal bus error",
        r"PCIe Bus Error: severity=Uncorrect(ed|able) \(Fatal\)|AER:.*(?<!Non-)\b\(?Fatal\)? error"
        r"|DPC: containment event",
        _LIMITS,
        "a fatal PCI Express error: the link is reset, and what was in flight is lost",
        "seat, cables and power first; then what the driver did last: an access to a BAR that does not answer",
    ),
    _pattern(
        "bus error",
        r"PCIe Bus Error: severity=Uncorrect(ed|able)|AER:.*(Uncorrect(ed|able)|Non-Fatal)",
        _LIMITS,
        "a PCI Express transaction failed: an unsupported request, a timeout or a poisoned packet",
        "the line's Requester ID and 'TLP Header' say what was asked; often a register beyond the device's BAR, or "
        "memory decode off",
    ),
    _pattern(
        "corrected bus error",
        r"PCIe Bus Error: severity=Correct(ed|able)|AER:.*Correct(ed|able) error",
        _NOTE,
        "the link corrected an error; many of them cost bandwidth",
        "seat and cables; link speed in the firmware; ASPM off (pcie_aspm=off)",
    ),
    _pattern(
        "ROM",
        r"Invalid PCI ROM header signature",
        _NOTE,
        "its expansion ROM cannot be read: absent, disabled, or the device is asleep or hung",
        "nothing if no ROM is needed; together with 'got 0xffff' look whether the device answers at all",
    ),
    _pattern(
        "link down",
        r"Slot\(.*\): (Link Down|Card not present)",
        _LIMITS,
        "the device left the bus: pulled out, powered off, or its link broke",
        "seat and power; after it is back: echo 1 > /sys/bus/pci/rescan",
    ),
    _pattern(
        "lockdown",
        r"Lockdown:.*(PCI|/dev/mem|port|MSR)",
        _NOTE,
        "the kernel is locked down: a program that maps BARs through sysfs or /dev/mem was refused",
        "reach BARs through VFIO, which lockdown leaves alone",
    ),
)

PATTERNS: Final[tuple[Pattern, ...]] = (*_IOMMU, *_VFIO, *_PCI)
"""The first that fits a line counts."""
