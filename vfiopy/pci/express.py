"""The PCI Express capability (PCI Express Base 6.0, 7.5.3)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from vfiopy.pci.fields import Body, Capability, bits

__all__ = ["LINK_SPEEDS", "PciExpress", "PortType", "decode_express"]

LINK_SPEEDS: dict[int, float] = {1: 2.5, 2: 5.0, 3: 8.0, 4: 16.0, 5: 32.0, 6: 64.0}
"""Link speed code → GT/s."""


class PortType(IntEnum):
    """Device/port type (7.5.3.2)."""

    ENDPOINT = 0
    LEGACY_ENDPOINT = 1
    ROOT_PORT = 4
    UPSTREAM_PORT = 5
    DOWNSTREAM_PORT = 6
    PCIE_TO_PCI_BRIDGE = 7
    PCI_TO_PCIE_BRIDGE = 8
    INTEGRATED_ENDPOINT = 9
    EVENT_COLLECTOR = 10


@dataclass(frozen=True, slots=True)
class PciExpress(Capability):
    """PCI Express capability.

    The registers that are there on each kind of port are decoded; the rest of an integrated endpoint's link
    registers read as zero. ``link_*`` and ``slot_*`` say nothing where ``has_link`` and ``slot_implemented``
    are False.

    Attributes:
        version: capability version; the second set of registers exists from 2 on.
        port_type: :class:`PortType`, or the bare number where it is reserved.
        slot_implemented: a slot is behind this port.
        interrupt_message: MSI number used for this capability's own interrupts.
        device_capabilities: DEVCAP, 32 bits.
        device_control: DEVCTL, 16 bits.
        device_status: DEVSTA, 16 bits.
        link_capabilities: LNKCAP, 32 bits.
        link_control: LNKCTL, 16 bits.
        link_status: LNKSTA, 16 bits.
        slot_capabilities: SLTCAP, 32 bits.
        device_capabilities2: DEVCAP2, 32 bits; 0 below version 2, as all below.
        device_control2: DEVCTL2, 16 bits.
        link_capabilities2: LNKCAP2, 32 bits.
        link_control2: LNKCTL2, 16 bits.
        link_status2: LNKSTA2, 16 bits.
    """

    version: int
    port_type: PortType | int
    slot_implemented: bool
    interrupt_message: int
    device_capabilities: int
    device_control: int
    device_status: int
    link_capabilities: int
    link_control: int
    link_status: int
    slot_capabilities: int
    device_capabilities2: int
    device_control2: int
    link_capabilities2: int
    link_control2: int
    link_status2: int

    # --- device (7.5.3.3 to 7.5.3.5) ---

    @property
    def flr(self) -> bool:
        """The function has a function level reset."""
        return bool(self.device_capabilities & 1 << 28)

    @property
    def max_payload_supported(self) -> int:
        """Largest payload that the function can take, in bytes."""
        return 128 << bits(self.device_capabilities, 2, 0)

    @property
    def max_payload(self) -> int:
        """Largest payload in use, in bytes."""
        return 128 << bits(self.device_control, 7, 5)

    @property
    def max_read_request(self) -> int:
        """Largest read request that the function may send, in bytes."""
        return 128 << bits(self.device_control, 14, 12)

    @property
    def extended_tags(self) -> bool:
        """8-bit tags are on."""
        return bool(self.device_control & 1 << 8)

    @property
    def relaxed_ordering(self) -> bool:
        """The function may set the relaxed ordering attribute."""
        return bool(self.device_control & 1 << 4)

    @property
    def no_snoop(self) -> bool:
        """The function may set the no snoop attribute."""
        return bool(self.device_control & 1 << 11)

    @property
    def transactions_pending(self) -> bool:
        """The function waits for completions."""
        return bool(self.device_status & 1 << 5)

    @property
    def error_status(self) -> tuple[str, ...]:
        """Errors seen since the status bits were last cleared."""
        names = ("correctable", "non-fatal", "fatal", "unsupported request")
        return tuple(name for bit, name in enumerate(names) if self.device_status & 1 << bit)

    # --- link (7.5.3.6 to 7.5.3.8) ---

    @property
    def has_link(self) -> bool:
        """The function is at a link; integrated endpoints and event collectors are not."""
        return self.port_type not in (PortType.INTEGRATED_ENDPOINT, PortType.EVENT_COLLECTOR)

    @property
    def max_link_speed(self) -> float | None:
        """Fastest link speed in GT/s, None where the code is not known."""
        return LINK_SPEEDS.get(bits(self.link_capabilities, 3, 0))

    @property
    def max_link_width(self) -> int:
        """Widest link, in lanes."""
        return bits(self.link_capabilities, 9, 4)

    @property
    def link_speed(self) -> float | None:
        """Link speed now, in GT/s; None where the code is not known."""
        return LINK_SPEEDS.get(bits(self.link_status, 3, 0))

    @property
    def link_width(self) -> int:
        """Link width now, in lanes."""
        return bits(self.link_status, 9, 4)

    @property
    def aspm_supported(self) -> tuple[str, ...]:
        """Active state power management states that the link can enter."""
        field = bits(self.link_capabilities, 11, 10)
        return tuple(name for bit, name in enumerate(("L0s", "L1")) if field & 1 << bit)

    @property
    def aspm_enabled(self) -> tuple[str, ...]:
        """Active state power management states that are switched on."""
        return tuple(name for bit, name in enumerate(("L0s", "L1")) if self.link_control & 1 << bit)

    # --- second set (7.5.3.15 to 7.5.3.20) ---

    @property
    def ari_forwarding(self) -> bool:
        """This port can forward to functions above 7."""
        return bool(self.device_capabilities2 & 1 << 5)

    @property
    def atomic_routing(self) -> bool:
        """This port can route AtomicOps."""
        return bool(self.device_capabilities2 & 1 << 6)

    @property
    def atomic_completer(self) -> tuple[int, ...]:
        """AtomicOp widths in bytes that the function completes: 4, 8, and 16 for compare and swap."""
        return tuple(width for bit, width in ((7, 4), (8, 8), (9, 16)) if self.device_capabilities2 & 1 << bit)

    @property
    def atomic_requester(self) -> bool:
        """The function may send AtomicOps."""
        return bool(self.device_control2 & 1 << 6)

    @property
    def ltr_supported(self) -> bool:
        """The function can report latency tolerance."""
        return bool(self.device_capabilities2 & 1 << 11)

    @property
    def completion_timeout_disabled(self) -> bool:
        """The function waits for completions for ever."""
        return bool(self.device_control2 & 1 << 4)


def decode_express(body: Body, id_: int, name: str) -> PciExpress:
    """Decode the capability that starts at ``body``."""
    flags = body.u16(0x02)
    version = bits(flags, 3, 0)
    kind = bits(flags, 7, 4)
    second = version >= 2
    return PciExpress(
        id_,
        body.offset,
        name,
        version=version,
        port_type=PortType(kind) if kind in PortType._value2member_map_ else kind,
        slot_implemented=bool(flags & 1 << 8),
        interrupt_message=bits(flags, 13, 9),
        device_capabilities=body.u32(0x04),
        device_control=body.u16(0x08),
        device_status=body.u16(0x0A),
        link_capabilities=body.u32(0x0C),
        link_control=body.u16(0x10),
        link_status=body.u16(0x12),
        slot_capabilities=body.u32(0x14),
        device_capabilities2=body.u32(0x24) if second else 0,
        device_control2=body.u16(0x28) if second else 0,
        link_capabilities2=body.u32(0x2C) if second else 0,
        link_control2=body.u16(0x30) if second else 0,
        link_status2=body.u16(0x32) if second else 0,
    )
