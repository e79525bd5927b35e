"""What users of VFIO meet, by number, and where vfiopy finds it: pure data, from which documentation is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["SYMPTOMS", "Symptom"]


@dataclass(frozen=True, slots=True)
class Symptom:
    """One of the 46.

    Attributes:
        number: 1 to 46.
        title: what a user sees.
        cause: why, one sentence.
        checks: names of the doctor's checks that find it before anything is opened.
        tries: names of the steps of ``vfiopy doctor ADDRESS --open`` that meet it.
        log: patterns of ``vfiopy doctor --log`` that recognise it.
        errors: (errno, call) that ``vfiopy doctor --explain`` explains.
        library: how vfiopy itself keeps its users from it; empty where it cannot.
    """

    number: int
    title: str
    cause: str
    checks: tuple[str, ...] = ()
    tries: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    errors: tuple[tuple[str, str], ...] = ()
    library: str = ""


_OPEN: Final = ("open",)
_MAP: Final = ("VFIO_IOMMU_MAP_DMA", "IOMMU_IOAS_MAP")


def _of(name: str, *calls: str) -> tuple[tuple[str, str], ...]:
    return tuple((name, call) for call in calls)


_OPENING: Final = (
    Symptom(
        1,
        "opening /dev/vfio/N: device or resource busy",
        "the group is open already, or a device of it through its own node; a leaked descriptor counts",
        checks=("held",),
        tries=_OPEN,
        errors=_of("EBUSY", "open VFIO group"),
    ),
    Symptom(
        2,
        "opening /dev/vfio/noiommu-N: operation not permitted",
        "a group without an IOMMU takes CAP_SYS_RAWIO",
        checks=("no IOMMU",),
        tries=_OPEN,
        log=("no IOMMU",),
        errors=_of("EPERM", "open VFIO group"),
    ),
    Symptom(
        3,
        "opening /dev/vfio/N: permission denied, or not permitted even for root in a container",
        "the node belongs to somebody else, or the container's device filter forbids it",
        checks=("permissions",),
        tries=_OPEN,
        errors=(*_of("EACCES", "open VFIO group", "open iommufd"), *_of("EPERM", "open VFIO device")),
    ),
    Symptom(
        4,
        "opening /dev/vfio/N: no such file or directory",
        "the module is not loaded, or a container has a stale copy of /dev",
        checks=("vfio module", "shared nodes", "stale node", "character device"),
        errors=_of("ENOENT", "open VFIO group", "open VFIO container", "open iommufd"),
    ),
    Symptom(
        5,
        "group N is not viable",
        "another function of the group is held by a native driver (bridges may stay)",
        checks=("group not viable",),
        errors=_of("EPERM", "VFIO_GROUP_GET_DEVICE_FD"),
    ),
    Symptom(
        6,
        "joining a container or an iommufd: device or resource busy",
        "a native driver of the group has claimed its DMA",
        checks=("group not viable",),
        tries=_OPEN,
        errors=_of("EBUSY", "VFIO_GROUP_SET_CONTAINER", "VFIO_DEVICE_BIND_IOMMUFD"),
    ),
    Symptom(
        7,
        "VFIO_GROUP_SET_CONTAINER a second time: invalid argument",
        "the group is in a container already",
        errors=_of("EINVAL", "VFIO_GROUP_SET_CONTAINER"),
        library="a group joins its container once, when its first device is opened",
    ),
    Symptom(
        8,
        "VFIO_GROUP_UNSET_CONTAINER: device or resource busy",
        "a device of the group is open, or a BAR of it is mapped",
        errors=_of("EBUSY", "VFIO_GROUP_UNSET_CONTAINER"),
        library="close() unmaps BARs, then closes devices, groups and the container, in this order",
    ),
    Symptom(
        9,
        "VFIO_SET_IOMMU: invalid argument, or no such device",
        "the container has no group yet, or its IOMMU model is chosen already, or the kernel has no such model",
        tries=_OPEN,
        errors=(*_of("EINVAL", "VFIO_SET_IOMMU"), *_of("ENODEV", "VFIO_SET_IOMMU")),
        library="open() makes the calls in the order that the kernel wants",
    ),
)

_MAPPING: Final = (
    Symptom(
        10,
        "mapping memory: invalid argument",
        "not whole pages, or IOVAs that are reserved (MSI window, RMRR) or out of the IOMMU's reach",
        tries=("map one page", "last page"),
        errors=_of("EINVAL", *_MAP),
        library="IOVAs come from the ranges that the kernel calls usable; IovaRangeError names the nearest one",
    ),
    Symptom(
        11,
        "mapping memory: file exists",
        "the range overlaps one that the program mapped before",
        errors=_of("EEXIST", *_MAP),
        library="the address space has a book of its mappings; OverlapError names the other one",
    ),
    Symptom(
        12,
        "mapping memory: cannot allocate memory",
        "memory that a device can reach counts as locked; iommufd counts all processes of the user together",
        checks=("memlock", "cgroup memory"),
        tries=("map one page", "map big", "locked memory"),
        log=("memlock",),
        errors=_of("ENOMEM", *_MAP),
    ),
    Symptom(
        13,
        "mapping memory: no space left on device, after very many mappings",
        "type1 takes 65535 mappings (dma_entry_limit)",
        checks=("mapping limit",),
        errors=_of("ENOSPC", "VFIO_IOMMU_MAP_DMA"),
        library="NoSpaceError; one buffer of many pages is one mapping",
    ),
    Symptom(
        14,
        "mapping a BAR for another device: bad address",
        "iommufd does not pin a BAR that is mapped into a process",
        errors=_of("EFAULT", "IOMMU_IOAS_MAP"),
        library="space.peer() exports a dma-buf for a BAR and imports that",
    ),
    Symptom(
        15,
        "exporting a BAR as a dma-buf: not supported",
        "the kernel is older than the feature or built without it, or a variant driver lacks it",
        tries=("dma-buf",),
        errors=_of("ENOTTY", "VFIO_DEVICE_FEATURE_DMA_BUF") + _of("EOPNOTSUPP", "VFIO_DEVICE_FEATURE_DMA_BUF"),
    ),
    Symptom(
        16,
        "exporting a BAR as a dma-buf: invalid argument",
        "the range is empty or not whole pages",
        errors=_of("EINVAL", "VFIO_DEVICE_FEATURE_DMA_BUF"),
    ),
    Symptom(
        17,
        "exporting a BAR as a dma-buf: no such device",
        "the region is none of BAR 0 to 5, or nobody has claimed the BAR, or the device is going away",
        errors=_of("ENODEV", "VFIO_DEVICE_FEATURE_DMA_BUF"),
    ),
    Symptom(
        18,
        "importing a dma-buf: no such device",
        "its exporter took it back: memory decode off, or a reset",
        checks=("memory decode",),
        errors=_of("ENODEV", "IOMMU_IOAS_MAP_FILE"),
        library="RevokedError; the exporter's own actions mark its imports",
    ),
    Symptom(
        19,
        "importing a dma-buf: operation not supported",
        "its exporter is not vfio-pci, or it has more than one range",
        errors=_of("EOPNOTSUPP", "IOMMU_IOAS_MAP_FILE"),
    ),
    Symptom(
        20,
        "peer-to-peer reads only ones after the exporter was reset",
        "the kernel drops the import when the exporter is reset, and does not bring it back",
        log=("IOMMU fault",),
        library="a reset through vfiopy marks imports as revoked and calls their owner; remap() brings them back",
    ),
)

_ISOLATION: Final = (
    Symptom(
        21,
        "attaching to an iommufd: operation not permitted, and no word in the kernel's log",
        "interrupts are not remapped; iommufd has a parameter of its own for that",
        checks=("interrupt remapping",),
        tries=_OPEN,
        errors=_of("EPERM", "VFIO_DEVICE_BIND_IOMMUFD"),
    ),
    Symptom(
        22,
        "VFIO_SET_IOMMU: operation not permitted",
        "interrupts are not remapped, and vfio_iommu_type1 was not told to go on without",
        checks=("interrupt remapping",),
        tries=_OPEN,
        log=("interrupt remapping",),
        errors=_of("EPERM", "VFIO_SET_IOMMU"),
    ),
    Symptom(
        23,
        "attaching: invalid argument; the kernel says 'requested ... a 1:1 IOMMU mapping' or 'RMRR'",
        "the firmware wants memory mapped one to one for the device",
        checks=("direct ranges",),
        tries=_OPEN,
        log=("direct ranges",),
        errors=_of("EINVAL", "VFIO_DEVICE_ATTACH_IOMMUFD_PT"),
    ),
    Symptom(
        24,
        "vfio-pci: probe failed with error -22",
        "the machine has no IOMMU, or it is off",
        checks=("iommu groups", "no group"),
        log=("probe failed",),
    ),
    Symptom(
        25,
        "vfio-pci: probe failed with error -22, although there is a group",
        "the IOMMU cannot keep DMA coherent with the caches",
        checks=("driver override",),
        log=("probe failed",),
    ),
    Symptom(
        26,
        "binding to vfio-pci: device or resource busy; 'Cannot bind to PF with SR-IOV enabled'",
        "vfio-pci does not take a physical function whose virtual functions are on",
        checks=("virtual functions on",),
        log=("virtual functions on",),
    ),
    Symptom(
        27,
        "opening a virtual function, or its physical one: permission denied",
        "the VF token is missing, or not the one that was set",
        checks=("token",),
        tries=_OPEN,
        log=("token",),
        errors=_of("EACCES", "VFIO_GROUP_GET_DEVICE_FD", "VFIO_DEVICE_BIND_IOMMUFD"),
    ),
    Symptom(
        28,
        "opening with a VF token: invalid argument",
        "the device does not use one",
        tries=_OPEN,
        log=("token not used",),
        errors=_of("EINVAL", "VFIO_GROUP_GET_DEVICE_FD"),
    ),
    Symptom(
        29,
        "vfio-pci does not take a device: 'exists in vfio-pci device denylist'",
        "known not to be safe in a user's hands",
        checks=("denylist",),
        log=("denylist",),
    ),
    Symptom(
        30,
        "unbinding hangs",
        "a process still has the device, and is not told or does not listen",
        checks=("held",),
        log=("still in use",),
        library="unbind, undo and restore refuse, and name the process",
    ),
    Symptom(
        31,
        "the device has vfio-dev/vfioN in sysfs, and no /dev/vfio/devices/vfioN",
        "the kernel was built without CONFIG_VFIO_DEVICE_CDEV; the folder is there all the same",
        checks=("character device",),
        errors=_of("ENOENT", "open VFIO device"),
        library="open() goes through the group then",
    ),
    Symptom(
        32,
        "a device without an IOMMU has no /dev/vfio/devices/vfioN",
        "character devices take an IOMMU, unless the kernel has CONFIG_IOMMUFD_NOIOMMU",
        checks=("character device", "no IOMMU"),
        library="open(noiommu=True) goes through the group",
    ),
)

_USING: Final = (
    Symptom(
        33,
        "mapping a BAR into the process: invalid argument",
        "the region cannot be mapped there: no MMAP flag, the MSI-X table's page, or beyond its end",
        tries=("bars",),
        errors=_of("EINVAL", "mmap of a VFIO device"),
        library="parts that cannot be mapped are reached by pread and pwrite, at the same width",
    ),
    Symptom(
        34,
        "SIGBUS or SIGSEGV while a register is accessed",
        "memory decode is off, the device sleeps, or it was removed",
        checks=("memory decode", "power"),
        tries=("identity",),
        log=("does not wake", "link down", "fatal bus error"),
        library="register accesses raise DeviceGoneError instead",
    ),
    Symptom(
        35,
        "enabling interrupts: invalid argument, or a positive number comes back",
        "more vectors than the device has, another kind is enabled, or the system has fewer vectors left",
        tries=("msi", "msix", "intx"),
        errors=_of("EINVAL", "VFIO_DEVICE_SET_IRQS"),
        library="IrqCountError says how many there are",
    ),
    Symptom(
        36,
        "reset: invalid argument",
        "the device has no reset of its own",
        checks=("reset",),
        tries=("reset",),
        log=("reset failed", "slow reset"),
        errors=_of("EINVAL", "VFIO_DEVICE_RESET"),
    ),
    Symptom(
        37,
        "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: no space left on device",
        "the first call only tells how many devices there are",
        library="hot_reset_info() calls twice",
    ),
    Symptom(
        38,
        "hot reset: invalid argument, busy, or not permitted",
        "a device on the same bus is not this user's, or another reset is going on",
        tries=("hot reset",),
        errors=(
            *_of("EINVAL", "VFIO_DEVICE_PCI_HOT_RESET"),
            *_of("EBUSY", "VFIO_DEVICE_PCI_HOT_RESET"),
            *_of("EPERM", "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO"),
        ),
    ),
    Symptom(
        39,
        "the IOMMU group has far too many devices",
        "a bridge on the way up does not keep the devices below it apart (no ACS)",
        checks=("wide group",),
    ),
    Symptom(
        40,
        "DMA goes to the wrong memory after fork()",
        "pages that are pinned are copied for the child at fork, or later",
        library="buffers are not copied into a child (MADV_DONTFORK), and raise ForkedError there",
    ),
    Symptom(
        41,
        "all mappings vanish",
        "the last group left the container",
        library="an address space keeps its mappings in its book, and replays them when a device joins",
    ),
    Symptom(
        42,
        "an ioctl: inappropriate ioctl for device",
        "the descriptor is of another kind, or the kernel does not have the call",
        errors=(
            *_of("ENOTTY", "IOMMU_HWPT_ALLOC", "VFIO_IOMMU_MAP_DMA"),
            *_of("ENOTTY", "VFIO_DEVICE_FEATURE_MIGRATION"),
        ),
    ),
    Symptom(
        43,
        "mapping resourceN of sysfs: operation not permitted",
        "the kernel is locked down (Secure Boot)",
        checks=("lockdown",),
        log=("lockdown",),
    ),
    Symptom(
        44,
        "IOMMU_IOAS_IOVA_RANGES: message too long",
        "the first call only tells how many ranges there are",
        errors=_of("EMSGSIZE", "IOMMU_IOAS_IOVA_RANGES"),
        library="iova_ranges() calls twice",
    ),
    Symptom(
        45,
        "an iommufd ioctl: argument list too long",
        "the structure is newer than the kernel, and its new part is not zero",
        errors=_of("E2BIG", "IOMMU_HWPT_ALLOC"),
        library="only what was asked for is set; NotSupportedError says that the kernel is too old for it",
    ),
    Symptom(
        46,
        "mapping 4096 bytes: invalid argument, on a machine with pages of 16 or 64 KiB",
        "addresses and sizes are multiples of the machine's page and of the IOMMU's smallest one",
        checks=("page size",),
        errors=_of("EINVAL", "VFIO_IOMMU_MAP_DMA"),
        library="allocate() rounds; AlignmentError says to what",
    ),
)

SYMPTOMS: Final[tuple[Symptom, ...]] = (*_OPENING, *_MAPPING, *_ISOLATION, *_USING)
"""All of them, in order of their numbers."""
