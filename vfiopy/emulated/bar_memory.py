"""A BAR that is memory: one memfd, mapped here and by whoever maps the BAR."""

from __future__ import annotations

import mmap
import os
import weakref

from vfiopy.file_window import sealed_memfd

__all__ = ["BarMemory"]


class BarMemory:
    """The memory behind a shared BAR.

    Attributes:
        fd: the memfd, sealed against shrinking: a peer that maps it can rely on its size.
        size: bytes.
        view: the memory, for the device's own code.
    """

    def __init__(self, size: int) -> None:
        if size % mmap.PAGESIZE:
            raise ValueError(f"a shared BAR is a whole number of pages of {mmap.PAGESIZE} bytes, not {size:#x}")
        self.size = size
        self.fd = sealed_memfd("vfiopy-bar", size)
        weakref.finalize(self, os.close, self.fd)
        self.view = memoryview(mmap.mmap(self.fd, size))
