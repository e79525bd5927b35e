"""Physical addresses of this process's memory: only for devices without an IOMMU.

Sources: Documentation/admin-guide/mm/pagemap.rst, Documentation/filesystems/proc.rst (smaps).
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from pathlib import Path

from vfiopy.errors import MemoryKindError, PermissionDeniedError, VfioError

__all__ = ["is_hugetlb", "physical_address"]

_PAGEMAP = Path("/proc/self/pagemap")
_SMAPS = Path("/proc/self/smaps")
_PRESENT = 1 << 63
_PFN = (1 << 55) - 1


def physical_address(address: int, size: int, label: str) -> int:
    """Return the physical address of memory that is contiguous there too.

    Args:
        address: virtual address, page-aligned.
        size: bytes, whole pages.
        label: for messages.

    Raises:
        PermissionDeniedError: the process has no CAP_SYS_ADMIN, so the kernel hides page frame numbers.
        MemoryKindError: the memory is not present, or in pieces.
    """
    page, count = mmap.PAGESIZE, size // mmap.PAGESIZE
    try:
        fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
        try:
            raw = os.pread(fd, 8 * count, address // page * 8)
        finally:
            os.close(fd)
    except PermissionError as error:
        # A process that has given up root may not even open its own file.
        raise _hidden(label) from error
    except OSError as error:
        raise VfioError(
            f"the kernel does not tell physical addresses ({_PAGEMAP})",
            errno=error.errno,
            object=label,
            hint="the kernel needs CONFIG_PROC_PAGE_MONITOR",
        ) from error
    entries = struct.unpack(f"={len(raw) // 8}Q", raw)
    if len(entries) < count or not all(entry & _PRESENT for entry in entries):
        raise MemoryKindError(
            "the memory is not all present, so it has no physical address",
            object=label,
            hint="use allocate(page_size=2 << 20), which touches every page",
        )
    frames: list[int] = [entry & _PFN for entry in entries]
    if not frames[0]:
        raise _hidden(label)
    if any(frame != frames[0] + number for number, frame in enumerate(frames)):
        raise MemoryKindError(
            f"the memory's {size:#x} bytes are in pieces that do not follow each other physically",
            object=label,
            hint="stay within one huge page: allocate(page_size=2 << 20) or (1 << 30)",
        )
    return frames[0] * page


def _hidden(label: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        "the kernel hides physical addresses from processes without CAP_SYS_ADMIN",
        errno=errno.EPERM,
        object=label,
        hint="run with CAP_SYS_ADMIN; a device without an IOMMU needs it",
    )


def is_hugetlb(address: int, size: int) -> bool:
    """Whether a range lies in one mapping of hugetlb pages, which the kernel never moves by itself."""
    inside = False
    for line in _SMAPS.read_text("utf-8", "replace").splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address and address + size <= last
        elif inside and line.startswith("VmFlags:"):
            return "ht" in line.split()
    return False
