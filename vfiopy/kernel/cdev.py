"""Opening a VFIO device through its own character device, /dev/vfio/devices/vfioX."""

from __future__ import annotations

from vfiopy.errors import NotBoundError, NotSupportedError, NotViableError, VfioError, WrongFdError
from vfiopy.kernel.ioctl import DeviceFd
from vfiopy.pci import Function

__all__ = ["bind_error", "open_cdev"]


def open_cdev(function: Function) -> DeviceFd:
    """Open the cdev of a function that is bound to a VFIO driver.

    sysfs says which node it is, and the opened node must have the device number that sysfs gives: a stale
    /dev could otherwise hand out another device.

    Raises:
        NotBoundError: no VFIO driver holds the function.
        NotSupportedError: the kernel has no cdev for it.
        WrongFdError: the node in /dev is another device's.
    """
    node = function.cdev_node
    if node is None:
        kind = NotSupportedError if function.is_vfio else NotBoundError
        raise kind(
            function.cdev_missing,
            object=str(function.address),
            hint="use backend='type1v2'" if function.is_vfio else f"bind it: vfiopy bind {function.address}",
        )
    fd = DeviceFd.open(str(node), str(function.address))
    try:
        identity = fd.identity()
        if identity != f"vfio/devices/{node.name}":
            raise WrongFdError(
                f"{node} is {identity!r}, not the device that sysfs says",
                object=str(function.address),
                hint="this /dev is a stale copy; in a container mount the host's, or restart the container",
            )
    except BaseException:
        fd.close()
        raise
    return fd


def bind_error(error: VfioError, function: Function) -> VfioError:
    """Say more about a VFIO_DEVICE_BIND_IOMMUFD that failed, from what sysfs shows of the group."""
    blockers = function.group_blockers()
    if not blockers:
        return error
    names = ", ".join(f"{one.address} ({one.driver})" for one in blockers)
    return NotViableError(
        f"IOMMU group {function.iommu_group} is not viable: native drivers hold {names}",
        errno=error.errno,
        object=error.object,
        call=error.call,
        hint=f"bind these to vfio-pci or to nothing (bridges may stay): vfiopy bind --group {function.address}",
    )
