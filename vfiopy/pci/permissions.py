"""Giving a device to an unprivileged user: nodes, udev rules, and how much memory may be locked."""

from __future__ import annotations

import grp
import os
import pwd
import re
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vfiopy.errors import BindingError, NotBoundError, PermissionDeniedError, VfioError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.discovery import function as find_function
from vfiopy.pci.function import Function
from vfiopy.pci.records import NodeState, Record, Records, State
from vfiopy.pci.system import System

__all__ = ["MemlockLimit", "check_rule_names", "grant", "memlock_limit", "take_back", "udev_rule"]

_CAP_IPC_LOCK = 14  # linux/capability.h
_LET_UDEV = "run as root, or let udev do it: udev_rule() writes the rule"


def grant(
    target: PciAddress | str | Function,
    user: str | int | None = None,
    group: str | int | None = None,
    *,
    state_dir: Path | str | None = None,
    system: System | None = None,
) -> tuple[Path, ...]:
    """Let a user or group open a function that is bound to VFIO, until it is unbound or the machine restarts.

    Whose the nodes were is written down first; undoing the binding, or :func:`vfiopy.restore`, gives them back.

    Its own nodes (``/dev/vfio/N`` and ``/dev/vfio/devices/vfioX``) get the owner or group and mode 0600 or
    0660. ``/dev/iommu``, which all devices share, keeps its owner: the group gets it if it is still root's,
    else everybody may open it, as everybody may open ``/dev/vfio/vfio``; without a device it is of no use.

    Args:
        target: the function.
        user: name or uid that the nodes are to belong to; None keeps the owner.
        group: name or gid that the nodes are to belong to; None keeps it.
        state_dir: folder of records, as for :func:`vfiopy.bind`.
        system: other roots than /sys, /proc and /dev.

    Returns:
        The nodes that were changed.

    Raises:
        NotBoundError: the function has no VFIO node.
        PermissionDeniedError: not the owner of the nodes.
        BindingError: a node cannot be changed. It, and those before it, are as they were.
        LookupError: no such user or group.
        ValueError: neither user nor group.
    """
    if user is None and group is None:
        raise ValueError("grant() needs a user or a group")
    uid = -1 if user is None else pwd.getpwnam(user).pw_uid if isinstance(user, str) else user
    gid = -1 if group is None else grp.getgrnam(group).gr_gid if isinstance(group, str) else group
    function = target if isinstance(target, Function) else find_function(target, system=system)
    nodes = [node for node in (function.group_node, function.cdev_node) if node is not None and node.exists()]
    if not nodes:
        raise NotBoundError(
            f"it has no VFIO node to grant ({function.cdev_missing})",
            object=str(function),
            hint=f"bind it first: vfiopy bind {function}",
        )
    shared = function.system.dev / "iommu"
    also = [shared] if function.cdev_node in nodes and shared.exists() else []
    records = Records(None if state_dir is None else Path(state_dir), function.system)
    changed = []
    with records.lock(), _all_or_none(function, [*nodes, *also], records):
        _write_down(function, [*nodes, *also], records)
        for node in nodes:
            os.chown(node, uid, gid)
            node.chmod(0o600 if gid < 0 else 0o660)
            changed.append(node)
        changed += [node for node in also if _open_up(node, uid, gid)]
    return tuple(changed)


@contextmanager
def _all_or_none(function: Function, nodes: list[Path], records: Records) -> Iterator[None]:
    """Leave nodes and record as they were where giving them away fails, or is interrupted."""
    record = records.read(function.address)
    states = [(node, node.stat()) for node in nodes]
    try:
        yield
    except BaseException as error:
        for node, was in states:
            with suppress(OSError):
                now = node.stat()
                if (now.st_uid, now.st_gid, now.st_mode) != (was.st_uid, was.st_gid, was.st_mode):
                    os.chown(node, was.st_uid, was.st_gid)
                    node.chmod(stat.S_IMODE(was.st_mode))
        if record is None:
            records.remove(function.address)
        else:
            records.write(record)
        if isinstance(error, OSError) and not isinstance(error, VfioError):
            raise _refused(error, function.address, "given away", _LET_UDEV) from error
        raise


def _refused(error: OSError, address: PciAddress, what: str, hint: str) -> BindingError | PermissionDeniedError:
    kind = PermissionDeniedError if isinstance(error, PermissionError) else BindingError
    return kind(
        f"{error.filename} cannot be {what}: {error.strerror}",
        errno=error.errno,
        object=str(address),
        call="chown",
        hint=hint,
    )


def _write_down(function: Function, nodes: list[Path], records: Records) -> None:
    """Whose the nodes are, into the function's record; grant() holds the lock."""
    record = records.read(function.address)
    if record is None:
        # Its virtual functions are not touched: whoever changes their number later means it.
        before = replace(State.of(function), numvfs=None, vfs=())
        record = Record(function.address, before, function.driver or "", os.getpid())
    # A node that several functions share was written down by the first that was granted; that is what it was.
    known = {node.path: node for other in _all(records) for node in other.nodes}
    known |= {node.path: node for node in record.nodes}
    states = []
    for path in nodes:
        now = path.stat()
        old = known.get(str(path))
        if old is None or old.number != now.st_rdev:
            old = NodeState(str(path), now.st_rdev, now.st_uid, now.st_gid, stat.S_IMODE(now.st_mode))
        states.append(old)
    records.write(replace(record, nodes=tuple(states)))


def _all(records: Records) -> Iterator[Record]:
    for address in records.addresses():
        try:
            record = records.read(address)
        except BindingError:  # another function's record that nobody can read
            continue
        if record is not None:
            yield record


