"""The mapper for a device without an IOMMU: nothing to map, addresses are physical, nothing protects anything."""

from __future__ import annotations

import mmap

from vfiopy.backend import IovaRange, KernelTarget, MapperTraits, Memory, MemoryKind, Prot
from vfiopy.errors import IovaRangeError, MemoryKindError, NotMappedError, OverlapError
from vfiopy.kernel.container import Container
from vfiopy.kernel.mapper_group import GroupMapper
from vfiopy.kernel.physical import is_hugetlb, physical_address

__all__ = ["NOIOMMU_COST", "NoiommuMapper"]

NOIOMMU_COST = (
    "the device can read and overwrite all of this machine's memory, whatever is mapped; VFIO taints the kernel; "
    "CAP_SYS_RAWIO is needed to open it and CAP_SYS_ADMIN to learn physical addresses; "
    "memory must come from huge pages, because nothing pins it"
)


class NoiommuMapper(GroupMapper):
    """A container without an IOMMU. VFIO_IOMMU_MAP_DMA does not exist: an IOVA *is* a physical address.

    So the IOVA of a buffer is not chosen but found out, with :meth:`place`; ``prot`` cannot be enforced, and
    unmapping does not keep the device out.
    """

    def __init__(self, container: Container | None = None) -> None:
        """Open a container, or take one over."""
        own = Container() if container is None else container
        self._mapped: dict[int, int] = {}
        try:
            super().__init__(own, "noiommu", "noiommu")
        except BaseException:
            own.close()
            raise

    def _measure(self) -> None:
        self._limit = 0  # VFIO_IOMMU_GET_INFO does not exist here either

    @property
    def kernel_target(self) -> KernelTarget | None:
        """None: there is no call that native code could make."""
        return None

    def traits(self) -> MapperTraits:
        """Whole pages of process memory."""
        return MapperTraits(mmap.PAGESIZE, 0, frozenset({MemoryKind.HOST, MemoryKind.FILE}))

    def ranges(self) -> list[IovaRange]:
        """Every address; what is RAM among them only the kernel knows."""
        return [IovaRange(0, (1 << 64) - 1)]

    def place(self, memory: Memory) -> int:
        """Return the only IOVA that this memory can have: its physical address.

        Raises:
            MemoryKindError: it is not of huge pages, or not contiguous.
            PermissionDeniedError: no CAP_SYS_ADMIN.
        """
        address = self._address(memory)
        if not is_hugetlb(address, memory.size):
            raise MemoryKindError(
                "without an IOMMU only memory of huge pages can be used: the kernel may move any other page",
                object=self._label,
                hint="use allocate(page_size=2 << 20); vm.nr_hugepages must be set",
            )
        return physical_address(address, memory.size, self._label)

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:  # noqa: ARG002  nothing enforces it
        """Check that ``iova`` is where the memory is; nothing is mapped, and ``prot`` protects nothing."""
        place = self.place(memory)
        if iova != place:
            raise IovaRangeError(
                f"without an IOMMU this memory has IOVA {place:#x}, its physical address, and no other",
                object=self._label,
                hint="leave the IOVA out",
            )
        for first, size in self._mapped.items():
            if iova < first + size and first < iova + memory.size:
                raise OverlapError(f"{iova:#x} is mapped already", object=self._label)
        self._mapped[iova] = memory.size

    def unmap(self, iova: int, size: int) -> int:
        """Forget a mapping. The device can still reach the memory: quiesce it first."""
        if self._mapped.get(iova) != size:
            raise NotMappedError(f"no mapping of {size:#x} bytes starts at {iova:#x}", object=self._label)
        del self._mapped[iova]
        return size
