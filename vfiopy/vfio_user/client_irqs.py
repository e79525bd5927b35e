"""The client's side of interrupts: SET_IRQS in pieces that the server takes, and what to repeat after a reconnect."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from vfiopy import uapi
from vfiopy.backend import IrqAction
from vfiopy.errors import AddressRangeError, VfioError, WrongFdError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.channel import close_fds

__all__ = ["ClientIrqs"]

_MOST: Final = 1 << 16
_CALL: Final = "VFIO_USER_SET_IRQS"

Send = Callable[[bytes, Sequence[int], str], object]
"""Sends SET_IRQS: payload, fds, what it is about."""


class ClientIrqs:
    """The interrupts of one device; keeps duplicates of the eventfds, so that the caller may close its own.

    Args:
        name: of the device, for messages.
        send: see :data:`Send`.
    """

    def __init__(self, name: str, send: Send) -> None:
        self._name = name
        self._send = send
        self._fds: dict[int, dict[int, int]] = {}

    def set(
        self,
        index: int,
        action: IrqAction,
        start: int,
        count: int,
        fds: Sequence[int] | None,
        bools: Sequence[bool] | None,
        most: int,
    ) -> None:
        """Do SET_IRQS: see :meth:`vfiopy.backend.DeviceIo.set_irqs`.

        Args:
            index, action, start, count, fds, bools: as there.
            most: fds that go with one message.

        Raises:
            AddressRangeError: (EINVAL) no such vectors.
            WrongFdError: (EBADF) an fd is not open; nothing is changed then.
            VfioError: what the server says.
        """
        self._check(start, count, fds, bools)
        if fds is None:
            kind = uapi.VFIO_IRQ_SET_DATA_NONE if bools is None else uapi.VFIO_IRQ_SET_DATA_BOOL
            self._send_one(kind | action, index, start, count, bytes(map(bool, bools or ())), ())
        else:
            for first, part in _pieces(start, fds, most):
                given = part if part and part[0] != -1 else ()
                self._send_one(uapi.VFIO_IRQ_SET_DATA_EVENTFD | action, index, first, len(part), b"", given)
        if action == IrqAction.TRIGGER:
            self._remember(index, start, count, fds, bools is not None)

    def _check(self, start: int, count: int, fds: Sequence[int] | None, bools: Sequence[bool] | None) -> None:
        if not 0 <= start < _MOST or not 0 <= count < _MOST:
            raise AddressRangeError(f"there are not {count} vectors from {start} on", object=self._name, call=_CALL)
        if fds is not None and bools is not None:
            raise VfioError("eventfds and bools exclude each other", errno=errno.EINVAL, object=self._name, call=_CALL)
        for values in (fds, bools):
            if values is not None and len(values) != count:
                raise VfioError(
                    f"{len(values)} values are given for {count} vectors",
                    errno=errno.EINVAL,
                    object=self._name,
                    call=_CALL,
                )
        for fd in fds or ():  # all of them before the first message goes
            if fd != -1:
                self._check_open(fd)

    def _check_open(self, fd: int) -> None:
        try:
            os.fstat(fd)
        except OSError as error:
            raise WrongFdError(f"fd {fd} is not open", errno=error.errno, object=self._name, call=_CALL) from None

    def _send_one(self, flags: int, index: int, start: int, count: int, data: bytes, fds: Sequence[int]) -> None:
        payload = wire.SET_IRQS.pack(wire.SET_IRQS.size + len(data), flags, index, start, count) + data
        self._send(payload, fds, f"index {index}, vectors {start} to {start + count - 1}")

    # --- for a reconnect ---------------------------------------------------------------------------------------------

    def _remember(self, index: int, start: int, count: int, fds: Sequence[int] | None, has_bools: bool) -> None:
        if fds is not None:
            vectors = self._fds.setdefault(index, {})
            for vector, fd in enumerate(fds, start):
                close_fds([vectors.pop(vector)] if vector in vectors else [])
                if fd != -1:
                    vectors[vector] = os.dup(fd)
        elif not count and not has_bools:
            self._forget(index)

    def _forget(self, index: int) -> None:
        close_fds(list(self._fds.pop(index, {}).values()))

    def repeat(self, most: int) -> None:
        """Give a new server all eventfds that the one before had."""
        for index, vectors in self._fds.items():
            if vectors:
                fds = [vectors.get(vector, -1) for vector in range(max(vectors) + 1)]
                for first, part in _pieces(0, fds, most):
                    given = part if part[0] != -1 else ()
                    flags = uapi.VFIO_IRQ_SET_DATA_EVENTFD | IrqAction.TRIGGER
                    self._send_one(flags, index, first, len(part), b"", given)

    def close(self) -> None:
        """Close the duplicates. Idempotent."""
        for index in list(self._fds):
            self._forget(index)


def _pieces(start: int, fds: Sequence[int], most: int) -> Iterator[tuple[int, Sequence[int]]]:
    """Cut vectors into messages: none has more than ``most`` fds, or vectors to set together with some to clear.

    Yields:
        First vector and fds: all of them -1, or none.
    """
    at = 0
    while at < len(fds):
        end = at + 1
        while end < len(fds) and (fds[end] == -1) == (fds[at] == -1) and (fds[at] == -1 or end - at < most):
            end += 1
        yield start + at, fds[at:end]
        at = end
    if not fds:
        yield start, ()
