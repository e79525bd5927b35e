"""Device fds: from a group (VFIO_GROUP_GET_DEVICE_FD) or a cdev (/dev/vfio/devices/vfio0).

Source: linux/vfio.h, "IOCTLs for DEVICE file descriptors".
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from vfiopy import uapi
from vfiopy.backend import Area, DeviceInfo, IrqAction, IrqFlag, IrqInfo, RegionFlag, RegionInfo
from vfiopy.errors import IrqCountError
from vfiopy.kernel.ioctl._call import address_of, os_calls, restarted
from vfiopy.kernel.ioctl.caps import chain, sparse_areas
from vfiopy.kernel.ioctl.dmabuf import DmaBufFd
from vfiopy.kernel.ioctl.feature import FeatureCalls

if TYPE_CHECKING:
    from vfiopy.kernel.ioctl._fd import OwnershipFd
    from vfiopy.kernel.ioctl.iommufd import IommufdFd

__all__ = ["DependentDevice", "DeviceFd", "GfxPlane", "HotResetInfo"]

_ATOMIC_WIDTHS = (
    (uapi.VFIO_PCI_ATOMIC_COMP32, 4),
    (uapi.VFIO_PCI_ATOMIC_COMP64, 8),
    (uapi.VFIO_PCI_ATOMIC_COMP128, 16),
)
_MOST_DEPENDENTS = 1 << 16  # a PCI segment has no more functions


class DependentDevice(NamedTuple):
    """A function that a hot reset resets as well.

    ``id`` is its IOMMU group for a device fd from a group, its iommufd device id (or VFIO_PCI_DEVID_OWNED,
    VFIO_PCI_DEVID_NOT_OWNED) for a cdev.
    """

    id: int
    address: str


@dataclass(frozen=True, slots=True)
class HotResetInfo:
    """What VFIO_DEVICE_GET_PCI_HOT_RESET_INFO says.

    Attributes:
        by_device_id: ids are iommufd device ids, not groups (VFIO_PCI_HOT_RESET_FLAG_DEV_ID).
        owned: all of ``devices`` are this process's (VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED); only with
            ``by_device_id``.
        devices: what would be reset.
    """

    by_device_id: bool
    owned: bool
    devices: tuple[DependentDevice, ...]


@dataclass(frozen=True, slots=True)
class GfxPlane:
    """struct vfio_device_gfx_plane_info; sizes in pixels, ``stride`` and ``size`` in bytes.

    ``target`` is a dma-buf id or a region index, as the plane type that was asked for.
    """

    drm_format: int
    drm_format_mod: int
    width: int
    height: int
    stride: int
    size: int
    position: tuple[int, int]
    hot_spot: tuple[int, int]
    target: int


class DeviceFd(FeatureCalls):
    """A VFIO device."""

    kind = "VFIO device"
    node = r"vfio/devices/(noiommu-)?vfio\d+|anon_inode:\[vfio-device\]"

    # --- what it is -----------------------------------------------------------------------------------------

    def get_info(self) -> DeviceInfo:
        """VFIO_DEVICE_GET_INFO with its capabilities."""
        layout, call = uapi.vfio_device_info, "VFIO_DEVICE_GET_INFO"
        answer = self._query(call, uapi.VFIO_DEVICE_GET_INFO, layout)
        flags = layout.get(answer, "flags")
        atomics: tuple[int, ...] = ()
        first = layout.get(answer, "cap_offset") if flags & uapi.VFIO_DEVICE_FLAGS_CAPS else 0
        for capability in chain(answer, first, f"{self._label}: {call}"):
            if capability.id == uapi.VFIO_DEVICE_INFO_CAP_PCI_ATOMIC_COMP:
                bits = capability.get(uapi.vfio_device_info_cap_pci_atomic_comp, "flags")
                atomics = tuple(width for bit, width in _ATOMIC_WIDTHS if bits & bit)
        return DeviceInfo(
            num_regions=layout.get(answer, "num_regions"),
            num_irqs=layout.get(answer, "num_irqs"),
            can_reset=bool(flags & uapi.VFIO_DEVICE_FLAGS_RESET),
            is_pci=bool(flags & uapi.VFIO_DEVICE_FLAGS_PCI),
            atomics=atomics,
        )

    def get_region_info(self, index: int) -> RegionInfo:
        """VFIO_DEVICE_GET_REGION_INFO with its capabilities."""
        layout, call = uapi.vfio_region_info, "VFIO_DEVICE_GET_REGION_INFO"
        answer = self._query(call, uapi.VFIO_DEVICE_GET_REGION_INFO, layout, f"region {index}", index=index)
        flags = layout.get(answer, "flags")
        sparse: tuple[Area, ...] | None = None
        mappable = False
        kind: tuple[int, int] | None = None
        first = layout.get(answer, "cap_offset") if flags & uapi.VFIO_REGION_INFO_FLAG_CAPS else 0
        for capability in chain(answer, first, f"{self._label}: {call}"):
            match capability.id:
                case uapi.VFIO_REGION_INFO_CAP_SPARSE_MMAP:
                    sparse = sparse_areas(capability)
                case uapi.VFIO_REGION_INFO_CAP_MSIX_MAPPABLE:
                    mappable = True
                case uapi.VFIO_REGION_INFO_CAP_TYPE:
                    body = uapi.vfio_region_info_cap_type
                    kind = (capability.get(body, "type"), capability.get(body, "subtype"))
        return RegionInfo(
            index=index,
            size=layout.get(answer, "size"),
            flags=RegionFlag(flags & int(RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP)),
            offset=layout.get(answer, "offset"),
            sparse=sparse,
            msix_mappable=mappable,
            type=kind,
        )

    def get_irq_info(self, index: int) -> IrqInfo:
        """VFIO_DEVICE_GET_IRQ_INFO."""
        layout = uapi.vfio_irq_info
        argument = layout.new(argsz=layout.size, index=index)
        self._ioctl("VFIO_DEVICE_GET_IRQ_INFO", uapi.VFIO_DEVICE_GET_IRQ_INFO, argument, f"irq index {index}")
        return IrqInfo(index, layout.get(argument, "count"), IrqFlag(layout.get(argument, "flags") & 0xF))

    # --- regions --------------------------------------------------------------------------------------------

    def pread(self, offset: int, size: int, detail: str = "") -> bytes:
        """Read up to ``size`` bytes at an fd offset (that of the region plus the place in it); short at its
        end.
        """
        fd, buffer = self.fileno(), bytearray(size)
        count = restarted(lambda: os_calls().pread(fd, buffer, offset))
        return bytes(buffer[: self._fail("pread of a VFIO device", count, detail)])

    def pwrite(self, offset: int, data: bytes, detail: str = "") -> int:
        """Write bytes at an fd offset; return how many were taken, fewer at the region's end."""
        fd = self.fileno()
        with self.watch.writing(self, offset, data):
            count = restarted(lambda: os_calls().pwrite(fd, data, offset))
            return self._fail("pwrite of a VFIO device", count, detail)

    def map(self, offset: int, size: int, protection: int, alignment: int, detail: str = "") -> int:
        """mmap(2) at an fd offset; return an address congruent to the offset modulo ``alignment``."""
        fd = self.fileno()
        address = os_calls().mmap(fd, offset, size, protection, alignment)
        return self._fail("mmap of a VFIO device", address, detail)

    # --- interrupts -----------------------------------------------------------------------------------------

    def set_irqs(
        self,
        index: int,
        action: IrqAction,
        start: int,
        count: int,
        *,
        fds: Sequence[int] | None = None,
        bools: Sequence[bool] | None = None,
    ) -> None:
        """VFIO_DEVICE_SET_IRQS with eventfds, with booleans, or with neither (DATA_NONE).

        Raises IrqCountError where the system has fewer vectors than asked for; nothing is enabled then.
        """
        layout = uapi.vfio_irq_set
        if fds is not None and bools is not None:
            raise ValueError("either fds or bools, not both")
        data = b""
        kind = uapi.VFIO_IRQ_SET_DATA_NONE
        if fds is not None:
            kind = uapi.VFIO_IRQ_SET_DATA_EVENTFD
            data = b"".join(fd.to_bytes(4, "little", signed=True) for fd in fds)
        elif bools is not None:
            kind = uapi.VFIO_IRQ_SET_DATA_BOOL
            data = bytes(map(bool, bools))
        size = layout.offset("data")
        argument = layout.new(
            len(data), argsz=size + len(data), flags=kind | action, index=index, start=start, count=count
        )
        argument[size:] = data
        call = "VFIO_DEVICE_SET_IRQS"
        detail = f"irq index {index}, vectors {start} to {start + count - 1}, action {action.name}"
        result = self._ioctl(call, uapi.VFIO_DEVICE_SET_IRQS, argument, detail)
        if result > 0:
            raise IrqCountError(
                f"only {result} interrupt vectors are available, {count} were asked for ({detail})",
                available=result,
                object=self._label,
                call=call,
                hint=f"ask for at most {result}; nothing has been enabled",
            )

    # --- reset ----------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """VFIO_DEVICE_RESET. BAR mappings fault until it is over and dma-bufs of the device are revoked."""
        with self.watch.resetting():
            self._ioctl("VFIO_DEVICE_RESET", uapi.VFIO_DEVICE_RESET)

    def get_pci_hot_reset_info(self) -> HotResetInfo:
        """VFIO_DEVICE_GET_PCI_HOT_RESET_INFO: which functions a slot or bus reset takes along."""
        layout, item = uapi.vfio_pci_hot_reset_info, uapi.vfio_pci_dependent_device
        call, number = "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO
        room, fd = 8, self.fileno()
        while True:
            argument = layout.new(room * item.size, argsz=layout.size + room * item.size)
            result = os_calls().ioctl(fd, number, argument)
            count = layout.get(argument, "count")
            if result == -errno.ENOSPC and room < count <= _MOST_DEPENDENTS:
                room = count
            elif result != -errno.EINTR:
                break
        self._fail(call, result)
        flags = layout.get(argument, "flags")
        start = layout.offset("devices")
        devices = []
        for base in range(start, start + count * item.size, item.size):
            segment, bus, devfn = (item.get(argument, field, base) for field in ("segment", "bus", "devfn"))
            name = f"{segment:04x}:{bus:02x}:{devfn >> 3:02x}.{devfn & 7}"
            devices.append(DependentDevice(item.get(argument, "devid", base), name))
        return HotResetInfo(
            bool(flags & uapi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID),
            bool(flags & uapi.VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED),
            tuple(devices),
        )

    def reset_along(self) -> list[str]:
        """The functions that a hot reset takes along, by PCI address."""
        return [one.address for one in self.get_pci_hot_reset_info().devices]

    def pci_hot_reset(self, groups: Sequence[OwnershipFd] = ()) -> None:
        """VFIO_DEVICE_PCI_HOT_RESET: reset the slot or bus.

        Args:
            groups: all affected groups, as proof of ownership; empty for a cdev, whose iommufd is the proof
                (Linux 6.6).
        """
        layout = uapi.vfio_pci_hot_reset
        argument = layout.new(4 * len(groups), argsz=layout.size + 4 * len(groups), count=len(groups))
        argument[layout.size :] = b"".join(group.fileno().to_bytes(4, "little") for group in groups)
        with self.watch.hot_resetting(self):
            self._ioctl("VFIO_DEVICE_PCI_HOT_RESET", uapi.VFIO_DEVICE_PCI_HOT_RESET, argument)

    def _release(self) -> None:
        with self.watch.closing():
            super()._release()

    # --- graphics, ioeventfd --------------------------------------------------------------------------------

    def query_gfx_plane(self, kind: int, plane: int = 1) -> GfxPlane:
        """VFIO_DEVICE_QUERY_GFX_PLANE: what the device displays; all zero while it displays nothing.

        Args:
            kind: VFIO_GFX_PLANE_TYPE_DMABUF or _REGION; with _PROBE too only whether the device offers it.
            plane: DRM plane type: 1 primary, 2 cursor.
        """
        layout = uapi.vfio_device_gfx_plane_info
        argument = layout.new(argsz=layout.size, flags=kind, drm_plane_type=plane)
        call = "VFIO_DEVICE_QUERY_GFX_PLANE"
        self._ioctl(call, uapi.VFIO_DEVICE_QUERY_GFX_PLANE, argument, f"plane type {kind:#x}")
        names = ("drm_format", "drm_format_mod", "width", "height", "stride", "size")
        numbers = {name: layout.get(argument, name) for name in names}
        position = layout.get(argument, "x_pos"), layout.get(argument, "y_pos")
        hot_spot = layout.get(argument, "x_hot"), layout.get(argument, "y_hot")
        target = layout.get(argument, "dmabuf_id")
        return GfxPlane(**numbers, position=position, hot_spot=hot_spot, target=target)

    def get_gfx_dmabuf(self, dmabuf_id: int) -> DmaBufFd:
        """VFIO_DEVICE_GET_GFX_DMABUF: the dma-buf of a plane."""
        argument = bytearray(dmabuf_id.to_bytes(4, "little"))
        call = "VFIO_DEVICE_GET_GFX_DMABUF"
        owner = DmaBufFd(None, f"gfx dma-buf {dmabuf_id} of {self._label}")
        return self._ioctl_fd(owner, call, uapi.VFIO_DEVICE_GET_GFX_DMABUF, argument, f"dma-buf id {dmabuf_id}")

    def ioeventfd(self, offset: int, data: int, width: int, eventfd: int) -> None:
        """VFIO_DEVICE_IOEVENTFD: have the kernel write ``data`` when ``eventfd`` is signalled (Linux 4.17).

        Args:
            offset: fd offset of the register (region offset plus place in it).
            data: what to write.
            width: 1, 2 or 4 bytes, or 8 where the kernel can.
            eventfd: the eventfd, or -1 to take such a binding away.
        """
        layout = uapi.vfio_device_ioeventfd
        argument = layout.new(argsz=layout.size, flags=width, offset=offset, data=data, fd=eventfd)
        detail = f"offset {offset:#x}, width {width}"
        self._ioctl("VFIO_DEVICE_IOEVENTFD", uapi.VFIO_DEVICE_IOEVENTFD, argument, detail)

    # --- iommufd --------------------------------------------------------------------------------------------

    def bind_iommufd(self, iommufd: IommufdFd, vf_token: UUID | None = None) -> int:
        """VFIO_DEVICE_BIND_IOMMUFD: tie a cdev to an iommufd; until then nothing else works (Linux 6.6).

        Returns the device's id within the iommufd. ``vf_token`` needs Linux 6.19.
        """
        layout = uapi.vfio_device_bind_iommufd
        argument = layout.new(argsz=layout.size, iommufd=iommufd.fileno())
        token = bytearray(b"" if vf_token is None else vf_token.bytes)
        if token:
            layout.put(argument, "flags", uapi.VFIO_DEVICE_BIND_FLAG_TOKEN)
            layout.put(argument, "token_uuid_ptr", address_of(token))
        call = "VFIO_DEVICE_BIND_IOMMUFD"
        self._ioctl(call, uapi.VFIO_DEVICE_BIND_IOMMUFD, argument, f"to {iommufd.label}")
        return layout.get(argument, "out_devid")

    def attach_iommufd_pt(self, pt_id: int, pasid: int | None = None) -> int:
        """VFIO_DEVICE_ATTACH_IOMMUFD_PT: let the device's DMA go through an IOAS or HWPT (Linux 6.6).

        Attaching again replaces. Returns the id of the HWPT in use. With ``pasid`` (Linux 6.15) only DMA with
        that PASID is meant; the kernel takes it without effect on a device that has no PASID, so ask
        IOMMU_GET_HW_INFO first.
        """
        layout = uapi.vfio_device_attach_iommufd_pt
        flags = 0 if pasid is None else uapi.VFIO_DEVICE_ATTACH_PASID
        argument = layout.new(argsz=layout.size, flags=flags, pt_id=pt_id, pasid=pasid or 0)
        detail = f"to object {pt_id}" + ("" if pasid is None else f", PASID {pasid}")
        self._ioctl("VFIO_DEVICE_ATTACH_IOMMUFD_PT", uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument, detail)
        return layout.get(argument, "pt_id")

    def detach_iommufd_pt(self, pasid: int | None = None) -> None:
        """VFIO_DEVICE_DETACH_IOMMUFD_PT: from now on its DMA is blocked."""
        layout = uapi.vfio_device_detach_iommufd_pt
        flags = 0 if pasid is None else uapi.VFIO_DEVICE_DETACH_PASID
        argument = layout.new(argsz=layout.size, flags=flags, pasid=pasid or 0)
        self._ioctl("VFIO_DEVICE_DETACH_IOMMUFD_PT", uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT, argument)
