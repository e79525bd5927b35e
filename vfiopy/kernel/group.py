"""An IOMMU group as VFIO sees it: the devices that only come together."""

from __future__ import annotations

import errno
from uuid import UUID

from vfiopy.errors import BusyError, NotBoundError, NotViableError, VfioError
from vfiopy.kernel.container import Container
from vfiopy.kernel.ioctl import DeviceFd, GroupFd, GroupStatus
from vfiopy.lives import Resource
from vfiopy.pci import Function

__all__ = ["Group"]

_BLOCKED = (errno.EPERM, errno.EBUSY)


class Group(Resource):
    """An open /dev/vfio/N. One process at a time can have it.

    Attributes:
        number: of the IOMMU group.
        container: what it is in, or None.
    """

    _rank = 30

    def __init__(self, function: Function) -> None:
        """Open the group of a function that is bound to a VFIO driver.

        Raises NotBoundError where VFIO has no group for it, BusyError where it is open elsewhere.
        """
        node, number = function.group_node, function.iommu_group
        if node is None or number is None:
            raise NotBoundError(
                "VFIO has no group for it" + ("" if function.is_vfio else f": its driver is {function.driver}"),
                object=str(function.address),
                hint=f"bind it: vfiopy bind {function.address}",
            )
        self.number = number
        self.container: Container | None = None
        self._function = function
        try:
            self.calls = GroupFd.open(str(node))
        except BusyError as error:
            raise BusyError(
                error.meaning,
                errno=error.errno,
                object=f"{function.address} in {node}",
                call=error.call,
                hint="in one process put all devices of a group into one space; else close the other opener "
                f"(fuser {node} shows who it is)",
            ) from error
        super().__init__(str(node))

    def status(self) -> GroupStatus:
        """Whether it is viable, and whether it is in a container."""
        return self.calls.get_status()

    def check_viable(self) -> None:
        """Raise NotViableError, naming the devices that stand in the way and their drivers.

        Bridges do not count: the kernel lets their driver stay.
        """
        if not self.status().viable:
            raise self._not_viable()

    def _not_viable(self, cause: VfioError | None = None) -> NotViableError:
        blockers = self._function.group_blockers()
        names = ", ".join(f"{one.address} ({one.driver})" for one in blockers) or "a device that sysfs does not show"
        return NotViableError(
            f"IOMMU group {self.number} is not viable: native drivers hold {names}",
            errno=errno.EBUSY if cause is None else cause.errno,
            object=str(self._function.address),
            call="VFIO_GROUP_GET_STATUS" if cause is None else cause.call,
            hint="bind these to vfio-pci or to nothing (bridges may stay): "
            f"vfiopy bind --group {self._function.address}",
        )

    def set_container(self, container: Container) -> None:
        """Put it into a container."""
        try:
            self.calls.set_container(container.calls)
        except VfioError as error:
            if error.errno in _BLOCKED and self._function.group_blockers():
                raise self._not_viable(error) from error
            raise
        self.container = container

    def unset_container(self) -> None:
        """Take it out; refused while a device or a mapped BAR of it is left."""
        self.calls.unset_container()
        self.container = None

    def open_device(self, function: Function, vf_token: UUID | None = None) -> DeviceFd:
        """Open a device of the group, which must be in a container whose model is chosen."""
        try:
            return self.calls.get_device_fd(str(function.address), vf_token)
        except VfioError as error:
            if error.errno in _BLOCKED and self._function.group_blockers():
                raise self._not_viable(error) from error
            raise

    def _release(self) -> None:
        if self.container is not None:
            self.unset_container()
        self.calls.close()
