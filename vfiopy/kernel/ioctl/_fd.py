"""What all typed file descriptors have in common: they own their fd, and they name themselves in errors."""

from __future__ import annotations

import errno
import os
import re
from typing import ClassVar, Self, TypeVar

from vfiopy.errors import WrongFdError, from_errno
from vfiopy.kernel.ioctl._call import os_calls, restarted
from vfiopy.layout import Layout
from vfiopy.lives import Resource

__all__ = ["Fd", "OwnershipFd"]

_GROWTH_LIMIT = 1 << 20  # bytes; no info structure is anywhere near, so a kernel that asks for more is broken
_Owner = TypeVar("_Owner", bound="Fd")
_ROOM = 256  # bytes for capabilities on the first try, which saves the second call nearly always


class Fd(Resource):
    """A file descriptor of one known kind, closed with the object, with O_CLOEXEC.

    Threads: methods may be called from several threads; the kernel does its own locking. ``close()`` while
    another thread is inside a call is the caller's mistake, as with any file.
    """

    _rank = 40
    kind: ClassVar[str] = "file descriptor"
    """What messages call it."""
    node: ClassVar[str] = ".*"
    """Regular expression for :meth:`Syscalls.identity` of such an fd."""

    def __init__(self, fd: int | None, label: str) -> None:
        """Take ownership of ``fd`` (None: it is yet to come); ``label`` is what a user calls the object."""
        self._fds = [] if fd is None else [fd]
        super().__init__(label)

    @classmethod
    def open(cls, path: str, label: str | None = None) -> Self:
        """Open a device node for reading and writing.

        Raises VfioError with what the errno means for this kind of node.
        """
        owner = cls(None, label or path)
        try:
            result = restarted(lambda: os_calls().open(path, os.O_RDWR, owner._fds))
            if result < 0:
                raise from_errno(-result, call=f"open {cls.kind}", object=path)
        except BaseException:
            owner.close()
            raise
        return owner

    @classmethod
    def adopt(cls, fd: int, label: str | None = None) -> Self:
        """Take over an fd that somebody else opened, for instance one that came over a socket with
        SCM_RIGHTS.

        The caller's fd stays the caller's: what this object owns is a duplicate.

        Raises WrongFdError if it is an fd of another kind: the same ioctl number means different things on
        different kinds (linux/vfio.h), so this mistake must not reach the kernel.
        """
        identity = os_calls().identity(fd)
        if not re.fullmatch(cls.node, identity):
            what = f"is {identity!r}" if identity else "cannot be identified (is it open?)"
            raise WrongFdError(
                f"fd {fd} {what}, not a {cls.kind}",
                object=label or f"fd {fd}",
                hint=f"pass the fd of a {cls.kind}",
            )
        owner = cls(None, label or identity)
        try:
            result = restarted(lambda: os_calls().duplicate(fd, owner._fds))
            if result < 0:
                raise from_errno(-result, call="dup", object=label or f"fd {fd}")
        except BaseException:
            owner.close()
            raise
        return owner

    @property
    def has_fd(self) -> bool:
        """Whether there is an fd: not where the kernel had none to give, and not after the end."""
        return bool(self._fds) and self._fds[0] >= 0

    @property
    def label(self) -> str:
        """What messages call this object."""
        return self._label

    def identity(self) -> str:
        """What the kernel says the fd is; see :meth:`Syscalls.identity`."""
        return os_calls().identity(self.fileno())

    def fileno(self) -> int:
        """Return the fd number; still owned by this object."""
        self.check_open()
        try:
            return self._fds[0]
        except IndexError:  # another thread is in close()
            self._open = False
            self.check_open()
            raise

    def detach(self) -> int:
        """Give the fd away: the caller owns it from now on, and this object counts as closed."""
        fd = self.fileno()
        self._fds.clear()
        self._open = False
        return fd

    def _release(self) -> None:
        try:
            fd = self._fds.pop()  # atomic: two threads in close() must not close the number twice
        except IndexError:
            return
        if fd >= 0:
            os_calls().close(fd)

    # --- calls ----------------------------------------------------------------------------------------------

    def _fail(self, call: str, result: int, detail: str = "") -> int:
        """Return a result, or raise what a negative one stands for."""
        if result < 0:
            raise from_errno(-result, call=call, object=self._label, detail=detail)
        return result

    def _ioctl(self, call: str, number: int, argument: bytearray | None = None, detail: str = "", *restart: int) -> int:
        fd = self.fileno()
        result = restarted(lambda: os_calls().ioctl(fd, number, argument), *restart)
        return self._fail(call, result, detail)

    def _ioctl_fd(
        self,
        owner: _Owner,
        call: str,
        number: int,
        argument: bytearray,
        detail: str = "",
        *,
        at: int = -1,
    ) -> _Owner:
        """Run an ioctl that answers with an fd (see :meth:`Syscalls.ioctl_fd`) and give it to ``owner``; return that.

        The owner is made by the caller, before: ``self._ioctl_fd(DmaBufFd(None, label), ...)``.
        """
        try:
            fd = self.fileno()
            result = restarted(lambda: os_calls().ioctl_fd(fd, number, argument, at, owner._fds))
            self._fail(call, result, detail)
        except BaseException:
            owner.close()
            raise
        return owner

    def _ioctl_value(self, call: str, number: int, value: int, detail: str = "") -> int:
        fd = self.fileno()
        return self._fail(call, restarted(lambda: os_calls().ioctl_value(fd, number, value)), detail)

    def _query(self, call: str, number: int, layout: Layout, detail: str = "", **fields: int) -> bytes:
        """Run an ioctl of the argsz kind until what it wants to say fits; return all of it.

        A buffer that is too short is not an error: the call succeeds, sets ``argsz`` to what it needs and
        leaves the capabilities out.
        """
        room = _ROOM
        while True:
            argument = layout.new(room, argsz=layout.size + room, **fields)
            self._ioctl(call, number, argument, detail)
            needed = layout.get(argument, "argsz")
            if needed <= len(argument):
                return bytes(argument)
            if needed > _GROWTH_LIMIT:
                raise from_errno(errno.EMSGSIZE, call=call, object=self._label, detail=f"{needed} bytes")
            room = needed - layout.size


class OwnershipFd(Fd):
    """An fd that proves to a hot reset that a whole group is ours: a group's, and no other."""
