"""What the kernel shows of a dma-buf (Documentation/driver-api/dma-buf.rst, fdinfo)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DmaBufInfo", "parse_info", "read_info"]


@dataclass(frozen=True, slots=True)
class DmaBufInfo:
    """The lines of /proc/self/fdinfo.

    Attributes:
        inode: the same for all fds of the buffer, in all processes.
        size: bytes.
        references: open files, mappings and importers that keep it.
        exporter: name of the driver that made it: ``"vfio_pci_core"``, ``"udmabuf"``, ``"system"``.
        name: what set_name() gave it, or None.
    """

    inode: int
    size: int
    references: int
    exporter: str
    name: str | None


def read_info(fd: int) -> DmaBufInfo:
    """Read it for an open dma-buf."""
    return parse_info(Path(f"/proc/self/fdinfo/{fd}").read_text("utf-8", "replace"))


def parse_info(text: str) -> DmaBufInfo:
    """Understand the text of fdinfo."""
    found: dict[str, str] = {}
    for line in text.split("\n"):
        key, _, value = line.partition(":\t")
        found.setdefault(key, value)  # the name comes last, as its giver wrote it: with lines of its own, perhaps
    return DmaBufInfo(
        inode=int(found["ino"]),
        size=int(found["size"]),
        references=int(found["count"]),
        exporter=found["exp_name"],
        name=found.get("name"),
    )
