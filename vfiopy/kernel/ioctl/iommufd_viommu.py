"""/dev/iommu: a physical IOMMU's share for a virtual machine: vIOMMU, vDEVICE, event and command queues.

Source: linux/iommufd.h (vIOMMU and vDEVICE Linux 6.13, event queues 6.15, hardware queues 6.17).
"""

from __future__ import annotations

from typing import NamedTuple

from vfiopy import uapi
from vfiopy.kernel.ioctl._call import address_of, os_calls, restarted
from vfiopy.kernel.ioctl._fd import Fd

__all__ = ["Vevent", "VeventFd", "ViommuCalls"]


class Vevent(NamedTuple):
    """One event: its place in the sequence, whether events before it were lost, and the IOMMU driver's own
    record.
    """

    sequence: int
    lost: bool
    data: bytes


class VeventFd(Fd):
    """Queue of a vIOMMU's events (IOMMU_VEVENTQ_ALLOC)."""

    kind = "iommufd event queue"
    node = r"anon_inode:\[iommufd-viommu-event\]"

    def read(self, data_size: int, most: int = 64) -> list[Vevent]:
        """Read up to ``most`` events.

        Args:
            data_size: bytes of a record of this queue's type (32 for struct iommu_vevent_arm_smmuv3).
            most: how many at most; an empty list if there is none.
        """
        header = uapi.iommufd_vevent_header
        fd, buffer = self.fileno(), bytearray(most * (header.size + data_size))
        count = self._fail("read event queue", restarted(lambda: os_calls().read(fd, buffer)))
        events, at = [], 0
        while at + header.size <= count:
            lost = bool(header.get(buffer, "flags", at) & uapi.IOMMU_VEVENTQ_FLAG_LOST_EVENTS)
            sequence = header.get(buffer, "sequence", at)
            at += header.size
            # A header that only says that events were lost has no record behind it.
            size = 0 if lost else data_size
            events.append(Vevent(sequence, lost, bytes(buffer[at : at + size])))
            at += size
        return events


class ViommuCalls(Fd):
    """The part of an iommufd that deals with vIOMMUs."""

    def viommu_alloc(self, kind: int, device_id: int, hwpt_id: int, data: bytearray | None = None) -> int:
        """IOMMU_VIOMMU_ALLOC: take a share of the IOMMU in front of a device; return its id.

        Args:
            kind: IOMMU_VIOMMU_TYPE_*.
            device_id: a bound device.
            hwpt_id: an HWPT made with IOMMU_HWPT_ALLOC_NEST_PARENT.
            data: the structure of that kind; the kernel may write into it (Linux 6.17).
        """
        layout = uapi.iommu_viommu_alloc
        argument = layout.new(
            size=layout.size,
            type=kind,
            dev_id=device_id,
            hwpt_id=hwpt_id,
            data_len=len(data) if data else 0,
            data_uptr=address_of(data) if data else 0,
        )
        detail = f"type {kind}, device {device_id}, HWPT {hwpt_id}"
        self._ioctl("IOMMU_VIOMMU_ALLOC", uapi.IOMMU_VIOMMU_ALLOC, argument, detail)
        return layout.get(argument, "out_viommu_id")

    def vdevice_alloc(self, viommu_id: int, device_id: int, virtual_id: int) -> int:
        """IOMMU_VDEVICE_ALLOC: give a device its number in the vIOMMU's world; return the object's id."""
        layout = uapi.iommu_vdevice_alloc
        argument = layout.new(size=layout.size, viommu_id=viommu_id, dev_id=device_id, virt_id=virtual_id)
        detail = f"vIOMMU {viommu_id}, device {device_id}, virtual id {virtual_id:#x}"
        self._ioctl("IOMMU_VDEVICE_ALLOC", uapi.IOMMU_VDEVICE_ALLOC, argument, detail)
        return layout.get(argument, "out_vdevice_id")

    def veventq_alloc(self, viommu_id: int, kind: int, depth: int) -> tuple[int, VeventFd]:
        """IOMMU_VEVENTQ_ALLOC: a queue of ``depth`` events, one per type and vIOMMU; return its id and fd."""
        layout = uapi.iommu_veventq_alloc
        argument = layout.new(size=layout.size, viommu_id=viommu_id, type=kind, veventq_depth=depth)
        detail = f"vIOMMU {viommu_id}, type {kind}, depth {depth}"
        owner, at = VeventFd(None, "event queue"), layout.offset("out_veventq_fd")
        self._ioctl_fd(owner, "IOMMU_VEVENTQ_ALLOC", uapi.IOMMU_VEVENTQ_ALLOC, argument, detail, at=at)
        object_id = layout.get(argument, "out_veventq_id")
        owner._label = f"event queue {object_id} of {self._label}"
        return object_id, owner

    def hw_queue_alloc(self, viommu_id: int, kind: int, index: int, iova: int, length: int) -> int:
        """IOMMU_HW_QUEUE_ALLOC: let the IOMMU work on a queue in memory; return its id.

        Args:
            viommu_id: whose queue it is.
            kind: IOMMU_HW_QUEUE_TYPE_*.
            index: number of the queue within its type, from 0.
            iova: where it lies in the nesting parent; stays mapped while the queue lives.
            length: bytes.
        """
        layout = uapi.iommu_hw_queue_alloc
        argument = layout.new(
            size=layout.size,
            viommu_id=viommu_id,
            type=kind,
            index=index,
            nesting_parent_iova=iova,
            length=length,
        )
        detail = f"vIOMMU {viommu_id}, type {kind}, queue {index}, iova {iova:#x}, size {length:#x}"
        self._ioctl("IOMMU_HW_QUEUE_ALLOC", uapi.IOMMU_HW_QUEUE_ALLOC, argument, detail)
        return layout.get(argument, "out_hw_queue_id")
