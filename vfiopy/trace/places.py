"""Places in a device by words: ``bar0``, ``bar0:0x20``, ``bar0:0x20-0x3f``, ``bar0:0x24&0xff``, ``irq``, ``dma``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

__all__ = ["Place", "Selection"]

_REGION = r"bar[0-5]|rom|config|vga|region\d+"
_PLACE = re.compile(
    rf"(?P<word>{_REGION}|irq|dma)(?::(?P<first>\w+)(?:-(?P<last>\w+))?)?(?:&(?P<mask>\w+))?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Place:
    """Registers of a region, or one of the words ``irq`` and ``dma``.

    Attributes:
        word: region, ``"irq"`` or ``"dma"``.
        first, last: offsets in bytes, both included.
        mask: bits of the register that are meant; None for all.
    """

    word: str
    first: int = 0
    last: int = (1 << 64) - 1
    mask: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a place. Raises ``ValueError``, which says how places are written."""
        match = _PLACE.fullmatch(text.strip())
        problem = f"{text!r} is no place: write bar0, bar0:0x20, bar0:0x20-0x3f, bar0:0x24&0xff, config, irq or dma"
        if match is None:
            raise ValueError(problem)
        try:
            first = int(match["first"] or "0", 0)
            last = int(match["last"], 0) if match["last"] else first if match["first"] else cls.last_of_all()
            mask = None if match["mask"] is None else int(match["mask"], 0)
        except ValueError:
            raise ValueError(problem) from None
        word = match["word"].lower()
        if last < first or (word in ("irq", "dma") and (match["first"] or match["mask"])):
            raise ValueError(problem)
        return cls(word, first, last, mask)

    @staticmethod
    def last_of_all() -> int:
        """The last offset that a region can have."""
        return (1 << 64) - 1

    def meets(self, offset: int, width: int) -> bool:
        """Whether an access touches one of the registers."""
        return offset <= self.last and offset + width > self.first


class Selection:
    """Which of a device's doings are meant: all where no place is given."""

    def __init__(self, places: Iterable[str | Place] = ()) -> None:
        self.places = tuple(place if isinstance(place, Place) else Place.parse(place) for place in places)

    def has(self, word: str) -> bool:
        """Whether anything of a region, of interrupts or of DMA is meant."""
        return not self.places or any(place.word == word for place in self.places)

    def part(self, word: str) -> tuple[Place, ...] | None:
        """Return which registers of a region are meant, or None for all of them."""
        parts = tuple(place for place in self.places if place.word == word)
        whole = not parts or any(place.first == 0 and place.last == Place.last_of_all() for place in parts)
        return None if whole else parts
