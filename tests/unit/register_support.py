"""A region whose every access is on record."""

from __future__ import annotations

from vfiopy.mmio import Region


class Recorder:
    """Little-endian bytes; each access is noted as (what, offset, width, value)."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)
        self.log: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, width: int) -> int:
        value = int.from_bytes(self.data[offset : offset + width], "little")
        self.log.append(("r", offset, width, value))
        return value

    def write(self, offset: int, width: int, value: int) -> None:
        self.log.append(("w", offset, width, value))
        self.data[offset : offset + width] = value.to_bytes(width, "little")

    def taken(self) -> list[tuple[str, int, int, int]]:
        log, self.log = self.log, []
        return log


def recorded(size: int = 0x1000) -> tuple[Region, Recorder]:
    recorder = Recorder(size)
    return Region(name="board BAR 0", size=size, slow=recorder), recorder
