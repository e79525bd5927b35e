"""Rows for devices and their features. Sources: drivers/vfio/*.c, drivers/vfio/pci/."""

from __future__ import annotations

import errno
from typing import Final

from vfiopy.errno_table.meaning import Meaning

__all__ = ["DEVICE", "FEATURES"]

_UNBOUND: Final = "the device's cdev is not bound to an iommufd yet"
_DECODE_OFF: Final = (
    "memory decode off: the device does not answer (PCI_COMMAND bit 1 is clear, or it is in low power or being reset)"
)
_ENABLE: Final = "set PCI_COMMAND's memory bit, leave low power, or wait for the reset to end; then try again"

DEVICE: Final[dict[str, dict[int, Meaning]]] = {
    "open VFIO device": {
        errno.ENOENT: Meaning(
            "NotBoundError",
            "the device has no cdev node: it is not bound to a VFIO driver, or the kernel has no VFIO_DEVICE_CDEV",
            "bind it to vfio-pci; without cdev support use backend='type1v2'",
        ),
        errno.ENODEV: Meaning("NotBoundError", "the device is just being unbound", "bind it to vfio-pci again"),
        errno.EPERM: Meaning(
            "PermissionDeniedError",
            "a device without an IOMMU needs CAP_SYS_RAWIO, or a device cgroup forbids the node",
            "run with CAP_SYS_RAWIO; in a container allow the device",
        ),
    },
    "VFIO_DEVICE_GET_INFO": {
        errno.EINVAL: Meaning("VfioError", _UNBOUND, "call VFIO_DEVICE_BIND_IOMMUFD first"),
        errno.EIO: Meaning("DeviceGoneError", "the device cannot be woken from low power", "see the kernel's log"),
    },
    "VFIO_DEVICE_GET_REGION_INFO": {
        errno.EINVAL: Meaning("AddressRangeError", f"the device has no such region, or {_UNBOUND}", ""),
    },
    "VFIO_DEVICE_GET_IRQ_INFO": {
        errno.EINVAL: Meaning(
            "AddressRangeError",
            f"the device has no such interrupt index (ERR may need PCI Express), or {_UNBOUND}",
            "",
        ),
    },
    "VFIO_DEVICE_SET_IRQS": {
        errno.EINVAL: Meaning(
            "AddressRangeError",
            "the interrupt index or vectors do not exist, another kind of interrupt is enabled, or an fd is "
            "not an eventfd",
            "irq_info() says how many vectors there are; disable one kind (INTx, MSI, MSI-X) before enabling another",
        ),
        errno.EBADF: Meaning("WrongFdError", "one of the eventfds is not open", ""),
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "this interrupt kind does not have this action (MSI and MSI-X cannot be masked here)",
            "mask MSI and MSI-X vectors in the device",
        ),
        errno.ENOSPC: Meaning("NoSpaceError", "the system has no interrupt vectors left", "ask for fewer"),
        errno.ENODEV: Meaning("NotSupportedError", "no INTx line is routed to the device", "use MSI or MSI-X"),
        errno.EBUSY: Meaning(
            "BusyError", "the INTx line is shared with a driver that does not share", "use MSI or MSI-X"
        ),
    },
    "VFIO_DEVICE_RESET": {
        errno.EINVAL: Meaning(
            "NotSupportedError",
            "the device has no function reset",
            "info().can_reset says so; a hot reset of the whole slot or bus may be possible",
        ),
        errno.EAGAIN: Meaning("BusyError", "another thread or process uses the device", "try again"),
        errno.ENOTTY: Meaning("DeviceGoneError", "none of the device's reset methods works", "see the kernel's log"),
        errno.ENODEV: Meaning("DeviceGoneError", "the device is gone", ""),
    },
    "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO": {
        errno.ENODEV: Meaning(
            "NotSupportedError",
            "the device sits on a root bus: there is no slot or bus to reset",
            "use the function reset",
        ),
        errno.EPERM: Meaning("NotViableError", "a device behind the same bridge has no IOMMU group", ""),
        errno.EAGAIN: Meaning("BusyError", "devices behind the bridge came or went meanwhile", "try again"),
    },
    "VFIO_DEVICE_PCI_HOT_RESET": {
        errno.EINVAL: Meaning(
            "NotViableError",
            "not all devices that the reset would hit are in this process's hands, or the groups given are "
            "not all of them",
            "get_pci_hot_reset_info() lists them: bind and open each",
        ),
        errno.EBADF: Meaning("WrongFdError", "one of the group fds is not open", ""),
        errno.EBUSY: Meaning("BusyError", "another thread or process uses one of the devices", "try again"),
        errno.EAGAIN: Meaning("BusyError", "another operation on one of the devices is in progress", "try again"),
        errno.ENOTTY: Meaning("NotSupportedError", "the bridge's reset does not work", "see the kernel's log"),
        errno.ENODEV: Meaning("NotSupportedError", "there is no slot or bus to reset", "use the function reset"),
    },
    "VFIO_DEVICE_QUERY_GFX_PLANE": {
        errno.EINVAL: Meaning(
            "NotSupportedError", "the device does not offer this kind of plane", "probe the other kind"
        ),
    },
    "VFIO_DEVICE_GET_GFX_DMABUF": {
        errno.ENOENT: Meaning(
            "VfioError", "there is no dma-buf of this id", "query the plane again for its current id"
        ),
    },
    "VFIO_DEVICE_IOEVENTFD": {
        errno.EINVAL: Meaning(
            "AccessError",
            "ioeventfds are for registers in a BAR, outside of the MSI-X table, of 1, 2 or 4 bytes "
            "(or 8, where the kernel can)",
            "",
        ),
        errno.EEXIST: Meaning("OverlapError", "there is an ioeventfd for the same register and value", ""),
        errno.ENODEV: Meaning("VfioError", "there is no such ioeventfd to remove", ""),
        errno.ENOSPC: Meaning("NoSpaceError", "the device has 1000 ioeventfds already", ""),
    },
    "VFIO_DEVICE_BIND_IOMMUFD": {
        errno.EINVAL: Meaning(
            "BusyError",
            "the device is bound already or open through another fd, was opened through its group, a VF "
            "token was given that it does not use, or its IOMMU is not cache-coherent",
            "open a fresh cdev fd, one per device and machine; give a token only for SR-IOV functions",
        ),
        errno.EBADF: Meaning("WrongFdError", "the iommufd is not open", ""),
        errno.EBADFD: Meaning("WrongFdError", "the fd given as iommufd is not one", "open /dev/iommu"),
        errno.EBUSY: Meaning(
            "NotViableError",
            "the device's group is open, or a native driver still holds another device of it",
            "close /dev/vfio/N, and bind the other devices of the group to vfio-pci or to nothing (bridges may stay)",
        ),
        errno.EACCES: Meaning(
            "PermissionDeniedError",
            "the VF token is missing or not the one that the physical function set",
            "pass vf_token= with the UUID of the physical function's driver",
        ),
        errno.EPERM: Meaning(
            "PermissionDeniedError",
            "the platform has no interrupt remapping, so a device could forge any interrupt; or another "
            "user owns the group's DMA",
            "switch interrupt remapping on, or accept the risk with the module parameter "
            "iommufd.allow_unsafe_interrupts=1 (vfio_iommu_type1's parameter does not count here)",
        ),
        errno.ENODEV: Meaning("NotSupportedError", "the device has no IOMMU group", "switch the IOMMU on"),
        errno.E2BIG: Meaning(
            "NotSupportedError",
            "this kernel does not know VF tokens for cdevs",
            "use backend='type1v2', or Linux 6.19 or later",
        ),
        errno.EAGAIN: Meaning("BusyError", "the device is being reset", "try again"),
    },
    "VFIO_DEVICE_ATTACH_IOMMUFD_PT": {
        errno.ENOENT: Meaning("VfioError", "the iommufd that the device is bound to has no object of this id", ""),
        errno.EINVAL: Meaning(
            "VfioError",
            "the object is neither IOAS nor HWPT, or not one that fits the device's IOMMU; or the firmware "
            "asks for a 1:1 mapping of this device",
            "see the kernel's log; a firmware setting may lift RMRR or IVMD requirements",
        ),
        errno.EADDRINUSE: Meaning(
            "IovaRangeError",
            "what is mapped already collides with a reserved range, the aperture or the page size of this "
            "device's IOMMU",
            "attach the device before mapping, or unmap what lies outside of its ranges",
        ),
        errno.EFAULT: Meaning(
            "MemoryKindError",
            "memory that was mapped before any device was attached turns out not to be mappable",
            "a BAR must be mapped as a dma-buf, other memory must exist and be writable where the device is to write",
        ),
        errno.ENOMEM: Meaning(
            "MemlockError",
            "RLIMIT_MEMLOCK does not allow to pin what is mapped (or the kernel has run out of memory)",
            "raise the limit (ulimit -l, LimitMEMLOCK=), or give the process CAP_IPC_LOCK; iommufd counts "
            "all of the user's processes together",
        ),
        errno.ENODEV: Meaning(
            "NotSupportedError",
            "the HWPT has a fault queue and the device has no page request interface",
            "use an HWPT without fault queue",
        ),
        errno.EOPNOTSUPP: Meaning("NotSupportedError", "the device's IOMMU driver has no PASID support", ""),
        errno.EBUSY: Meaning("BusyError", "the device is recovering from an error", "try again"),
    },
    "mmap of a VFIO device": {
        errno.EINVAL: Meaning(
            "NotSupportedError",
            "this part of the region cannot be mapped (I/O ports, less than a page, past its end, or no memory at all)",
            "use read() and write() for it",
        ),
        errno.ENODEV: Meaning(
            "DeviceGoneError", "the BAR was not claimed when the device was opened", "see the kernel's log"
        ),
        errno.EBUSY: Meaning("BusyError", "another driver holds the BAR", "see the kernel's log"),
    },
    "pread of a VFIO device": {
        errno.EIO: Meaning("DeviceGoneError", _DECODE_OFF, _ENABLE),
        errno.EINVAL: Meaning("AddressRangeError", "the region does not exist, or ends before this offset", ""),
        errno.ENODEV: Meaning(
            "DeviceGoneError", "the BAR was not claimed when the device was opened", "see the kernel's log"
        ),
    },
    "pwrite of a VFIO device": {
        errno.EIO: Meaning("DeviceGoneError", _DECODE_OFF, _ENABLE),
        errno.EINVAL: Meaning(
            "AddressRangeError",
            "the region does not exist, cannot be written, or ends before this offset",
            "",
        ),
        errno.ENODEV: Meaning(
            "DeviceGoneError", "the BAR was not claimed when the device was opened", "see the kernel's log"
        ),
    },
    "VFIO_MIG_GET_PRECOPY_INFO": {
        errno.EINVAL: Meaning("VfioError", "the device is not in a PRE_COPY state", "move to PRE_COPY first"),
        errno.ENODEV: Meaning(
            "VfioError", "the stream belongs to an earlier migration", "use the stream of the last arc"
        ),
    },
    "read migration stream": {
        errno.ENOMSG: Meaning(
            "VfioError", "nothing to read at the moment: PRE_COPY has no new data", "go on to STOP_COPY"
        ),
        errno.ENODEV: Meaning(
            "VfioError", "the stream belongs to an earlier migration", "use the stream of the last arc"
        ),
    },
    "write migration stream": {
        errno.ENODEV: Meaning(
            "VfioError", "the stream belongs to an earlier migration", "use the stream of the last arc"
        ),
        errno.EINVAL: Meaning(
            "VfioError", "the device does not recognise this state", "the source must be of the same kind"
        ),
    },
}

