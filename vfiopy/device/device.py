"""The device that a user holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING, Any

from numpy.typing import DTypeLike

from vfiopy.backend import Area, DeviceInfo, DeviceIo, Mapper, Memory, Prot, RegionIndex
from vfiopy.device.config_space import COMMAND_BUS_MASTER, COMMAND_MEMORY, ConfigSpace
from vfiopy.device.irqs import Irqs
from vfiopy.device.regions import Regions
from vfiopy.dma import AddressSpace, DmaArray, Mapping
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.errors import BusyError, ClosedError, NotSupportedError, VfioError
from vfiopy.lives import Resource
from vfiopy.mmio import Region
from vfiopy.observing import Observer, told
from vfiopy.pci.capabilities import MsiX

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Device", "DeviceDma"]


class DeviceDma:
    """A device's view of its address space: the space, and how many address bits the device has.

    What is asked for here is placed below ``2**bits``, from then on. That moves nothing that is mapped already, and
    does not bind ``space``, which other devices may share. 64 until you say otherwise: the bus does not tell.
    """

    def __init__(self, space: AddressSpace) -> None:
        self.space = space
        self._bits = 64

    @property
    def bits(self) -> int:
        """Address lines of the device, 1 to 64; assign what its data sheet says."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        if not 1 <= bits <= 64:
            raise ValueError(f"a device drives 1 to 64 address lines, not {bits}")
        self._bits = index(bits)

    @property
    def limit(self) -> int:
        """The highest IOVA that the device can reach."""
        return (1 << self.bits) - 1

    def allocate(
        self,
        shape: int | Sequence[int],
        dtype: DTypeLike = "u1",
        *,
        iova: int | None = None,
        prot: Prot = Prot.RW,
        alignment: int = 0,
        page_size: int = PAGE_SIZE,
        numa_node: int | None = None,
        order: Any = "C",
        transient: bool = False,
    ) -> DmaArray:
        """Allocate a DMA buffer within the device's reach: see :meth:`AddressSpace.allocate`."""
        return self.space.allocate(
            shape,
            dtype,
            iova=iova,
            prot=prot,
            limit=self.limit,
            alignment=alignment,
            page_size=page_size,
            numa_node=numa_node,
            order=order,
            transient=transient,
        )

    def map(
        self, memory: Memory | Buffer, *, iova: int | None = None, prot: Prot = Prot.RW, alignment: int = 0
    ) -> Mapping:
        """Map memory within the device's reach: see :meth:`AddressSpace.map`."""
        return self.space.map(memory, iova=iova, prot=prot, limit=self.limit, alignment=alignment)

    def bounce(self, data: Buffer, *, prot: Prot = Prot.READ) -> DmaArray:
        """Copy data into a new DMA buffer: see :meth:`AddressSpace.bounce`."""
        return self.space.bounce(data, prot=prot, limit=self.limit)


