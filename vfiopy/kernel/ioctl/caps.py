"""Capability chains: what VFIO appends to its info structures.

A chain is a list of headers (struct vfio_info_cap_header: id, version, offset of the next) inside the buffer
that the ioctl filled. Offsets count from the start of the info structure. Ids mean something else in each
ioctl, and unknown ones are to be skipped (linux/vfio.h).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from vfiopy import uapi
from vfiopy.backend import Area, IovaRange
from vfiopy.errors import VfioError
from vfiopy.layout import Layout

__all__ = ["Capability", "chain", "checked_ranges", "sparse_areas"]

_HEADER = uapi.vfio_info_cap_header


@dataclass(frozen=True, slots=True)
class Capability:
    """One link: where it starts in ``buffer``, and the buffer."""

    id: int
    version: int
    offset: int
    buffer: bytes
    label: str

    def get(self, layout: Layout, field: str) -> int:
        """Read a field of the capability's structure; raises VfioError where the buffer ends before it."""
        try:
            return layout.get(self.buffer, field, self.offset)
        except ValueError:
            raise _malformed(self.label, f"capability {self.id} at {self.offset:#x} is cut off") from None

    def pairs(self, layout: Layout, count: str) -> list[tuple[int, int]]:
        """Read the pairs of 64-bit numbers that end the structure; field ``count`` says how many."""
        number = self.get(layout, count)
        start = self.offset + layout.size
        if start + 16 * number > len(self.buffer):
            raise _malformed(self.label, f"capability {self.id} claims {number} entries, the buffer ends before")
        words = memoryview(self.buffer)[start : start + 16 * number]
        values = struct.unpack(f"={2 * number}Q", words)
        return list(zip(values[::2], values[1::2], strict=True))


def chain(buffer: bytes, first: int, label: str) -> Iterator[Capability]:
    """Walk the chain that starts ``first`` bytes into ``buffer``; 0 means that there is none.

    Raises VfioError (EBADMSG) for a chain that leaves the buffer or comes back to itself; it never loops.
    """
    seen: set[int] = set()
    offset = first
    while offset:
        if offset in seen:
            raise _malformed(label, f"the capability chain comes back to offset {offset:#x}")
        if offset + _HEADER.size > len(buffer):
            raise _malformed(label, f"a capability at {offset:#x} is beyond the {len(buffer):#x} bytes returned")
        seen.add(offset)
        yield Capability(
            _HEADER.get(buffer, "id", offset), _HEADER.get(buffer, "version", offset), offset, buffer, label
        )
        offset = _HEADER.get(buffer, "next", offset)


def checked_ranges(pairs: list[tuple[int, int]], label: str) -> tuple[IovaRange, ...]:
    """Sort IOVA ranges and prove that they are ranges and disjoint; the allocator builds on it.

    Raises VfioError (EBADMSG) for an inverted range or two that overlap.
    """
    ranges = tuple(IovaRange(*pair) for pair in sorted(pairs))
    for one in ranges:
        if one.first > one.last:
            raise _malformed(label, f"IOVA range {one.first:#x}-{one.last:#x} ends before it starts")
    for one, other in pairwise(ranges):
        if other.first <= one.last:
            raise _malformed(label, f"IOVA ranges {one.first:#x}-{one.last:#x} and {other.first:#x}- overlap")
    return ranges


def sparse_areas(capability: Capability) -> tuple[Area, ...]:
    """Decode VFIO_REGION_INFO_CAP_SPARSE_MMAP: empty areas dropped, sorted by offset."""
    pairs = capability.pairs(uapi.vfio_region_info_cap_sparse_mmap, "nr_areas")
    return tuple(Area(offset, size) for offset, size in sorted(pairs) if size)


def _malformed(label: str, what: str) -> VfioError:
    return VfioError(
        f"the kernel's answer is malformed: {what}",
        errno=errno.EBADMSG,
        object=label,
        hint="a bug of the kernel's driver for this device: please report it with the kernel's version",
    )
