"""Rows that hold for whole families of calls, and for any call."""

from __future__ import annotations

import errno
from typing import Final

from vfiopy.errno_table.meaning import Meaning
from vfiopy.errno_table.vfio_user import ANY_MESSAGE

__all__ = ["FAMILIES", "GENERIC"]

_IOMMUFD: Final = {
    errno.EINVAL: Meaning(
        "VfioError",
        "iommufd refuses the arguments: a structure that is too short, or a value out of range",
        "check the values given; on an old kernel the structure may have grown since",
    ),
    errno.E2BIG: Meaning(
        "NotSupportedError",
        "this kernel's structure is shorter, and something was asked of it that it does not know",
        "use a newer kernel, or leave the newer option out",
    ),
    errno.EOPNOTSUPP: Meaning(
        "NotSupportedError",
        "this kernel or IOMMU does not know a flag that was asked for, or lacks the feature",
        "leave the flag out; IOMMU_GET_HW_INFO says what the IOMMU can do",
    ),
    errno.ENOTTY: Meaning(
        "NotSupportedError",
        "this kernel's iommufd does not have the call",
        "use a newer kernel (each method's documentation says which)",
    ),
    errno.ENOENT: Meaning(
        "VfioError",
        "no object of this id and kind exists in this iommufd",
        "ids belong to one open /dev/iommu; check that it is the same one, and that the object was not destroyed",
    ),
    errno.EOVERFLOW: Meaning(
        "IovaRangeError",
        "address plus length goes beyond 64 bits",
        "",
    ),
}

_FEATURE: Final = {
    errno.ENOTTY: Meaning(
        "NotSupportedError",
        "the kernel, or this device's driver, does not have this feature",
        "feature_probe() asks first; some features need a newer kernel or a vendor's variant of vfio-pci",
    ),
    errno.EOPNOTSUPP: Meaning(
        "NotSupportedError",
        "this device's driver does not implement the feature",
        "bind the device to plain vfio-pci if a variant driver has it now",
    ),
    errno.EINVAL: Meaning(
        "VfioError",
        "the feature does not have this operation, or its arguments are not valid",
        "probe the feature with the operation (GET or SET) first",
    ),
    errno.EFAULT: Meaning("VfioError", "the kernel cannot read or write the feature's payload", ""),
}

_OPEN: Final = {
    errno.EACCES: Meaning(
        "PermissionDeniedError",
        "this user may not open the node",
        "give the user access with a udev rule or chown, and in a container allow the device",
    ),
    errno.EPERM: Meaning(
        "PermissionDeniedError",
        "opening the node needs a capability, or a device cgroup forbids it",
        "in a container allow the device; without an IOMMU CAP_SYS_RAWIO is needed",
    ),
    errno.ENOENT: Meaning(
        "NotSupportedError",
        "there is no such node",
        "load the module behind it, and in a container compare its /dev with the host's",
    ),
    errno.ENODEV: Meaning("NotSupportedError", "there is no driver behind the node", "load the module behind it"),
    errno.ENXIO: Meaning("NotSupportedError", "there is no driver behind the node", "load the module behind it"),
}

FAMILIES: Final = (
    ("VFIO_DEVICE_FEATURE", _FEATURE),
    ("IOMMU_", _IOMMUFD),
    ("open ", _OPEN),
    ("VFIO_USER_", ANY_MESSAGE),
)
"""(prefix of the call's name, its rows), asked in this order after the call's own rows."""

GENERIC: Final = {
    errno.EACCES: Meaning("PermissionDeniedError", "permission is denied", "check the user's rights on the object"),
    errno.EPERM: Meaning(
        "PermissionDeniedError",
        "the operation is not allowed for this process",
        "a capability may be missing, or a security policy in the way",
    ),
    errno.EBADF: Meaning(
        "WrongFdError", "the file descriptor is not open", "something else closed it, or it was given wrongly"
    ),
    errno.EBUSY: Meaning(
        "BusyError", "something else holds the object", "find and stop the other user, then try again"
    ),
    errno.EAGAIN: Meaning("BusyError", "another operation is in progress", "try again"),
    errno.EEXIST: Meaning("VfioError", "it exists already", ""),
    errno.EFAULT: Meaning("VfioError", "an address given to the kernel is not valid memory of this process", ""),
    errno.EINVAL: Meaning("VfioError", "the kernel refuses the arguments", ""),
    errno.EIO: Meaning(
        "DeviceGoneError", "the device does not answer", "see the kernel's log; the device may need a reset"
    ),
    errno.EMFILE: Meaning(
        "VfioError",
        "this process has too many open files",
        "raise RLIMIT_NOFILE, and close devices that are no longer used",
    ),
    errno.ENFILE: Meaning("VfioError", "the system has too many open files", "raise fs.file-max"),
    errno.ENODEV: Meaning(
        "DeviceGoneError",
        "the device is gone, or was never there",
        "check that it is still bound to its driver",
    ),
    errno.ENOENT: Meaning("VfioError", "no such object", ""),
    errno.ENOMEM: Meaning("VfioError", "the kernel has no memory for it", "free memory, or ask for less"),
    errno.ENOSPC: Meaning("NoSpaceError", "there is no room left for it", ""),
    errno.ENOTTY: Meaning(
        "NotSupportedError",
        "this kernel, or the driver behind the object, does not have the call",
        "use a newer kernel, or check that the object is of the right kind",
    ),
    errno.EOPNOTSUPP: Meaning(
        "NotSupportedError", "this kernel, or the driver behind the object, does not support it", ""
    ),
    errno.EOVERFLOW: Meaning("IovaRangeError", "address plus size goes beyond 64 bits", ""),
    errno.ETIMEDOUT: Meaning("VfioTimeoutError", "it did not happen in time", ""),
    errno.EINTR: Meaning("VfioError", "a signal interrupted the call", "try again"),
}
"""errno → row, for any call. An errno that is not even here keeps the system's own words."""
