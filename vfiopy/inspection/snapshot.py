"""What an address space holds, as JSON."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from typing import Any

from vfiopy.dma.space import AddressSpace, all_spaces
from vfiopy.errors import StateError
from vfiopy.iova import picture

__all__ = ["FORMAT", "snapshot"]

FORMAT = 1
_LAST = (1 << 64) - 1


def snapshot() -> dict[str, Any]:
    """Describe the open address spaces of this process.

    The book is asked piece by piece, each time for no longer than the piece takes to copy; between pieces it goes on.
    """
    spaces = []
    for space in sorted(all_spaces(), key=lambda space: space.name):
        with suppress(StateError):  # it was closed meanwhile
            spaces.append(_space(space))
    return {
        "format": FORMAT,
        "source": "process",
        "pid": os.getpid(),
        "program": list(sys.orig_argv),
        "time": time.time(),
        "spaces": spaces,
    }


def _space(space: AddressSpace) -> dict[str, Any]:
    book = space.book
    mappings = []
    for found in book.mappings():
        last = found.iova + found.size - 1
        pinned = [list(run) for run in book.pinned(found.iova, last)] if found.pins else []
        words = {
            "kind": picture.kind_word(found.kind),
            "prot": picture.prot_word(found.prot),
            "state": picture.state_word(found.state),
        }
        mappings.append({"iova": found.iova, "size": found.size, **words, "pins": found.pins, "pinned": pinned})
    figures = space.stats()
    return {
        "name": space.name,
        "devices": [str(getattr(member, "name", member)) for member in space.members()],
        "mappers": [mapper.name for mapper in space.mappers],
        "mapped_bytes": figures["mapped_bytes"],
        "pinned_bytes": figures["pinned_bytes"],
        "free_bytes": figures["free_bytes"],
        "mappings": mappings,
        "free": [list(each) for each in book.free_ranges()],
        "excluded": [list(each) for each in book.excluded()],
        "transient": [list(each) for each in book.transient()],
        "owners": [
            {"name": name, "pins": pins, "iova": iova, "size": size}
            for name, _, pins, iova, size in book.holders(0, _LAST)
        ],
        "picture": book.text_map(),
    }
