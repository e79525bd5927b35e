"""``open()`` and ``serve()``: from what a user names to a :class:`~vfiopy.device.Device`, or to its server."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast
from uuid import UUID

from vfiopy.backend import DeviceIo, Mapper
from vfiopy.device import Device
from vfiopy.dma import AddressSpace
from vfiopy.errors import DeviceNotFoundError, NotSupportedError

if TYPE_CHECKING:
    from vfiopy.emulated import PciDevice
    from vfiopy.pci import Function, PciAddress
    from vfiopy.vfio_user import Limits, Server

__all__ = ["open", "serve"]

_WITHOUT_KERNEL = {"emulated": "an emulated device", "vfio-user": "a device behind a socket"}


def open(  # noqa: A001  the word that users expect, as vfiopy.open
    target: str | PciAddress | Function | PciDevice,
    *,
    backend: str | None = None,
    space: AddressSpace | None = None,
    vf_token: UUID | None = None,
    noiommu: bool = False,
    device_fd: int | None = None,
    map_msix: bool = False,
) -> Device:
    """Open a device. Changes nothing on it: bus mastering stays off until you say so.

    Args:
        target: a PCI address (``"0000:00:05.0"``) that is bound to vfio-pci, a function from :func:`vfiopy.find`,
            ``"emulated:edu"``, an emulated device object, or ``"vfio-user:PATH"`` for the device that a vfio-user
            server offers on this socket.
        backend: ``"iommufd"``, ``"type1v2"``, ``"type1"``, ``"iommufd-compat-type1v2"``, ``"iommufd-compat-type1"``;
            None takes iommufd where kernel and device offer it, else ``"type1v2"``. Devices that are software
            have none of these.
        space: the address space to put the device into; None makes one for it alone, which ends with the device.
        vf_token: the token that a virtual function and its physical function share (linux/vfio.h,
            VFIO_DEVICE_FEATURE_PCI_VF_TOKEN).
        noiommu: allow a device without an IOMMU. It can then write any memory of the machine; MAP_DMA does not exist.
        device_fd: an open VFIO device fd from a privileged launcher, instead of opening one.
        map_msix: map the pages of the MSI-X table too, to look at them; vfio-pci owns the table.

    Raises:
        DeviceNotFoundError: no such function.
        NotBoundError, NotViableError, PermissionDeniedError, BusyError: with what to do about it.
        NotSupportedError: no such backend, or an argument that means nothing for an emulated device.
    """
    made_space = space is None
    room = AddressSpace(_name_of(target)) if space is None else space
    try:
        io, mapper = _connect(target, backend, room.mappers, vf_token, noiommu, device_fd)
        try:
            device = Device(io, mapper, room, owns_space=made_space, map_msix=map_msix)
        except BaseException:
            io.close()
            if mapper not in room.mappers:
                mapper.close()
            raise
    except BaseException:
        if made_space:
            room.close()
        raise
    try:
        _show_to_others(device)
    except BaseException:  # Ctrl-C, or a warning that is an error
        device.close()
        raise
    return device


def _show_to_others(device: Device) -> None:
    """Let a device be looked at and traced, where the environment asks for it."""
    if os.environ.get("VFIOPY_INSPECT", "0") != "0":
        from vfiopy.inspection.server import allow_by_environment  # noqa: PLC0415  as below

        allow_by_environment()
    if "VFIOPY_TRACE" in os.environ:
        from vfiopy.trace.program import trace_opened  # noqa: PLC0415  what is not asked for is not loaded

        trace_opened(device)


def serve(
    target: str | PciAddress | Function | PciDevice,
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str | None = None,
    limits: Limits | None = None,
    users: Collection[int] | None = None,
    guarded: bool = False,
) -> Server:
    """Offer a device on a vfio-user socket: QEMU, vfiopy or another client uses it as hardware.

    The server does nothing before its ``start()``, ``run()`` or ``serve()`` is called; ``close()`` ends it.

    Args:
        target: an emulated device object, its name (``"emulated:edu"``), or a real function bound to vfio-pci. A real
            function can only be used by clients that share their memory.
        path: of the socket; None where connected sockets are handed to ``Server.attach()``.
        backend: as for :func:`open`.
        limits: what clients may do: see :class:`vfiopy.vfio_user.Limits`.
        users: ids of users whose processes may connect; None for all who can open the socket, which has mode 0600.
        guarded: have a small process hang up when this one is killed; QEMU 11.1 may abort without it.

    Raises:
        BusyError: somebody serves there already, or uses the device.
        VfioError: no socket can be made there.
    """
    from vfiopy import vfio_user  # noqa: PLC0415

    io, mapper = _connect(target, backend, (), None, False, None)
    try:
        return vfio_user.Server(io, mapper, path, limits=limits or vfio_user.Limits(), users=users, guarded=guarded)
    except BaseException:
        io.close()
        mapper.close()
        raise


def _connect(
    target: str | PciAddress | Function | PciDevice,
    backend: str | None,
    mappers: Sequence[Mapper],
    vf_token: UUID | None,
    noiommu: bool,
    device_fd: int | None,
) -> tuple[DeviceIo, Mapper]:
    # Each way to a device is imported when it is first asked for: an emulated device needs no ioctl layer.
    from vfiopy import emulated  # noqa: PLC0415

    name = _name_of(target)
    scheme, colon, rest = name.partition(":")
    if colon and scheme in _WITHOUT_KERNEL:
        kernel_only = {"backend": backend, "vf_token": vf_token, "device_fd": device_fd}
        for argument, value in kernel_only.items():
            if value is not None:
                raise NotSupportedError(
                    f"{argument}={value!r} means nothing for {_WITHOUT_KERNEL[scheme]}: no kernel is involved",
                    object=name,
                    hint=f"leave {argument} out",
                )
        if scheme == "vfio-user":
            from vfiopy import vfio_user  # noqa: PLC0415

            return vfio_user.connect(rest)
        return emulated.connect(rest if isinstance(target, str) else cast("PciDevice", target))
    if colon and not _is_hex(scheme):
        raise DeviceNotFoundError(
            f"'{scheme}:' is not a way to reach a device",
            object=name,
            hint="give a PCI address such as 0000:00:05.0, emulated:edu, or vfio-user:/path/of.sock",
        )
    from vfiopy import kernel  # noqa: PLC0415

    return kernel.connect(
        name,
        backend=backend,
        mappers=mappers,
        vf_token=vf_token,
        noiommu=noiommu,
        device_fd=device_fd,
    )


def _name_of(target: str | PciAddress | Function | PciDevice) -> str:
    from vfiopy import emulated  # noqa: PLC0415

    return f"emulated:{target.name}" if isinstance(target, emulated.PciDevice) else str(target)


def _is_hex(text: str) -> bool:
    return bool(text) and all(character in "0123456789abcdefABCDEF" for character in text)
