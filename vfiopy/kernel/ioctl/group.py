"""Group fds: /dev/vfio/12, /dev/vfio/noiommu-0. Source: linux/vfio.h, "IOCTLs for GROUP file descriptors"."""

from __future__ import annotations

from typing import NamedTuple
from uuid import UUID

from vfiopy import uapi
from vfiopy.kernel.ioctl._fd import OwnershipFd
from vfiopy.kernel.ioctl.container import CompatContainerFd, ContainerFd
from vfiopy.kernel.ioctl.device import DeviceFd

__all__ = ["GroupFd", "GroupStatus"]


class GroupStatus(NamedTuple):
    """What VFIO_GROUP_GET_STATUS says: no native driver holds a member; the group is in a container."""

    viable: bool
    container_set: bool


class GroupFd(OwnershipFd):
    """An IOMMU group. One process at a time can have it open."""

    kind = "VFIO group"
    node = r"vfio/(noiommu-)?\d+"

    def get_status(self) -> GroupStatus:
        """VFIO_GROUP_GET_STATUS."""
        layout = uapi.vfio_group_status
        argument = layout.new(argsz=layout.size)
        self._ioctl("VFIO_GROUP_GET_STATUS", uapi.VFIO_GROUP_GET_STATUS, argument)
        flags = layout.get(argument, "flags")
        return GroupStatus(
            bool(flags & uapi.VFIO_GROUP_FLAGS_VIABLE), bool(flags & uapi.VFIO_GROUP_FLAGS_CONTAINER_SET)
        )

    def set_container(self, container: ContainerFd | CompatContainerFd) -> None:
        """VFIO_GROUP_SET_CONTAINER: put the group into a container, or into an iommufd (Linux 6.2)."""
        argument = bytearray(container.fileno().to_bytes(4, "little", signed=True))
        call = "VFIO_GROUP_SET_CONTAINER"
        self._ioctl(call, uapi.VFIO_GROUP_SET_CONTAINER, argument, f"into {container.label}")

    def unset_container(self) -> None:
        """VFIO_GROUP_UNSET_CONTAINER: take it out. Refused while a device fd or a mapped BAR is left."""
        self._ioctl("VFIO_GROUP_UNSET_CONTAINER", uapi.VFIO_GROUP_UNSET_CONTAINER)

    def get_device_fd(self, name: str, vf_token: UUID | None = None) -> DeviceFd:
        """VFIO_GROUP_GET_DEVICE_FD: open a device of the group.

        Args:
            name: what the driver calls it; for PCI ``"0000:00:05.0"``.
            vf_token: the UUID that a physical function and its virtual functions share (Linux 5.7).
        """
        words = name if vf_token is None else f"{name} vf_token={vf_token}"
        argument = bytearray(words.encode("ascii") + b"\0")
        call = "VFIO_GROUP_GET_DEVICE_FD"
        return self._ioctl_fd(DeviceFd(None, name), call, uapi.VFIO_GROUP_GET_DEVICE_FD, argument, f"device {name}")
