"""/dev/iommu: objects and IO address spaces. Source: linux/iommufd.h.

Page tables, vIOMMUs and queues are in the sibling modules; :class:`IommufdFd` here has them all.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final, NamedTuple

from vfiopy import uapi
from vfiopy.backend import IovaRange, Prot
from vfiopy.kernel.ioctl._call import address_of, os_calls, restarted
from vfiopy.kernel.ioctl.caps import checked_ranges
from vfiopy.kernel.ioctl.container import CompatContainerFd
from vfiopy.kernel.ioctl.iommufd_hwpt import HwptCalls
from vfiopy.kernel.ioctl.iommufd_viommu import ViommuCalls

__all__ = ["WHOLE_SPACE", "IoasRanges", "IommufdFd"]

WHOLE_SPACE: Final = 0xFFFF_FFFF_FFFF_FFFF
"""Length that, from IOVA 0, makes :meth:`IommufdFd.ioas_unmap` take everything."""

_MOST_RANGES: Final = 1 << 16


class IoasRanges(NamedTuple):
    """What IOMMU_IOAS_IOVA_RANGES says: usable IOVAs, sorted, and the alignment of maps in bytes."""

    ranges: tuple[IovaRange, ...]
    alignment: int


class IommufdFd(HwptCalls, ViommuCalls):
    """An iommufd context. Object ids are valid within one context."""

    kind = "iommufd"
    node = "iommu"

    def as_container(self) -> CompatContainerFd:
        """Return this same context as a VFIO container for groups (Linux 6.2)."""
        return CompatContainerFd.adopt(self.fileno(), f"{self._label} as container")

    def destroy(self, object_id: int) -> None:
        """IOMMU_DESTROY: destroy any object; refused while another one uses it."""
        argument = uapi.iommu_destroy.new(size=uapi.iommu_destroy.size, id=object_id)
        self._ioctl("IOMMU_DESTROY", uapi.IOMMU_DESTROY, argument, f"object {object_id}")

    # --- IOAS -----------------------------------------------------------------------------------------------

    def ioas_alloc(self) -> int:
        """IOMMU_IOAS_ALLOC: make an IO address space; return its id."""
        layout = uapi.iommu_ioas_alloc
        argument = layout.new(size=layout.size)
        self._ioctl("IOMMU_IOAS_ALLOC", uapi.IOMMU_IOAS_ALLOC, argument)
        return layout.get(argument, "out_ioas_id")

    def ioas_iova_ranges(self, ioas_id: int) -> IoasRanges:
        """IOMMU_IOAS_IOVA_RANGES: usable IOVAs as they are now; every attach and detach may change them."""
        layout, item = uapi.iommu_ioas_iova_ranges, uapi.iommu_iova_range
        call, room, fd = "IOMMU_IOAS_IOVA_RANGES", 32, self.fileno()
        while True:
            table = bytearray(room * item.size)
            argument = layout.new(size=layout.size, ioas_id=ioas_id, num_iovas=room, allowed_iovas=address_of(table))
            result = os_calls().ioctl(fd, uapi.IOMMU_IOAS_IOVA_RANGES, argument)
            number = layout.get(argument, "num_iovas")
            if result == -errno.EMSGSIZE and room < number <= _MOST_RANGES:
                room = number
            elif result != -errno.EINTR:
                break
        self._fail(call, result, f"IOAS {ioas_id}")
        pairs = [
            (item.get(table, "start", base), item.get(table, "last", base))
            for base in range(0, number * item.size, item.size)
        ]
        ranges = checked_ranges(pairs, f"{self._label}: {call}")
        return IoasRanges(ranges, layout.get(argument, "out_iova_alignment"))

    def ioas_allow_iovas(self, ioas_id: int, ranges: Sequence[IovaRange]) -> None:
        """IOMMU_IOAS_ALLOW_IOVAS: promise that these stay usable: devices that cannot are refused on attach.

        Replaces the list of before; an empty one takes the promise back. A range needs at least two
        addresses.
        """
        layout, item = uapi.iommu_ioas_allow_iovas, uapi.iommu_iova_range
        table = bytearray(item.size * len(ranges))
        for number, (first, last) in enumerate(ranges):
            item.put(table, "start", first, number * item.size)
            item.put(table, "last", last, number * item.size)
        argument = layout.new(
            size=layout.size,
            ioas_id=ioas_id,
            num_iovas=len(ranges),
            allowed_iovas=address_of(table) if table else 0,
        )
        detail = f"IOAS {ioas_id}, " + ", ".join(f"{first:#x}-{last:#x}" for first, last in ranges)
        self._ioctl("IOMMU_IOAS_ALLOW_IOVAS", uapi.IOMMU_IOAS_ALLOW_IOVAS, argument, detail)

    def ioas_map(self, ioas_id: int, user_va: int, length: int, prot: Prot, *, iova: int | None = None) -> int:
        """IOMMU_IOAS_MAP: map memory of this process at ``iova``, or where the kernel likes; return the IOVA.

        Without a device attached the kernel checks and pins nothing: bad memory is refused when one attaches.
        """
        layout = uapi.iommu_ioas_map
        argument = layout.new(
            size=layout.size,
            flags=_map_flags(prot, iova),
            ioas_id=ioas_id,
            user_va=user_va,
            length=length,
            iova=iova or 0,
        )
        detail = f"IOAS {ioas_id}, {_at(iova)}size {length:#x}, address {user_va:#x}"
        self._ioctl("IOMMU_IOAS_MAP", uapi.IOMMU_IOAS_MAP, argument, detail)
        return layout.get(argument, "iova")

    def ioas_map_file(
        self, ioas_id: int, fd: int, start: int, length: int, prot: Prot, *, iova: int | None = None
    ) -> int:
        """IOMMU_IOAS_MAP_FILE: map a memfd (Linux 6.13) or dma-buf of a BAR (6.19); return the IOVA.

        ``start`` and ``length`` are bytes of the file. The kernel checks neither the fd's access mode nor a
        memfd's write seals.
        """
        layout = uapi.iommu_ioas_map_file
        argument = layout.new(
            size=layout.size,
            flags=_map_flags(prot, iova),
            ioas_id=ioas_id,
            fd=fd,
            start=start,
            length=length,
            iova=iova or 0,
        )
        detail = f"IOAS {ioas_id}, {_at(iova)}size {length:#x}, fd {fd}, start {start:#x}"
        self._ioctl("IOMMU_IOAS_MAP_FILE", uapi.IOMMU_IOAS_MAP_FILE, argument, detail)
        return layout.get(argument, "iova")

    def ioas_copy(
        self,
        destination: int,
        source: int,
        source_iova: int,
        length: int,
        prot: Prot,
        *,
        destination_iova: int | None = None,
    ) -> int:
        """IOMMU_IOAS_COPY: share a mapping of one IOAS with another; return the IOVA there. Pages are pinned
        once.
        """
        layout = uapi.iommu_ioas_copy
        argument = layout.new(
            size=layout.size,
            flags=_map_flags(prot, destination_iova),
            dst_ioas_id=destination,
            src_ioas_id=source,
            length=length,
            dst_iova=destination_iova or 0,
            src_iova=source_iova,
        )
        detail = f"IOAS {source}, iova {source_iova:#x}, size {length:#x}, to IOAS {destination}"
        self._ioctl("IOMMU_IOAS_COPY", uapi.IOMMU_IOAS_COPY, argument, detail)
        return layout.get(argument, "dst_iova")

    def ioas_unmap(self, ioas_id: int, iova: int, length: int) -> int:
        """IOMMU_IOAS_UNMAP: undo the mappings inside a range; return the number of bytes unmapped.

        (0, WHOLE_SPACE) undoes everything, even nothing. Any other range that holds no mapping, or cuts one, raises
        NotMappedError, and by then mappings *below* the place in question are gone: ask for whole mappings.
        """
        layout = uapi.iommu_ioas_unmap
        argument = layout.new(size=layout.size, ioas_id=ioas_id, iova=iova, length=length)
        detail = f"IOAS {ioas_id}, iova {iova:#x}, size {length:#x}"
        self._ioctl("IOMMU_IOAS_UNMAP", uapi.IOMMU_IOAS_UNMAP, argument, detail)
        return layout.get(argument, "length")

    def ioas_change_process(self) -> None:
        """IOMMU_IOAS_CHANGE_PROCESS: charge all pinned memory to this process from now on (Linux 6.14).

        All maps in all IOASes must be of files.
        """
        layout = uapi.iommu_ioas_change_process
        argument = layout.new(size=layout.size)
        self._ioctl("IOMMU_IOAS_CHANGE_PROCESS", uapi.IOMMU_IOAS_CHANGE_PROCESS, argument)

    def ioas_noiommu_get_pa(self, ioas_id: int, iova: int, length: int) -> tuple[int, int]:
        """IOMMU_IOAS_NOIOMMU_GET_PA: physical address of an IOVA, and the bytes contiguous there (Linux 7.3).

        Only for an IOAS whose devices have no IOMMU; such a device must be given physical addresses.
        """
        layout = uapi.iommu_ioas_noiommu_get_pa
        argument = layout.new(size=layout.size, ioas_id=ioas_id, iova=iova, length=length)
        detail = f"IOAS {ioas_id}, iova {iova:#x}, size {length:#x}"
        self._ioctl("IOMMU_IOAS_NOIOMMU_GET_PA", uapi.IOMMU_IOAS_NOIOMMU_GET_PA, argument, detail)
        return layout.get(argument, "out_phys"), layout.get(argument, "length")

    # --- options --------------------------------------------------------------------------------------------

    def get_option(self, option: int, object_id: int = 0) -> int:
        """IOMMU_OPTION get: IOMMU_OPTION_RLIMIT_MODE (whole context) or _HUGE_PAGES (of an IOAS)."""
        return self._option(option, uapi.IOMMU_OPTION_OP_GET, object_id, 0)

    def set_option(self, option: int, value: int, object_id: int = 0) -> None:
        """IOMMU_OPTION set; see :meth:`get_option`. RLIMIT_MODE 1 charges the process instead of the user."""
        self._option(option, uapi.IOMMU_OPTION_OP_SET, object_id, value)

    def _option(self, option: int, operation: int, object_id: int, value: int) -> int:
        layout = uapi.iommu_option
        argument = layout.new(size=layout.size, option_id=option, op=operation, object_id=object_id, val64=value)
        names = {uapi.IOMMU_OPTION_RLIMIT_MODE: "RLIMIT_MODE", uapi.IOMMU_OPTION_HUGE_PAGES: "HUGE_PAGES"}
        call = f"IOMMU_OPTION_{names[option]}" if option in names else "IOMMU_OPTION"
        self._ioctl(call, uapi.IOMMU_OPTION, argument, f"value {value}, object {object_id}")
        return layout.get(argument, "val64")

    def vfio_ioas_get(self) -> int:
        """IOMMU_VFIO_IOAS get: the IOAS that groups use whose container this context is."""
        return self._vfio_ioas(uapi.IOMMU_VFIO_IOAS_GET, 0, "get")

    def vfio_ioas_set(self, ioas_id: int) -> None:
        """IOMMU_VFIO_IOAS set: choose it."""
        self._vfio_ioas(uapi.IOMMU_VFIO_IOAS_SET, ioas_id, f"set IOAS {ioas_id}")

    def vfio_ioas_clear(self) -> None:
        """IOMMU_VFIO_IOAS clear: the context can no longer be a container; the IOAS itself stays."""
        self._vfio_ioas(uapi.IOMMU_VFIO_IOAS_CLEAR, 0, "clear")

    def _vfio_ioas(self, operation: int, ioas_id: int, detail: str) -> int:
        layout = uapi.iommu_vfio_ioas
        argument = layout.new(size=layout.size, ioas_id=ioas_id, op=operation)
        self._ioctl("IOMMU_VFIO_IOAS", uapi.IOMMU_VFIO_IOAS, argument, detail)
        return layout.get(argument, "ioas_id")

    # --- mmap -----------------------------------------------------------------------------------------------

    def map(self, offset: int, length: int, protection: int) -> int:
        """mmap(2) of a page that a vIOMMU offers; offset and length exactly as it said (Linux 6.17)."""
        import mmap  # noqa: PLC0415  the name is this method's

        fd = self.fileno()
        address = restarted(lambda: os_calls().mmap(fd, offset, length, protection, mmap.PAGESIZE))
        return self._fail("mmap of an iommufd", address, f"offset {offset:#x}, size {length:#x}")


def _at(iova: int | None) -> str:
    return "" if iova is None else f"iova {iova:#x}, "


def _map_flags(prot: Prot, iova: int | None) -> int:
    flags = 0 if iova is None else uapi.IOMMU_IOAS_MAP_FIXED_IOVA
    if Prot.READ in prot:
        flags |= uapi.IOMMU_IOAS_MAP_READABLE
    if Prot.WRITE in prot:
        flags |= uapi.IOMMU_IOAS_MAP_WRITEABLE
    return flags
