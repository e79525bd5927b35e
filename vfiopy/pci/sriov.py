"""The SR-IOV capability (PCI Express Base 6.0, 9.3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from vfiopy.pci.fields import Body, ExtendedCapability

__all__ = ["SrIov", "decode_sriov"]


@dataclass(frozen=True, slots=True)
class SrIov(ExtendedCapability):
    """Single root I/O virtualization, at a physical function.

    Attributes:
        enabled: virtual functions exist.
        memory_enabled: their memory BARs decode.
        ari: the hierarchy routes to functions above 7.
        initial_vfs: virtual functions that can be there at first; equals ``total_vfs`` without VF migration.
        total_vfs: most virtual functions.
        num_vfs: how many there are now.
        first_offset: distance in routing IDs from this function to the first virtual one.
        stride: distance in routing IDs from one virtual function to the next.
        vf_device: device ID of the virtual functions.
        page_sizes: bit n set means that VF BARs can be aligned to pages of ``4096 << n`` bytes.
        page_size: page size chosen, in bytes; 0 where none is.
        bars: the six VF BAR registers, as they are.
    """

    enabled: bool
    memory_enabled: bool
    ari: bool
    initial_vfs: int
    total_vfs: int
    num_vfs: int
    first_offset: int
    stride: int
    vf_device: int
    page_sizes: int
    page_size: int
    bars: tuple[int, ...]


def decode_sriov(body: Body, id_: int, version: int, name: str) -> SrIov:
    """Decode the capability that starts at ``body``."""
    control = body.u16(0x08)
    return SrIov(
        id_,
        body.offset,
        version,
        name,
        enabled=bool(control & 1),
        memory_enabled=bool(control & 1 << 3),
        ari=bool(control & 1 << 4),
        initial_vfs=body.u16(0x0C),
        total_vfs=body.u16(0x0E),
        num_vfs=body.u16(0x10),
        first_offset=body.u16(0x14),
        stride=body.u16(0x16),
        vf_device=body.u16(0x1A),
        page_sizes=body.u32(0x1C),
        page_size=body.u32(0x20) * 4096,  # one bit is set: bit n is 4096 << n
        bars=tuple(body.u32(0x24 + 4 * index) for index in range(6)),
    )
