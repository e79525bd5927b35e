"""Binding functions to vfio-pci, or another driver, and undoing it, even after a crash."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from vfiopy.errors import (
    BindingError,
    DeviceInUseError,
    ForkedError,
    NotViableError,
    VfioError,
)
from vfiopy.pci.address import PciAddress
from vfiopy.pci.discovery import function as find_function
from vfiopy.pci.function import Function, is_vfio_driver
from vfiopy.pci.permissions import take_back
from vfiopy.pci.rebind import settle, wait_for_node
from vfiopy.pci.records import Record, Records, State
from vfiopy.pci.system import System
from vfiopy.pci.usage import uses

__all__ = ["Binding", "bind", "restore"]

_Target = PciAddress | str | Function


class Binding:
    """Functions that were bound, and the way back.

    A context manager: leaving it undoes the binding. Nothing happens when it is merely dropped, so that a
    program may bind and end; :func:`restore` undoes that later, from any process.

    Threads: may be shared; ``undo()`` in several is as once.
    """

    def __init__(self, driver: str, functions: tuple[Function, ...], records: Records) -> None:
        self.driver = driver
        self.functions = functions
        self._records = records
        self._pid = os.getpid()
        self._before: list[tuple[Function, State, bool]] = []  # and whether the record is this binding's

    @property
    def changed(self) -> tuple[Function, ...]:
        """Functions that were bound to something else before, and have not been put back."""
        return tuple(one for one, _, _ in self._before)

    def undo(self) -> None:
        """Put driver, driver_override and number of virtual functions back as they were. Safe to call twice.

        Raises:
            BusyError: a device is still open; close it and call again.
            BindingError: the old driver does not take it back; the record stays, for :func:`restore`.
            ForkedError: called in a forked child.
        """
        if self._pid != os.getpid():
            raise ForkedError(f"binding of {self} belongs to process {self._pid}; undo it there")
        with self._records.lock():
            while self._before:
                function, before, own = self._before[-1]
                record = self._records.read(function.address)
                # No record: somebody restored it meanwhile.
                if record is not None and function.exists:
                    settle(function, before)
                if own:
                    if record is not None:
                        take_back(record, self._records)
                    self._records.remove(function.address)
                self._before.pop()

    def close(self) -> None:
        """:meth:`undo`; does nothing in a forked child."""
        if self._pid == os.getpid():
            self.undo()

    def _bind(self, function: Function) -> None:
        """Bind one function; bind() holds the lock."""
        if function.driver == self.driver:  # another process was faster
            return
        now = State.of(function)
        old = self._records.read(function.address)
        # A crash in the middle left it without a driver: what it was before that is what to go back to.
        adopt = old is not None and function.driver is None
        # Bound by us and not undone: the older record leads further back; this way back stays in memory.
        own = old is None or adopt or function.driver != old.wanted
        before = old.before if old is not None and adopt else now
        self._before.append((function, before, own))
        if own:
            nodes = () if old is None else old.nodes
            self._records.write(Record(function.address, before, self.driver, os.getpid(), nodes))
        elif old is not None and old.before.numvfs is None and now.numvfs:
            # Made for an override or nodes, it says nothing about the virtual functions that go now.
            self._records.write(replace(old, before=replace(old.before, numvfs=now.numvfs, vfs=now.vfs)))
        settle(function, State(self.driver, self.driver, numvfs=0 if now.numvfs else None))

    def _roll_back(self, error: BaseException) -> NoReturn:
        """Put all back, under the lock that bind() holds; then raise what went wrong, and how this went."""
        failed = []
        while self._before:
            function, before, own = self._before.pop()
            try:
                if function.exists:
                    settle(function, before)
                if own:
                    record = self._records.read(function.address)
                    if record is not None:  # it has the nodes of a binding that was cut short
                        take_back(record, self._records)
                    self._records.remove(function.address)
            except VfioError as second:
                failed.append(f"{function}: {second.meaning}")
        outcome = "everything was put back"
        if failed:
            outcome = f"putting it back failed too ({'; '.join(failed)}); vfiopy.restore() tries again"
        if not isinstance(error, VfioError):
            error.add_note(f"binding was interrupted; {outcome}")
            raise error
        raise type(error)(
            f"{error.meaning}; {outcome}",
            errno=error.errno,
            object=error.object,
            call=error.call,
            hint=error.hint,
        ) from error

    def previous_driver(self, function: Function) -> str | None:
        """The driver that a function had before; its present one where it was left alone, or after ``keep()``."""
        return next((before.driver for one, before, _ in self._before if one == function), function.driver)

    def keep(self) -> None:
        """Leave the functions bound when the ``with`` block ends; :func:`restore` can still undo it."""
        self._before.clear()

    def __bool__(self) -> bool:
        return bool(self._before)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return ", ".join(map(str, self.functions))

    def __repr__(self) -> str:
        return f"<Binding {self} to {self.driver}{'' if self else ' (nothing to undo)'}>"


def bind(
    target: _Target | Iterable[_Target],
    driver: str = "vfio-pci",
    *,
    whole_group: bool = False,
    force: bool = False,
    timeout: float = 2.0,
    state_dir: Path | str | None = None,
    system: System | None = None,
) -> Binding:
    """Bind functions to a driver; those that it holds already stay as they are.

    How each function was bound is written down before the first change. If a step fails, or the program is
    interrupted, all functions are put back before the exception leaves.

    Args:
        target: an address or function, or several.
        driver: the driver; ``"vfio-pci"`` or one of its variants makes the functions usable from here.
        whole_group: bind the rest of the IOMMU group too, without bridges and what another VFIO driver has.
        force: go on although the running system uses a function, or the group would not be viable.
        timeout: how long to wait for the VFIO node to appear, in seconds.
        state_dir: folder of records; None takes ``$VFIOPY_STATE_DIR``, else /run/vfiopy for root, else
            ``$XDG_RUNTIME_DIR/vfiopy``.
        system: other roots than /sys, /proc and /dev.

    Raises:
        DeviceNotFoundError, PciAddressError: no such function.
        DeviceInUseError: a function carries something that the running system needs.
        NotViableError: another driver would keep a member of the group, so VFIO could not use it.
        BusyError: a process has the device open through VFIO.
        PermissionDeniedError: not root.
        BindingError: a step failed.
    """
    system = System() if system is None else system
    several = [target] if isinstance(target, PciAddress | str | Function) else list(target)
    wanted = [one if isinstance(one, Function) else find_function(one, system=system) for one in several]
    named = set(wanted)
    if whole_group:
        wanted = [one for first in wanted for one in first.group_members() if one == first or not one.is_bridge]
    functions = tuple(dict.fromkeys(wanted))
    records = Records(None if state_dir is None else Path(state_dir), system)
    binding = Binding(driver, functions, records)
    # A member that another VFIO driver has is viable; it may be in use there, and that driver can do more for it.
    fine = {one for one in functions if one not in named and one.is_vfio and is_vfio_driver(driver)}
    todo = [one for one in functions if one.driver != driver and one not in fine]
    _check_driver(driver, functions, system)
    for one in todo:
        _check_function(one, driver, force)
    if is_vfio_driver(driver) and not force:
        _check_groups(functions)
    if todo:
        with records.lock():
            try:
                for one in todo:
                    binding._bind(one)
                if is_vfio_driver(driver):
                    for one in functions:
                        wait_for_node(one, timeout)
            except BaseException as error:
                binding._roll_back(error)
    return binding


def restore(
    address: PciAddress | str | None = None,
    *,
    state_dir: Path | str | None = None,
    system: System | None = None,
) -> list[PciAddress]:
    """Undo bindings that were never undone: after a crash, or because a program bound and ended.

    Args:
        address: one function; None undoes all that there is a record of.
        state_dir: folder of records, as for :func:`bind`.
        system: other roots than /sys, /proc and /dev.

    Returns:
        The functions that were put back, maybe none. Calling it again does nothing.

    Raises:
        BusyError, BindingError, PermissionDeniedError: of the first function that could not be put back; the
            others were tried all the same, and records of failures stay.
    """
    system = System() if system is None else system
    records = Records(None if state_dir is None else Path(state_dir), system)
    done: list[PciAddress] = []
    first_error: VfioError | None = None
    with records.lock():
        chosen = records.addresses() if address is None else [PciAddress.parse(address)]
        for one in chosen:
            try:
                record = records.read(one)
                if record is None:
                    continue
                function = Function(one, system)
                if function.exists:
                    settle(function, record.before)
                    done.append(one)
                take_back(record, records)
                records.remove(one)
            except VfioError as error:
                first_error = first_error or error
    if first_error is not None:
        if done:
            first_error.add_note(f"put back: {', '.join(map(str, done))}")
        raise first_error
    return done


# --- checks before the first change ---


def _check_driver(driver: str, functions: tuple[Function, ...], system: System) -> None:
    if not system.driver(driver).is_dir():
        raise BindingError(
            f"no PCI driver named '{driver}' is registered",
            errno=errno.ENOENT,
            object=", ".join(map(str, functions)),
            call="bind",
            hint=f"load it: modprobe {driver}",
        )
    if not is_vfio_driver(driver):
        return
    noiommu = system.text(system.sys / "module/vfio/parameters/enable_unsafe_noiommu_mode") == "Y"
    for one in functions:
        if one.header_type:
            raise BindingError(
                "it is a bridge; VFIO drives functions only",
                object=str(one),
                call="bind",
                hint="bind the functions behind it; a bridge does not keep their group from being viable",
            )
        if one.iommu_group is None and not noiommu:
            raise BindingError(
                "it has no IOMMU group: the IOMMU is off or there is none",
                object=str(one),
                call="bind",
                hint="switch VT-d or AMD-Vi on in the firmware; Intel may need intel_iommu=on on the "
                "kernel's command line",
            )


def _check_function(function: Function, driver: str, force: bool) -> None:
    reasons = [] if force else uses(function)
    if reasons:
        raise DeviceInUseError(
            f"{function.driver or 'the system'} uses it: {'; '.join(reasons)}",
            object=str(function),
            call=f"bind to {driver}",
            hint="unmount, take down or stop that first, or say force=True if the system can do without",
        )


def _check_groups(functions: tuple[Function, ...]) -> None:
    for one in functions:
        others = [other for other in one.group_blockers() if other not in functions]
        if others:
            names = ", ".join(f"{other} ({other.driver}: {other.class_name})" for other in others)
            bridges = [str(other) for other in others if other.is_bridge]
            raise NotViableError(
                f"other drivers would keep a part of IOMMU group {one.iommu_group}: {names}",
                object=str(one),
                call="bind",
                hint=(
                    f"{bridges[0]} is a bridge with a driver: unbind it by hand if the system can do without"
                    if bridges
                    else "say whole_group=True, or bind those too; one group is one unit of isolation"
                ),
            )
