"""A namespace: logical blocks in a file or in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from uuid import UUID

from vfiopy.emulated.nvme.backing import Backing
from vfiopy.emulated.nvme.command import RefusedError
from vfiopy.emulated.nvme.settings import Settings
from vfiopy.errors import VfioError
from vfiopy.nvme_spec.status import Code

__all__ = ["Namespace", "numbered"]

_SIZES = (512, 4096)
_CHUNK = 1 << 20


class Namespace:
    """A namespace of the NVM command set, without metadata.

    Args:
        backing: where the data are.
        block_size: bytes of a logical block: 512 or 4096.

    Attributes:
        blocks: its size in logical blocks.
        uuid: its identity; a controller gives it one where it is None.

    Raises:
        ValueError: not such a block size.
        VfioError: the backing is empty, or not a whole number of blocks.
    """

    def __init__(self, backing: Backing, *, block_size: int = 512, uuid: UUID | None = None) -> None:
        _check_size(backing.size, block_size, backing.name)
        self.backing = backing
        self.block_size = block_size
        self.blocks = backing.size // block_size
        self.uuid = uuid

    @classmethod
    def memory(cls, size: int = 64 << 20, *, block_size: int = 512) -> Namespace:
        """Make one in memory; ``size`` in bytes."""
        _check_size(size, block_size, "memory")
        return cls._own(Backing.memory(size), block_size)

    @classmethod
    def image(
        cls,
        path: str | os.PathLike[str],
        *,
        size: int | None = None,
        block_size: int = 512,
        read_only: bool = False,
    ) -> Namespace:
        """Make one of an image file: see :meth:`Backing.image`, which says what it raises."""
        if size is not None:  # before a file is made
            _check_size(size, block_size, os.fspath(path))
        return cls._own(Backing.image(path, size=size, read_only=read_only), block_size)

    @classmethod
    def _own(cls, backing: Backing, block_size: int) -> Namespace:
        try:
            return cls(backing, block_size=block_size)
        except BaseException:
            backing.close()
            raise

    @property
    def read_only(self) -> bool:
        """It cannot be written."""
        return self.backing.read_only

    def offset(self, lba: int, count: int) -> int:
        """Return where blocks begin in the backing, bytes.

        Raises:
            RefusedError: LBA Out of Range.
        """
        if lba + count > self.blocks:
            raise RefusedError(Code.LBA_OUT_OF_RANGE, 40, lba=lba)
        return lba * self.block_size

    def read(self, lba: int, views: Sequence[memoryview]) -> None:
        """Fill views from blocks on; raises RefusedError with a media error."""
        try:
            self.backing.read(views, lba * self.block_size)
        except OSError as error:
            raise _refusal(error, Code.UNRECOVERED_READ_ERROR, lba) from error

    def write(self, lba: int, views: Sequence[memoryview]) -> None:
        """Write blocks; raises RefusedError with a media error."""
        self.check_writable()
        try:
            self.backing.write(views, lba * self.block_size)
        except OSError as error:
            raise _refusal(error, Code.WRITE_FAULT, lba) from error

    def zero(self, lba: int, count: int, *, deallocate: bool) -> None:
        """Have blocks read as zeroes; raises RefusedError with a media error."""
        self.check_writable()
        try:
            self.backing.zero(lba * self.block_size, count * self.block_size, deallocate=deallocate)
        except OSError as error:
            raise _refusal(error, Code.WRITE_FAULT, lba) from error

    def discard(self, lba: int, count: int) -> None:
        """Have no need of blocks' content; raises RefusedError with a media error."""
        self.check_writable()
        try:
            self.backing.discard(lba * self.block_size, count * self.block_size)
        except OSError as error:
            raise _refusal(error, Code.WRITE_FAULT, lba) from error

    def verify(self, lba: int, count: int) -> None:
        """Read blocks and drop them; raises RefusedError with a media error."""
        scratch = memoryview(bytearray(min(count * self.block_size, _CHUNK)))
        step = len(scratch) // self.block_size
        for first in range(lba, lba + count, step):
            self.read(first, [scratch[: min(step, lba + count - first) * self.block_size]])

    def check_writable(self) -> None:
        """Refuse what would write a namespace that is read-only."""
        if self.read_only:
            raise RefusedError(Code.WRITE_PROTECTED)

    def sync(self) -> None:
        """Have what was written on the disk; raises RefusedError with a media error."""
        try:
            self.backing.sync()
        except OSError as error:
            raise _refusal(error, Code.WRITE_FAULT, 0) from error

    def close(self) -> None:
        """Close the file. Idempotent."""
        self.backing.close()


def _check_size(size: int, block_size: int, name: str) -> None:
    if block_size not in _SIZES:
        raise ValueError(f"a logical block has 512 or 4096 bytes, not {block_size}")
    if size <= 0 or size % block_size:
        raise VfioError(
            f"{size} bytes are not a whole number of blocks of {block_size}",
            errno=errno.EINVAL,
            object=name,
            hint="choose another size (truncate -s makes an image longer), or another block size",
        )


def _refusal(error: OSError, code: Code, lba: int) -> RefusedError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        code = Code.CAPACITY_EXCEEDED
    elif error.errno == errno.EFAULT:
        code = Code.DATA_TRANSFER_ERROR  # the host's memory, not ours
    return RefusedError(code, lba=lba)


def numbered(
    namespaces: Mapping[int, Namespace] | Sequence[Namespace] | None, settings: Settings
) -> dict[int, Namespace]:
    """Give namespaces their identifiers and identities; None is one in memory.

    Raises:
        ValueError: an identifier that the controller does not have.
    """
    if namespaces is None:
        found = {1: Namespace.memory()}
    elif isinstance(namespaces, Mapping):
        found = dict(sorted(namespaces.items()))
    else:
        found = dict(enumerate(namespaces, 1))
    for nsid, namespace in found.items():
        if not 1 <= nsid <= settings.most_namespaces:
            raise ValueError(f"namespaces have identifiers 1 to {settings.most_namespaces}, not {nsid}")
        if namespace.uuid is None:
            namespace.uuid = settings.namespace_uuid(nsid)
    return found
