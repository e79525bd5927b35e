"""Features and migration of a device behind a socket, and how any of its requests is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from vfiopy import uapi
from vfiopy.lives import Resource
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import close_fds
from vfiopy.vfio_user.client_regions import FIRST_ARGSZ, ClientRegions
from vfiopy.vfio_user.connection import Connection
from vfiopy.vfio_user.wire import Command

__all__ = ["MOST_READ", "MOST_WRITE", "FeatureRequests"]

MOST_WRITE: Final = 128 << 10
"""Bytes of one message: libvfio-user loses the stream with what does not fit into the socket's buffer."""
MOST_READ: Final = 1 << 20
_MOST_BITMAP: Final = 64 << 20


class FeatureRequests(Resource):
    """Base of :class:`~vfiopy.vfio_user.device_io.VfioUserDeviceIo`.

    Attributes:
        connection: for who wants to send messages of their own.
    """

    connection: Connection
    _regions: ClientRegions

    def _request(self, command: Command, *parts: bytes, fds: Sequence[int] = (), detail: str = "") -> bytearray:
        payload, received = self._request_fds(command, *parts, fds=fds, detail=detail)
        close_fds(received)
        return payload

    def _request_fds(
        self, command: Command, *parts: bytes, fds: Sequence[int] = (), detail: str = ""
    ) -> tuple[bytearray, list[int]]:
        reply = self.connection.request(command, *parts, fds=fds, detail=detail)
        return reply.payload, reply.fds

    def feature(self, number: int, operation: int, data: bytes) -> bytes:
        """VFIO_DEVICE_FEATURE; returns the payload of the reply.

        Raises:
            NotSupportedError: the server does not have it.
        """
        self.check_open()
        argsz = wire.FEATURE.size + max(len(data), FIRST_ARGSZ)
        if number == uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT and len(data) >= wire.DMA_REPORT.size:
            # A server that forgets what it could not tell must not be asked twice.
            _, length, page = wire.DMA_REPORT.unpack(data)
            argsz = min(argsz + wire.bitmap_size(length, page or 1), _MOST_BITMAP)
        while True:
            reply = self._request(Command.FEATURE, wire.FEATURE.pack(argsz, number | operation), data)
            needed = wire.FEATURE.unpack(reply).argsz
            if not argsz < needed <= self.connection.peer.max_data_xfer_size:
                return bytes(memoryview(reply)[wire.FEATURE.size :])
            argsz = needed

    def migration_read(self, size: int) -> bytes:
        """Return the next bytes of the device's state: see :class:`vfiopy.backend.MigrationStream`."""
        self.check_open()
        fixed = wire.MIGRATION_DATA.size
        asked = min(size, self.connection.peer.max_data_xfer_size - fixed, MOST_READ)
        reply = self._request(Command.MIG_DATA_READ, wire.MIGRATION_DATA.pack(fixed + asked, asked))
        got = wire.MIGRATION_DATA.unpack(reply).size
        if got > asked or len(reply) != fixed + got:
            raise self._regions.malformed(f"{len(reply)} bytes for {asked} of migration data")
        return bytes(memoryview(reply)[fixed:])

    def migration_write(self, data: bytes) -> None:
        """Take the next bytes of a device's state: see :class:`vfiopy.backend.MigrationStream`."""
        self.check_open()
        most = min(MOST_WRITE, self.connection.peer.max_data_xfer_size)
        for start in range(0, len(data), most):
            piece = bytes(data[start : start + most])
            head = wire.MIGRATION_DATA.pack(wire.MIGRATION_DATA.size + len(piece), len(piece))
            self._request(Command.MIG_DATA_WRITE, head, piece)
