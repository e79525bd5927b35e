"""Every exception vfiopy raises on purpose.

Two families, because a caller reacts to them differently:

* :class:`VfioError` (an :class:`OSError`): the system refused something. It carries the errno, the object, the call,
  what that errno means *for that call*, and what to do about it.
* :class:`StateError`: our own rule was broken (used after close, used in a forked child, count out of balance).
  Never an ``OSError``: no system call was made.

Classes also inherit the builtin that fits, so ``except ValueError`` or ``except TimeoutError`` keep working.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

from vfiopy.errno_table import look_up

__all__ = [
    "AccessError",
    "AddressRangeError",
    "AlignmentError",
    "BindingError",
    "BusyError",
    "ClosedError",
    "DeviceGoneError",
    "DeviceInUseError",
    "DeviceNotFoundError",
    "ForkedError",
    "IovaRangeError",
    "IrqCountError",
    "MemlockError",
    "MemoryKindError",
    "NoSpaceError",
    "NotBoundError",
    "NotMappedError",
    "NotSupportedError",
    "NotViableError",
    "OverlapError",
    "PciAddressError",
    "PermissionDeniedError",
    "PinnedError",
    "ProtocolError",
    "RegisterMapError",
    "RegisterNameError",
    "RevokedError",
    "StateError",
    "UnmappingError",
    "UnpinError",
    "VfioError",
    "VfioTimeoutError",
    "VfiopyError",
    "WrongFdError",
    "from_errno",
]


class VfiopyError(Exception):
    """Base of all exceptions that vfiopy raises on purpose."""


class VfioError(VfiopyError, OSError):
    """The kernel, or what stands in its place, refused a call.

    Attributes:
        errno: the error number.
        object: what was acted on, as a user knows it (``"0000:00:05.0"``, ``"/dev/vfio/12"``, ``"space 'dma'"``).
        call: the ioctl or operation (``"VFIO_IOMMU_MAP_DMA"``).
        meaning: what this errno means for this call, one sentence.
        hint: what to do about it, one sentence; may be empty.
    """

    default_errno = _errno.EINVAL

    def __init__(
        self,
        meaning: str,
        *,
        errno: int | None = None,
        object: str = "",  # noqa: A002  the user's word for it; keyword only
        call: str = "",
        hint: str = "",
    ) -> None:
        number = self.default_errno if errno is None else errno
        where = ": ".join(part for part in (object, call) if part)
        name = _errno.errorcode.get(number, str(number))
        text = f"{where}: {meaning}" if where else meaning
        if call:
            text += f" [{name}: {os.strerror(number)}]"
        if hint:
            text += f"\n  hint: {hint}"
        super().__init__(number, text)
        self.object = object
        self.call = call
        self.meaning = meaning
        self.hint = hint

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[object, ...]:
        # OSError would replay its own two arguments; ours are keyword arguments.
        return (_rebuild, (type(self), self.meaning, self.errno, self.object, self.call, self.hint))


def _rebuild(
    kind: type[VfioError], meaning: str, number: int, object_: str, call: str, hint: str
) -> VfioError:
    return kind(meaning, errno=number, object=object_, call=call, hint=hint)


# --- finding and opening a device --------------------------------------------------------------------------------


class DeviceNotFoundError(VfioError, LookupError):
    """No such PCI function, or none that fits what was asked for."""

    default_errno = _errno.ENODEV


class PciAddressError(VfioError, ValueError):
    """A text that is not a PCI address, or a number in it that is out of range."""


class NotBoundError(VfioError):
    """The function exists but no VFIO driver holds it."""

    default_errno = _errno.ENODEV


class NotViableError(VfioError):
    """Another device of the same IOMMU group is still in the kernel's hands."""

    default_errno = _errno.EBUSY


class PermissionDeniedError(VfioError, PermissionError):
    """A node's permissions, a capability or a security policy stands in the way."""

    default_errno = _errno.EACCES


class BusyError(VfioError):
    """Somebody else, or another operation of ours, holds what is needed."""

    default_errno = _errno.EBUSY


class DeviceInUseError(BusyError):
    """The function carries something that the running system needs (a mounted disk, the default route)."""


class BindingError(VfioError):
    """Binding or unbinding a driver did not end as it should; the message says what was put back."""

    default_errno = _errno.EIO


class NotSupportedError(VfioError):
    """This kernel, driver or device does not have the feature."""

    default_errno = _errno.EOPNOTSUPP


