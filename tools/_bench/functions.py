"""Which PCI function a benchmark drives: the one that the user names, or one of the lab's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vfiopy

from .registry import Unavailable

__all__ = ["EDU", "IGB", "VARIABLE", "find", "vfio_function"]

VARIABLE = "VFIOPY_BENCH_BDF"
EDU = (0x1234, 0x11E8)
IGB = (0x8086, 0x10C9)


def _in_lab() -> bool:
    return any(word.startswith("vfiopy.lab=") for word in Path("/proc/cmdline").read_text().split())


def find(kind: tuple[int, int]) -> str | None:
    """Return the lab's first function of a kind, or None outside the lab: nobody's device is taken unasked."""
    if not _in_lab():
        return None
    vendor, device = kind
    return next((str(found.address) for found in vfiopy.find(vendor=vendor, device=device)), None)


@contextmanager
def vfio_function() -> Iterator[str]:
    """The address of a function to map memory for; the lab's is bound for the time being.

    Raises:
        Unavailable: this is not the lab, and no function is named.
    """
    if named := os.environ.get(VARIABLE):
        yield named
        return
    address = find(EDU)
    if address is None:
        raise Unavailable(
            f"it needs a PCI function of your own that is bound to vfio-pci ({VARIABLE}=0000:01:00.0), or the lab: "
            "tools/lab run -- .venv/bin/python tools/bench"
        )
    with vfiopy.bind(address):
        yield address
