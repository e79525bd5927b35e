"""From a PCI address to an open device and the mapper that its memory goes through."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, cast
from uuid import UUID

from vfiopy import pci
from vfiopy.backend import Mapper
from vfiopy.errors import NotBoundError, NotSupportedError, PermissionDeniedError, VfioError
from vfiopy.kernel.device_io import KernelDeviceIo
from vfiopy.kernel.ioctl import DeviceFd
from vfiopy.kernel.mapper_foreign import ForeignMapper
from vfiopy.kernel.mapper_group import ContainerMapper, GroupOnIommufdMapper
from vfiopy.kernel.mapper_ioas import IoasMapper
from vfiopy.kernel.mapper_noiommu import NOIOMMU_COST, NoiommuMapper
from vfiopy.pci import Function, System

__all__ = ["BACKENDS", "KernelMapper", "connect"]

KernelMapper = ContainerMapper | GroupOnIommufdMapper | IoasMapper | NoiommuMapper
"""The mappers that a device can join."""

_MAKERS: Final[dict[str, Callable[[], KernelMapper]]] = {
    "iommufd": IoasMapper,
    "type1v2": ContainerMapper,
    "type1": lambda: ContainerMapper("type1"),
    "iommufd-compat-type1v2": GroupOnIommufdMapper,
    "iommufd-compat-type1": lambda: GroupOnIommufdMapper("type1"),
    "noiommu": NoiommuMapper,
}

BACKENDS: Final = tuple(_MAKERS)
"""What ``backend=`` may be."""

_JOINS = ("VFIO_GROUP_SET_CONTAINER", "VFIO_DEVICE_ATTACH_IOMMUFD_PT")


def connect(
    address: str,
    *,
    backend: str | None = None,
    mappers: Sequence[Mapper] = (),
    vf_token: UUID | None = None,
    noiommu: bool = False,
    device_fd: int | None = None,
    system: System | None = None,
) -> tuple[KernelDeviceIo, Mapper]:
    """Open a device through the kernel. Everything that was opened on the way is closed again when it raises.

    Args:
        address: PCI address.
        backend: one of :data:`BACKENDS`; None: ``"iommufd"`` where /dev/iommu and the device's cdev are there
            and may be opened, else ``"type1v2"``.
        mappers: of the address space that the device is to live in: the first that fits is joined. A new one
            is made where none fits, or where the device's IOMMU does not go with what is in it.
        vf_token: see :func:`vfiopy.open`.
        noiommu: accept a device without an IOMMU.
        device_fd: an open device fd, for instance from a privileged launcher; stays the caller's (a cdev
            stays bound to the iommufd). A cdev that is not bound yet joins a mapper as usual. Otherwise the
            container or iommufd is the launcher's, and DMA works only through a mapper made from that
            (:meth:`ContainerMapper.adopt`, :meth:`IoasMapper.adopt`) and passed in ``mappers``.

    Raises:
        DeviceNotFoundError, NotBoundError, NotViableError, PermissionDeniedError, BusyError,
        NotSupportedError:
            with the device's name and what to do.
    """
    if backend is not None and backend not in _MAKERS:
        raise NotSupportedError(
            f"there is no backend {backend!r}", object=address, hint=f"there are {', '.join(BACKENDS)}"
        )
    function = pci.function(address, system=system)
    if device_fd is not None:
        return _adopt(function, device_fd, mappers, vf_token)
    if not function.is_vfio:
        driver = function.driver
        raise NotBoundError(
            f"it is bound to {driver}, not to a VFIO driver" if driver else "it is bound to no driver",
            object=str(function.address),
            hint=f"bind it to vfio-pci: vfiopy bind {function.address}",
        )
    chosen = _choose(function, backend, mappers, noiommu)
    return _join(chosen, mappers, lambda mapper: mapper.join(function, vf_token))


def _choose(function: Function, backend: str | None, mappers: Sequence[Mapper], noiommu: bool) -> str:
    if _has_no_iommu(function):
        if not noiommu:
            raise PermissionDeniedError(
                "it has no IOMMU, and that must be accepted in so many words",
                errno=errno.EPERM,
                object=str(function.address),
                hint=f"switch the IOMMU on, or pass noiommu=True, which costs: {NOIOMMU_COST}",
            )
        if backend not in (None, "noiommu"):
            raise NotSupportedError(
                f"it has no IOMMU, so backend {backend!r} cannot be used",
                object=str(function.address),
                hint="leave backend out",
            )
        return "noiommu"
    if backend == "noiommu":
        raise NotSupportedError(
            "it has an IOMMU", object=str(function.address), hint="leave backend out, and noiommu too"
        )
    if backend is not None:
        return backend
    possible = ["iommufd"] if _may_use_iommufd(function) else []
    possible += ["type1v2"] if function.group_node is not None else []
    used = [mapper.backend for mapper in mappers if isinstance(mapper, KernelMapper)]
    for name in used:
        # A space that has a mapper already takes the same road again if the device can go there.
        if name in possible or (name != "iommufd" and "type1v2" in possible):
            return name
    return possible[0] if possible else "iommufd"


def _has_no_iommu(function: Function) -> bool:
    cdev = function.vfio_cdev
    return function.is_noiommu or (cdev is not None and cdev.startswith("noiommu-"))


def _may_use_iommufd(function: Function) -> bool:
    cdev, iommufd = function.cdev_node, function.system.dev / "iommu"
    if cdev is None or not cdev.exists() or not iommufd.exists():
        return False
    group = function.group_node
    # Somebody with rights on the group's node only is better served by type1 than by an error.
    return group is None or not os.access(group, os.R_OK | os.W_OK) or _usable(cdev, iommufd)


def _usable(*nodes: Path) -> bool:
    return all(os.access(node, os.R_OK | os.W_OK) for node in nodes)


def _join(
    backend: str, mappers: Sequence[Mapper], join: Callable[[KernelMapper], KernelDeviceIo]
) -> tuple[KernelDeviceIo, Mapper]:
    for mapper in mappers:
        if isinstance(mapper, KernelMapper) and mapper.backend == backend:
            try:
                return join(mapper), mapper
            except VfioError as error:
                # EINVAL of these means: this IOMMU cannot share page tables with what is there. A second
                # mapper can.
                if error.errno != errno.EINVAL or error.call not in _JOINS:
                    raise
    with ExitStack() as undo:
        made = _MAKERS[backend]()
        undo.callback(made.close)
        io = join(made)
        undo.pop_all()
    return io, made


def _adopt(
    function: Function, device_fd: int, mappers: Sequence[Mapper], vf_token: UUID | None
) -> tuple[KernelDeviceIo, Mapper]:
    calls = DeviceFd.adopt(device_fd, str(function.address))
    with ExitStack() as undo:
        undo.callback(calls.close)
        if _is_unbound_cdev(calls):
            answer = _join(
                "iommufd", mappers, lambda mapper: cast("IoasMapper", mapper).join(function, vf_token, calls)
            )
        else:
            # Any other mapper of the space would map into a place where this device's DMA does not look.
            given = next((one for one in mappers if isinstance(one, KernelMapper) and one.adopted), None)
            backend = "adopted" if given is None else given.backend
            io = KernelDeviceIo(calls, backend)
            answer = io, ForeignMapper(io.name) if given is None else given
        undo.pop_all()
    return answer


def _is_unbound_cdev(calls: DeviceFd) -> bool:
    if not calls.identity().startswith("vfio/devices/"):
        return False
    try:
        calls.get_info()
    except VfioError as error:
        if error.errno == errno.EINVAL:
            return True
        raise
    return False
