"""A configuration space to fill in by offset."""

from __future__ import annotations

import struct


class Space:
    """A configuration space that is written to by offset and read as the decoders read."""

    def __init__(self, size: int = 4096) -> None:
        self.data = bytearray(size)
        self.reads: list[tuple[int, int]] = []

    def put(self, offset: int, layout: str, *values: int) -> Space:
        struct.pack_into("<" + layout, self.data, offset, *values)
        return self

    def read(self, offset: int, size: int) -> bytes:
        assert size > 0
        self.reads.append((offset, size))
        return bytes(self.data[offset : offset + size])


def with_list(*capabilities: tuple[int, int], size: int = 4096) -> Space:
    """A space whose list has these (offset, id), in this order."""
    space = Space(size).put(0, "HHHH", 0x1B36, 0x0010, 0, 0x10)
    where = 0x34
    for offset, id_ in capabilities:
        space.put(where, "B", offset)
        space.put(offset, "BB", id_, 0)
        where = offset + 1
    return space


def express_with(*capabilities: tuple[int, int, int]) -> Space:
    """A PCI Express function whose extended list has these (offset, id, version), the first at 0x100."""
    space = with_list((0x60, 0x10)).put(0x62, "H", 0x0002)
    for index, (offset, id_, version) in enumerate(capabilities):
        following = capabilities[index + 1][0] if index + 1 < len(capabilities) else 0
        space.put(offset, "I", id_ | version << 16 | following << 20)
    return space
