"""Checks of how much memory a device may reach: locked memory, cgroups, the kernel's own limits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vfiopy.doctor.finding import MachineCheck, Problem, Severity
from vfiopy.pci import System, memlock_limit
from vfiopy.pci.words import size_words

__all__ = ["MEMORY_CHECKS"]

_LITTLE_MEMLOCK = 64 << 20  # bytes; the usual default is 8 MiB, one big queue pair takes more
_LITTLE_CGROUP = 1 << 30  # bytes
_ENTRY_LIMIT = 65535  # drivers/vfio/vfio_iommu_type1.c, dma_entry_limit


def _memlock(system: System) -> Iterator[Problem]:
    limit = memlock_limit(system=system)
    if limit.exempt or limit.soft is None:
        return
    used = max(limit.locked, limit.pinned)
    others = _pinned_by_others(system)
    if limit.soft - used - others >= _LITTLE_MEMLOCK:
        return
    cause = f"this user may lock {size_words(limit.soft)} only, and DMA memory counts as locked (ENOMEM beyond it)"
    evidence = f"RLIMIT_MEMLOCK is {limit.soft}, {used} in use by this process"
    if others:
        cause += "; iommufd counts the user's other processes too"
        evidence += f", {others} pinned by others of this user"
    yield Problem(
        Severity.LIMITS,
        cause,
        evidence,
        "ulimit -l, or /etc/security/limits.d: '@vfio - memlock 8388608'; a service takes LimitMEMLOCK=",
    )


def _pinned_by_others(system: System) -> int:
    """Bytes that other processes of this user have pinned (VmPin)."""
    total, me = 0, os.getpid()
    for pid in system.processes():
        if pid == me:
            continue
        try:
            text = system.text(system.proc / str(pid) / "status") or ""
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if fields.get("Uid", "").split()[:1] == [str(os.getuid())]:
            total += int(fields.get("VmPin", "0").split()[0]) * 1024
    return total


def _cgroup(system: System) -> Iterator[Problem]:
    root = system.sys / "fs/cgroup"
    lines = (system.text(system.proc / "self/cgroup") or "").splitlines()
    where = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if where is None or ".." in Path(where).parts:  # outside of what this namespace shows
        return
    limits: list[tuple[int, Path]] = []
    # In a container the root of what it sees is its own group, with a limit.
    for folder in (Path(where), *Path(where).parents):
        text = system.text(root / folder / "memory.max")
        if text and text.isdigit():
            limits.append((int(text), root / folder / "memory.max"))
    if not limits:
        return
    least, file = min(limits)
    if least < _LITTLE_CGROUP:
        yield Problem(
            Severity.LIMITS if least < _LITTLE_MEMLOCK else Severity.NOTE,
            f"this process's cgroup may have {size_words(least)}, and memory for DMA cannot be swapped out: the "
            "process is ended when it goes beyond (OOM)",
            f"{file} is {least}",
            f"echo max > {file}; a service takes MemoryMax=, a container --memory",
        )


def _mapping_limit(system: System) -> Iterator[Problem]:
    file = system.sys / "module/vfio_iommu_type1/parameters/dma_entry_limit"
    limit = system.number(file)
    if limit is not None and limit < _ENTRY_LIMIT:
        yield Problem(
            Severity.NOTE,
            f"a container takes {limit} mappings only, fewer than usual (ENOSPC beyond them)",
            f"{file} is {limit}",
            f"echo {_ENTRY_LIMIT} > {file}, or map fewer and larger ranges",
        )


def _page_size(_system: System) -> Iterator[Problem]:
    size = os.sysconf("SC_PAGE_SIZE")
    if size != 4096:
        yield Problem(
            Severity.NOTE,
            f"pages have {size_words(size)}: IOVA, address and size of each mapping are multiples of that",
            f"sysconf(_SC_PAGESIZE) is {size}",
            "do not write 4096 into a driver; let allocate() round",
        )


MEMORY_CHECKS: tuple[MachineCheck, ...] = (
    MachineCheck("memlock", _memlock),
    MachineCheck("cgroup memory", _cgroup),
    MachineCheck("mapping limit", _mapping_limit),
    MachineCheck("page size", _page_size),
)
"""In order of what to fix first."""
