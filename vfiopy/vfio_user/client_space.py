"""What a server knows of its client's memory: the book, fed by DMA_MAP and DMA_UNMAP."""

from __future__ import annotations

import logging
from typing import Final

from vfiopy.backend import BookReader, HostMemory, IovaRange, Mapper, Prot, RemoteMemory
from vfiopy.errors import NotSupportedError
from vfiopy.iova import KIND_HOST, KIND_REMOTE, IovaClosing, IovaSpace
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.dma_requests import ClientMemory, DmaRequests
from vfiopy.vfio_user.shared_files import SharedFiles

__all__ = ["ClientSpace"]

_LOG = logging.getLogger(__name__)
_LAST: Final = (1 << 64) - 1
_PAGE: Final = 4096
_BY_CALLS: Final = 8  # libvfio-user's flag for an fd that cannot be mapped
_KNOWN: Final = 0xF  # and 4, which says that it can
_KNOWN_OF_UNMAP: Final = int(wire.UnmapFlag.ALL | wire.UnmapFlag.GET_DIRTY_BITMAP)  # an IntFlag's ~ knows no others


class ClientSpace:
    """The address space that a served device does DMA in.

    An emulated device looks into the book; a device of the kernel's has a mapper that the book calls.

    Args:
        mapper: the device's.
        label: for messages.
        max_mappings: the most mappings that the client may make.
        trust_files: map files that are not sealed too.

    Raises:
        NotSupportedError: the mapper is neither of the two.
    """

    def __init__(self, mapper: Mapper, label: str, *, max_mappings: int, trust_files: bool) -> None:
        self.book = IovaSpace(label)
        self.files = SharedFiles(trusted=trust_files)
        self._mapper = mapper
        target = mapper.kernel_target
        if isinstance(mapper, BookReader):
            # A guest's memory is where the guest has it; only the pages' size is ours to say.
            self.book.set_usable([IovaRange(0, _LAST)], _PAGE, max_mappings)
            mapper.attach_book(self.book)
        elif target is not None:
            traits = mapper.traits()
            limit = min(max_mappings, traits.max_mappings or max_mappings)
            self.book.set_usable(mapper.ranges(), traits.page_sizes, limit)
            self.book.replay(self.book.add_kernel_mapper(target.kind, target.fd, target.object_id))
        else:
            raise NotSupportedError(
                f"a device whose memory goes through {mapper.name} cannot be served",
                object=label,
                hint="serve emulated devices, and devices behind iommufd or type1",
            )

    def map(self, payload: bytes | bytearray, fds: list[int], requests: DmaRequests) -> None:
        """Do DMA_MAP. An fd that came along stays the caller's.

        Raises:
            OverlapError: (EEXIST) a part is mapped already.
            VfioError: (EINVAL) not whole pages, no size, beyond 64 bits, unknown flags, or a file that does not fit;
                (EACCES) a file that is not open for that; (ENOSPC) too many mappings.
        """
        record = wire.DMA_MAP.unpack(payload)
        wire.check_argsz(record.argsz, wire.DMA_MAP.size)
        prot = Prot(record.flags & Prot.RW)
        if not prot or record.flags & ~_KNOWN:
            raise wire.malformed(f"DMA_MAP with flags {record.flags:#x}")
        if record.address % _PAGE or record.size % _PAGE or not record.size or (fds and record.offset % _PAGE):
            raise wire.malformed("DMA_MAP of what is not whole pages of 4096 bytes")
        if record.address + record.size > _LAST + 1 or record.offset + record.size > _LAST + 1:
            raise wire.malformed("DMA_MAP beyond 64 bits")
        writable = Prot.WRITE in prot
        memory: HostMemory | RemoteMemory
        if fds:
            by_calls = bool(record.flags & _BY_CALLS)
            memory = self.files.memory(fds[0], record.offset, record.size, writable=writable, by_calls=by_calls)
        else:
            memory = ClientMemory(requests, record.address, record.size, writable)
        kind = KIND_REMOTE if isinstance(memory, RemoteMemory) else KIND_HOST
        self.book.map(memory, memory.address, record.size, int(prot), record.address, kind=kind)

    def begin_unmap(self, payload: bytes | bytearray) -> tuple[IovaClosing, int, int]:
        """Begin DMA_UNMAP: return what ends it once no device uses the range, and the range's bounds.

        Holes in the range, and a range without a mapping, are fine, as for type1.

        Raises:
            VfioError: (EINVAL) no size, beyond 64 bits, or unknown flags.
        """
        record = wire.DMA_UNMAP.unpack(payload)
        wire.check_argsz(record.argsz, wire.DMA_UNMAP.size)
        if record.flags & ~_KNOWN_OF_UNMAP:
            raise wire.malformed(f"DMA_UNMAP with flags {record.flags:#x}")
        if record.flags & wire.UnmapFlag.ALL:
            if record.address or record.size:
                raise wire.malformed("DMA_UNMAP of everything, with a range")
            return self.book.closing(0, _LAST), 0, _LAST
        last = record.address + record.size - 1
        if not record.size or last > _LAST:
            raise wire.malformed(f"DMA_UNMAP of {record.size:#x} bytes at {record.address:#x}")
        return self.book.closing(record.address, last), record.address, last

    def clear(self, timeout: float) -> None:
        """Unmap everything, after the client went. What a device holds on to stays, with its memory."""
        leaks = self.book.close(timeout=timeout, force=True)
        if leaks:
            _LOG.error("%s: memory of a client that is gone stays: %s", self.book.name, leaks)

    def close(self) -> None:
        """Let the mapper go. Everything is unmapped."""
        self.clear(0.0)
        for token, *_ in self.book.kernel_mappers():
            self.book.remove_kernel_mapper(token)
        self._mapper.close()
