"""The mapper for devices that are bound to an iommufd through their own cdev: an IO address space."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self
from uuid import UUID

from vfiopy.backend import (
    DeviceWindow,
    FileMemory,
    IovaRange,
    KernelTarget,
    Mapper,
    MapperTraits,
    Memory,
    MemoryKind,
    Prot,
)
from vfiopy.errors import MemoryKindError, StateError, VfioError
from vfiopy.iova import MAPPER_IOAS
from vfiopy.kernel.cdev import bind_error, open_cdev
from vfiopy.kernel.device_io import KernelDeviceIo
from vfiopy.kernel.ioctl import DeviceFd
from vfiopy.kernel.iommufd import Ioas, Iommufd
from vfiopy.lives import Resource
from vfiopy.pci import Function

__all__ = ["IoasMapper"]

_HUGE_PAGES = 1 << 21 | 1 << 30


class IoasMapper(Resource):
    """An IOAS of an iommufd.

    Threads: devices join and leave from one thread at a time; mapping may go on meanwhile.

    Attributes:
        iommufd: the context.
        ioas: the address space.
        backend: ``"iommufd"``.
        adopted: it was made from a launcher's fd: devices that came as fds from there may use it.
    """

    _rank = 10
    backend = "iommufd"

    def __init__(self, iommufd: Iommufd | None = None, ioas_id: int | None = None) -> None:
        """Make an IOAS in a context that is taken over, or in a new one; or use one that is there."""
        self.adopted = False
        self._devices: list[KernelDeviceIo] = []
        self.iommufd = Iommufd() if iommufd is None else iommufd
        try:
            self.ioas = Ioas(self.iommufd, ioas_id)
            super().__init__(f"IOAS {self.ioas.id} of {self.iommufd.calls.label}")
        except BaseException:
            self.iommufd.close()
            raise

    @classmethod
    def adopt(cls, fd: int, ioas_id: int) -> Self:
        """Duplicate a launcher's iommufd and use an IOAS of it, which stays the launcher's.

        For device fds that the launcher has attached to it: ``connect(..., device_fd=...,
        mappers=[mapper])``.
        """
        mapper = cls(Iommufd.adopt(fd), ioas_id)
        mapper.adopted = True
        return mapper

    @property
    def name(self) -> str:
        """For messages."""
        return self._label

    # --- devices --------------------------------------------------------------------------------------------

    def join(self, function: Function, vf_token: UUID | None = None, calls: DeviceFd | None = None) -> KernelDeviceIo:
        """Open a function's cdev (unless ``calls`` is that), bind it to the iommufd and attach it to the
        IOAS.

        When it raises, the device is as before; ``calls`` is then still open.
        """
        self.check_open()
        with ExitStack() as undo:
            if calls is None:
                calls = open_cdev(function)
                undo.callback(calls.close)
            try:
                device_id = calls.bind_iommufd(self.iommufd.calls, vf_token)
            except VfioError as error:
                raise bind_error(error, function) from error
            # Binding has no opposite but close: a device that came as an fd stays bound if attaching fails.
            calls.attach_iommufd_pt(self.ioas.id)
            undo.callback(calls.detach_iommufd_pt)
            io = KernelDeviceIo(calls, self.backend, on_close=self._left, iommufd_id=device_id)
            undo.pop_all()  # from here on the io closes what was opened, also when it is dropped at once
        self._devices.append(io)
        return io

    def _left(self, io: KernelDeviceIo) -> None:
        if io in self._devices:
            self._devices.remove(io)

    # --- the seam -------------------------------------------------------------------------------------------

    @property
    def kernel_target(self) -> KernelTarget | None:
        """The IOAS, to be mapped into by native code."""
        return KernelTarget(MAPPER_IOAS, self.iommufd.fileno(), self.ioas.id)

    def traits(self) -> MapperTraits:
        """Alignment of the IOAS as it is now, and huge pages, which every IOMMU has in some size."""
        smallest = max(self.ioas.alignment(), mmap.PAGESIZE)
        return MapperTraits(smallest | _HUGE_PAGES & -smallest, 0, frozenset(_KINDS), dmabufs=True)

    def ranges(self) -> list[IovaRange]:
        """Usable IOVAs as they are now."""
        return list(self.ioas.ranges())

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        """IOMMU_IOAS_MAP for memory of this process, IOMMU_IOAS_MAP_FILE for memfds and dma-bufs."""
        if isinstance(memory, FileMemory):
            self.ioas.map_file(memory.fd, memory.offset, memory.size, prot, iova=iova)
        elif isinstance(memory, DeviceWindow):
            if memory.dmabuf_fd < 0:
                raise MemoryKindError(
                    "iommufd cannot map a BAR by its address, only by a dma-buf",
                    object=self._label,
                    hint="export the BAR as a dma-buf and map that",
                )
            self.ioas.map_file(memory.dmabuf_fd, memory.dmabuf_offset, memory.size, prot, iova=iova)
        else:
            self.ioas.map(memory.address, memory.size, prot, iova=iova)

    def unmap(self, iova: int, size: int) -> int:
        """IOMMU_IOAS_UNMAP."""
        return self.ioas.unmap(iova, size)

    def sibling(self) -> IoasMapper:
        """Make another IOAS in the same context: mappings can be copied between them."""
        self.check_open()
        return IoasMapper(self.iommufd.share())

    def can_copy_from(self, source: Mapper) -> bool:
        """Whether it is an IOAS of the same context."""
        return isinstance(source, IoasMapper) and source.iommufd.context is self.iommufd.context

    def copy_from(self, source: Mapper, source_iova: int, size: int, prot: Prot, iova: int) -> None:
        """IOMMU_IOAS_COPY: the pages are pinned, and charged, once."""
        assert isinstance(source, IoasMapper)
        self.ioas.copy_from(source.ioas, source_iova, size, prot, iova=iova)

    # --- end ------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        if self._devices:
            names = ", ".join(io.name for io in self._devices)
            raise StateError(f"{self._label} cannot be closed while devices are in it: {names}")
        self.ioas.close()
        self.iommufd.close()

    def _leftover(self) -> Callable[[], None]:
        return self._abandon

    def _abandon(self) -> None:
        for io in list(self._devices):
            io.abandon()
        self.close()


_KINDS = (MemoryKind.HOST, MemoryKind.FILE, MemoryKind.MMIO)
