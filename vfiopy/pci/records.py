"""What a function's binding was, written down before it is changed, so that a crash can be undone.

One JSON file for each function, in a folder that does not outlive the boot (the kernel forgets bindings too).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vfiopy.errors import BindingError, PermissionDeniedError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.function import Function
from vfiopy.pci.system import System

__all__ = ["NodeState", "Record", "Records", "State", "state_folder"]

_FORMAT = 1
_no_flock = threading.Lock()


@dataclass(frozen=True, slots=True)
class State:
    """How a function is bound.

    Attributes:
        driver: the driver that holds it, or None.
        override: its driver_override, or None.
        numvfs: virtual functions that are enabled; None leaves them alone.
        vfs: how those are bound.
    """

    driver: str | None
    override: str | None
    numvfs: int | None = None
    vfs: tuple[tuple[PciAddress, State], ...] = ()

    @classmethod
    def of(cls, function: Function) -> State:
        """How a function is bound now."""
        return cls(
            driver=function.driver,
            override=function.driver_override,
            numvfs=function.sriov_numvfs,
            vfs=tuple((one.address, cls.of(one)) for one in function.virtual_functions()),
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "driver": self.driver,
            "override": self.override,
            "numvfs": self.numvfs,
            "vfs": {str(address): state.to_json() for address, state in self.vfs},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> State:
        """From what :meth:`to_json` made."""
        return cls(
            driver=data["driver"],
            override=data["override"],
            numvfs=data["numvfs"],
            vfs=tuple((PciAddress.parse(name), cls.from_json(one)) for name, one in data["vfs"].items()),
        )


@dataclass(frozen=True, slots=True)
class NodeState:
    """Whose a device node was before it was given to somebody.

    Attributes:
        path: the node.
        number: its device number, so that another node of the same name is not taken for it.
        uid: owner.
        gid: group.
        mode: permissions.
    """

    path: str
    number: int
    uid: int
    gid: int
    mode: int


@dataclass(frozen=True, slots=True)
class Record:
    """What to go back to.

    Attributes:
        address: the function.
        before: how it was bound.
        wanted: the driver that it was being bound to.
        pid: the process that did it.
        nodes: nodes that were given to somebody, as they were.
    """

    address: PciAddress
    before: State
    wanted: str
    pid: int
    nodes: tuple[NodeState, ...] = ()


def state_folder() -> Path:
    """Where records are: ``$VFIOPY_STATE_DIR``, else /run/vfiopy for root, else ``$XDG_RUNTIME_DIR/``."""
    chosen = os.environ.get("VFIOPY_STATE_DIR")
    if chosen:
        return Path(chosen)
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if os.geteuid() == 0 or not runtime:
        return Path("/run/vfiopy")
    return Path(runtime) / "vfiopy"


class Records:
    """The folder of records. Change it, or the binding of a function, only while :meth:`lock` is held."""

    def __init__(self, folder: Path | None, system: System) -> None:
        self.folder = state_folder() if folder is None else folder
        self._boot = system.text(system.proc / "sys/kernel/random/boot_id") or ""

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes and threads that bind out; waits for them."""
        try:
            self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
            fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise PermissionDeniedError(
                f"what is undone after a crash must be written down there first, and that fails: {error}",
                errno=error.errno,
                object=str(self.folder),
                hint="run as root, or name a folder of your own in VFIOPY_STATE_DIR",
            ) from error
        try:
            with contextlib.ExitStack() as held:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno != errno.ENOSYS:
                        raise
                    # built without CONFIG_FILE_LOCKING: threads of this process are all that can be kept out
                    held.enter_context(_no_flock)
                yield
        finally:
            os.close(fd)

    def _path(self, address: PciAddress) -> Path:
        return self.folder / f"{address}.json"

    def read(self, address: PciAddress) -> Record | None:
        """The record of a function, None where there is none from this boot."""
        path = self._path(address)
        try:
            data = json.loads(path.read_bytes())
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']} is not {_FORMAT}")
            nodes = tuple(NodeState(**node) for node in data.get("nodes", ()))
            record = Record(address, State.from_json(data["before"]), data["wanted"], data["pid"], nodes)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BindingError(
                f"the record cannot be read: {error!r}",
                object=str(path),
                hint=f"bind {address} to its driver by hand, then remove the file",
            ) from error
        if data["boot"] != self._boot:
            path.unlink(missing_ok=True)
            return None
        return record

    def write(self, record: Record) -> None:
        """Write a record so that after a crash there is either all of it or none."""
        data = {
            "format": _FORMAT,
            "boot": self._boot,
            "pid": record.pid,
            "wanted": record.wanted,
            "before": record.before.to_json(),
            "nodes": [asdict(node) for node in record.nodes],
        }
        path = self._path(record.address)
        fresh = path.with_suffix(".new")
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            try:
                with os.fdopen(fd, "w", encoding="utf-8") as file:
                    json.dump(data, file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())
                fresh.replace(path)
                self._sync()
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise BindingError(
                f"the way back cannot be written down, so nothing is changed: {error}",
                errno=error.errno,
                object=str(path),
                hint="free space there, or name another folder in VFIOPY_STATE_DIR",
            ) from error

    def remove(self, address: PciAddress) -> None:
        """Forget a function's record, if there is one."""
        path = self._path(address)
        try:
            path.unlink(missing_ok=True)
            self._sync()
        except OSError as error:
            raise BindingError(
                f"the record cannot be removed: {error}",
                errno=error.errno,
                object=str(path),
                hint="remove it by hand",
            ) from error

    def _sync(self) -> None:
        fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def addresses(self) -> list[PciAddress]:
        """Functions that have a record, in order."""
        found = []
        for path in self.folder.glob("*.json"):
            with contextlib.suppress(ValueError):
                found.append(PciAddress.parse(path.stem))
        return sorted(found)
