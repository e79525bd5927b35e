"""The shape of a row."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Meaning"]


class Meaning(NamedTuple):
    """One row. ``kind`` is the name of a class in :mod:`vfiopy.errors`; see :mod:`vfiopy.errno_table`."""

    kind: str
    meaning: str
    hint: str
