"""/dev/iommu: hardware page tables, what the IOMMU can do, dirty tracking, I/O page faults. Source:
linux/iommufd.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vfiopy import uapi
from vfiopy.errors import from_errno
from vfiopy.kernel.ioctl._call import address_of, dirty_bitmap, os_calls, restarted
from vfiopy.kernel.ioctl._fd import Fd

__all__ = ["FaultFd", "HwInfo", "HwptCalls", "PageFault"]


@dataclass(frozen=True, slots=True)
class HwInfo:
    """What IOMMU_GET_HW_INFO says of the IOMMU in front of a device.

    Attributes:
        type: IOMMU_HW_INFO_TYPE_*: how to read ``data``.
        data: the IOMMU driver's own structure (iommu_hw_info_vtd, ...), as the kernel has it.
        capabilities: IOMMU_HW_CAP_* bits.
        max_pasid_log2: width of PASIDs in bits; 0: the device has none.
    """

    type: int
    data: bytes
    capabilities: int
    max_pasid_log2: int


@dataclass(frozen=True, slots=True)
class PageFault:
    """struct iommu_hwpt_pgfault: a device asks for a page. Answer the last one of a group by its ``cookie``.

    ``flags`` are IOMMU_PGFAULT_FLAGS_*, ``perm`` IOMMU_PGFAULT_PERM_*; ``length`` is a hint in bytes, or 0.
    """

    flags: int
    device_id: int
    pasid: int
    group: int
    perm: int
    address: int
    length: int
    cookie: int

    @property
    def last(self) -> bool:
        """Whether it ends its group."""
        return bool(self.flags & uapi.IOMMU_PGFAULT_FLAGS_LAST_PAGE)


class FaultFd(Fd):
    """Queue of I/O page faults (IOMMU_FAULT_QUEUE_ALLOC); poll() says when there are some."""

    kind = "iommufd fault queue"
    node = r"anon_inode:\[iommufd-pgfault\]"

    def read(self, most: int = 64) -> list[PageFault]:
        """Read up to ``most`` faults; an empty list if there is none. A group that does not fit is refused
        with EINVAL.
        """
        layout = uapi.iommu_hwpt_pgfault
        fd, buffer = self.fileno(), bytearray(most * layout.size)
        count = self._fail("read fault queue", restarted(lambda: os_calls().read(fd, buffer)))
        names = ("flags", "dev_id", "pasid", "grpid", "perm", "addr", "length", "cookie")
        return [
            PageFault(*(layout.get(buffer, name, base) for name in names))
            for base in range(0, count - count % layout.size, layout.size)
        ]

    def respond(self, cookie: int, *, success: bool) -> None:
        """Answer a group: IOMMUFD_PAGE_RESP_SUCCESS (page is there now, try again) or _INVALID."""
        code = uapi.IOMMUFD_PAGE_RESP_SUCCESS if success else uapi.IOMMUFD_PAGE_RESP_INVALID
        data = bytes(uapi.iommu_hwpt_page_response.new(cookie=cookie, code=code))
        fd = self.fileno()
        result = restarted(lambda: os_calls().write(fd, data))
        self._fail("write fault queue", result, f"cookie {cookie}")


class HwptCalls(Fd):
    """The part of an iommufd that deals with hardware page tables."""

    def hwpt_alloc(
        self,
        device_id: int,
        parent_id: int,
        flags: int = 0,
        *,
        data_type: int = uapi.IOMMU_HWPT_DATA_NONE,
        data: bytes = b"",
        fault_id: int | None = None,
    ) -> int:
        """IOMMU_HWPT_ALLOC: make a page table for a device (Linux 6.6); return its id.

        Args:
            device_id: from VFIO_DEVICE_BIND_IOMMUFD.
            parent_id: an IOAS; for a nested table a parent HWPT or vIOMMU.
            flags: IOMMU_HWPT_ALLOC_NEST_PARENT, _DIRTY_TRACKING, _PASID.
            data_type: IOMMU_HWPT_DATA_* for a nested table.
            data: the structure that goes with ``data_type``.
            fault_id: queue that gets its page faults (Linux 6.11).
        """
        layout = uapi.iommu_hwpt_alloc
        blob = bytearray(data)
        if fault_id is not None:
            flags |= uapi.IOMMU_HWPT_FAULT_ID_VALID
        argument = layout.new(
            size=layout.size,
            flags=flags,
            dev_id=device_id,
            pt_id=parent_id,
            data_type=data_type,
            data_len=len(blob),
            data_uptr=address_of(blob) if blob else 0,
            fault_id=fault_id or 0,
        )
        detail = f"device {device_id}, parent {parent_id}, flags {flags:#x}"
        self._ioctl("IOMMU_HWPT_ALLOC", uapi.IOMMU_HWPT_ALLOC, argument, detail)
        return layout.get(argument, "out_hwpt_id")

    def get_hw_info(self, device_id: int, data_type: int | None = None) -> HwInfo:
        """IOMMU_GET_HW_INFO (Linux 6.6); ``data_type`` asks for one kind of information (6.17)."""
        layout = uapi.iommu_hw_info
        room = 64
        while True:
            blob = bytearray(room)
            argument = layout.new(size=layout.size, dev_id=device_id, data_len=room, data_uptr=address_of(blob))
            if data_type is not None:
                layout.put(argument, "flags", uapi.IOMMU_HW_INFO_FLAG_INPUT_TYPE)
                layout.put(argument, "in_data_type", data_type)
            self._ioctl("IOMMU_GET_HW_INFO", uapi.IOMMU_GET_HW_INFO, argument, f"device {device_id}")
            length = layout.get(argument, "data_len")
            if length <= room:
                break
            room = length
        return HwInfo(
            layout.get(argument, "out_data_type"),
            bytes(blob[:length]),
            layout.get(argument, "out_capabilities"),
            layout.get(argument, "out_max_pasid_log2"),
        )

    def hwpt_set_dirty_tracking(self, hwpt_id: int, enable: bool) -> None:
        """IOMMU_HWPT_SET_DIRTY_TRACKING (Linux 6.7); the HWPT must have been made for it."""
        layout = uapi.iommu_hwpt_set_dirty_tracking
        flags = uapi.IOMMU_HWPT_DIRTY_TRACKING_ENABLE if enable else 0
        argument = layout.new(size=layout.size, flags=flags, hwpt_id=hwpt_id)
        call = "IOMMU_HWPT_SET_DIRTY_TRACKING"
        self._ioctl(call, uapi.IOMMU_HWPT_SET_DIRTY_TRACKING, argument, f"HWPT {hwpt_id}")

    def hwpt_get_dirty_bitmap(
        self, hwpt_id: int, iova: int, length: int, page_size: int, *, clear: bool = True
    ) -> bytes:
        """IOMMU_HWPT_GET_DIRTY_BITMAP (Linux 6.7): one bit for each ``page_size`` bytes, 64-bit little-endian
        words.

        The kernel (7.2) reports success even where part of the range is not mapped: its bits are then 0.
        """
        layout = uapi.iommu_hwpt_get_dirty_bitmap
        bitmap = dirty_bitmap(length, page_size)
        argument = layout.new(
            size=layout.size,
            hwpt_id=hwpt_id,
            flags=0 if clear else uapi.IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR,
            iova=iova,
            length=length,
            page_size=page_size,
            data=address_of(bitmap) if bitmap else 0,
        )
        detail = f"HWPT {hwpt_id}, iova {iova:#x}, size {length:#x}"
        call = "IOMMU_HWPT_GET_DIRTY_BITMAP"
        self._ioctl(call, uapi.IOMMU_HWPT_GET_DIRTY_BITMAP, argument, detail)
        return bytes(bitmap)

    def hwpt_invalidate(
        self, hwpt_id: int, data_type: int, entries: Sequence[bytes], entry_length: int | None = None
    ) -> None:
        """IOMMU_HWPT_INVALIDATE (Linux 6.8): drop what the IOMMU has cached of a nested HWPT, or of a vIOMMU.

        Args:
            hwpt_id: the HWPT or vIOMMU.
            data_type: IOMMU_HWPT_INVALIDATE_DATA_* or IOMMU_VIOMMU_INVALIDATE_DATA_*.
            entries: requests, all of one length; none asks whether ``data_type`` is known.
            entry_length: that length in bytes; by default that of the first.

        Raises VfioError whose text says how many requests were done before the one that failed.
        """
        layout = uapi.iommu_hwpt_invalidate
        length = entry_length if entry_length is not None else len(entries[0]) if entries else 0
        if any(len(entry) != length for entry in entries):
            raise ValueError(f"not all entries have {length} bytes")
        table = bytearray(b"".join(entries))
        argument = layout.new(
            size=layout.size,
            hwpt_id=hwpt_id,
            data_uptr=address_of(table) if table else 0,
            data_type=data_type,
            entry_len=length,
            entry_num=len(entries),
        )
        fd, number = self.fileno(), uapi.IOMMU_HWPT_INVALIDATE
        result = os_calls().ioctl(fd, number, argument)
        if result < 0:
            # Not restarted on EINTR: the requests before it are done, and their number is in the answer.
            done = layout.get(argument, "entry_num")
            detail = f"object {hwpt_id}, {done} of {len(entries)} requests done"
            raise from_errno(-result, call="IOMMU_HWPT_INVALIDATE", object=self._label, detail=detail)

    def fault_queue_alloc(self) -> tuple[int, FaultFd]:
        """IOMMU_FAULT_QUEUE_ALLOC (Linux 6.11): id of a new fault queue, and its fd."""
        layout = uapi.iommu_fault_alloc
        argument = layout.new(size=layout.size)
        owner, at = FaultFd(None, "fault queue"), layout.offset("out_fault_fd")
        self._ioctl_fd(owner, "IOMMU_FAULT_QUEUE_ALLOC", uapi.IOMMU_FAULT_QUEUE_ALLOC, argument, at=at)
        object_id = layout.get(argument, "out_fault_id")
        owner._label = f"fault queue {object_id} of {self._label}"
        return object_id, owner
