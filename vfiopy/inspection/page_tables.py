"""What the IOMMU translates for the devices of a process, from its driver's debugfs: as root, of any process.

Only Intel's driver shows its tables (CONFIG_INTEL_IOMMU_DEBUGFS, drivers/iommu/intel/debugfs.c).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vfiopy.errors import NotSupportedError, PermissionDeniedError, VfioError
from vfiopy.pci import PciAddress, System

__all__ = ["Translation", "functions_of", "page_table_snapshot", "parse_translations"]

_PAGE_SHIFT = 12
_READ, _WRITE, _BIG = 1, 2, 1 << 7
_ADDRESS = 0x000F_FFFF_FFFF_F000
_LEVEL_SHIFT = 9
_FUNCTION = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")


class Translation(NamedTuple):
    """Neighbouring IOVAs that are translated with the same rights and page size.

    Attributes:
        iova: first one.
        size: bytes.
        page_size: bytes that one entry of the table translates.
        prot: ``"r"``, ``"w"`` or ``"rw"``.
    """

    iova: int
    size: int
    page_size: int
    prot: str


def parse_translations(lines: Iterable[str]) -> list[Translation]:
    """Read ``domain_translation_struct``: a line for each entry, the levels of the table from the highest down.

    Adjacent entries alike become one.
    """
    found: list[Translation] = []
    for one in _entries(lines):
        before = found[-1] if found else None
        if before and (before.iova + before.size, *before[2:]) == (one.iova, *one[2:]):
            found[-1] = before._replace(size=before.size + one.size)
        else:
            found.append(one)
    return found


def _entries(lines: Iterable[str]) -> Iterator[Translation]:
    for line in lines:
        words = line.replace("|", " ").split()
        if len(words) < 2 or not words[0].startswith("0x"):
            continue
        iova = int(words[0], 16) << _PAGE_SHIFT
        entries = [int(word, 16) for word in words[1:]]
        leaf = max((level for level, entry in enumerate(entries) if entry & (_READ | _WRITE)), default=None)
        if leaf is None:
            continue
        size = 1 << (_PAGE_SHIFT + _LEVEL_SHIFT * (len(entries) - 1 - leaf))
        prot = ("r" if entries[leaf] & _READ else "") + ("w" if entries[leaf] & _WRITE else "")
        yield Translation(iova, size, size, prot)


def functions_of(pid: int, system: System) -> list[PciAddress]:
    """Return the PCI functions that a process uses through VFIO, by its open files.

    Raises:
        PermissionDeniedError: another user's process.
        VfioError: no such process.
    """
    folder = system.proc / str(pid)
    found: set[PciAddress] = set()
    try:
        for fd in os.listdir(folder / "fd"):  # noqa: PTH208
            found.update(_functions_of_fd(folder, fd, system))
    except PermissionError as error:
        raise PermissionDeniedError(
            "its open files are not ours to see", errno=error.errno, object=f"process {pid}", hint="use sudo"
        ) from None
    except FileNotFoundError as error:
        raise VfioError("there is no such process", errno=error.errno, object=f"process {pid}") from None
    return sorted(found)


def _functions_of_fd(folder: Path, fd: str, system: System) -> Iterator[PciAddress]:
    target = system.link_name(folder / "fd" / fd)
    try:
        full = os.readlink(folder / "fd" / fd)  # noqa: PTH115
    except OSError:
        return
    if full == "anon_inode:[vfio-device]":
        info = system.text(folder / "fdinfo" / fd) or ""
        for name in re.findall(r"vfio-device-syspath:\s*(\S+)", info):
            last = name.rsplit("/", 1)[-1]
            if _FUNCTION.fullmatch(last):
                yield PciAddress.parse(last)
    elif full.startswith("/dev/vfio/devices/") and target:
        parent = system.link_name(system.sys / "class/vfio-dev" / target / "device")
        if parent and _FUNCTION.fullmatch(parent):
            yield PciAddress.parse(parent)
    elif full.startswith("/dev/vfio/") and target and target.removeprefix("noiommu-").isdigit():
        for name in system.names(system.sys / "kernel/iommu_groups" / target / "devices"):
            if _FUNCTION.fullmatch(name):
                yield PciAddress.parse(name)


def page_table_snapshot(pid: int, system: System | None = None) -> dict[str, Any]:
    """Describe what the IOMMU translates for a process, in the shape of :func:`vfiopy.inspection.client.ask`.

    Functions that share a table (one address space) show the same.

    Raises:
        PermissionDeniedError: not root.
        NotSupportedError: the process uses no function through VFIO, or the IOMMU's driver shows no tables.
        VfioError: no such process.
    """
    system = system or System()
    functions = functions_of(pid, system)
    if not functions:
        raise NotSupportedError("it uses no PCI function through VFIO", object=f"process {pid}")
    root = system.sys / "kernel/debug/iommu/intel"
    spaces = [_space(root / str(function), function) for function in functions]
    return {
        "format": 1,
        "source": "page tables",
        "pid": pid,
        "program": (system.text(system.proc / str(pid) / "cmdline") or "").rstrip("\0").split("\0"),
        "time": time.time(),
        "spaces": spaces,
    }


def _space(folder: Path, function: PciAddress) -> dict[str, Any]:
    path = folder / "domain_translation_struct"
    try:
        with path.open(encoding="utf-8") as file:
            translations = parse_translations(file)
    except PermissionError as error:
        raise PermissionDeniedError(
            "the IOMMU's tables are root's to see", errno=error.errno, object=str(path), hint="use sudo"
        ) from None
    except OSError as error:
        raise NotSupportedError(
            "the IOMMU's driver shows no tables of this function",
            errno=error.errno,
            object=str(path),
            hint="only Intel's does, with CONFIG_INTEL_IOMMU_DEBUGFS and debugfs mounted; "
            "a process that calls vfiopy.allow_inspection() needs neither",
        ) from None
    mappings = [
        {"iova": one.iova, "size": one.size, "prot": one.prot, "page_size": one.page_size} for one in translations
    ]
    return {
        "name": str(function),
        "devices": [str(function)],
        "mapped_bytes": sum(one.size for one in translations),
        "mappings": mappings,
    }
