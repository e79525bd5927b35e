"""DMA buffers: numpy arrays that know their IOVA.

Who frees what, decided once: ``free()`` takes the memory away from the *device* at once; the host memory itself stays
until the last numpy view of it is gone, so no view ever dangles. A buffer that is dropped without ``free()`` is taken
from the device at the next operation, with a ``ResourceWarning``.
"""

from __future__ import annotations

import errno
import os
from functools import partial
from typing import Any, Protocol, Self, cast

import numpy as np
from numpy.typing import DTypeLike

from vfiopy._shim import lib
from vfiopy.backend import FileMemory, HostMemory
from vfiopy.dma.mapping import Mapping
from vfiopy.dma.memory import PAGE_SIZE, round_to_pages
from vfiopy.errors import AlignmentError, ClosedError, NoSpaceError, VfioError
from vfiopy.lives import Resource, drain_finalizers, retire

__all__ = ["HUGE_1G", "HUGE_2M", "DmaArray", "allocate_pages"]

HUGE_2M = 2 << 20
HUGE_1G = 1 << 30
FREE_TIMEOUT = 1.0
"""Seconds that a buffer waits for DMA of emulated devices that is under way when it is freed."""


def allocate_pages(size: int, *, page_size: int = PAGE_SIZE, numa_node: int | None = None) -> HostMemory:
    """Allocate zeroed memory of this process for DMA.

    Args:
        size: bytes; rounded up to whole pages.
        page_size: PAGE_SIZE, or HUGE_2M or HUGE_1G for pages of the hugetlb pool.
        numa_node: the node that the memory has to come from, or None for the kernel's choice.

    Buffers of 2 MiB and more start at a multiple of 2 MiB and ask for transparent huge pages, so that the IOMMU can
    use big pages. All pages exist when the call returns. The memory is not inherited by forked children
    (madvise(2), MADV_DONTFORK). It is given back when the last view of it is gone.

    Raises:
        NoSpaceError: no memory, or the hugetlb pool has no such pages free.
        VfioError: the kernel refuses the NUMA node.
    """
    if size <= 0:
        raise AlignmentError(f"a buffer of {size} bytes cannot be allocated", hint="ask for at least 1 byte")
    if page_size not in (PAGE_SIZE, HUGE_2M, HUGE_1G):
        raise AlignmentError(
            f"pages of {page_size} bytes do not exist here",
            hint=f"page_size is {PAGE_SIZE}, HUGE_2M or HUGE_1G",
        )
    drain_finalizers()
    size = round_to_pages(size, page_size)
    shift = 0 if page_size == PAGE_SIZE else page_size.bit_length() - 1
    address = lib.vfiopy_alloc_pages(size, shift, -1 if numa_node is None else numa_node)
    if address < 0:
        raise _allocation_error(size, page_size, numa_node, -address)
    return HostMemory(address, size, True, np.asarray(_Pages(address, size)).view(_PageArray))


class _PageArray(np.ndarray[Any, Any]):
    """What a buffer's arrays are views of.

    A type of its own, because numpy lets a plain view of a view point past it at the first array of its own plain
    type. That would be this one, and the buffer could end under the view.
    """


class _Pages:
    """Owner of an anonymous mapping; arrays over it keep it alive."""

    def __init__(self, address: int, size: int) -> None:
        self._address = address
        self._size = size
        self._pid = os.getpid()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"shape": (self._size,), "typestr": "|u1", "data": (self._address, False), "version": 3}

    def __del__(self) -> None:
        # A forked child does not even have these pages (MADV_DONTFORK): what is there now may be something else.
        if self._pid == os.getpid():
            retire(partial(lib.vfiopy_free_pages, self._address, self._size))


def _allocation_error(size: int, page_size: int, numa_node: int | None, number: int) -> VfioError:
    if number == errno.EINVAL and numa_node is not None:
        return VfioError(
            f"memory of NUMA node {numa_node} cannot be had",
            errno=number,
            object="allocate()",
            call="mbind",
            hint="/sys/devices/system/node/online lists the nodes of this machine",
        )
    if page_size == PAGE_SIZE:
        return NoSpaceError(
            f"{size} bytes of memory cannot be had", errno=number, object="allocate()", call="mmap"
        )
    pool = f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB"
    if not os.path.isdir(pool):  # noqa: PTH112  one question about one path
        hint = f"this kernel has no pages of {page_size >> 20} MiB; boot with hugepagesz={page_size >> 20}M"
    else:
        hint = f"write at least {size // page_size} to {pool}/nr_hugepages"
    return NoSpaceError(
        f"no {size // page_size} free huge pages of {page_size >> 20} MiB",
        errno=number,
        object="allocate()",
        call="mmap(MAP_HUGETLB)",
        hint=hint,
    )


