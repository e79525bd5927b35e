"""One function from the binding it has to the binding it should have, step by step, from wherever it is now.

Each step looks first and acts only where something differs. So the same code binds, rolls back, undoes, and
restores what a crash left half done. In the order of steps, no other driver can ever take the function.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path

from vfiopy.errors import BindingError, BusyError, PermissionDeniedError
from vfiopy.pci.function import Function, is_vfio_driver
from vfiopy.pci.holders import vfio_holders
from vfiopy.pci.records import State

__all__ = ["settle", "wait_for_node"]

_PROBES = 4
_PAUSE = 0.05  # seconds before the second probe; doubles
_POLL = 0.01


def settle(function: Function, wanted: State) -> None:
    """Give a function the binding that is wanted; do nothing where it has it.

    Raises:
        BusyError: a process uses it, or a virtual function that would go, through VFIO; unbinding would hang until
            that ends.
        BindingError, PermissionDeniedError: a step failed; nothing after it was done.
    """
    if function.driver != wanted.driver:
        # Its driver's leaving, or vfio-pci's refusal of a PF with VFs, must not meet live VFs.
        _set_vfs(function, 0)
        _set_override(function, wanted.driver if wanted.driver is not None else wanted.override)
        _unbind(function)
        if wanted.driver is not None:
            _probe(function, wanted.driver)
    _set_override(function, wanted.override)
    if wanted.numvfs is not None:
        _set_vfs(function, wanted.numvfs)
    for address, state in wanted.vfs:
        virtual = Function(address, function.system)
        if virtual.exists:
            settle(virtual, state)


def _write(function: Function, path: Path, text: str) -> None:
    try:
        function.system.write(path, text)
    except OSError as error:
        what = f"writing '{text.strip()}' to {path.name} failed"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionDeniedError(
                what,
                errno=error.errno,
                object=str(function),
                call=path.name,
                hint="binding drivers takes root and a sysfs that is mounted read-write; "
                "do it once as root, then grant() the device to a user",
            ) from error
        raise BindingError(what, errno=error.errno, object=str(function), call=path.name) from error


def _set_override(function: Function, value: str | None) -> None:
    if function.driver_override != value:
        # a lone newline clears it
        _write(function, function.sysfs / "driver_override", f"{value or ''}\n")


def _set_vfs(function: Function, count: int) -> None:
    now = function.sriov_numvfs
    if now is None or now == count:
        return
    path = function.sysfs / "sriov_numvfs"
    for virtual in function.virtual_functions():
        _check_closed(virtual)
    if now:  # the kernel changes the number only through 0
        _write(function, path, "0")
    if count:
        _write(function, path, str(count))
    now = function.sriov_numvfs
    if now != count:
        raise BindingError(f"{count} virtual functions were asked for, {now} are enabled", object=str(function))


def _check_closed(function: Function) -> None:
    holders = vfio_holders(function) if function.is_vfio else []
    if holders:
        raise BusyError(
            f"it is used through VFIO: {'; '.join(map(str, holders))}",
            object=str(function),
            call="unbind",
            hint="close the device there first; the kernel would wait for that without end",
        )


def _unbind(function: Function) -> None:
    driver = function.driver
    if driver is None:
        return
    _check_closed(function)
    try:
        _write(function, function.system.driver(driver) / "unbind", str(function))
    except BindingError:
        if function.driver is not None:
            raise
    if function.driver == driver:
        raise BindingError(f"{driver} did not let go of it", object=str(function), call="unbind")


def _probe(function: Function, driver: str) -> None:
    system = function.system
    pause = _PAUSE
    for attempt in range(_PROBES):
        if attempt:
            time.sleep(pause)
            pause *= 2
        try:
            _write(function, system.pci / "drivers_probe", str(function))
        except BindingError as error:
            if error.errno == errno.ENODEV:  # the function is gone
                raise
        if function.driver == driver:
            return
    # drivers_probe keeps the driver's reason to itself; bind tells
    try:
        system.write(system.driver(driver) / "bind", str(function))
    except OSError as error:
        if function.driver == driver:
            return
        raise BindingError(
            f"{driver} does not take it: its probe failed",
            errno=error.errno,
            object=str(function),
            call="bind",
            hint=_probe_hint(driver, error.errno or 0),
        ) from error
    if function.driver != driver:
        raise BindingError(f"bound to {function.driver}, not to {driver}", object=str(function), call="bind")


def _probe_hint(driver: str, number: int) -> str:
    if number == errno.ENOENT:
        return f"the driver is not registered: modprobe {driver}"
    if is_vfio_driver(driver):
        if number == errno.EINVAL:
            return (
                "either its IOMMU is off or not cache-coherent, or vfio-pci's denylist has it "
                "(module parameter disable_denylist); dmesg says which"
            )
        if number == errno.EBUSY:
            return "virtual functions are enabled: write 0 to sriov_numvfs first"
        if number == errno.ENODEV:
            return "another driver_override is set, or the function went away"
    return "dmesg has the driver's own words"


def wait_for_node(function: Function, timeout: float) -> None:
    """Wait until a node exists through which a function bound to VFIO can be opened.

    Args:
        function: the function.
        timeout: in seconds.

    Raises:
        BindingError: none appeared; says why.
    """
    deadline = time.monotonic() + timeout
    while True:
        nodes = [node for node in (function.cdev_node, function.group_node) if node is not None]
        if any(node.exists() for node in nodes):
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL)
    if nodes:
        raise BindingError(
            f"the kernel has its node but {' and '.join(map(str, nodes))} did not appear",
            errno=errno.ENOENT,
            object=str(function),
            hint="this /dev is a stale copy, as in some containers; compare with the host's",
        )
    raise BindingError(
        f"bound to {function.driver}, but VFIO made no group and no character device for it",
        errno=errno.ENOENT,
        object=str(function),
        hint="the kernel needs CONFIG_VFIO_GROUP or CONFIG_VFIO_DEVICE_CDEV, and an IOMMU",
    )
