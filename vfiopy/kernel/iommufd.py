"""An open /dev/iommu and the objects in it, as things with a life instead of ids."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Self

from vfiopy.backend import IovaRange, Prot
from vfiopy.kernel.ioctl import WHOLE_SPACE, FaultFd, HwInfo, IommufdFd
from vfiopy.lives import Resource

__all__ = ["FaultQueue", "Hwpt", "Ioas", "Iommufd", "IommufdObject"]

_PATH = "/dev/iommu"


class Iommufd(Resource):
    """An iommufd context. Closing it closes its objects; close devices that are bound to it first.

    Attributes:
        calls: the typed fd below, with every ioctl.
        context: the same for all objects that :meth:`share` made of one, because the kernel does not tell.
    """

    _rank = 30

    def __init__(self, calls: IommufdFd | None = None) -> None:
        """Open /dev/iommu, or take over an fd that is open already."""
        self.calls = IommufdFd.open(_PATH) if calls is None else calls
        self.context = object()
        self._objects: list[weakref.ref[IommufdObject]] = []
        super().__init__(self.calls.label)

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Duplicate an fd of /dev/iommu that came from elsewhere; raises WrongFdError if it is not one."""
        calls = IommufdFd.adopt(fd, _PATH)
        try:
            return cls(calls)
        except BaseException:
            calls.close()
            raise

    def share(self) -> Self:
        """Another object of the same context, which lives as long as one of them does."""
        other = self.adopt(self.fileno())
        other.context = self.context
        return other

    def fileno(self) -> int:
        """Return the fd number; still owned by this object."""
        return self.calls.fileno()

    def ioas(self) -> Ioas:
        """Make an IO address space."""
        return Ioas(self)

    def hwpt(self, device_id: int, parent: Ioas | Hwpt, flags: int = 0) -> Hwpt:
        """Make a page table for a bound device; ``flags`` are IOMMU_HWPT_ALLOC_*."""
        return Hwpt(self, device_id, parent, flags)

    def fault_queue(self) -> FaultQueue:
        """Make a queue of I/O page faults (Linux 6.11)."""
        return FaultQueue(self)

    def hw_info(self, device_id: int) -> HwInfo:
        """Describe the IOMMU in front of a bound device."""
        return self.calls.get_hw_info(device_id)

    def _made(self, thing: IommufdObject) -> None:
        self._objects = [ref for ref in self._objects if ref() is not None]
        self._objects.append(weakref.ref(thing))

    def _release(self) -> None:
        # The last made goes first: an HWPT keeps its IOAS busy.
        for ref in reversed(self._objects):
            thing = ref()
            if thing is not None:
                thing.close()
        self._objects.clear()
        self.calls.close()


class IommufdObject(Resource):
    """An object of a context. Closing it destroys it; refused with BusyError while something uses it."""

    _rank = 31

    def __init__(self, iommufd: Iommufd, object_id: int, kind: str) -> None:
        """Take an id over."""
        self.iommufd = iommufd
        self.id = object_id
        super().__init__(f"{kind} {object_id} of {iommufd.calls.label}")
        iommufd._made(self)

    def _release(self) -> None:
        if self.iommufd.calls:  # closing the context has destroyed everything
            self.iommufd.calls.destroy(self.id)


class Ioas(IommufdObject):
    """An IO address space: IOVAs and what they are mapped to."""

    def __init__(self, iommufd: Iommufd, existing: int | None = None) -> None:
        """Allocate it, or stand for an ``existing`` one of a context that was adopted; that is never
        destroyed.
        """
        iommufd.check_open()
        self._borrowed = existing is not None
        super().__init__(iommufd, iommufd.calls.ioas_alloc() if existing is None else existing, "IOAS")

    def _release(self) -> None:
        if not self._borrowed:
            super()._release()

    def ranges(self) -> tuple[IovaRange, ...]:
        """Usable IOVAs as they are now; every device that is attached or detached may change them."""
        return self.iommufd.calls.ioas_iova_ranges(self.id).ranges

    def alignment(self) -> int:
        """Bytes that IOVA and length must be multiples of; 1 while no device is attached."""
        return self.iommufd.calls.ioas_iova_ranges(self.id).alignment

    def allow(self, ranges: Sequence[IovaRange]) -> None:
        """Have these IOVAs stay usable, or devices refused that cannot."""
        self.iommufd.calls.ioas_allow_iovas(self.id, ranges)

    def map(self, address: int, size: int, prot: Prot = Prot.RW, *, iova: int | None = None) -> int:
        """Map memory of this process; return the IOVA."""
        return self.iommufd.calls.ioas_map(self.id, address, size, prot, iova=iova)

    def map_file(self, fd: int, offset: int, size: int, prot: Prot = Prot.RW, *, iova: int | None = None) -> int:
        """Map a memfd, or the dma-buf of a BAR; return the IOVA."""
        return self.iommufd.calls.ioas_map_file(self.id, fd, offset, size, prot, iova=iova)

    def copy_from(
        self, source: Ioas, source_iova: int, size: int, prot: Prot = Prot.RW, *, iova: int | None = None
    ) -> int:
        """Share a mapping of another address space of the same context; return the IOVA here."""
        calls = self.iommufd.calls
        return calls.ioas_copy(self.id, source.id, source_iova, size, prot, destination_iova=iova)

    def unmap(self, iova: int, size: int) -> int:
        """Undo whole mappings inside a range; return the number of bytes."""
        return self.iommufd.calls.ioas_unmap(self.id, iova, size)

    def unmap_all(self) -> int:
        """Undo everything; return the number of bytes."""
        return self.iommufd.calls.ioas_unmap(self.id, 0, WHOLE_SPACE)


class Hwpt(IommufdObject):
    """A hardware page table."""

    def __init__(self, iommufd: Iommufd, device_id: int, parent: Ioas | Hwpt, flags: int = 0) -> None:
        """Allocate it."""
        iommufd.check_open()
        self.parent = parent  # keeps it from being collected, and so from being destroyed, before this
        super().__init__(iommufd, iommufd.calls.hwpt_alloc(device_id, parent.id, flags), "HWPT")


class FaultQueue(IommufdObject):
    """A queue of I/O page faults; ``.calls`` reads and answers them."""

    def __init__(self, iommufd: Iommufd) -> None:
        """Allocate it."""
        iommufd.check_open()
        number, fd = iommufd.calls.fault_queue_alloc()
        self.calls: FaultFd = fd
        super().__init__(iommufd, number, "fault queue")

    def fileno(self) -> int:
        """For poll() and asyncio."""
        return self.calls.fileno()

    def _release(self) -> None:
        self.calls.close()
        super()._release()