_NOT_ENGAGED: Final = Meaning(
    "VfioError",
    "the device is in this low-power mode already, or the wake-up fd is not an eventfd",
    "call low_power_exit() first",
)

FEATURES: Final[dict[str, dict[int, Meaning]]] = {
    "VFIO_DEVICE_FEATURE_PCI_VF_TOKEN": {
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "the device is not an SR-IOV physical function",
            "set it on the physical function",
        ),
    },
    "VFIO_DEVICE_FEATURE_MIGRATION": {
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "the device's driver cannot migrate it",
            "migration needs the vendor's variant of vfio-pci",
        ),
    },
    "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE": {
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "the device's driver cannot migrate it",
            "migration needs the vendor's variant of vfio-pci",
        ),
        errno.EINVAL: Meaning(
            "VfioError",
            "there is no way from the device's state to this one, or the driver does not have it",
            "read the state again: the device may have stopped half-way",
        ),
    },
    "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY": {errno.EINVAL: _NOT_ENGAGED},
    "VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY_WITH_WAKEUP": {errno.EINVAL: _NOT_ENGAGED},
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_START": {
        errno.E2BIG: Meaning("VfioError", "there are more than 256 ranges", "merge ranges"),
        errno.EINVAL: Meaning(
            "VfioError",
            "logging is on already, there is no range, or ranges overlap or are not aligned to the page size",
            "",
        ),
        errno.EOVERFLOW: Meaning("IovaRangeError", "a range goes beyond 64 bits", ""),
    },
    "VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2": {
        errno.EINVAL: Meaning("NotSupportedError", "the device has no PRE_COPY state", ""),
    },
    "VFIO_DEVICE_FEATURE_DMA_BUF": {
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "this kernel cannot export BARs as dma-bufs",
            "use Linux 6.19 or later, built with PCI_P2PDMA",
        ),
        errno.EOPNOTSUPP: Meaning(
            "NotSupportedError",
            "this device's driver cannot export BARs as dma-bufs",
            "bind the device to plain vfio-pci",
        ),
        errno.EINVAL: Meaning(
            "AlignmentError",
            "the parts must be whole pages inside of a memory BAR; I/O BARs and BARs smaller than a page "
            "cannot be exported",
            "align offset and size to the page size",
        ),
        errno.ENODEV: Meaning(
            "NotSupportedError",
            "only BARs can be exported (not ROM or config space), and this one must exist and be claimed",
            "region_info() says which BARs there are",
        ),
        errno.EOVERFLOW: Meaning("AddressRangeError", "a part goes beyond 64 bits", ""),
    },
}
