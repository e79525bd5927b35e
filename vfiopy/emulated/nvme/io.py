"""The I/O commands: NVM Command Set Specification 1.0, 3.2, and Flush (Base 2.0, 7.1)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Final

from vfiopy.backend import Prot
from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.data import Data
from vfiopy.emulated.nvme.features import Features
from vfiopy.emulated.nvme.logs import Logs
from vfiopy.emulated.nvme.namespace import Namespace
from vfiopy.nvme_spec.opcodes import ALL_NAMESPACES, IoOpcode
from vfiopy.nvme_spec.status import Code

__all__ = ["IoCommands"]

_FUA: Final = 1 << 30
_DEALLOCATE: Final = 1 << 25
_ATTRIBUTE_DEALLOCATE: Final = 1 << 2
_RANGE: Final = struct.Struct("<IIQ")
_NSID, _NLB = 4, 48  # bytes of the entry, for the error log


class IoCommands:
    """Executes I/O commands.

    Args:
        data: finds a command's data.
        namespaces: the active ones, by identifier.
        features: whether the write cache is on.
        logs: what is counted.
        slow: gives the device's lock up for the length of a ``with`` block, for what takes a disk's time.
    """

    def __init__(
        self,
        data: Data,
        namespaces: Mapping[int, Namespace],
        features: Features,
        logs: Logs,
        slow: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._data = data
        self._namespaces = namespaces
        self._features = features
        self._logs = logs
        self._slow = slow
        self._handlers: dict[int, Callable[[Command], None]] = {
            IoOpcode.FLUSH: self._flush,
            IoOpcode.WRITE: self._write,
            IoOpcode.READ: self._read,
            IoOpcode.COMPARE: self._compare,
            IoOpcode.WRITE_ZEROES: self._write_zeroes,
            IoOpcode.DATASET_MANAGEMENT: self._manage,
            IoOpcode.VERIFY: self._verify,
        }

    def execute(self, command: Command) -> int:
        """Execute a command and return dword 0 of its completion.

        Raises:
            RefusedError: with the status.
            NotMappedError: the host has no memory where it says.
        """
        handler = self._handlers.get(command.opcode)
        if handler is None:
            raise RefusedError(Code.INVALID_OPCODE, 0)
        handler(command)
        return 0

    # --- what they have in common --------------------------------------------------------------------------------

    def _namespace(self, command: Command) -> Namespace:
        found = self._namespaces.get(command.nsid)
        if found is None:
            raise RefusedError(Code.INVALID_NAMESPACE, _NSID)
        return found

    def _extent(self, command: Command, namespace: Namespace) -> tuple[int, int]:
        """First block and number of blocks; raises RefusedError outside of the namespace."""
        lba, count = command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1
        namespace.offset(lba, count)
        return lba, count

    def _check_size(self, size: int) -> None:
        if self._data.limit and size > self._data.limit:
            raise RefusedError.field(_NLB)

    def _settle(self, command: Command, namespace: Namespace) -> None:
        """Put data on the disk at once where the command or the write cache's absence asks for it."""
        if command.cdw12 & _FUA or not self._features.write_cache:
            with self._slow():
                namespace.sync()

    # --- the commands --------------------------------------------------------------------------------------------

    def _read(self, command: Command) -> None:
        namespace = self._namespace(command)
        lba, count = self._extent(command, namespace)
        size = count * namespace.block_size
        self._check_size(size)
        with self._data.memory.gather(self._data.locate(command, size, to_host=True), Prot.WRITE) as views:
            namespace.read(lba, views)
        self._logs.count_read(size)

    def _write(self, command: Command) -> None:
        namespace = self._namespace(command)
        namespace.check_writable()
        lba, count = self._extent(command, namespace)
        size = count * namespace.block_size
        self._check_size(size)
        with self._data.memory.gather(self._data.locate(command, size, to_host=False), Prot.READ) as views:
            namespace.write(lba, views)
        self._logs.count_write(size)
        self._settle(command, namespace)

    def _compare(self, command: Command) -> None:
        namespace = self._namespace(command)
        lba, count = self._extent(command, namespace)
        size = count * namespace.block_size
        self._check_size(size)
        expected = self._data.load(command, size)
        found = bytearray(size)
        namespace.read(lba, [memoryview(found)])
        self._logs.count_read(size)
        if found != expected:
            raise RefusedError(Code.COMPARE_FAILURE, lba=lba)

    def _verify(self, command: Command) -> None:
        namespace = self._namespace(command)
        extent = self._extent(command, namespace)
        with self._slow():
            namespace.verify(*extent)

    def _write_zeroes(self, command: Command) -> None:
        namespace = self._namespace(command)
        namespace.check_writable()
        lba, count = self._extent(command, namespace)
        with self._slow():
            namespace.zero(lba, count, deallocate=bool(command.cdw12 & _DEALLOCATE))
        self._settle(command, namespace)

    def _manage(self, command: Command) -> None:
        namespace = self._namespace(command)
        ranges = list(_RANGE.iter_unpack(self._data.load(command, _RANGE.size * ((command.cdw10 & 0xFF) + 1))))
        for _, count, lba in ranges:
            namespace.offset(lba, count)
        if command.cdw11 & _ATTRIBUTE_DEALLOCATE:
            namespace.check_writable()
            with self._slow():
                for _, count, lba in ranges:
                    namespace.discard(lba, count)

    def _flush(self, command: Command) -> None:
        every = command.nsid == ALL_NAMESPACES
        wanted = list(self._namespaces.values()) if every else [self._namespace(command)]
        with self._slow():
            for namespace in wanted:
                namespace.sync()
