"""DMA memory that a server can map: slices of a few large memfds."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from functools import partial
from typing import Any, Final

from vfiopy.backend import FileMemory
from vfiopy.file_window import FileWindow, sealed_memfd
from vfiopy.lives import drain_finalizers, retire

__all__ = ["Arena", "ArenaSlice", "Arenas"]

_PAGE: Final = mmap.PAGESIZE
_ARENA: Final = 64 << 20  # bytes of address space; memory is taken page by page, when it is touched
_ALIGNED: Final = 2 << 20
_FIXED: Final = 4  # arenas of the usual size: four fit below 256 MiB, which some devices reach no further than


class Arena:
    """One memfd, mapped, with a list of what is free in it: (offset, size), sorted.

    Attributes:
        fd: the memfd.
        size: bytes.
        window: where it is mapped in this process.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = sealed_memfd("vfiopy-dma", size)
        weakref.finalize(self, os.close, self.fd).atexit = False
        self.window = FileWindow(self.fd, 0, size, inherit=False)
        self.free = [(0, size)]

    def take(self, size: int) -> int | None:
        """Cut a piece out of the first gap that has room; return its offset."""
        for number, (offset, room) in enumerate(self.free):
            if room >= size:
                self.free[number : number + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        return None

    def give_back(self, offset: int, size: int) -> None:
        """Put a piece back, empty again."""
        with mmap.mmap(self.fd, size, offset=offset) as part:
            part.madvise(mmap.MADV_REMOVE)
        pieces = sorted([*self.free, (offset, size)])
        merged = pieces[:1]
        for start, length in pieces[1:]:
            last, before = merged[-1]
            if last + before == start:
                merged[-1] = (last, before + length)
            else:
                merged.append((start, length))
        self.free = merged


class ArenaSlice:
    """Pages of an arena; goes back when the last view of it is gone. numpy views it by ``__array_interface__``.

    Attributes:
        arena: the arena.
        offset: of its first byte in the arena.
        size: bytes.
    """

    def __init__(self, arenas: Arenas, arena: Arena, offset: int, size: int) -> None:
        self.arena = arena
        self.offset = offset
        self.size = size
        self._arenas = arenas
        self._pid = os.getpid()

    @property
    def __array_interface__(self) -> dict[str, Any]:
        address = self.arena.window.address + self.offset
        return {"shape": (self.size,), "typestr": "|u1", "data": (address, False), "version": 3}

    def __del__(self) -> None:
        if self._pid == os.getpid() and self._arenas:
            retire(partial(self._arenas._give_back, self.arena, self.offset, self.size))


class Arenas:
    """Gives out zeroed memory that has a file descriptor.

    An arena is address space: memory is taken page by page, when it is touched, and given back with each buffer. The
    first four have 64 MiB, or as much as one buffer needs; later ones half of all before them together, so that few are
    enough for any amount. An arena that nobody uses goes, but for the last one.

    Threads: any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arenas: list[Arena] = []
        self._open = True

    def __bool__(self) -> bool:
        return self._open

    def close(self) -> None:
        """Give nothing out any more, and keep nothing but what is in use. Idempotent."""
        self._open = False
        drain_finalizers()
        with self._lock:
            self._arenas.clear()

    def allocate(self, size: int) -> FileMemory:
        """Return ``size`` bytes, whole pages, zeroed.

        Raises:
            VfioError: there is no memory.
        """
        with self._lock:
            arena, offset = self._find(size)
        piece = ArenaSlice(self, arena, offset, size)
        return FileMemory(arena.fd, offset, size, True, arena.window.address + offset, piece)

    def _find(self, size: int) -> tuple[Arena, int]:
        for arena in self._arenas:
            offset = arena.take(size)
            if offset is not None:
                return arena, offset
        together = sum(arena.size for arena in self._arenas)
        growth = together // 2 if len(self._arenas) >= _FIXED else 0
        arena = Arena(-(-max(_ARENA, growth, size) // _ALIGNED) * _ALIGNED)
        self._arenas.append(arena)
        arena.take(size)
        return arena, 0

    def _give_back(self, arena: Arena, offset: int, size: int) -> None:
        with self._lock:
            if arena not in self._arenas:
                return
            arena.give_back(offset, size)
            if arena.free == [(0, arena.size)] and len(self._arenas) > 1:
                self._arenas.remove(arena)
