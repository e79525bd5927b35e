"""Rows for messages of vfio-user: what a server means by the error in its reply. Source: docs/interop/vfio-user.rst."""

from __future__ import annotations

import errno
from typing import Final

from vfiopy.errno_table.meaning import Meaning

__all__ = ["ANY_MESSAGE", "VFIO_USER"]

_SILENT: Final = Meaning(
    "DeviceGoneError",
    "the device does not answer: memory decode is off, the function is not in D0, or its own code failed",
    "set PCI_COMMAND's memory bit (device.memory_enabled = True); else see the server's log",
)
_OUTSIDE: Final = Meaning("AddressRangeError", "the server has no such region, or it ends before this offset", "")

VFIO_USER: Final[dict[str, dict[int, Meaning]]] = {
    "VFIO_USER_VERSION": {
        errno.EINVAL: Meaning("ProtocolError", "the server does not take our version or capabilities", ""),
    },
    "VFIO_USER_REGION_READ": {errno.EIO: _SILENT, errno.EINVAL: _OUTSIDE},
    "VFIO_USER_REGION_WRITE": {errno.EIO: _SILENT, errno.EINVAL: _OUTSIDE},
    "VFIO_USER_GET_REGION_INFO": {errno.EINVAL: Meaning("AddressRangeError", "the device has no such region", "")},
    "VFIO_USER_GET_IRQ_INFO": {
        errno.EINVAL: Meaning("AddressRangeError", "the device has no such interrupt index", "")
    },
    "VFIO_USER_SET_IRQS": {
        errno.EINVAL: Meaning(
            "AddressRangeError",
            "the interrupt index or vectors do not exist, another kind of interrupt is enabled, or an fd is "
            "not an eventfd",
            "irq_info() says how many vectors there are; disable one kind (INTx, MSI, MSI-X) before enabling another",
        ),
        errno.ENOTTY: Meaning(
            "NotSupportedError",
            "this interrupt kind does not have this action",
            "mask MSI and MSI-X vectors in the device",
        ),
    },
    "VFIO_USER_RESET": {errno.EINVAL: Meaning("NotSupportedError", "the device has no function reset", "")},
    "VFIO_USER_DMA_MAP": {
        errno.EEXIST: Meaning(
            "OverlapError", "the IOVA range overlaps one that the server has mapped", "unmap the other one first"
        ),
        errno.EINVAL: Meaning(
            "IovaRangeError",
            "the server refuses the range (some servers say so for an overlap too), or the file behind the memory",
            "keep to whole pages of 4096 bytes",
        ),
        errno.ENOSPC: Meaning(
            "NoSpaceError",
            "the server takes no more mappings",
            "map fewer and larger ranges; the mapper's traits().max_mappings is what the server announced",
        ),
    },
    "VFIO_USER_DMA_UNMAP": {
        errno.EBUSY: Meaning(
            "PinnedError", "the server's device still uses the memory", "quiesce the device, then try again"
        ),
        errno.ENOENT: Meaning("NotMappedError", "the server has no mapping there, or the range cuts one in two", ""),
        errno.EINVAL: Meaning("NotMappedError", "the server has no mapping of exactly this range", ""),
    },
}
"""call → errno → row."""

_UNKNOWN: Final = Meaning("NotSupportedError", "the server does not have this command", "use a newer server")

ANY_MESSAGE: Final = {
    errno.ENOSYS: _UNKNOWN,
    errno.EOPNOTSUPP: _UNKNOWN,
    errno.ENOTTY: Meaning("NotSupportedError", "the served device does not have it", ""),
    errno.EIO: Meaning("DeviceGoneError", "the server could not do it", "see the server's log"),
    errno.EINVAL: Meaning("VfioError", "the server refuses the arguments", ""),
    errno.ENODEV: Meaning("DeviceGoneError", "the device behind the server is gone", "see the server's log"),
}
"""errno → row, for any message."""
