"""An auditor of memory accesses: which instructions touched a range, how wide, in which direction, in what order.

Works on x86-64, for one thread. See auditor.c for how.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .decode import decode_width

__all__ = ["Auditor", "reason_to_skip"]


def reason_to_skip() -> str:
    """Return why there can be no auditor here, or an empty string."""
    if platform.machine() != "x86_64":
        return "the auditor single-steps x86-64; other processors have no trap flag that a process can set"
    if shutil.which("cc") is None:
        return "the auditor is compiled by the test: no cc found"
    return ""


class _Access(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("is_write", ctypes.c_uint8), ("code", ctypes.c_uint8 * 15))


class Auditor:
    """Compile and load the auditor.

    Args:
        folder: where the library is built.
    """

    def __init__(self, folder: Path) -> None:
        source = Path(__file__).with_name("auditor.c")
        library = folder / "auditor.so"
        flags = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", str(library), str(source)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.audit_start.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._count = ctypes.c_uint64.in_dll(self._library, "audit_count")
        self._log = (_Access * 65536).in_dll(self._library, "audit_log")

    @contextmanager
    def watch(self, address: int, size: int) -> Iterator[list[tuple[str, int, int]]]:
        """Watch a page-aligned range; the list is filled at the end: ("R" or "W", offset, width in bytes)."""
        accesses: list[tuple[str, int, int]] = []
        assert self._library.audit_start(address, size) == 0
        try:
            yield accesses
        finally:
            assert self._library.audit_stop() == 0
        assert self._count.value < len(self._log), "the log is full"
        for entry in self._log[: self._count.value]:
            width = decode_width(bytes(entry.code), is_write=bool(entry.is_write))
            accesses.append(("W" if entry.is_write else "R", entry.offset, width))
