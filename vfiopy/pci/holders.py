"""Which processes have a device node open."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vfiopy.pci.function import Function
from vfiopy.pci.system import System

__all__ = ["Holder", "node_holders", "vfio_holders"]

_VFIO_DEVICE = "anon_inode:[vfio-device]"
_SYSPATH = "vfio-device-syspath:"

_Test = Callable[[int, str, str], bool]


@dataclass(frozen=True, slots=True)
class Holder:
    """A process with an open file.

    Attributes:
        pid: process id.
        command: its name.
        node: what it has open.
    """

    pid: int
    command: str
    node: str

    def __str__(self) -> str:
        here = ", this process" if self.pid == os.getpid() else ""
        return f"process {self.pid} ({self.command}{here}) has {self.node} open"


def node_holders(system: System, nodes: Iterable[Path]) -> list[Holder]:
    """Processes that have one of the nodes open, as far as this user may see them."""
    paths = {str(node) for node in nodes}
    numbers = {number for path in paths if (number := _number(path)) is not None}

    def is_one(_pid: int, _fd: str, target: str) -> bool:
        if target in paths:
            return True
        # another mount of /dev, a container's say, has the same device under another path
        return "/dev/" in target and bool(numbers) and _number(target) in numbers

    return _scan(system, is_one) if paths else []


def vfio_holders(function: Function) -> list[Holder]:
    """Processes that use a function through VFIO: its group, its character device, or a device file of it."""
    system = function.system
    nodes = {str(node) for node in (function.group_node, function.cdev_node) if node is not None}
    real = str(function.sysfs.resolve())

    def is_one(pid: int, fd: str, target: str) -> bool:
        if target in nodes:
            return True
        if target != _VFIO_DEVICE:
            return False
        # since 6.18 the file says which device it is (drivers/vfio/vfio_main.c)
        info = system.text(system.proc / str(pid) / "fdinfo" / fd) or ""
        return any(
            line.removeprefix(_SYSPATH).strip() == real for line in info.splitlines() if line.startswith(_SYSPATH)
        )

    return _scan(system, is_one)


def _number(path: str) -> int | None:
    try:
        return os.stat(path).st_rdev or None  # noqa: PTH116
    except OSError:
        return None


def _scan(system: System, is_one: _Test) -> list[Holder]:
    found = []
    for pid in system.processes():
        folder = system.proc / str(pid)
        seen: set[str] = set()
        try:
            fds = system.names(folder / "fd")
        except (PermissionError, ProcessLookupError):
            continue
        for fd in fds:
            try:
                target = os.readlink(folder / "fd" / fd)  # noqa: PTH115
                if target in seen or not is_one(pid, fd, target):
                    continue
            except OSError:
                continue
            seen.add(target)
            found.append(Holder(pid, system.text(folder / "comm") or "?", target))
    return found
