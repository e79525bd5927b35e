"""The client's side of memory: what is mapped is announced to the server, and served to it where it cannot map it."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple

from vfiopy.backend import FileMemory, IovaRange, KernelTarget, MapperTraits, Memory, MemoryKind, Prot
from vfiopy.errors import (
    DeviceGoneError,
    NoSpaceError,
    OverlapError,
    ProtocolError,
    VfioError,
    VfiopyError,
    VfioTimeoutError,
)
from vfiopy.memory_view import view_of
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.arena import Arenas, ArenaSlice
from vfiopy.vfio_user.arena_windows import ArenaWindows, Window
from vfiopy.vfio_user.connection import Connection
from vfiopy.vfio_user.wire import Command, MapFlag, UnmapFlag

__all__ = ["VfioUserMapper"]

_RANGES: Final = (IovaRange(0, (1 << 48) - 1),)  # a device may have no more address lines than a PC's IOMMU
_MAX_DATA: Final = 1 << 20
_FEW: Final = 1024  # mappings, up to which a server gets whole arenas: a driver may well have more buffers
_PAGE: Final = 4096

TellDirty = Callable[[int, int, int, bytes], object]
"""Hears of the dirty pages of what was unmapped: IOVA, size, page size, bitmap."""


class _Entry(NamedTuple):
    iova: int
    size: int
    prot: Prot
    memory: Memory


class VfioUserMapper:
    """Memory of a device behind a socket: implements :class:`~vfiopy.backend.Mapper` and ``MemorySource``.

    What has a file descriptor goes to the server with it, and the server maps it. Everything else (buffers of this
    process, also a BAR of another device) is read and written for the server when it asks.

    A server that takes few mappings has buffers as whole arenas: see :class:`~vfiopy.vfio_user.arena_windows.Window`.
    Its device then reaches all of an arena for as long as one buffer of it is mapped.

    Threads: any.
    """

    adopted = False

    def __init__(self, name: str) -> None:
        self._name = f"memory of {name}"
        self._arenas = Arenas()
        self._lock = threading.Lock()  # held while memory is copied: what is unmapped is not touched any more
        self._starts: list[int] = []
        self._entries: list[_Entry] = []
        self._connection: Connection | None = None
        self._windows = ArenaWindows()
        self._inside: dict[int, Window] = {}  # by the IOVA of the buffer
        self._announcing = threading.Lock()  # of the windows, held while the server is asked
        self._tell: TellDirty | None = None

    def attach(self, connection: Connection) -> None:
        """Take the connection to announce mappings on, and announce those that there are: after a reconnect too."""
        self._connection = connection
        with self._announcing:
            for window in self._windows:
                self._announce_window(window)
        for entry in list(self._entries):
            if entry.iova not in self._inside:
                self._announce(entry)

    @property
    def name(self) -> str:
        """For messages."""
        return self._name

    @property
    def kernel_target(self) -> KernelTarget | None:
        """None: no kernel is involved."""
        return None

    def traits(self) -> MapperTraits:
        """Pages and number of mappings that the server announced; memory of every kind that is in this process."""
        peer = self._peer()
        kinds = frozenset({MemoryKind.HOST, MemoryKind.FILE, MemoryKind.MMIO, MemoryKind.REMOTE})
        return MapperTraits(peer.peer.pgsizes, 0 if self._gathers else peer.peer.max_dma_maps, kinds)

    @property
    def _gathers(self) -> bool:
        """The server takes so few mappings that it gets whole arenas."""
        return self._peer().peer.max_dma_maps <= _FEW and self._peer().peer.max_msg_fds > 0

    def advise(self, memory: Memory, limit: int) -> int | None:
        """Say which IOVA is best: see :class:`vfiopy.backend.Adviser`."""
        if not self._gathers:
            return None
        with self._announcing:
            if isinstance(memory.owner, ArenaSlice) and (iova := self._windows.advise(memory.owner, limit)) is not None:
                return iova
            return self._windows.advise_alone(memory.size, limit) if len(self._windows) else None

    def ranges(self) -> list[IovaRange]:
        """48 bits."""
        return list(_RANGES)

    def allocate(self, size: int) -> FileMemory | None:
        """Make memory that the server can map: see :class:`vfiopy.backend.MemorySource`."""
        return self._arenas.allocate(size)

    def _peer(self) -> Connection:
        if self._connection is None:
            raise DeviceGoneError("it is connected to no server", object=self._name)
        return self._connection

    # --- mapping -----------------------------------------------------------------------------------------------------

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        """Announce memory to the server.

        Raises:
            VfioError: it refuses, or is gone; nothing is mapped then.
        """
        entry = _Entry(iova, memory.size, prot, memory)
        self._insert(entry)  # first: the device may use it before the reply is here
        try:
            with self._announcing:
                if not (self._gathers and self._enter(entry)):
                    self._map_alone(entry)
        except BaseException:
            self._remove(iova)
            raise

    def _enter(self, entry: _Entry) -> bool:
        """Map a buffer by its arena; return whether that is possible."""
        piece = entry.memory.owner
        window = self._windows.enter(piece, entry.iova) if isinstance(piece, ArenaSlice) else None
        if window is None:
            return False  # its arena is elsewhere, or something lies in between
        self._inside[entry.iova] = window
        try:
            if window.users == 1:
                self._check_room(1)
                self._announce_window(window)
        except BaseException:
            del self._inside[entry.iova]
            self._windows.leave(window)
            raise
        return True

    def _announce_window(self, window: Window) -> None:
        arena = window.arena
        memory = FileMemory(arena.fd, 0, arena.size, True, arena.window.address, arena)
        self._announce(_Entry(window.iova, arena.size, Prot.RW, memory))

    def _map_alone(self, entry: _Entry) -> None:
        window = self._windows.find(entry.iova, entry.size)
        if window is not None:
            raise OverlapError(
                f"IOVA {entry.iova:#x} lies where the server has an arena of DMA buffers: "
                f"{window.iova:#x} to {window.end - 1:#x}",
                errno=errno.EEXIST,
                object=self._name,
                hint="choose another IOVA, or map this before buffers are allocated; this server takes few mappings, "
                "so that it has buffers as whole arenas",
            )
        self._check_room(0)
        self._announce(entry)
        self._windows.add_single(entry.iova, entry.size)

    def _check_room(self, counted: int) -> None:
        """Refuse what the server would; for a server of many mappings the book does."""
        most = self._peer().peer.max_dma_maps
        if self._gathers and len(self._windows) - counted >= most:
            raise NoSpaceError(
                f"the server takes {most} mappings",
                errno=errno.ENOSPC,
                object=self._name,
                hint="use device.dma.allocate(): buffers of its own take one mapping for many",
            )

    def _announce(self, entry: _Entry) -> None:
        flags = MapFlag(int(entry.prot))
        memory = entry.memory
        fds = [memory.fd] if isinstance(memory, FileMemory) and self._peer().peer.max_msg_fds else []
        offset = memory.offset if isinstance(memory, FileMemory) and fds else 0
        payload = wire.DMA_MAP.pack(wire.DMA_MAP.size, int(flags), offset, entry.iova, entry.size)
        detail = f"iova {entry.iova:#x}, size {entry.size:#x}"
        connection = self._peer()
        try:
            connection.request(Command.DMA_MAP, payload, fds=fds, detail=detail)
        except BaseException as error:
            # No refusal: the server may have done it, or does it yet. Others get the memory and the IOVA.
            if isinstance(error, VfioTimeoutError) or not isinstance(error, VfiopyError):
                with suppress(VfioError):
                    back = wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, 0, entry.iova, entry.size)
                    connection.post(Command.DMA_UNMAP, back)
            raise

    def unmap(self, iova: int, size: int) -> int:
        """Take memory away from the server. A server that is gone has none any more.

        Raises:
            PinnedError: its device still uses the memory.
            VfioError: it refuses, or does not answer; it still has the memory then.
        """
        with self._announcing:
            window = self._inside.get(iova)
            if window is None:
                self._take_back(iova, size)
                if iova in self._starts:
                    self._windows.drop_single(iova, size)
            else:
                if window.users == 1:
                    self._take_back(window.iova, window.arena.size)
                del self._inside[iova]
                self._windows.leave(window)
        self._remove(iova)
        return size

    def _take_back(self, iova: int, size: int) -> None:
        connection = self._connection
        if connection is not None and connection.alive:
            try:
                self._take_away(connection, iova, size)
            except DeviceGoneError:
                if connection.alive:  # it answers, but says EIO
                    raise

    def _take_away(self, connection: Connection, iova: int, size: int) -> None:
        detail = f"iova {iova:#x}, size {size:#x}"
        if self._tell is None:
            payload = wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, 0, iova, size)
            connection.request(Command.DMA_UNMAP, payload, detail=detail)
            return
        page = _PAGE
        while (length := wire.bitmap_size(size, page)) > min(_MAX_DATA, connection.peer.max_data_xfer_size):
            page *= 2
        question = wire.DIRTY_BITMAP.pack(page, length)
        room = wire.DMA_UNMAP.size + len(question) + length
        payload = wire.DMA_UNMAP.pack(room, int(UnmapFlag.GET_DIRTY_BITMAP), iova, size)
        reply = connection.request(Command.DMA_UNMAP, payload, question, detail=detail).payload
        if len(reply) != room:
            raise ProtocolError(
                f"the server answers DMA_UNMAP with {len(reply)} bytes instead of {room}", object=self._name
            )
        self._tell(iova, size, page, bytes(reply[-length:]))

    def tell_dirty(self, tell: TellDirty | None) -> None:
        """From now on have ``tell(iova, size, page_size, bitmap)`` called for each mapping that goes, or not any more.

        The bitmap says which of its pages the device has written since the log was started, or since they were last
        asked for: a bit for each ``page_size`` bytes from ``iova``, in little-endian words of 64 bits. The server asks
        its device for it when nobody uses the memory any more. The log has to be on
        (VFIO_DEVICE_FEATURE_DMA_LOGGING_START, through ``device.io.feature``): without it nothing can be unmapped.

        Of what goes because the server has gone, nothing is told; of a buffer that the server has with the whole of its
        arena, when the arena goes.
        """
        self._tell = tell

    def _insert(self, entry: _Entry) -> None:
        with self._lock:
            at = bisect_right(self._starts, entry.iova)
            self._starts.insert(at, entry.iova)
            self._entries.insert(at, entry)

    def _remove(self, iova: int) -> None:
        with self._lock:
            at = bisect_right(self._starts, iova) - 1
            if at >= 0 and self._starts[at] == iova:
                del self._starts[at], self._entries[at]

    def close(self) -> None:
        """Forget everything; the connection is closed by now, so that the server has nothing left. Idempotent."""
        with self._lock:
            self._starts.clear()
            self._entries.clear()
        with self._announcing:
            self._windows = ArenaWindows()
            self._inside.clear()
        self._arenas.close()

    # --- the server's requests ---------------------------------------------------------------------------------------

    def serve(self, command: int, payload: bytearray) -> tuple[bytes | bytearray, ...]:
        """Do DMA_READ or DMA_WRITE: return the parts of the reply.

        Raises:
            VfioError: (EFAULT) not mapped, or not so; (EINVAL) too much, or not what it says.
        """
        address, size = wire.DMA_ACCESS.unpack(payload)
        head = bytes(payload[: wire.DMA_ACCESS.size])
        if size > _MAX_DATA:
            raise wire.malformed(f"an access of {size} bytes; {_MAX_DATA} at a time")
        if command == Command.DMA_READ:
            return head, self._read(address, size)
        data = memoryview(payload)[wire.DMA_ACCESS.size :]
        if len(data) != size:
            raise wire.malformed(f"DMA_WRITE of {size} bytes brings {len(data)}")
        self._write(address, data)
        return (head,)

    def _read(self, address: int, size: int) -> bytearray:
        data = bytearray()
        with self._lock, ExitStack() as stack:
            for view in self._views(stack, address, size, Prot.READ):
                data += view
        return data

    def _write(self, address: int, data: memoryview) -> None:
        done = 0
        with self._lock, ExitStack() as stack:
            for view in self._views(stack, address, len(data), Prot.WRITE):
                view[:] = data[done : done + len(view)]
                done += len(view)

    def _views(self, stack: ExitStack, address: int, size: int, prot: Prot) -> list[memoryview]:
        """View a range, which may go over several mappings; the lock is held."""
        views = []
        while size:
            at = bisect_right(self._starts, address) - 1
            entry = self._entries[at] if at >= 0 else None
            if entry is None or address >= entry.iova + entry.size or prot not in entry.prot:
                raise VfioError(f"IOVA {address:#x} is not mapped for this", errno=errno.EFAULT, object=self._name)
            inside = address - entry.iova
            length = min(size, entry.size - inside)
            views.append(stack.enter_context(view_of(entry.memory.address + inside, length, entry.memory, prot)))
            address += length
            size -= length
        return views