class WrongFdError(VfioError, TypeError):
    """A file descriptor that is not open, or of another kind than what it was given for."""

    default_errno = _errno.EBADF


class DeviceGoneError(VfioError):
    """The device does not answer: removed, powered down, or its memory decode is off."""

    default_errno = _errno.ENODEV


class ProtocolError(VfioError):
    """The other end of a socket sent what its protocol does not allow."""

    default_errno = _errno.EPROTO


class VfioTimeoutError(VfioError, TimeoutError):
    """What was waited for did not happen in time.

    Attributes:
        value: what a polled register last read; None where no register was polled.
    """

    default_errno = _errno.ETIMEDOUT
    value: int | None = None


class IrqCountError(VfioError):
    """The system has fewer interrupt vectors than were asked for; none is enabled.

    Attributes:
        available: how many there are; asking for that many works.
    """

    default_errno = _errno.ENOSPC

    def __init__(self, meaning: str, *, available: int = 0, **context: Any) -> None:
        super().__init__(meaning, **context)
        self.available = available

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"available": self.available})


# --- registers ---------------------------------------------------------------------------------------------------


class AccessError(VfioError, ValueError):
    """A register access that the region does not allow: misaligned, or against its direction."""


class AddressRangeError(AccessError, IndexError):
    """An offset outside of the region, or an index outside of a table."""


class RegisterNameError(VfioError, LookupError):
    """A register, field or capability that the map or the device does not have."""

    default_errno = _errno.ENOENT


class RegisterMapError(VfioError, ValueError):
    """A register map that cannot be read, or says what no register can be."""


# --- DMA ---------------------------------------------------------------------------------------------------------


class AlignmentError(VfioError, ValueError):
    """An address, IOVA or size that is not a multiple of the page size it has to be."""


class MemoryKindError(VfioError, TypeError):
    """Memory that this mapper cannot map, or must not (immutable, unaligned, of the wrong kind)."""


class IovaRangeError(VfioError, ValueError):
    """An IOVA that the IOMMU, a reserved window or the device's own limit puts out of reach."""


class OverlapError(VfioError, ValueError):
    """The IOVA range is already mapped, in part or in full."""

    default_errno = _errno.EEXIST


class NoSpaceError(VfioError):
    """No free IOVA range fits, or the kernel's number of mappings is used up."""

    default_errno = _errno.ENOSPC


class MemlockError(VfioError, MemoryError):
    """RLIMIT_MEMLOCK does not allow the kernel to pin this much."""

    default_errno = _errno.ENOMEM


class NotMappedError(VfioError, LookupError):
    """The IOVA range holds no mapping, or cuts one in two."""

    default_errno = _errno.ENOENT


class PinnedError(BusyError):
    """A mapping cannot go while pins hold its pages; the message names their owners."""


class UnmappingError(BusyError):
    """The mapping is being unmapped already, or the call came from its own unmap callback."""


class RevokedError(VfioError):
    """The exporter of a dma-buf took the memory back (reset, memory decode off, closed)."""

    default_errno = _errno.ENODEV


# --- our own rules -----------------------------------------------------------------------------------------------


class StateError(VfiopyError, RuntimeError):
    """The object is not in a state that allows this call."""


class ClosedError(StateError, ValueError):
    """The object was used after it was closed (``ValueError``, as for Python's own files)."""


class ForkedError(StateError):
    """An object of the parent was used in a forked child, which shares its open files but must not touch them."""


class UnpinError(StateError):
    """More unpins than pins."""


# --- from an errno to an exception -------------------------------------------------------------------------------


def from_errno(errno: int, *, call: str, object: str, detail: str = "") -> VfioError:  # noqa: A002
    """Make the exception for a call that failed: class, meaning and hint come from :mod:`vfiopy.errno_table`.

    Args:
        errno: the positive error number.
        call: name of the ioctl (``"VFIO_IOMMU_MAP_DMA"``) or of another call as the table has it
            (``"open VFIO group"``).
        object: what was acted on, as a user knows it.
        detail: what was asked for, added to the meaning in parentheses (``"iova 0x1000, size 0x1000"``).
    """
    row = look_up(errno, call)
    kind = VfioError if row is None else globals()[row.kind]
    meaning = os.strerror(errno) if row is None else row.meaning
    if detail:
        meaning += f" ({detail})"
    error: VfioError = kind(meaning, errno=errno, object=object, call=call, hint="" if row is None else row.hint)
    return error
