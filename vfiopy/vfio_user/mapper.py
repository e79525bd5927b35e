"""The client's side of memory: what is mapped is announced to the server, and served to it where it cannot map it."""

from __future__ import annotations

import errno
import threading
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, NamedTuple

from vfiopy.backend import FileMemory, IovaRange, KernelTarget, MapperTraits, Memory, MemoryKind, Prot
from vfiopy.errors import DeviceGoneError, ProtocolError, VfioError
from vfiopy.memory_view import view_of
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.arena import Arenas
from vfiopy.vfio_user.connection import Connection
from vfiopy.vfio_user.wire import Command, MapFlag, UnmapFlag

__all__ = ["VfioUserMapper"]

_RANGES: Final = (IovaRange(0, (1 << 48) - 1),)  # a device may have no more address lines than a PC's IOMMU
_MAX_DATA: Final = 1 << 20
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
        self._tell: TellDirty | None = None

    def attach(self, connection: Connection) -> None:
        """Take the connection to announce mappings on, and announce those that there are: after a reconnect too."""
        self._connection = connection
        for entry in list(self._entries):
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
        return MapperTraits(peer.peer.pgsizes, peer.peer.max_dma_maps, kinds)

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
            self._announce(entry)
        except BaseException:
            self._remove(iova)
            raise

    def _announce(self, entry: _Entry) -> None:
        flags = MapFlag(int(entry.prot))
        memory = entry.memory
        fds = [memory.fd] if isinstance(memory, FileMemory) and self._peer().peer.max_msg_fds else []
        offset = memory.offset if isinstance(memory, FileMemory) and fds else 0
        payload = wire.DMA_MAP.pack(wire.DMA_MAP.size, int(flags), offset, entry.iova, entry.size)
        detail = f"iova {entry.iova:#x}, size {entry.size:#x}"
        self._peer().request(Command.DMA_MAP, payload, fds=fds, detail=detail)

    def unmap(self, iova: int, size: int) -> int:
        """Take memory away from the server. A server that is gone has none any more.

        Raises:
            PinnedError: its device still uses the memory.
            VfioError: it refuses, or does not answer; it still has the memory then.
        """
        connection = self._connection
        if connection is not None and connection.alive:
            try:
                self._take_away(connection, iova, size)
            except DeviceGoneError:
                if connection.alive:  # it answers, but says EIO
                    raise
        self._remove(iova)
        return size

    def _take_away(self, connection: Connection, iova: int, size: int) -> None:
        detail = f"iova {iova:#x}, size {size:#x}"
        if self._tell is None:
            payload = wire.DMA_UNMAP.pack(wire.DMA_UNMAP.size, 0, iova, size)
            connection.request(Command.DMA_UNMAP, payload, detail=detail)
            return
        page = _PAGE
        while (length := -(-size // (64 * page)) * 8) > min(_MAX_DATA, connection.peer.max_data_xfer_size):
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

        Of what goes because the server has gone, nothing is told.
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
