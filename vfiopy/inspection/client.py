"""Asking a process for its address spaces."""

from __future__ import annotations

import errno
import json
import os
import socket
from typing import Any

from vfiopy.errors import PermissionDeniedError, VfioError
from vfiopy.inspection.server import peer, socket_name

__all__ = ["ask"]

_PATIENCE = 10.0
_HINT = "call vfiopy.allow_inspection() in it, or start it with VFIOPY_INSPECT=1"


def ask(pid: int) -> dict[str, Any]:
    """Return what a process says of its address spaces; see :mod:`vfiopy.inspection.snapshot`.

    Raises:
        PermissionDeniedError: it does not answer this user.
        VfioError: it is not there, does not let itself be looked at, or did not finish.
    """
    where = f"process {pid}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE)
        try:
            connection.connect(socket_name(pid))
            if peer(connection)[0] != pid:  # anybody may take a name, but not somebody else's pid
                raise PermissionDeniedError("another process answers in its name", object=where)
            parts = []
            while part := connection.recv(1 << 20):
                parts.append(part)
        except ConnectionRefusedError as error:
            exists = os.path.exists(f"/proc/{pid}")  # noqa: PTH110
            meaning = "it does not let itself be looked at" if exists else "there is no such process"
            raise VfioError(meaning, errno=error.errno, object=where, hint=_HINT if exists else "") from None
        except OSError as error:
            if isinstance(error, VfioError):
                raise
            raise VfioError("it did not answer", errno=error.errno, object=where) from error
    if not parts:
        raise PermissionDeniedError("it answers only its own user and root", object=where, hint="use sudo")
    try:
        answer: dict[str, Any] = json.loads(b"".join(parts))
    except ValueError:
        raise VfioError("it ended in the middle of its answer", errno=errno.ECONNRESET, object=where) from None
    return answer
