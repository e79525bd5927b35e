"""The process that lets itself be looked at: a thread that answers on an abstract socket."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import threading
import time
import warnings
from contextlib import suppress
from functools import partial

from vfiopy.errors import VfioError
from vfiopy.inspection.snapshot import snapshot
from vfiopy.lives import Resource, report_errors

__all__ = ["Inspection", "allow_by_environment", "allow_inspection", "peer", "socket_name"]

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_PATIENCE = 5.0  # seconds for a client to take its answer
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED)
_PAUSE = 0.1  # seconds until there may be files again


def socket_name(pid: int) -> str:
    """Name of a process's socket: abstract, so that it ends with the process and leaves no file (unix(7))."""
    return f"\0vfiopy-inspect-{pid}"


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return pid and uid of who is at the other end, as the kernel says (SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid


def _answer(connection: socket.socket) -> None:
    connection.settimeout(_PATIENCE)
    if peer(connection)[1] in (os.geteuid(), 0):
        data = json.dumps(snapshot()).encode()
        with suppress(OSError):  # who asked is gone
            connection.sendall(data)


class Inspection(Resource):
    """Answers who asks, until it is closed: this user's processes, and root's.

    Made by :func:`allow_inspection`. Nothing can be changed through it.
    """

    def __init__(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(socket_name(os.getpid()))
            listener.listen(4)
        except OSError as error:
            listener.close()
            raise VfioError(
                "the socket for inspection cannot be made",
                errno=error.errno,
                object=f"process {os.getpid()}",
                hint="another copy of vfiopy in this process may have it",
            ) from None
        super().__init__(f"inspection of process {os.getpid()}")
        self._listener = listener
        self._thread = threading.Thread(target=self._serve, name="vfiopy inspection", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if error.errno in _SHORT:
                    time.sleep(_PAUSE)  # who asks waits, too
                    continue
                return  # closed
            with connection:
                report_errors(partial(_answer, connection))

    def _release(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()

    def end_in_child(self) -> None:
        """In a forked child: let go of the parent's socket, or clients would wait for a thread that is not there."""
        self._listener.close()
        self._open = False


class _Only:
    """The one inspection of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inspection: Inspection | None = None
        self.registered = False


_only = _Only()


def allow_inspection() -> Inspection:
    """Let ``vfiopy iova PID`` show this process's address spaces: mappings, free ranges, pins and their owners.

    The same as ``VFIOPY_INSPECT=1`` in the environment of a program that opens a device. Only processes of the same
    user and of root are answered. Called again, it returns what is there already.

    Returns:
        What to close to end it; it ends with the process.

    Raises:
        VfioError: the socket cannot be made.
    """
    with _only.lock:
        if not _only.inspection:
            _only.inspection = Inspection()
            if not _only.registered:
                os.register_at_fork(after_in_child=_after_fork)
                _only.registered = True
        return _only.inspection


def _after_fork() -> None:
    _only.lock = threading.Lock()
    inspection, _only.inspection = _only.inspection, None
    if inspection is not None:
        inspection.end_in_child()


def allow_by_environment() -> None:
    """As :func:`allow_inspection`; a program does not fail because nobody can look."""
    try:
        allow_inspection()
    except VfioError as error:
        warnings.warn(f"VFIOPY_INSPECT: {error.meaning}", RuntimeWarning, stacklevel=4)
