"""The words for what the native book refuses: one exception for each reason, with what stood in the way.

Native code calls :func:`failure` when it has something to raise; nobody else needs to.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vfiopy.errors import (
    AlignmentError,
    BusyError,
    IovaRangeError,
    MemoryKindError,
    NoSpaceError,
    NotMappedError,
    OverlapError,
    PermissionDeniedError,
    PinnedError,
    RevokedError,
    StateError,
    UnmappingError,
    UnpinError,
    VfioError,
    from_errno,
)
from vfiopy.iova.accounting import describe_memlock

__all__ = ["Details", "Holder", "failure"]

Holder = tuple[str, int, int, int, int]
"""Name and id of an owner, its number of pins, IOVA and size of the mapping that they are in."""

_ANY = (1 << 64) - 1
_WRAP = 1 << 64
_STATES = ("reserved", "mapped", "closing", "being unmapped", "in an unknown state")
_PROTS = {1: "read", 2: "write", 3: "read and write"}


@dataclass(frozen=True, slots=True)
class _Failure:
    """What native code knows of a failure; see ``enum vfiopy_result`` for what counts when."""

    space: str
    operation: str
    asked_first: int
    asked_last: int
    clash_first: int
    clash_last: int
    clash_state: int
    value: int
    call: str | None
    errno: int
    mapper: int
    holders: Sequence[Holder]

    @property
    def object(self) -> str:
        return f"space '{self.space}'"

    @property
    def asked(self) -> str:
        size = (self.asked_last - self.asked_first + 1) % _WRAP
        if self.asked_first == _ANY:
            return f"{size:#x} bytes at any IOVA"
        return f"IOVA {self.asked_first:#x}-{self.asked_last:#x}"

    @property
    def clash(self) -> str:
        return f"{self.clash_first:#x}-{self.clash_last:#x}"

    @property
    def state(self) -> str:
        return _STATES[self.clash_state] if self.clash_state >= 0 else ""

    def error(self, kind: type[VfioError], meaning: str, hint: str = "", errno: int | None = None) -> VfioError:
        return kind(meaning, errno=errno, object=self.object, hint=hint)


def _bad_size(it: _Failure) -> Exception:
    return it.error(
        IovaRangeError,
        f"{it.operation}: a size of 0 bytes, or one that reaches beyond the 64-bit address space",
        "give a size of at least one page that ends at IOVA 2**64 - 1 or below",
    )


def _bad_prot(it: _Failure) -> Exception:
    return ValueError(f"{it.object}: {it.operation}: prot must be 1 (the device reads), 2 (it writes) or 3 (both)")


def _bad_alignment(it: _Failure) -> Exception:
    if it.clash_state >= 0:
        return it.error(
            AlignmentError,
            f"mapping {it.clash} is not made of whole pages of {it.value:#x} bytes, which this IOMMU needs",
            "unmap it, or give the device a space of its own",
        )
    if it.call is None:
        return it.error(AlignmentError, "no page size is common to all mappers", "give the device a space of its own")
    if it.call == "alignment":
        meaning = f"alignment {it.clash_first:#x} is not a power of two"
    else:
        meaning = f"{it.call} {it.clash_first:#x} is not a multiple of {it.value:#x}"
    return it.error(AlignmentError, meaning, "allocate() returns memory that is aligned; round sizes up to whole pages")


def _bad_ranges(it: _Failure) -> Exception:
    if it.operation == "include":
        return it.error(IovaRangeError, f"{it.clash} was never excluded", "excluded() lists the windows")
    return it.error(IovaRangeError, f"range {it.clash} is empty, out of order, or overlaps the one before it")


def _bad_kind(it: _Failure) -> Exception:
    if it.operation == "pin":
        return it.error(
            MemoryKindError,
            f"mapping {it.clash} is device memory (MMIO), which is not pinned",
            "pass peer=True if the owner knows how to use another device's memory",
        )
    if it.mapper:
        return it.error(
            MemoryKindError,
            "the kernel cannot map remote memory, and type1 none that this process has not mapped itself",
            "map the file or BAR here and pass its address, open the device through iommufd, or use a space whose "
            "devices are all emulated or behind vfio-user",
        )
    return it.error(MemoryKindError, f"{it.operation}: unknown kind of memory")


def _overlap(it: _Failure) -> Exception:
    return it.error(
        OverlapError,
        f"{it.asked} overlaps the mapping {it.clash}",
        "unmap that first, or let the space choose the IOVA",
    )


def _busy(it: _Failure) -> Exception:
    if it.clash_state == 0:
        hint = "another map() is under way there: wait for it, or use another range"
    elif it.clash_state == 1:
        hint = "a mapper joins or leaves the space: try again"
    elif it.clash_state == 4:
        hint = "resync() unmaps what the kernel may still have there"
    else:
        hint = "wait until it is unmapped"
    return it.error(BusyError, f"{it.operation}: {it.clash} is {it.state}", hint)


def _outside(it: _Failure) -> Exception:
    if it.clash_state >= 0:
        return it.error(
            IovaRangeError,
            f"{it.operation}: the mapping {it.clash} would lie outside of the usable IOVA ranges",
            "unmap it, or give the device a space of its own",
        )
    return it.error(
        IovaRangeError,
        f"{it.asked} does not lie inside one usable IOVA range",
        "usable() lists the ranges that all mappers of the space share; reserved windows (MSI) are left out",
    )


def _excluded(it: _Failure) -> Exception:
    if it.operation == "exclude" and it.clash_state < 0:
        return it.error(IovaRangeError, f"{it.asked} overlaps the excluded window {it.clash}")
    if it.clash_state >= 0:
        return it.error(IovaRangeError, f"{it.operation}: the mapping {it.clash} lies in the window", "unmap it before")
    return it.error(IovaRangeError, f"{it.asked} lies in the excluded window {it.clash}", "include() gives it back")


def _over_limit(it: _Failure) -> Exception:
    return it.error(
        IovaRangeError,
        f"{it.asked} reaches beyond {it.value:#x}, the highest IOVA that the request allows",
        "the device has only that many address lines; choose a lower IOVA",
    )


def _no_space(it: _Failure) -> Exception:
    largest = f"the largest free range has {it.value + 1:#x} bytes" if it.clash_state >= 0 else "nothing is free"
    return it.error(
        NoSpaceError,
        f"no free range takes {it.asked} with the limit and alignment asked for; {largest}",
        "unmap something, or ask for less, a higher limit or a smaller alignment",
    )


def _too_many(it: _Failure) -> Exception:
    return it.error(
        NoSpaceError,
        f"the kernel takes {it.value} mappings, and there are as many",
        "map larger pieces, or raise the module parameter vfio_iommu_type1.dma_entry_limit",
    )


def _not_mapped(it: _Failure) -> Exception:
    return it.error(
        NotMappedError,
        f"{it.operation}: nothing is mapped at IOVA {it.clash_first:#x}"
        + (f" (asked for {it.asked})" if it.asked_first != it.asked_last else ""),
    )


def _cuts(it: _Failure) -> Exception:
    return it.error(
        NotMappedError,
        f"{it.operation}: {it.asked} cuts the mapping {it.clash} in two",
        "unmap whole mappings: both ends of the range must lie at ends of mappings or in holes",
    )


def _no_access(it: _Failure) -> Exception:
    return it.error(
        PermissionDeniedError,
        f"{it.operation}: the mapping {it.clash} gives devices {_PROTS[it.value]} access only",
        "map it with the prot that the device needs",
        errno=_errno.EPERM,
    )


def _pinned(it: _Failure) -> Exception:
    owners = ", ".join(
        f"{name} ({pins} in {iova:#x}-{iova + size - 1:#x})" for name, _owner, pins, iova, size in it.holders[:8]
    )
    if not it.holders:
        owners = "nobody is left to be named, so the last pin has just gone; try again"
    if len(it.holders) > 8:
        owners += f" and {len(it.holders) - 8} more"
    return it.error(
        PinnedError,
        f"{it.operation}: {it.asked} has pins; their owners did not let go in time: {owners}",
        "the mappings are as they were; unpin, or give the owners' callbacks a longer timeout",
    )


def _is_unmapping(it: _Failure) -> Exception:
    return it.error(
        UnmappingError,
        f"{it.operation}: the mapping {it.clash} is {it.state} by somebody else",
        "wait for that to end; an unmap callback must only let go of its pins",
    )


def _in_steps(it: _Failure) -> Exception:
    return StateError(
        f"{it.object}: {it.operation}() would pass by its mappers that are written in Python; "
        "call the AddressSpace's map() and unmap(). Nothing was changed"
    )


def _not_pinned(it: _Failure) -> Exception:
    return UnpinError(
        f"{it.object}: owner {it.value} does not have a pin on every page of {it.asked}: "
        f"look at IOVA {it.clash_first:#x}. Nothing was unpinned"
    )


def _too_many_pins(it: _Failure) -> Exception:
    return it.error(
        NoSpaceError,
        f"the page at IOVA {it.clash_first:#x} has {it.value} pins already, the most that can be counted",
    )


def _no_owner(it: _Failure) -> Exception:
    return StateError(f"{it.object}: there is no owner {it.value}; add_owner() makes one")


def _owner_holds(it: _Failure) -> Exception:
    return it.error(PinnedError, f"the owner still holds {it.value} pins", "unpin them first")


def _no_mapper(it: _Failure) -> Exception:
    return StateError(f"{it.object}: there is no kernel mapper {it.value}")


def _outcome(it: _Failure) -> str:
    if it.clash_state < 0:
        return ""
    return f"; the mapping {it.clash} is now {it.state}"


def _kernel(it: _Failure) -> Exception:
    mapping = f"IOVA {it.clash_first:#x}-{it.clash_last:#x}"
    detail = f"{mapping}{_outcome(it) if it.operation != 'replay' else ''}"
    if it.errno == _errno.ENOMEM and "UNMAP" not in str(it.call):
        detail += "; " + describe_memlock(it.clash_last - it.clash_first + 1)
    return from_errno(it.errno, call=str(it.call), object=it.object, detail=detail)


def _short(it: _Failure) -> Exception:
    size = it.clash_last - it.clash_first + 1
    return it.error(
        NotMappedError,
        f"{it.call}: the kernel unmapped {it.value:#x} of {size:#x} bytes at {it.clash_first:#x}{_outcome(it)}",
        "something else unmapped it behind the book's back; resync() sorts it out",
    )


def _no_address(it: _Failure) -> Exception:
    where = f"the memory of mapping {it.clash}" if it.clash_state >= 0 else "the memory of some mapping"
    return it.error(
        BusyError,
        f"{it.operation}: {where} has no valid address now (lose_addresses() was called)",
        "set_address() says where it is",
    )


def _revoked(it: _Failure) -> Exception:
    return it.error(
        RevokedError,
        f"{it.operation}: the device memory behind the mapping {it.clash} was taken away",
        "remap() brings it back once its device decodes memory again",
    )


def _has_address(it: _Failure) -> Exception:
    return it.error(
        BusyError,
        f"{it.operation}: the memory of mapping {it.clash} has an address",
        "lose_addresses() comes before set_address()",
    )


_MAKERS: dict[str, Callable[[_Failure], Exception]] = {
    "bad_size": _bad_size,
    "bad_prot": _bad_prot,
    "bad_alignment": _bad_alignment,
    "bad_ranges": _bad_ranges,
    "bad_kind": _bad_kind,
    "overlap": _overlap,
    "busy": _busy,
    "outside": _outside,
    "excluded": _excluded,
    "over_limit": _over_limit,
    "no_space": _no_space,
    "too_many": _too_many,
    "not_mapped": _not_mapped,
    "cuts": _cuts,
    "no_access": _no_access,
    "pinned": _pinned,
    "is_unmapping": _is_unmapping,
    "in_steps": _in_steps,
    "not_pinned": _not_pinned,
    "too_many_pins": _too_many_pins,
    "no_owner": _no_owner,
    "owner_holds": _owner_holds,
    "no_mapper": _no_mapper,
    "kernel": _kernel,
    "short": _short,
    "no_address": _no_address,
    "has_address": _has_address,
    "revoked": _revoked,
}


Details = tuple[int, int, int, int, int, int, str | None, int, int]


def failure(reason: str, space: str, operation: str, details: Details, holders: Sequence[Holder] | None) -> Exception:
    """Make the exception for a reason of native/iova/space.h (``enum vfiopy_result``, in small letters).

    Args:
        reason: which.
        space: name of the book.
        operation: name of the method.
        details: asked first and last, clash first, last and state, value, call, errno, token of the mapper.
        holders: owners of pins that are in the way.
    """
    return _MAKERS[reason](_Failure(space, operation, *details, holders or ()))
