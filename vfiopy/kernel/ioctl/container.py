"""Container fds: /dev/vfio/vfio (type1), and an iommufd that stands in for one.

Source of all structures and flags: linux/vfio.h, "API for Type1 VFIO IOMMU".
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiopy import uapi
from vfiopy.backend import IovaRange
from vfiopy.kernel.ioctl._call import address_of, dirty_bitmap, os_calls, restarted
from vfiopy.kernel.ioctl._fd import Fd
from vfiopy.kernel.ioctl.caps import chain, checked_ranges

__all__ = ["CompatContainerFd", "ContainerCalls", "ContainerFd", "MigrationCapability", "Type1Info"]


@dataclass(frozen=True, slots=True)
class MigrationCapability:
    """VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION.

    Attributes:
        flags: none defined yet.
        page_sizes: bit n set means that dirty bitmaps can have pages of 2**n bytes.
        max_dirty_bitmap_size: bytes.
    """

    flags: int
    page_sizes: int
    max_dirty_bitmap_size: int


@dataclass(frozen=True, slots=True)
class Type1Info:
    """What VFIO_IOMMU_GET_INFO says.

    Attributes:
        page_sizes: bit n set means that the IOMMU has pages of 2**n bytes; 0 where the kernel does not say.
        ranges: usable IOVAs, sorted and disjoint; None where the kernel does not say (before 5.4, or no
            IOMMU).
        dma_avail: how many mappings are left; None where the kernel does not say (before 5.10).
        migration: dirty tracking, or None.
    """

    page_sizes: int
    ranges: tuple[IovaRange, ...] | None
    dma_avail: int | None
    migration: MigrationCapability | None


class ContainerCalls(Fd):
    """What both kinds of container answer."""

    kind = "VFIO container"

    def get_api_version(self) -> int:
        """VFIO_GET_API_VERSION: 0, for all kernels so far."""
        return self._ioctl("VFIO_GET_API_VERSION", uapi.VFIO_GET_API_VERSION)

    def check_extension(self, extension: int) -> bool:
        """VFIO_CHECK_EXTENSION: whether this container can do ``extension`` (VFIO_TYPE1v2_IOMMU, ...).

        Before VFIO_SET_IOMMU all drivers are asked, after it only the one in use.
        """
        name = "VFIO_CHECK_EXTENSION"
        return self._ioctl_value(name, uapi.VFIO_CHECK_EXTENSION, extension) > 0

    def set_iommu(self, model: int) -> None:
        """VFIO_SET_IOMMU: choose the model (VFIO_TYPE1v2_IOMMU, ...). Needs a group in the container."""
        names = {
            uapi.VFIO_TYPE1_IOMMU: "type1",
            uapi.VFIO_TYPE1v2_IOMMU: "type1v2",
            uapi.VFIO_NOIOMMU_IOMMU: "noiommu",
        }
        detail = names.get(model, f"model {model}")
        self._ioctl_value("VFIO_SET_IOMMU", uapi.VFIO_SET_IOMMU, model, detail)

    def iommu_get_info(self) -> Type1Info:
        """VFIO_IOMMU_GET_INFO with all capabilities."""
        layout = uapi.vfio_iommu_type1_info
        call = "VFIO_IOMMU_GET_INFO"
        answer = self._query(call, uapi.VFIO_IOMMU_GET_INFO, layout)
        flags = layout.get(answer, "flags")
        ranges: tuple[IovaRange, ...] | None = None
        avail: int | None = None
        migration: MigrationCapability | None = None
        first = layout.get(answer, "cap_offset") if flags & uapi.VFIO_IOMMU_INFO_CAPS else 0
        for capability in chain(answer, first, f"{self._label}: {call}"):
            match capability.id:
                case uapi.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE:
                    pairs = capability.pairs(uapi.vfio_iommu_type1_info_cap_iova_range, "nr_iovas")
                    ranges = checked_ranges(pairs, f"{self._label}: {call}")
                case uapi.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL:
                    avail = capability.get(uapi.vfio_iommu_type1_info_dma_avail, "avail")
                case uapi.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION:
                    body = uapi.vfio_iommu_type1_info_cap_migration
                    migration = MigrationCapability(
                        capability.get(body, "flags"),
                        capability.get(body, "pgsize_bitmap"),
                        capability.get(body, "max_dirty_bitmap_size"),
                    )
        sizes = layout.get(answer, "iova_pgsizes") if flags & uapi.VFIO_IOMMU_INFO_PGSIZES else 0
        return Type1Info(sizes, ranges, avail, migration)

    def map_dma(self, vaddr: int, iova: int, size: int, flags: int) -> None:
        """VFIO_IOMMU_MAP_DMA: all of it or, when it raises, nothing.

        Args:
            vaddr: address in this process, a multiple of the smallest IOMMU page.
            iova: where the device sees it.
            size: bytes.
            flags: VFIO_DMA_MAP_FLAG_READ and _WRITE for the device's rights; _VADDR alone gives an
                invalidated mapping a new address.
        """
        layout = uapi.vfio_iommu_type1_dma_map
        argument = layout.new(argsz=layout.size, flags=flags, vaddr=vaddr, iova=iova, size=size)
        detail = f"iova {iova:#x}, size {size:#x}, address {vaddr:#x}"
        self._ioctl("VFIO_IOMMU_MAP_DMA", uapi.VFIO_IOMMU_MAP_DMA, argument, detail)

    def unmap_dma(self, iova: int, size: int, flags: int = 0) -> int:
        """VFIO_IOMMU_UNMAP_DMA: undo the mappings inside a range; return the number of bytes unmapped.

        A range that holds no mapping gives 0, also where iommufd stands behind the container (its own
        IOMMU_IOAS_UNMAP says ENOENT). Neither type1v2 nor iommufd cuts a mapping in two.
        """
        layout = uapi.vfio_iommu_type1_dma_unmap
        argument = layout.new(argsz=layout.size, flags=flags, iova=iova, size=size)
        detail = f"iova {iova:#x}, size {size:#x}"
        self._ioctl("VFIO_IOMMU_UNMAP_DMA", uapi.VFIO_IOMMU_UNMAP_DMA, argument, detail)
        return layout.get(argument, "size")

    def unmap_all(self) -> int:
        """VFIO_IOMMU_UNMAP_DMA with VFIO_DMA_UNMAP_FLAG_ALL; return the number of bytes unmapped."""
        return self.unmap_dma(0, 0, uapi.VFIO_DMA_UNMAP_FLAG_ALL)


class ContainerFd(ContainerCalls):
    """/dev/vfio/vfio: the kernel's type1 container, or iommufd's imitation of it where the kernel has no
    type1.
    """

    node = "vfio/vfio"

    def is_iommufd(self) -> bool:
        """Whether iommufd serves this node: only then does an iommufd ioctl that changes nothing succeed."""
        layout = uapi.iommu_option
        argument = layout.new(size=layout.size, option_id=uapi.IOMMU_OPTION_RLIMIT_MODE, op=uapi.IOMMU_OPTION_OP_GET)
        fd = self.fileno()
        return restarted(lambda: os_calls().ioctl(fd, uapi.IOMMU_OPTION, argument)) >= 0

    def unmap_dma_dirty(self, iova: int, size: int, page_size: int) -> tuple[int, bytes]:
        """VFIO_IOMMU_UNMAP_DMA with VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP.

        Returns the number of bytes unmapped and the bitmap: one bit for each ``page_size`` bytes from
        ``iova``, in 64-bit little-endian words. Tracking must have been started; ``page_size`` is the
        smallest IOMMU page.
        """
        layout = uapi.vfio_iommu_type1_dma_unmap
        bitmap = dirty_bitmap(size, page_size)
        argument = layout.new(
            uapi.vfio_bitmap.size,
            argsz=layout.size + uapi.vfio_bitmap.size,
            flags=uapi.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP,
            iova=iova,
            size=size,
        )
        _put_bitmap(argument, layout.size, bitmap, page_size)
        detail = f"iova {iova:#x}, size {size:#x}, with dirty bitmap"
        self._ioctl("VFIO_IOMMU_UNMAP_DMA", uapi.VFIO_IOMMU_UNMAP_DMA, argument, detail)
        return layout.get(argument, "size"), bytes(bitmap)

    def dirty_pages_start(self) -> None:
        """VFIO_IOMMU_DIRTY_PAGES: start tracking; starting twice is fine."""
        self._dirty(uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_START, "start")

    def dirty_pages_stop(self) -> None:
        """VFIO_IOMMU_DIRTY_PAGES: stop tracking."""
        self._dirty(uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP, "stop")

    def dirty_pages_get(self, iova: int, size: int, page_size: int) -> bytes:
        """VFIO_IOMMU_DIRTY_PAGES: read and clear the bitmap of a range of whole mappings.

        One bit for each ``page_size`` bytes (the smallest IOMMU page) from ``iova``. With devices that cannot
        tell what they wrote (all of vfio-pci), every mapped page counts as dirty.
        """
        outer, inner = uapi.vfio_iommu_type1_dirty_bitmap, uapi.vfio_iommu_type1_dirty_bitmap_get
        bitmap = dirty_bitmap(size, page_size)
        flag = uapi.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP
        argument = outer.new(inner.size, argsz=outer.size + inner.size, flags=flag)
        inner.put(argument, "iova", iova, outer.size)
        inner.put(argument, "size", size, outer.size)
        _put_bitmap(argument, outer.size + inner.offset("bitmap_pgsize"), bitmap, page_size)
        detail = f"iova {iova:#x}, size {size:#x}"
        self._ioctl("VFIO_IOMMU_DIRTY_PAGES", uapi.VFIO_IOMMU_DIRTY_PAGES, argument, detail)
        return bytes(bitmap)

    def _dirty(self, flag: int, detail: str) -> None:
        layout = uapi.vfio_iommu_type1_dirty_bitmap
        argument = layout.new(argsz=layout.size, flags=flag)
        self._ioctl("VFIO_IOMMU_DIRTY_PAGES", uapi.VFIO_IOMMU_DIRTY_PAGES, argument, detail)


class CompatContainerFd(ContainerCalls):
    """A /dev/iommu that takes the container's part: no dirty tracking, no VADDR update.

    See :meth:`vfiopy.kernel.ioctl.iommufd.IommufdFd.as_container`.
    """

    kind = "iommufd used as a VFIO container"
    node = "iommu"


def _put_bitmap(argument: bytearray, base: int, bitmap: bytearray, page_size: int) -> None:
    layout = uapi.vfio_bitmap
    layout.put(argument, "pgsize", page_size, base)
    layout.put(argument, "size", len(bitmap), base)
    layout.put(argument, "data", address_of(bitmap), base)
