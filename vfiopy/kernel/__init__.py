"""Way 1 to a device: the kernel. VFIO groups and containers, cdevs, iommufd.

:func:`connect` is what ``vfiopy.open()`` uses. The kernel's own objects are here for those who want them, and
below them, in :mod:`vfiopy.kernel.ioctl`, every ioctl as a typed method.
"""

from vfiopy.kernel.connect import BACKENDS, connect
from vfiopy.kernel.container import Container
from vfiopy.kernel.device_io import KernelDeviceIo, KernelWindow
from vfiopy.kernel.group import Group
from vfiopy.kernel.hot_reset import hot_reset, hot_reset_info
from vfiopy.kernel.iommufd import FaultQueue, Hwpt, Ioas, Iommufd
from vfiopy.kernel.mapper_foreign import ForeignMapper
from vfiopy.kernel.mapper_group import ContainerMapper, GroupOnIommufdMapper
from vfiopy.kernel.mapper_ioas import IoasMapper
from vfiopy.kernel.mapper_noiommu import NoiommuMapper

__all__ = [
    "BACKENDS",
    "Container",
    "ContainerMapper",
    "FaultQueue",
    "ForeignMapper",
    "Group",
    "GroupOnIommufdMapper",
    "Hwpt",
    "Ioas",
    "IoasMapper",
    "Iommufd",
    "KernelDeviceIo",
    "KernelWindow",
    "NoiommuMapper",
    "connect",
    "hot_reset",
    "hot_reset_info",
]
