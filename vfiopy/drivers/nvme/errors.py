"""How an NVMe controller fails, and what state that leaves it in."""

from __future__ import annotations

import errno as _errno

from vfiopy.errors import BusyError, VfioError, VfioTimeoutError
from vfiopy.nvme_spec.status import Status

__all__ = [
    "CommandAbortedError",
    "ControllerFailedError",
    "NvmeError",
    "NvmeTimeoutError",
    "QueueFullError",
    "TransferSizeError",
]


class NvmeError(VfioError):
    """The controller completed a command with an error. It goes on working.

    Attributes:
        status: the decoded status field.
        sct, sc: its two numbers.
        dnr: the same command would fail again.
    """

    default_errno = _errno.EIO

    def __init__(self, status: Status, *, object: str, call: str) -> None:  # noqa: A002  as in VfioError
        super().__init__(str(status), object=object, call=call, hint=status.hint)
        self.status = status
        self.sct = status.sct
        self.sc = status.sc
        self.dnr = status.dnr

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.status, self.object, self.call))


def _rebuild(status: Status, object_: str, call: str) -> NvmeError:
    return NvmeError(status, object=object_, call=call)


class NvmeTimeoutError(VfioTimeoutError):
    """A command was not completed in time. The controller was disabled; ``controller.reset()`` brings it back."""


class CommandAbortedError(VfioError):
    """The command was under way when the controller was reset, disabled or closed; it may have taken effect."""

    default_errno = _errno.ECANCELED


class ControllerFailedError(VfioError):
    """The controller reports a fatal error, broke the protocol, or was disabled after a failure before."""

    default_errno = _errno.EIO


class QueueFullError(BusyError):
    """As many commands are under way as the queue holds."""


class TransferSizeError(VfioError, ValueError):
    """More, or fewer, bytes than one command can move, or than the blocks that it names have."""
