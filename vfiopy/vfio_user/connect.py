"""From a path, or a connected socket, to a device: what ``vfiopy.open("vfio-user:PATH")`` needs."""

from __future__ import annotations

import errno
import os
import socket
from typing import Final

from vfiopy.errors import DeviceGoneError, DeviceNotFoundError, PermissionDeniedError, VfioError
from vfiopy.vfio_user.connection import Connection
from vfiopy.vfio_user.device_io import VfioUserDeviceIo
from vfiopy.vfio_user.mapper import VfioUserMapper

__all__ = ["TIMEOUT", "connect"]

TIMEOUT: Final = 10.0
"""Seconds that a server has for each answer, unless said otherwise."""


def connect(
    target: str | os.PathLike[str] | socket.socket, *, timeout: float = TIMEOUT, twin: bool = True
) -> tuple[VfioUserDeviceIo, VfioUserMapper]:
    """Connect to a server.

    Args:
        target: path of its socket, or a connected socket, which is taken over.
        timeout: seconds for each answer.
        twin: use a socket of its own for the server's requests, where the server can.

    Raises:
        DeviceNotFoundError: nobody listens there.
        PermissionDeniedError: the socket is somebody else's.
        DeviceGoneError: the server hung up: it has another client, or does not take us.
        ProtocolError, VfioTimeoutError: it is no vfio-user server, or does not answer.
    """
    name = f"vfio-user:{f'fd {target.fileno()}' if isinstance(target, socket.socket) else os.fspath(target)}"
    mapper = VfioUserMapper(name)

    def reach() -> Connection:
        sock = target if isinstance(target, socket.socket) else _connect(os.fspath(target), name, timeout)
        try:
            connection = Connection(sock, name, mapper.serve, timeout=timeout, twin=twin)
        except DeviceGoneError as error:
            error.add_note("  hint: a server has one client at a time: is another one connected?")
            raise
        try:
            mapper.attach(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    connection = reach()
    again = None if isinstance(target, socket.socket) else reach
    return VfioUserDeviceIo(connection, name, on_reconnect=again), mapper


def _connect(path: str, name: str, timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
    except OSError as error:
        sock.close()
        raise _refusal(error, name) from error
    return sock


def _refusal(error: OSError, name: str) -> VfioError:
    number = error.errno or errno.EINVAL
    if number in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTSOCK, errno.ENOTDIR):
        return DeviceNotFoundError(
            "nobody listens there",
            errno=number,
            object=name,
            call="connect",
            hint="start the server first: vfiopy serve edu --socket PATH",
        )
    if number in (errno.EACCES, errno.EPERM):
        return PermissionDeniedError(
            "the socket is not for this user", errno=number, object=name, call="connect", hint="run as its owner"
        )
    return VfioError(f"no connection: {error}", errno=number, object=name, call="connect")