def take_back(record: Record, records: Records) -> None:
    """Give the nodes of a record back to whom they belonged, unless another record needs them given away.

    Raises:
        PermissionDeniedError: not the owner of the nodes.
        BindingError: a node cannot be changed.
    """
    others = {node.path for other in _all(records) if other.address != record.address for node in other.nodes}
    for node in record.nodes:
        if node.path in others:
            continue
        try:
            # The kernel removes a node with its device; a new one of the same name was never given away.
            if os.stat(node.path).st_rdev == node.number:  # noqa: PTH116
                os.chown(node.path, node.uid, node.gid)
                os.chmod(node.path, node.mode)  # noqa: PTH101
        except FileNotFoundError:
            continue
        except OSError as error:
            raise _refused(error, record.address, "taken back", "run as root") from error


def _open_up(node: Path, uid: int, gid: int) -> bool:
    now = node.stat()
    owner_may = now.st_uid == uid and now.st_mode & 0o600 == 0o600
    group_may = now.st_gid == gid and now.st_mode & 0o060 == 0o060
    if now.st_mode & 0o006 == 0o006 or owner_may or group_may:
        return False
    if gid > 0 and now.st_gid == 0:
        os.chown(node, -1, gid)
        node.chmod(stat.S_IMODE(now.st_mode) | 0o060)
    else:
        node.chmod(stat.S_IMODE(now.st_mode) | 0o006)
    return True


def check_rule_names(user: str | None, group: str | None) -> None:
    """Raise ``ValueError`` for a name that cannot stand in a udev rule, and for the shell that the rule runs."""
    for name, what in ((user, "user"), (group, "group")):
        if name is not None and not re.fullmatch(r"[\w.+@][\w.+@-]*", name):
            raise ValueError(f"{name!r} is not the name of a {what} that a udev rule can hold")


def udev_rule(
    address: PciAddress | str, group: str | None = None, *, user: str | None = None, mode: int | None = None
) -> str:
    """Text of udev rules that give a function's nodes to a user or group each time it is bound to VFIO.

    Put it into a file such as ``/etc/udev/rules.d/70-vfiopy.rules``, then ``udevadm control --reload``.

    Args:
        address: the function.
        group: name of the group; None keeps root's.
        user: name of the owner; None keeps root. ``/dev/iommu`` is everybody's then, as ``/dev/vfio/vfio`` is,
            unless a group is given too.
        mode: permissions of the nodes; None: 0660 with a group, else 0600.
    """
    where = PciAddress.parse(address)
    if user is None and group is None:
        raise ValueError("a rule gives the nodes to a user or a group")
    check_rule_names(user, group)
    mode = (0o600 if group is None else 0o660) if mode is None else mode
    whom = " and ".join([*([user] if user else []), *([f"the group {group}"] if group else [])])
    # By chown, not by OWNER= and GROUP=: systemd 258 and 259 leave out a rule that names a user or group of people.
    change = f"chown {user}{f':{group}' if group else ''}" if user else f"chgrp {group}"
    rights = f'MODE="{mode:04o}", RUN+="/bin/sh -c \'{change} $devnode\'"'
    shared = 'MODE="0666"' if group is None else f'MODE="{mode:04o}", RUN+="/bin/sh -c \'chgrp {group} $devnode\'"'
    # The group node has no parent device, so it is found from the function's "bind" event: its number may
    # change from boot to boot, the function's address does not.
    command = (
        f"RUN+=\"/bin/sh -c 'n=/dev/vfio/$$(basename $$(readlink /sys%p/iommu_group)); "
        f"{change} $$n; chmod {mode:04o} $$n'\""
    )
    return (
        f"# {where} for {whom}: its character device, its group's node, what all devices share\n"
        f'SUBSYSTEM=="vfio-dev", KERNELS=="{where}", {rights}\n'
        f'ACTION=="bind", SUBSYSTEM=="pci", KERNEL=="{where}", DRIVER=="*vfio?pci", {command}\n'
        f'SUBSYSTEM=="misc", KERNEL=="iommu", {shared}\n'
    )


@dataclass(frozen=True, slots=True)
class MemlockLimit:
    """How much memory this process may lock; memory that a device can reach counts as locked.

    Attributes:
        soft: RLIMIT_MEMLOCK now, in bytes; None for no limit.
        hard: what the process may raise it to, in bytes; None for no limit.
        locked: what type1 counts for this process already (VmLck), in bytes.
        pinned: what iommufd and others have pinned for this process (VmPin), in bytes.
        exempt: the process has CAP_IPC_LOCK, so the limit does not apply.
    """

    soft: int | None
    hard: int | None
    locked: int
    pinned: int
    exempt: bool

    @property
    def available(self) -> int | None:
        """Bytes that can still be locked, None for no limit; iommufd counts other processes of the user too."""
        if self.exempt or self.soft is None:
            return None
        return max(0, self.soft - max(self.locked, self.pinned))

    def allows(self, size: int) -> bool:
        """Whether ``size`` more bytes can be locked, as far as this process can tell."""
        return self.available is None or size <= self.available


def memlock_limit(*, system: System | None = None) -> MemlockLimit:
    """This process's limit on locked memory, and how much of it is used."""
    system = System() if system is None else system
    limits = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    soft, hard = (None if value == resource.RLIM_INFINITY else value for value in limits)
    status = dict(
        line.split(":", 1) for line in (system.text(system.proc / "self/status") or "").splitlines() if ":" in line
    )

    def kibibytes(name: str) -> int:
        return int(status.get(name, "0").split()[0]) * 1024

    return MemlockLimit(
        soft=soft,
        hard=hard,
        locked=kibibytes("VmLck"),
        pinned=kibibytes("VmPin"),
        exempt=bool(int(status.get("CapEff", "0").strip(), 16) & 1 << _CAP_IPC_LOCK),
    )
