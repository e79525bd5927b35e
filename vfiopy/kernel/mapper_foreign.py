"""The mapper for a device fd whose container belongs to the process that opened it."""

from __future__ import annotations

import mmap

from vfiopy.backend import IovaRange, KernelTarget, MapperTraits, Memory, Prot
from vfiopy.errors import NotSupportedError
from vfiopy.lives import Resource

__all__ = ["ForeignMapper"]


class ForeignMapper(Resource):
    """Maps nothing: registers, interrupts and reset work, DMA is the business of the launcher."""

    adopted = False  # nothing is mapped that could stay

    def __init__(self, name: str) -> None:
        """Name the device that it is for."""
        super().__init__(f"the launcher's container of {name}")

    @property
    def name(self) -> str:
        """For messages."""
        return self._label

    @property
    def kernel_target(self) -> KernelTarget | None:
        """None: the container is not at hand."""
        return None

    def traits(self) -> MapperTraits:
        """No kind of memory at all."""
        return MapperTraits(mmap.PAGESIZE, 0, frozenset())

    def ranges(self) -> list[IovaRange]:
        """None that is known."""
        return []

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        """Refuse."""
        raise NotSupportedError(
            f"{memory.size:#x} bytes cannot be mapped at {iova:#x} ({prot.name}): the container is the launcher's",
            object=self._label,
            hint="have the launcher send the container's fd too: ContainerMapper.adopt(fd); or use a cdev",
        )

    def unmap(self, iova: int, size: int) -> int:  # noqa: ARG002  the seam's signature
        """Nothing is mapped, so nothing is unmapped."""
        self.check_open()
        return 0

    def _release(self) -> None:
        pass
