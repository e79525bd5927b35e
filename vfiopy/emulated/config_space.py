"""The configuration space of an emulated device: registers with their write masks, as the hardware has them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import TypeVar

from vfiopy.backend import Area
from vfiopy.emulated.capabilities import CapabilityDeclaration, Msi, MsiX, PciExpress, PowerManagement
from vfiopy.errors import VfioError

__all__ = ["Bar", "ConfigSpace", "Identity"]

_Capability = TypeVar("_Capability")

# PCI Express Base 6.0, 7.5.1
_COMMAND, _STATUS = 0x04, 0x06
_IO, _MEMORY, _BUS_MASTER, _SERR, _INTX_DISABLE = 1 << 0, 1 << 1, 1 << 2, 1 << 8, 1 << 10
_COMMAND_WRITABLE = _IO | _MEMORY | _BUS_MASTER | _SERR | _INTX_DISABLE
_STATUS_INTX, _STATUS_CAPABILITIES, _STATUS_CLEARABLE = 1 << 3, 1 << 4, 0xF900
_CACHE_LINE, _BARS, _SUBSYSTEM, _POINTER, _LINE, _PIN = 0x0C, 0x10, 0x2C, 0x34, 0x3C, 0x3D
_FIRST_CAPABILITY = 0x40


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a device says it is.

    Attributes:
        vendor, device: ids.
        class_code: 24 bits: base class, sub-class, programming interface.
        revision: one byte.
        subsystem_vendor, subsystem: ids.
    """

    vendor: int
    device: int
    class_code: int
    revision: int = 0
    subsystem_vendor: int = 0
    subsystem: int = 0


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory BAR.

    Attributes:
        size: bytes, a power of two, at least 16.
        shared: plain memory that can be mapped (a whole number of pages), instead of registers with handlers.
        address64: a 64-bit BAR, which takes the next BAR's register too.
        prefetchable: reads have no side effects.
        areas: of a shared BAR, the only parts that are memory, whole pages in their order; the rest is registers with
            handlers. None where all of it is memory.
    """

    size: int
    shared: bool = False
    address64: bool = False
    prefetchable: bool = False
    areas: tuple[Area, ...] | None = None

    def __post_init__(self) -> None:
        if self.size < 16 or self.size & (self.size - 1):
            raise ValueError(f"the size of a BAR is a power of two of at least 16, not {self.size:#x}")
        if self.areas is None:
            return
        if not self.shared or not self.areas:
            raise ValueError("areas are the parts of a shared BAR that are memory, one at least")
        end = 0
        for offset, size in self.areas:
            if offset % PAGESIZE or size % PAGESIZE or size <= 0 or offset < end or offset + size > self.size:
                raise ValueError(
                    f"{size:#x} bytes at {offset:#x} are no area: whole pages of {PAGESIZE} bytes, in their order, "
                    f"inside of the BAR's {self.size:#x}"
                )
            end = offset + size

    def is_memory(self, offset: int) -> bool:
        """Whether a byte is memory, and no register."""
        if self.areas is None:
            return self.shared
        return any(start <= offset < start + size for start, size in self.areas)

    @property
    def type_bits(self) -> int:
        """The low bits of its register."""
        return self.address64 << 2 | self.prefetchable << 3


class ConfigSpace:
    """Configuration space: 256 bytes, or 4096 with a PCI Express capability. Little-endian.

    ``on_change`` is called after each write that may have changed something, without arguments. Attributes that a
    device looks at with each access are kept decoded.

    Threads: the device's lock is held by whoever writes.

    Attributes:
        size: bytes.
        memory_enabled: memory decode is on and the function is in D0: BARs answer.
        bus_master: the device may do DMA and send messages.
        intx_disabled: COMMAND's interrupt disable.
    """

    def __init__(
        self,
        identity: Identity,
        bars: Mapping[int, Bar],
        capabilities: Sequence[CapabilityDeclaration],
        interrupt_pin: int,
    ) -> None:
        express = any(isinstance(capability, PciExpress) for capability in capabilities)
        self.size = 4096 if express else 256
        self._data = bytearray(self.size)
        self._writable = bytearray(self.size)
        self._clearable = bytearray(self.size)
        self._offsets: list[tuple[CapabilityDeclaration, int]] = []
        self.on_change: Callable[[], None] = lambda: None
        self.on_function_reset: Callable[[], None] = lambda: None
        self._lay_out_header(identity, interrupt_pin)
        self._lay_out_bars(bars)
        self._lay_out_capabilities(capabilities)
        self._initial = bytes(self._data)
        self._decode()

    # --- layout --------------------------------------------------------------------------------------------------

    def _put(self, offset: int, value: int, size: int, writable: int = 0, clearable: int = 0) -> None:
        for target, bits in ((self._data, value), (self._writable, writable), (self._clearable, clearable)):
            target[offset : offset + size] = bits.to_bytes(size, "little")

    def _lay_out_header(self, identity: Identity, pin: int) -> None:
        self._put(0x00, identity.vendor, 2)
        self._put(0x02, identity.device, 2)
        self._put(_COMMAND, 0, 2, _COMMAND_WRITABLE)
        self._put(_STATUS, 0, 2, 0, _STATUS_CLEARABLE)
        self._put(0x08, identity.class_code << 8 | identity.revision, 4)
        self._put(_CACHE_LINE, 0, 1, 0xFF)
        self._put(_SUBSYSTEM, identity.subsystem << 16 | identity.subsystem_vendor, 4)
        self._put(_LINE, 0, 1, 0xFF)
        self._put(_PIN, pin, 1)

    def _lay_out_bars(self, bars: Mapping[int, Bar]) -> None:
        taken: set[int] = set()
        for index, bar in sorted(bars.items()):
            registers = {index, index + 1} if bar.address64 else {index}
            if taken & registers or not registers <= set(range(6)):
                raise ValueError(f"BAR {index} does not fit: registers {sorted(registers)} of 0 to 5")
            taken |= registers
            width = 8 if bar.address64 else 4
            mask = (1 << 8 * width) - bar.size
            self._put(_BARS + 4 * index, bar.type_bits, width, mask & ~0xF)

    def _lay_out_capabilities(self, capabilities: Sequence[CapabilityDeclaration]) -> None:
        pointer, offset = _POINTER, _FIRST_CAPABILITY
        for capability in capabilities:
            layout = capability.layout()
            end = offset + len(layout.data)
            if end > 256:
                raise ValueError(f"capability {capability.id:#x} does not fit: it would end at {end:#x}")
            self._data[offset:end] = layout.data
            self._writable[offset:end] = layout.writable
            self._clearable[offset:end] = layout.clearable
            self._data[offset] = capability.id
            self._data[pointer] = offset
            self._offsets.append((capability, offset))
            pointer, offset = offset + 1, (end + 3) & ~3
        if capabilities:
            self._data[_STATUS] |= _STATUS_CAPABILITIES

    def place_bars(self, bars: Mapping[int, Bar], top: int) -> None:
        """Give the BARs bus addresses below ``top``, as firmware does."""
        for index, bar in bars.items():
            top = (top - bar.size) & -bar.size
            width = 8 if bar.address64 else 4
            self.write(_BARS + 4 * index, (top | bar.type_bits).to_bytes(width, "little"))

    # --- access --------------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Read bytes. The caller has checked the range."""
        return bytes(self._data[offset : offset + size])

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes: writable bits take the value, RW1C bits are cleared, the rest stays. Then ``on_change``."""
        state = self._power_state()
        for position, value in enumerate(data, offset):
            writable = self._writable[position]
            kept = self._data[position] & ~writable & ~(value & self._clearable[position])
            self._data[position] = kept | value & writable
        if self._power_state() not in (PowerManagement.D0, PowerManagement.D3HOT):
            self._set_power_state(state)  # a state that the function does not have: the write does nothing
        self._clamp_messages()
        self._decode()
        if self._take_function_reset():
            self.on_function_reset()
        self.on_change()

    def read16(self, offset: int) -> int:
        """Read 16 bits."""
        return int.from_bytes(self._data[offset : offset + 2], "little")

    def write16(self, offset: int, value: int) -> None:
        """Write 16 bits, as software would."""
        self.write(offset, value.to_bytes(2, "little"))

    def reset(self) -> None:
        """Go back to what power-on leaves."""
        self._data[:] = self._initial
        self._decode()
        self.on_change()

    def check_same_function(self, data: bytes) -> None:
        """Check that saved configuration space is of a function like this one.

        Raises:
            VfioError: (EINVAL) it is not: another size, identity, BAR or capability.
        """
        fixed = bytearray(~(one | two) & 0xFF for one, two in zip(self._writable, self._clearable, strict=True))
        fixed[_STATUS] &= ~_STATUS_INTX
        same = len(data) == self.size and all(
            not (saved ^ ours) & bits for saved, ours, bits in zip(data, self._initial, fixed, strict=True)
        )
        if not same:
            raise VfioError("the configuration space is another function's", errno=errno.EINVAL)

    def load(self, data: bytes) -> None:
        """Take over saved configuration space; whether messages are enabled stays, for that is the user's to say."""
        controls = {
            found[1] + kind.CONTROL: self.read(found[1] + kind.CONTROL, 2)
            for kind in (Msi, MsiX)
            if (found := self.find(kind)) is not None
        }
        self._data[:] = data
        for offset, control in controls.items():
            self._data[offset : offset + 2] = control
        self._decode()
        self.on_change()

    # --- meaning -------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        command = self.read16(_COMMAND)
        on = self._power_state() == PowerManagement.D0
        self.memory_enabled = bool(command & _MEMORY) and on
        self.bus_master = bool(command & _BUS_MASTER) and on
        self.intx_disabled = bool(command & _INTX_DISABLE)

    def enable(self, *, memory: bool | None = None, bus_master: bool | None = None, intx: bool | None = None) -> None:
        """Switch parts of COMMAND; None leaves one as it is."""
        command = self.read16(_COMMAND)
        for bit, on in (
            (_MEMORY, memory),
            (_BUS_MASTER, bus_master),
            (_INTX_DISABLE, None if intx is None else not intx),
        ):
            if on is not None:
                command = command | bit if on else command & ~bit
        self.write16(_COMMAND, command)

    def show_intx(self, asserted: bool) -> None:
        """Show the level of INTx in the status register."""
        if asserted:
            self._data[_STATUS] |= _STATUS_INTX
        else:
            self._data[_STATUS] &= ~_STATUS_INTX

    def find(self, kind: type[_Capability]) -> tuple[_Capability, int] | None:
        """Return the declared capability of a kind and its offset, or None."""
        for capability, offset in self._offsets:
            if isinstance(capability, kind):
                return capability, offset
        return None

    @property
    def interrupt_pin(self) -> int:
        """1 to 4 for INTA to INTD, 0 where the function has no INTx."""
        return self._data[_PIN]

    @property
    def msi_enabled(self) -> bool:
        """MSI is enabled."""
        found = self.find(Msi)
        return found is not None and bool(self.read16(found[1] + Msi.CONTROL) & Msi.ENABLE)

    @property
    def msix_enabled(self) -> bool:
        """MSI-X is enabled."""
        found = self.find(MsiX)
        return found is not None and bool(self.read16(found[1] + MsiX.CONTROL) & MsiX.ENABLE)

    def message_address(self) -> int:
        """Return where MSI messages go; 0 without MSI."""
        found = self.find(Msi)
        if found is None:
            return 0
        start = found[1] + 4
        return int.from_bytes(self._data[start : start + (8 if found[0].address64 else 4)], "little")

    def enable_messages(self, kind: type[Msi] | type[MsiX], vectors: int) -> None:
        """Switch MSI or MSI-X on for a number of vectors, or off for 0, as an operating system does."""
        found = self.find(kind)
        if found is None:
            raise ValueError(f"the function has no {kind.__name__}")
        where = found[1] + kind.CONTROL
        control = self.read16(where)
        control = control | kind.ENABLE if vectors else control & ~kind.ENABLE
        if kind is Msi:
            # Multiple Message Enable: the vectors, rounded up to a power of two, as a logarithm
            control = control & ~0x70 | (max(vectors, 1) - 1).bit_length() << 4
        self.write16(where, control)

    @property
    def has_function_reset(self) -> bool:
        """The function has FLR."""
        found = self.find(PciExpress)
        return found is not None and found[0].function_reset

    def _clamp_messages(self) -> None:
        """Keep Multiple Message Enable at what the function has."""
        found = self.find(Msi)
        if found is not None:
            where = found[1] + Msi.CONTROL
            control = self._data[where]
            self._data[where] = control & ~0x70 | min(control >> 4 & 7, control >> 1 & 7) << 4

    def _power_state(self) -> int:
        found = self.find(PowerManagement)
        if found is None:
            return PowerManagement.D0
        return self._data[found[1] + PowerManagement.CONTROL] & PowerManagement.STATE_MASK

    def _set_power_state(self, state: int) -> None:
        found = self.find(PowerManagement)
        if found is not None:
            where = found[1] + PowerManagement.CONTROL
            self._data[where] = self._data[where] & ~PowerManagement.STATE_MASK | state

    def _take_function_reset(self) -> bool:
        """Whether FLR was asked for by the last write; the bit always reads 0."""
        if not self.has_function_reset:
            return False
        found = self.find(PciExpress)
        where = found[1] + PciExpress.DEVICE_CONTROL if found else 0
        control = self.read16(where)
        self._data[where : where + 2] = (control & ~PciExpress.INITIATE_RESET).to_bytes(2, "little")
        return bool(control & PciExpress.INITIATE_RESET)
