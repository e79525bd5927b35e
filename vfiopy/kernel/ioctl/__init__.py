"""One typed method per ioctl, grouped by what the file descriptor is.

The same ioctl number means different things on different kinds of fd (0x3b71 maps memory on a container and
resets the bus on a device), so each kind is a class, and an fd that comes from elsewhere is looked at before
it is adopted.
"""

from vfiopy.kernel.ioctl.container import CompatContainerFd, ContainerFd, MigrationCapability, Type1Info
from vfiopy.kernel.ioctl.device import DependentDevice, DeviceFd, GfxPlane, HotResetInfo
from vfiopy.kernel.ioctl.dmabuf import (
    DmaBufFd,
    DmaHeapFd,
    FenceInfo,
    MemfdPart,
    SyncAccess,
    SyncFileFd,
    SyncFileInfo,
    UdmabufFd,
)
from vfiopy.kernel.ioctl.feature import MigrationFlag, MigrationState
from vfiopy.kernel.ioctl.group import GroupFd, GroupStatus
from vfiopy.kernel.ioctl.iommufd import WHOLE_SPACE, IoasRanges, IommufdFd
from vfiopy.kernel.ioctl.iommufd_hwpt import FaultFd, HwInfo, PageFault
from vfiopy.kernel.ioctl.iommufd_viommu import Vevent, VeventFd
from vfiopy.kernel.ioctl.migration import MigrationFd, PrecopyInfo

__all__ = [
    "WHOLE_SPACE",
    "CompatContainerFd",
    "ContainerFd",
    "DependentDevice",
    "DeviceFd",
    "DmaBufFd",
    "DmaHeapFd",
    "FaultFd",
    "FenceInfo",
    "GfxPlane",
    "GroupFd",
    "GroupStatus",
    "HotResetInfo",
    "HwInfo",
    "IoasRanges",
    "IommufdFd",
    "MemfdPart",
    "MigrationCapability",
    "MigrationFd",
    "MigrationFlag",
    "MigrationState",
    "PageFault",
    "PrecopyInfo",
    "SyncAccess",
    "SyncFileFd",
    "SyncFileInfo",
    "Type1Info",
    "UdmabufFd",
    "Vevent",
    "VeventFd",
]