class Device(Resource):
    """A PCI function that this process drives; made by ``vfiopy.open()``.

    Closing turns bus mastering off first, so that the device cannot write memory that is about to be freed, then
    disables interrupts, unmaps the BARs and lets the device go; also after an exception.

    Attributes:
        io: the seam: what the backend offers, unadorned.
        space: the address space that it is in.
        dma: the same, within this device's reach.
        bars: its BARs by number, 0 to 5.
        irqs: its interrupts.
        config: its configuration space.
    """

    _rank = -20

    def __init__(
        self,
        io: DeviceIo,
        mapper: Mapper,
        space: AddressSpace,
        *,
        owns_space: bool,
        map_msix: bool = False,
    ) -> None:
        super().__init__(io.name)
        self.io = io
        self.space = space
        self._mapper = mapper
        self._owns_space = owns_space
        self._observer: Observer | None = None
        try:
            self._info = io.info()
            self.config = ConfigSpace(io)
            self.bars = Regions(io, RegionIndex.BAR5 + 1, self._msix_tables(), map_msix=map_msix)
            self._others = Regions(io, self._info.num_regions, {})
            self.irqs = Irqs(io)
            self.dma = DeviceDma(space)
            space.join(mapper, self)
        except BaseException:
            self._open = False  # whoever made the io closes the space too if it is ours
            io.close()  # before the mapper, which may be in the space already when this was interrupted
            space.leave(mapper, self)
            raise

    @property
    def name(self) -> str:
        """What the device was opened as."""
        return self.io.name

    @property
    def backend(self) -> str:
        """The way it is reached: ``"iommufd"``, ``"type1v2"``, ``"emulated"``, ..."""
        return self.io.backend

    @property
    def info(self) -> DeviceInfo:
        """What the backend says of the device."""
        return self._info

    @property
    def rom(self) -> Region:
        """The expansion ROM; read-only."""
        return self.region(RegionIndex.ROM)

    def region(self, index: int) -> Region:
        """Open a region by VFIO's index: ROM, VGA, or a device-specific one from 9 on."""
        self.check_open()
        return self.bars[index] if index <= RegionIndex.BAR5 else self._others[index]

    def _msix_tables(self) -> dict[int, Area]:
        return {
            capability.table_bar: Area(capability.table_offset, capability.table_size * 16)
            for capability in self.config.capabilities()
            if isinstance(capability, MsiX)
        }

    def observe(self, observer: Observer | None) -> None:
        """Have an observer told of what is done with the device, but for its address space; None ends it.

        :func:`vfiopy.tracing` is what programs use.

        Raises:
            BusyError: somebody observes it already.
        """
        if observer is not None and self._observer is not None:
            raise BusyError(
                "it is being traced already", object=self.name, hint="end the other trace first, or give it more sinks"
            )
        self._observer = self.config.observer = self.bars.observer = self._others.observer = observer
        self.irqs.observe(observer)

    def open_regions(self) -> list[tuple[int, Region]]:
        """Return the regions that are open, by VFIO's index; opens none."""
        return [*self.bars.opened(), *self._others.opened()]

    # --- switches ------------------------------------------------------------------------------------------------

    @property
    def bus_master(self) -> bool:
        """Whether the device may start DMA and send MSIs. Off when opened; never switched on as a side effect."""
        self.check_open()
        return bool(self.config.command & COMMAND_BUS_MASTER)

    @bus_master.setter
    def bus_master(self, on: bool) -> None:
        self.check_open()
        self.config.update_command(
            set=COMMAND_BUS_MASTER if on else 0, clear=0 if on else COMMAND_BUS_MASTER
        )

    @property
    def memory_enabled(self) -> bool:
        """Whether the device decodes accesses to its memory BARs."""
        self.check_open()
        return bool(self.config.command & COMMAND_MEMORY)

    @memory_enabled.setter
    def memory_enabled(self, on: bool) -> None:
        self.check_open()
        self.config.update_command(set=COMMAND_MEMORY if on else 0, clear=0 if on else COMMAND_MEMORY)

    @property
    def can_reset(self) -> bool:
        """Whether the device has a function reset."""
        return self._info.can_reset

    def reset(self) -> None:
        """Reset the function. Afterwards bus mastering is off, and the device forgot what it was told.

        Raises:
            NotSupportedError: the device has no function reset.
        """
        self.check_open()
        if not self.can_reset:
            raise NotSupportedError(
                "the device has no function reset",
                object=self.name,
                hint="a hot reset of its whole bus may be possible; reset_method in sysfs says what the kernel knows",
            )
        # The kernel restores the command register after the reset: clear the bit first, or it comes back set.
        memory = self.memory_enabled
        self.quiesce()
        with told(self._observer, "reset"):
            self.io.reset()
        if memory:
            self.config.update_command(set=COMMAND_MEMORY)

    # --- end -----------------------------------------------------------------------------------------------------

    def quiesce(self) -> None:
        """Stop what the device does on its own: bus mastering off. A device that is gone cannot do harm."""
        # Where the config space does not answer the device is removed or asleep; closing its fd deals with the rest.
        with suppress(VfioError):
            self.config.update_command(clear=COMMAND_BUS_MASTER)

    def _release(self) -> None:
        # Each step can be done again: what was refused or interrupted goes on where it stopped.
        with suppress(ClosedError):
            self.quiesce()
        self.irqs.abandon()
        self.bars.close()
        self._others.close()
        self.io.close()
        self.space.leave(self._mapper, self)
        if self._owns_space:
            self.space.close()
        if self._observer is not None:
            self._observer.tell("close", {})
