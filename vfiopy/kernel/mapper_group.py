"""Mappers for devices that are opened through their group: type1, and iommufd in a container's place.

The life of one: a group goes into the container, the first one's model is chosen, device fds are opened; at
the end device fds, groups and container are closed in that order, which is the one that the kernel needs.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self
from uuid import UUID

from vfiopy import uapi
from vfiopy.backend import (
    FileMemory,
    IovaRange,
    KernelTarget,
    MapperTraits,
    Memory,
    MemoryKind,
    Prot,
)
from vfiopy.errors import MemoryKindError, StateError
from vfiopy.iova import MAPPER_TYPE1
from vfiopy.kernel.container import Container
from vfiopy.kernel.device_io import KernelDeviceIo
from vfiopy.kernel.group import Group
from vfiopy.kernel.iommufd import Iommufd
from vfiopy.lives import Resource
from vfiopy.pci import Function

__all__ = ["ContainerMapper", "GroupMapper", "GroupOnIommufdMapper"]

_EVERYTHING = IovaRange(0, (1 << 64) - 1)
_NO_LIMIT = 0xFFFF_FFFF  # what iommufd says as a container


class GroupMapper(Resource):
    """What mappers have in common whose devices come through groups.

    Threads: devices join and leave from one thread at a time; mapping may go on meanwhile.
    """

    _rank = 10
    _kinds = frozenset({MemoryKind.HOST, MemoryKind.FILE})
    _keeps_last_group = False
    adopted = False
    """It was made from a launcher's fd: devices that came as fds from there may use it."""

    def __init__(self, container: Container, backend: str, model: str) -> None:
        """Take over a container.

        Args:
            container: with no group in it yet, or adopted with its groups and model.
            backend: what :attr:`KernelDeviceIo.backend` says of devices here.
            model: ``"type1v2"``, ``"type1"``, ``"noiommu"``.
        """
        self.container = container
        self.backend = backend
        self._model = model
        self._groups: dict[int, Group] = {}
        self._devices: list[KernelDeviceIo] = []
        self._limit: int | None = None
        label = container.calls.label
        super().__init__(f"{label} ({backend})" if backend not in label else label)

    @property
    def name(self) -> str:
        """For messages."""
        return self._label

    # --- devices --------------------------------------------------------------------------------------------

    def join(self, function: Function, vf_token: UUID | None = None) -> KernelDeviceIo:
        """Put a function's group into the container, unless it is there, and open the function.

        When it raises, group and container are as before.
        """
        self.check_open()
        number = function.iommu_group
        group = None if number is None else self._groups.get(number)
        with ExitStack() as undo:
            if group is None:
                group = Group(function)
                undo.callback(group.close)
                group.check_viable()
                group.set_container(self.container)
            if self.container.model is None:
                self._choose_model()
                undo.callback(self._forget_model)
            calls = group.open_device(function, vf_token)
            undo.callback(calls.close)
            self._measure()
            io = KernelDeviceIo(calls, self.backend, on_close=self._left, group=group)
            undo.pop_all()  # from here on the io closes what was opened, also when it is dropped at once
        self._groups[group.number] = group
        self._devices.append(io)
        return io

    def _choose_model(self) -> None:
        self.container.set_model(self._model)

    def _forget_model(self) -> None:
        # The kernel forgets it with the last group.
        if not self._groups:
            self.container.model = None

    def _measure(self) -> None:
        if self._limit is None:
            available = self.container.info().dma_avail
            self._limit = 0 if available in (None, _NO_LIMIT) else available

    def _left(self, io: KernelDeviceIo) -> None:
        group = io.group
        if io in self._devices:
            self._devices.remove(io)
        if group is None or any(other.group is group for other in self._devices):
            return
        if self._keeps_last_group and len(self._groups) == 1:
            # With its last group the container would lose all mappings, behind the back of the book.
            return
        group.close()
        self._groups.pop(group.number, None)
        self._forget_model()

    # --- the seam -------------------------------------------------------------------------------------------

    @property
    def kernel_target(self) -> KernelTarget | None:
        """The container, to be mapped into by native code."""
        return KernelTarget(MAPPER_TYPE1, self.container.fileno(), 0)

    def traits(self) -> MapperTraits:
        """Page sizes and limit of the container as it is now."""
        info = self.container.info()
        return MapperTraits(info.page_sizes or _page_sizes(), self._limit or 0, self._kinds)

    def ranges(self) -> list[IovaRange]:
        """Usable IOVAs as they are now; all of them where the kernel does not say (before Linux 5.4)."""
        found = self.container.info().ranges
        return [_EVERYTHING] if found is None else list(found)

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        """VFIO_IOMMU_MAP_DMA by the memory's address in this process."""
        flags = uapi.VFIO_DMA_MAP_FLAG_READ if Prot.READ in prot else 0
        if Prot.WRITE in prot:
            flags |= uapi.VFIO_DMA_MAP_FLAG_WRITE
        self.container.calls.map_dma(self._address(memory), iova, memory.size, flags)

    def _address(self, memory: Memory) -> int:
        if memory.kind not in self._kinds or not memory.address:
            raise MemoryKindError(
                f"{memory.kind.name} memory that is not mapped in this process cannot be mapped for a device here"
                if memory.kind in self._kinds
                else f"it cannot map memory of kind {memory.kind.name}",
                object=self._label,
                hint="map the file into this process first (file_memory(..., mapped=...))"
                if isinstance(memory, FileMemory)
                else "a BAR needs backend='iommufd' and a dma-buf",
            )
        return memory.address

    def unmap(self, iova: int, size: int) -> int:
        """VFIO_IOMMU_UNMAP_DMA."""
        return self.container.calls.unmap_dma(iova, size)

    # --- end ------------------------------------------------------------------------------------------------

    def _release(self) -> None:
        if self._devices:
            names = ", ".join(io.name for io in self._devices)
            raise StateError(f"{self._label} cannot be closed while devices are in it: {names}")
        for number, group in list(self._groups.items()):
            group.close()
            del self._groups[number]
        self._close_container()

    def _close_container(self) -> None:
        self.container.close()

    def _leftover(self) -> Callable[[], None]:
        return self._abandon

    def _abandon(self) -> None:
        for io in list(self._devices):
            io.abandon()
        self.close()


