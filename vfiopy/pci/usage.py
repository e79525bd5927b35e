"""What the running system would lose if a function were taken from its driver."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator
from pathlib import Path

from vfiopy.pci.function import Function
from vfiopy.pci.holders import node_holders
from vfiopy.pci.system import System

__all__ = ["uses"]

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_IFF_UP = 1
_RTF_REJECT = 0x0200
_LINK_LOCAL = 0x20


def uses(function: Function, *, virtual_functions: bool = True) -> list[str]:
    """Reasons not to take a function away, one sentence each; empty where nothing is known against it.

    Looks for mounted file systems, swap, dm, md and loop devices on its disks; for default routes, addresses
    and membership in a bond or bridge on its interfaces; for the boot console; for virtual functions; and for
    processes that have one of its device nodes open. What another network namespace or a hidden process does
    is not seen.

    Args:
        function: the function.
        virtual_functions: say that its virtual functions are enabled, too.
    """
    return [
        *_console(function),
        *(_virtual_functions(function) if virtual_functions else ()),
        *_block(function),
        *_shares(function),
        *_network(function),
        *_open_nodes(function),
    ]


def _below(path: Path, roots: list[str]) -> bool:
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root + "/") for root in roots)


def _console(function: Function) -> Iterator[str]:
    system = function.system
    if system.text(function.sysfs / "boot_vga") == "1":
        yield "it is the graphics card of the boot console (boot_vga)"
    roots = [str(function.sysfs.resolve())]
    for name in (system.text(system.sys / "class/tty/console/active") or "").split():
        if _below(system.sys / "class/tty" / name, roots):
            yield f"the kernel's console is on its {name}"


def _virtual_functions(function: Function) -> Iterator[str]:
    names = [str(one.address) for one in function.virtual_functions()]
    if names:
        yield f"{len(names)} virtual functions of it are enabled ({', '.join(names)})"


# --- disks ---


def _block(function: Function) -> Iterator[str]:
    system = function.system
    folder = system.sys / "class/block"
    roots = [str(function.sysfs.resolve()), *_nvme_subsystems(function)]
    own = [name for name in system.names(folder) if _below(folder / name, roots)]
    mounts, swaps, loops = _mounts(system), _swaps(system), _loops(system)
    for name in own:
        reasons = list(_block_reasons(system, name, mounts, swaps, loops))
        if not reasons and system.is_claimed(system.dev / name):
            # the kernel knows, even if another mount namespace hides why
            reasons = [f"/dev/{name} is claimed exclusively in the kernel (mounted or assembled elsewhere)"]
        yield from reasons


def _block_reasons(
    system: System,
    name: str,
    mounts: list[tuple[str, str, str]],
    swaps: list[str],
    loops: dict[str, str],
) -> Iterator[str]:
    folder = system.sys / "class/block" / name
    number = system.text(folder / "dev")
    for device, source, where in mounts:
        if device == number or source == f"/dev/{name}":
            yield f"/dev/{name} is mounted at {where}"
    if name in swaps:
        yield f"/dev/{name} is swap space"
    if name in loops:
        yield f"/dev/{loops[name]} is made of /dev/{name}"
    for holder in system.names(folder / "holders"):
        label = system.text(system.sys / "class/block" / holder / "dm/name")
        yield f"/dev/{holder}{f' ({label})' if label else ''} is made of /dev/{name}"
        yield from _block_reasons(system, holder, mounts, swaps, loops)


def _shares(function: Function) -> Iterator[str]:
    # A virtual machine's shared folders have no block device: the mount's source is the tag of the device.
    system = function.system
    roots = [str(function.sysfs.resolve())]
    paths = list(function.sysfs.glob("virtio*/mount_tag"))  # 9p
    folder = system.sys / "fs/virtiofs"
    paths += [folder / one / "tag" for one in system.names(folder) if _below(folder / one / "device", roots)]
    tags = {tag.strip("\0") for path in paths if (tag := system.text(path))}
    for _, source, where in _mounts(system) if tags else ():
        if source in tags:
            yield f"the host's folder '{source}' is mounted at {where}"


def _nvme_subsystems(function: Function) -> Iterator[str]:
    # With native multipath the disks hang below a virtual subsystem that links to its controllers.
    system = function.system
    real = [str(function.sysfs.resolve())]
    folder = system.sys / "class/nvme-subsystem"
    for name in system.names(folder):
        if any(
            (folder / name / entry).is_symlink() and _below(folder / name / entry, real)
            for entry in system.names(folder / name)
            if entry.startswith("nvme")
        ):
            yield os.path.realpath(folder / name)


def _unescape(word: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def _mounts(system: System) -> list[tuple[str, str, str]]:
    """(major:minor, source, mount point) in each mount namespace that can be seen."""
    found: dict[tuple[str, str, str], None] = {}
    namespaces: set[str] = set()
    for process in ("self", *map(str, system.processes())):
        folder = system.proc / process
        namespace = system.link_name(folder / "ns/mnt") or process
        if namespace in namespaces:
            continue
        try:
            lines = (system.text(folder / "mountinfo") or "").splitlines()
        except OSError:
            continue
        namespaces.add(namespace)
        for line in lines:
            head, _, tail = line.partition(" - ")
            fields, after = head.split(), tail.split()
            if len(fields) >= 5 and len(after) >= 2:
                found[fields[2], _unescape(after[1]), _unescape(fields[4])] = None
    return list(found)


def _swaps(system: System) -> list[str]:
    lines = (system.text(system.proc / "swaps") or "").splitlines()[1:]
    return [Path(_unescape(line.split()[0])).name for line in lines if line.split()]


def _loops(system: System) -> dict[str, str]:
    """Block device → loop device that is made of it."""
    folder = system.sys / "class/block"
    found = {}
    for name in system.names(folder):
        backing = system.text(folder / name / "loop/backing_file") if name.startswith("loop") else None
        if backing:
            found[backing.removeprefix("/dev/")] = name
    return found


# --- network ---


def _network(function: Function) -> Iterator[str]:
    system = function.system
    folder = system.sys / "class/net"
    roots = [str(function.sysfs.resolve())]
    for name in system.names(folder):
        if not _below(folder / name, roots):
            continue
        if name in _default_routes(system):
            yield f"interface {name} carries the default route"
        if (system.number(folder / name / "flags") or 0) & _IFF_UP:
            addresses = _addresses(system, name)
            if addresses:
                yield f"interface {name} is up with {', '.join(addresses)}"
        for entry in system.names(folder / name):
            if entry == "master":
                yield f"interface {name} is a part of {system.link_name(folder / name / entry)}"
            elif entry.startswith("upper_") and not (folder / name / "master").exists():
                yield f"interface {entry.removeprefix('upper_')} is on top of {name}"


def _default_routes(system: System) -> set[str]:
    found = set()
    for line in (system.text(system.proc / "net/route") or "").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == fields[7] == "00000000":
            found.add(fields[0])
    for line in (system.text(system.proc / "net/ipv6_route") or "").splitlines():
        fields = line.split()
        if len(fields) < 10 or fields[1] != "00" or int(fields[0], 16):
            continue
        if not int(fields[8], 16) & _RTF_REJECT:
            found.add(fields[9])
    return found


def _addresses(system: System, interface: str) -> list[str]:
    found = [address for name, address in system.ipv4_addresses() if name == interface]
    for line in (system.text(system.proc / "net/if_inet6") or "").splitlines():
        fields = line.split()
        # each interface that is up has a link-local address; it says nothing about use
        if len(fields) >= 6 and fields[5] == interface and int(fields[3], 16) != _LINK_LOCAL:
            found.append(str(ipaddress.IPv6Address(bytes.fromhex(fields[0]))))
    return found


# --- anything with a node ---


def _open_nodes(function: Function) -> Iterator[str]:
    system = function.system
    nodes = []
    for folder, children, files in os.walk(function.sysfs.resolve()):
        # functions behind a bridge are not its own, and VFIO's nodes are looked at where it counts
        children[:] = [name for name in children if not _ADDRESS.fullmatch(name) and name != "vfio-dev"]
        if "dev" in files and "uevent" in files:
            for line in (system.text(Path(folder) / "uevent") or "").splitlines():
                if line.startswith("DEVNAME="):
                    nodes.append(system.dev / line.removeprefix("DEVNAME="))
    for holder in node_holders(system, nodes):
        yield str(holder)
