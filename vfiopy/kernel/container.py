"""A VFIO container: what groups are put into, and what memory is mapped into under type1."""

from __future__ import annotations

from typing import Self

from vfiopy import uapi
from vfiopy.errors import NotSupportedError
from vfiopy.kernel.ioctl import CompatContainerFd, ContainerFd, Type1Info
from vfiopy.lives import Resource

__all__ = ["Container"]

_PATH = "/dev/vfio/vfio"

_MODELS = {
    "type1v2": uapi.VFIO_TYPE1v2_IOMMU,
    "type1": uapi.VFIO_TYPE1_IOMMU,
    "noiommu": uapi.VFIO_NOIOMMU_IOMMU,
}


class Container(Resource):
    """An open /dev/vfio/vfio, or an iommufd in its place. ``.calls`` is the typed fd below.

    Attributes:
        compat: iommufd stands behind it. A kernel that is built without type1 has such a /dev/vfio/vfio.
        model: the IOMMU model in use (``"type1v2"``, ...), or None before :meth:`set_model`.
    """

    _rank = 30

    def __init__(self, calls: ContainerFd | CompatContainerFd | None = None) -> None:
        """Open /dev/vfio/vfio, or take over a container that is open already."""
        self.calls = ContainerFd.open(_PATH) if calls is None else calls
        self.model: str | None = None
        try:
            self._check()
            super().__init__(self.calls.label)
        except BaseException:
            self.calls.close()
            raise

    def _check(self) -> None:
        version = self.calls.get_api_version()
        if version != uapi.VFIO_API_VERSION:
            raise NotSupportedError(
                f"the kernel speaks version {version} of the VFIO API, vfiopy version {uapi.VFIO_API_VERSION}",
                object=self.calls.label,
                call="VFIO_GET_API_VERSION",
            )
        self.compat = isinstance(self.calls, CompatContainerFd) or self.calls.is_iommufd()

    @classmethod
    def adopt(cls, fd: int, model: str | None = None) -> Self:
        """Duplicate a container's fd that came from elsewhere, with its groups in it and its model chosen."""
        container = cls(ContainerFd.adopt(fd, _PATH))
        container.model = model
        return container

    def fileno(self) -> int:
        """Return the fd number; still owned by this object."""
        return self.calls.fileno()

    def has(self, model: str) -> bool:
        """Whether the kernel offers a model (``"type1v2"``, ``"type1"``, ``"noiommu"``)."""
        return self.calls.check_extension(_MODELS[model])

    def set_model(self, model: str) -> None:
        """VFIO_SET_IOMMU; needs a group in the container."""
        self.calls.set_iommu(_MODELS[model])
        self.model = model

    def info(self) -> Type1Info:
        """VFIO_IOMMU_GET_INFO."""
        return self.calls.iommu_get_info()

    def _release(self) -> None:
        self.calls.close()