class Allocation(Resource):
    """A buffer's hold on its mapping: shared by all arrays that look at the same memory."""

    _rank = 50

    def __init__(self, mapping: Mapping) -> None:
        super().__init__(f"DMA buffer of {mapping.size:#x} bytes at IOVA {mapping.iova:#x}")
        self.iova = mapping.iova
        self.size = mapping.size
        self.address = mapping.address
        self.mapping = mapping
        self.timeout = FREE_TIMEOUT

    def __bool__(self) -> bool:
        # Closing the space, or unmapping by IOVA, may have taken it away before.
        return self._open and bool(self.mapping)

    def check_open(self) -> None:
        super().check_open()
        if not self.mapping:
            raise ClosedError(f"{self._label} was unmapped")

    def _release(self) -> None:
        if self.mapping:
            self.mapping.unmap(timeout=self.timeout)

    def abandon(self) -> None:
        """End without unmapping: its space was closed by force."""
        self._open = False


class Reach(Protocol):
    """How devices reach the memory of an array.

    Attributes:
        timeout: seconds that :meth:`close` waits for pins.
    """

    iova: int
    size: int
    address: int
    mapping: Mapping
    timeout: float

    def check_open(self) -> None:
        """Raise unless they reach it now."""

    def close(self) -> None:
        """Take it away from them. Idempotent."""


class DmaArray(np.ndarray[Any, Any]):
    """A numpy array in memory that a device can reach.

    Made by ``device.dma.allocate()``, ``space.allocate()`` or, over another device's BAR, ``DmaBufMapping.array()``.
    Slices and views keep the right :attr:`iova`; copies and results of arithmetic are ordinary memory and have none.
    """

    _allocation: Reach | None = None

    @classmethod
    def over(cls, memory: HostMemory | FileMemory, shape: Any, dtype: DTypeLike, order: Any) -> Self:
        """View the first bytes of memory as an array of this shape; not mapped yet."""
        owner = cast("Any", memory.owner)
        pages = owner if isinstance(owner, _PageArray) else np.asarray(owner).view(_PageArray)
        return np.ndarray.__new__(cls, shape, dtype=dtype, buffer=pages, order=order)

    def adopt(self, mapping: Mapping) -> Allocation:
        """Take over the mapping of this array's memory; return what is to be closed."""
        allocation = Allocation(mapping)
        self._allocation = allocation
        return allocation

    def reached_by(self, reach: Reach) -> Self:
        """Say how devices reach this array's memory, which somebody else mapped for them."""
        self._allocation = reach
        return self

    def __array_finalize__(self, other: Any) -> None:
        """Hand the allocation on to views, and to nothing else: a copy must neither free the buffer nor keep it."""
        allocation = getattr(other, "_allocation", None)
        # The type of the base tells nearly always, and costs little.
        if allocation is not None and not isinstance(self.base, DmaArray | _PageArray) and not self._is_in(allocation):
            allocation = None
        self._allocation = allocation

    def _is_in(self, allocation: Reach) -> bool:
        base = self.base
        if base is None or (isinstance(base, np.ndarray) and base.flags.owndata):
            return False  # numpy's own memory; to ask it for the address takes microseconds
        return 0 <= self.address - allocation.address < allocation.size

    @property
    def iova(self) -> int:
        """The IOVA of the first element, for the device.

        Raises:
            ClosedError: the buffer was freed, or this array is a copy in ordinary memory.
        """
        allocation = self._allocation
        if allocation is not None:
            offset = int(self.__array_interface__["data"][0]) - allocation.address
            if 0 <= offset < allocation.size:
                allocation.check_open()
                return allocation.iova + offset
        raise ClosedError("this array is a copy in ordinary memory: no device can reach it; use the buffer itself")

    device_address = iova

    @property
    def address(self) -> int:
        """The virtual address of the first element, for compiled code."""
        return int(self.__array_interface__["data"][0])

    @property
    def mapping(self) -> Mapping:
        """The mapping that this buffer is in."""
        if self._allocation is None:
            raise ClosedError("this array is a copy in ordinary memory and has no mapping")
        return self._allocation.mapping

    def free(self, *, timeout: float = FREE_TIMEOUT) -> None:
        """Take the memory away from the device; the array stays readable and writable. Idempotent.

        A copy, or the result of arithmetic, is no device's: there is nothing to free, and the buffer stays.

        An emulated device pins what its DMA is at, and only that. Real hardware has no pins: its DMA to memory that was
        freed too early is refused by the IOMMU, and is lost. Here it is waited for instead.

        Args:
            timeout: seconds to wait for pins to go, after their owners were told.

        Raises:
            PinnedError: pins are left; the buffer is as it was.
        """
        if self._allocation is not None:
            self._allocation.timeout = timeout
            self._allocation.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.free()
