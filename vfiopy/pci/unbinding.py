"""Taking functions off VFIO, whoever bound them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vfiopy.errors import DeviceInUseError, NotBoundError, VfioError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.discovery import function as find_function
from vfiopy.pci.function import Function, is_vfio_driver
from vfiopy.pci.permissions import take_back
from vfiopy.pci.rebind import settle
from vfiopy.pci.records import Record, Records, State
from vfiopy.pci.system import System

__all__ = ["clear_override", "unbind"]


def unbind(
    target: PciAddress | str | Function | Iterable[PciAddress | str | Function],
    *,
    whole_group: bool = False,
    force: bool = False,
    state_dir: Path | str | None = None,
    system: System | None = None,
) -> list[Function]:
    """Take functions off VFIO and let their own drivers have them.

    Where vfiopy bound a function, what it was before comes back, as by :func:`restore`. Else its override goes, and
    the kernel chooses a driver as it would for a new device; that may be none.

    Args:
        target: an address or function, or several.
        whole_group: all of the IOMMU group that VFIO holds.
        force: go on although virtual functions of it are enabled; they go.
        state_dir: folder of records, as for :func:`bind`.
        system: other roots than /sys, /proc and /dev.

    Returns:
        The functions that were taken off VFIO.

    Raises:
        NotBoundError: VFIO does not hold it.
        DeviceInUseError: it has virtual functions.
        BusyError, BindingError, PermissionDeniedError: of the first function that could not be taken off; the others
            were tried all the same.
    """
    system = System() if system is None else system
    several = [target] if isinstance(target, PciAddress | str | Function) else list(target)
    wanted = [one if isinstance(one, Function) else find_function(one, system=system) for one in several]
    for one in wanted:
        _check(one, force)
    if whole_group:
        wanted = [other for one in wanted for other in (one, *one.group_members()) if other.is_vfio]
    functions = list(dict.fromkeys(wanted))
    for one in functions:
        _check(one, force)
    records = Records(None if state_dir is None else Path(state_dir), system)
    done: list[Function] = []
    first_error: VfioError | None = None
    with records.lock():
        for one in functions:
            try:
                _take_off(one, records.read(one.address), records)
            except VfioError as error:
                first_error = first_error or error
            else:
                done.append(one)
    if first_error is not None:
        if done:
            first_error.add_note(f"taken off VFIO: {', '.join(map(str, done))}")
        raise first_error
    return done


def _check(function: Function, force: bool) -> None:
    if not function.is_vfio:
        driver = function.driver
        raise NotBoundError(
            f"VFIO does not hold it: {f'it is bound to {driver}' if driver else 'it is bound to no driver'}",
            errno=errno.ENODEV,
            object=str(function),
            call="unbind",
            hint=f"vfiopy bind {function} would hand it over; vfiopy restore undoes what vfiopy did",
        )
    if function.sriov_numvfs and not force:
        raise DeviceInUseError(
            f"its virtual functions are enabled ({', '.join(map(str, function.virtual_functions()))})",
            object=str(function),
            call="unbind",
            hint=f"echo 0 > {function.sysfs}/sriov_numvfs, or say force=True, which does it",
        )


def _take_off(function: Function, record: Record | None, records: Records) -> None:
    before = State(None, None)
    # VFIO had it when the record was made (for a user's nodes, say): that is no driver to go back to.
    known = record is not None and not is_vfio_driver(record.before.driver)
    if record is not None and known:
        # An override to VFIO (of a rule for each boot) would hand it back at the next probe.
        kept = None if is_vfio_driver(record.before.override) else record.before.override
        before = replace(record.before, override=kept)
    settle(function, before)
    if record is not None:
        take_back(record, records)
        records.remove(function.address)
    if not known:
        try:
            function.system.write(function.system.pci / "drivers_probe", str(function))
        except OSError:
            return  # no driver wants it; it is off VFIO all the same


def clear_override(
    target: PciAddress | str | Function, *, state_dir: Path | str | None = None, system: System | None = None
) -> None:
    """Clear a function's driver_override and leave its driver as it is; :func:`restore` brings the override back.

    Args:
        target: the function.
        state_dir: folder of records, as for :func:`bind`.
        system: other roots than /sys, /proc and /dev.

    Raises:
        BindingError, PermissionDeniedError: it cannot be cleared, or not be written down.
    """
    system = System() if system is None else system
    function = target if isinstance(target, Function) else find_function(target, system=system)
    records = Records(None if state_dir is None else Path(state_dir), system)
    with records.lock():
        now = State.of(function)
        if now.override is None:
            return
        if records.read(function.address) is None:
            # Virtual functions were not touched: whoever changes their number later means it.
            kept = replace(now, numvfs=None, vfs=())
            records.write(Record(function.address, kept, function.driver or "", os.getpid()))
        settle(function, replace(now, override=None, numvfs=None, vfs=()))