def _page_sizes() -> int:
    """Page sizes to assume where the kernel names none: this machine's pages."""
    return mmap.PAGESIZE


class ContainerMapper(GroupMapper):
    """/dev/vfio/vfio with the type1v2 model, or type1 on request.

    type1 may cut mappings in two and unmaps whole mappings when asked for a part; nobody should want it but
    to compare. A BAR that this process has mapped can be mapped by its address. Unlike a dma-buf such a
    mapping is not taken back when the other device is reset or closed: writes then go nowhere, or to whatever
    comes to live there.
    """

    _kinds = frozenset({MemoryKind.HOST, MemoryKind.FILE, MemoryKind.MMIO})
    _keeps_last_group = True

    def __init__(self, model: str = "type1v2", container: Container | None = None) -> None:
        """Open a container, or take one over."""
        own = Container() if container is None else container
        if own.compat:
            # iommufd in type1's clothes pins by pages, and a BAR has none.
            self._kinds = GroupMapper._kinds
        try:
            super().__init__(own, model, model)
        except BaseException:
            own.close()
            raise

    @classmethod
    def adopt(cls, fd: int, model: str = "type1v2") -> Self:
        """Duplicate a container's fd that a launcher opened and put groups into.

        For device fds that come from the same launcher: ``connect(..., device_fd=..., mappers=[mapper])``.
        """
        mapper = cls(model, Container.adopt(fd, model))
        mapper.adopted = True
        return mapper


class GroupOnIommufdMapper(GroupMapper):
    """An iommufd in the place of a container (Linux 6.2): the group's road, iommufd's memory rules."""

    def __init__(self, model: str = "type1v2", iommufd: Iommufd | None = None) -> None:
        """Open /dev/iommu, or take over a context."""
        self.iommufd = Iommufd() if iommufd is None else iommufd
        try:
            container = Container(self.iommufd.calls.as_container())
            try:
                super().__init__(container, f"iommufd-compat-{model}", model)
            except BaseException:
                container.close()
                raise
        except BaseException:
            self.iommufd.close()
            raise

    def _close_container(self) -> None:
        super()._close_container()
        self.iommufd.close()
