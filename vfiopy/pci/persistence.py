"""Bindings for each boot: a udev rule of vfiopy's own, or driverctl's file where that is installed.

What is not vfiopy's is never overwritten or removed. A rule says whose it is in its first line; driverctl's file
holds a driver's name and nothing else, so a hidden file beside it says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vfiopy.errors import BindingError, PciAddressError, PermissionDeniedError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.permissions import check_rule_names, udev_rule
from vfiopy.pci.system import System

__all__ = ["Persisted", "check_persist", "forget", "persist", "persisted"]

_TAG = "# vfiopy: "
_PREFIX, _SUFFIX = "70-vfiopy-", ".rules"


@dataclass(frozen=True, slots=True)
class Persisted:
    """What makes a function's binding outlive a restart.

    Attributes:
        path: the file.
        driver: the driver that it is for; None for a rule of permissions alone.
        own: vfiopy made it.
    """

    path: Path
    driver: str | None
    own: bool


def persisted(address: PciAddress | str, *, system: System | None = None) -> tuple[Persisted, ...]:
    """The files that bind a function at each boot: vfiopy's rule, and driverctl's file, whoever made it."""
    system, where = System() if system is None else system, PciAddress.parse(address)
    found = []
    rule, (saved, mark) = _rule(system, where), _driverctl(system, where)
    text = _text(rule)
    if text is not None:
        first = text.partition("\n")[0]
        driver = first.rpartition(" to ")[2].partition(" ")[0] if " to " in first else None
        found.append(Persisted(rule, driver, text.startswith(_TAG)))
    text = _text(saved)
    if text is not None:
        found.append(Persisted(saved, text.strip(), _text(mark) == _mark_text(saved, saved.stat())))
    return tuple(found)


def check_persist(
    address: PciAddress | str,
    driver: str = "vfio-pci",
    *,
    user: str | None = None,
    group: str | None = None,
    system: System | None = None,
) -> None:
    """Look whether :func:`persist` would refuse, before anything is changed.

    Args:
        address: the function.
        driver: the driver.
        user: name of who may open it.
        group: name of the group that may open it.
        system: other roots than /sys, /proc, /dev and /etc.

    Raises:
        BindingError: somebody else's file is there.
        ValueError: not the name of a driver, user or group.
    """
    system, where = System() if system is None else system, PciAddress.parse(address)
    check_rule_names(user, group)
    if not re.fullmatch(r"[\w.+-]+", driver):
        raise ValueError(f"{driver!r} is not the name of a driver")
    rule, (saved, _) = _rule(system, where), _driverctl(system, where)
    for one in persisted(where, system=system):
        if not one.own and (one.path == rule or one.driver != driver):
            raise BindingError(
                f"somebody else's file is there: {one.path}" + (f", for {one.driver}" if one.driver else ""),
                errno=errno.EEXIST,
                object=str(where),
                hint=f"driverctl unset-override {where}" if one.path == saved else "move it away, or remove it",
            )


def persist(
    address: PciAddress | str,
    driver: str = "vfio-pci",
    *,
    whole_group: bool = False,
    user: str | None = None,
    group: str | None = None,
    system: System | None = None,
) -> tuple[Path, ...]:
    """Bind a function to a driver at each boot, and give its nodes to a user or group then.

    The rule sets the function's override before its own driver is looked for, and runs ``vfiopy bind`` for one that
    has a driver already; that refuses what the running system uses. So a disk with a mounted root stays.

    Args:
        address: the function.
        driver: the driver.
        whole_group: its IOMMU group has others that are bound at each boot, too. They go together: one by one each
            would be refused because of the others.
        user: name of who may open it.
        group: name of the group that may open it.
        system: other roots than /sys, /proc, /dev and /etc.

    Returns:
        The files that were written.

    Raises:
        BindingError: somebody else's file is there, or cannot be written.
        PermissionDeniedError: not root.
        ValueError: not the name of a driver, user or group.
    """
    system, where = System() if system is None else system, PciAddress.parse(address)
    check_persist(where, driver, user=user, group=group, system=system)
    rule, (saved, mark) = _rule(system, where), _driverctl(system, where)
    use_driverctl = _has_driverctl(system)
    lines = [f"{_TAG}{where} to {driver} at each boot; 'vfiopy unbind --persist {where}' removes this file"]
    if use_driverctl:
        lines = [f"{_TAG}nodes of {where}; 'vfiopy unbind --persist {where}' removes this file"]
    else:
        together = "--group " if whole_group else ""
        lines.append(
            f'ACTION=="add", SUBSYSTEM=="pci", KERNEL=="{where}", ATTR{{driver_override}}="{driver}", '
            f'RUN{{builtin}}+="kmod load {driver}", '
            f'RUN+="{_python()} -m vfiopy bind {together}--driver {driver} {where}"'
        )
    text = "\n".join(lines) + "\n"
    if user is not None or group is not None:
        text += udev_rule(where, group, user=user)
    written = []
    try:
        if use_driverctl:
            if (_text(saved) or "").strip() != driver:
                # The mark comes first: after a crash in between it claims nothing that is there.
                _write(saved, f"{driver}\n", lambda made: _write(mark, _mark_text(saved, made)))
            written.append(saved)
        if not use_driverctl or user is not None or group is not None:
            _write(rule, text)
            written.append(rule)
        elif (_text(rule) or "").startswith(_TAG):
            rule.unlink()  # of before driverctl was there, or for a user of before
    except OSError as error:
        raise _failed(error, where, "written") from error
    return tuple(written)


def forget(address: PciAddress | str | None = None, *, system: System | None = None) -> tuple[Path, ...]:
    """Remove vfiopy's files that bind a function, or all functions, at each boot; others' files stay.

    Returns:
        The files that were removed.

    Raises:
        PermissionDeniedError: not root.
    """
    system = System() if system is None else system
    several = _own(system) if address is None else [PciAddress.parse(address)]
    removed = []
    for where in several:
        mark = _driverctl(system, where)[1]
        try:
            for one in persisted(where, system=system):
                if one.own:
                    one.path.unlink()
                    removed.append(one.path)
            mark.unlink(missing_ok=True)
        except OSError as error:
            raise _failed(error, where, "removed") from error
    return tuple(removed)


def _own(system: System) -> list[PciAddress]:
    names = [
        name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
        for name in system.names(system.etc / "udev/rules.d")
        if name.startswith(_PREFIX)
    ]
    names += [
        name.removeprefix(".pci-").removesuffix(".vfiopy")
        for name in system.names(system.etc / "driverctl.d")
        if name.endswith(".vfiopy")
    ]
    found = []
    for name in names:
        with contextlib.suppress(PciAddressError):
            found.append(PciAddress.parse(name))
    return sorted(set(found))


def _rule(system: System, where: PciAddress) -> Path:
    return system.etc / "udev/rules.d" / f"{_PREFIX}{where}{_SUFFIX}"


def _driverctl(system: System, where: PciAddress) -> tuple[Path, Path]:
    """driverctl's file for a function, and the mark that it is ours."""
    folder = system.etc / "driverctl.d"
    return folder / f"pci-{where}", folder / f".pci-{where}.vfiopy"


def _mark_text(saved: Path, made: os.stat_result) -> str:
    # With the file's time: one that driverctl wrote later, under the same name, is not ours.
    return f"{_TAG}{saved.name} of {made.st_mtime_ns} is vfiopy's\n"


def _has_driverctl(system: System) -> bool:
    if (system.etc / "driverctl.d").is_dir():
        return True
    return system.is_this_machine and shutil.which("driverctl") is not None


def _python() -> str:
    # udev splits words as a shell does, and gives % and $ a meaning of its own
    return shlex.quote(sys.executable).replace("%", "%%").replace("$", "$$")


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _write(path: Path, text: str, first: Callable[[os.stat_result], None] | None = None) -> None:
    """All of the file or none, on disk; ``first`` is told what it will be, before it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.chmod(0o644)
        if first is not None:
            first(fresh.stat())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def _failed(error: OSError, where: PciAddress, what: str) -> BindingError | PermissionDeniedError:
    refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    kind = PermissionDeniedError if refused else BindingError
    return kind(
        f"{error.filename} cannot be {what}: {error.strerror}",
        errno=error.errno,
        object=str(where),
        hint="run as root, on a file system that is writable" if refused else "",
    )
