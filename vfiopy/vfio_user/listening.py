"""A server's socket in the file system: nobody else may reach it, nothing is replaced that is no dead socket."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Final

from vfiopy.errors import BusyError, PermissionDeniedError, VfioError

__all__ = ["Listener", "peer_user"]

_LOG = logging.getLogger(__name__)
_LONGEST: Final = 107  # sun_path without its NUL, sys/un.h
_MODE: Final = 0o600


class Listener:
    """A listening socket at a path; takes the path away at its end.

    A folder that does not exist is made with mode 0700; the socket has mode 0600.

    Raises:
        BusyError: a server listens there.
        PermissionDeniedError: others may replace files in the folder.
        VfioError: the path is too long, or something else than a socket is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if len(os.fsencode(path)) > _LONGEST:
            raise VfioError(
                f"the path has {len(os.fsencode(path))} bytes; a socket's has {_LONGEST} at most",
                errno=errno.ENAMETOOLONG,
                object=str(path),
                hint="choose a shorter one, such as below /run/user",
            )
        _prepare_folder(path.parent)
        _remove_dead(path)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(self.socket.fileno(), _MODE)  # what bind() gives the path; a chmod afterwards would be late
            self._listen(path)
            self._identity = _identity(path)
            self._spare = _spare_fd()
        except FileExistsError as error:
            self.socket.close()
            raise BusyError("another server was faster", object=str(path), hint="choose another path") from error
        except OSError as error:
            self.socket.close()
            raise VfioError(
                "no socket can be made there", errno=error.errno, object=str(path), call="bind"
            ) from error

    def _listen(self, path: Path) -> None:
        """Have the path come into being when there is somebody who listens: who waits for it can then connect."""
        first = path.with_name(f".{token_hex(4)}")
        if len(os.fsencode(first)) > _LONGEST:
            first = path
        self.socket.bind(os.fspath(first))
        try:
            self.socket.listen(8)
            if first != path:
                path.hardlink_to(first)  # which never takes the place of something else
        finally:
            if first != path:
                first.unlink(missing_ok=True)

    def accept(self) -> socket.socket | None:
        """Return the next client's socket, or None where there is none, or no room in this process for its fd."""
        try:
            return self.socket.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._turn_away()
        return None

    def _turn_away(self) -> None:
        """Let the next client see that it is not taken: one that stays would wake the server again and again."""
        if self._spare >= 0:
            os.close(self._spare)
        with suppress(OSError):
            self.socket.accept()[0].close()
            _LOG.warning("%s: a client is turned away: no more files can be opened", self.path)
        self._spare = _spare_fd()

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self.socket.fileno() >= 0:
            self.socket.close()
            if _identity(self.path) == self._identity:  # nobody has put another there
                with suppress(OSError):
                    self.path.unlink()
            if self._spare >= 0:
                os.close(self._spare)


def _spare_fd() -> int:
    """Open something to be closed in need; -1 where the need is here."""
    with suppress(OSError):
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    return -1


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise VfioError(
            "the folder of the socket cannot be made", errno=error.errno, object=str(folder), call="mkdir"
        ) from error
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if others and not status.st_mode & stat.S_ISVTX:
        raise PermissionDeniedError(
            "others may put a socket of their own in this folder in place of ours",
            object=str(folder),
            hint=f"chmod 700 {folder}, or choose a folder of your own",
        )


def _remove_dead(path: Path) -> None:
    """Take a socket away that nobody listens on."""
    try:
        status = path.lstat()
    except OSError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise VfioError(
            "something else than a socket is there",
            errno=errno.EEXIST,
            object=str(path),
            hint="remove it yourself, or choose another path",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass
    raise BusyError("a server listens there already", object=str(path), hint="stop it, or choose another path")


def peer_user(sock: socket.socket) -> int:
    """Return the user id of the process that connected (SO_PEERCRED)."""
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
    user: int = struct.unpack("iII", data)[1]
    return user
