"""Memory that stands for a BAR, and other things that several tests of Region need."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import textwrap

from vfiopy._shim import lib
from vfiopy.mmio import Region

PAGE = mmap.PAGESIZE
WIDTHS = (1, 2, 4, 8)


class Bar:
    """A shared file mapping; truncating the file makes its pages vanish as those of a device do."""

    def __init__(self, size: int = 4 * PAGE) -> None:
        self.size = size
        self.fd = os.memfd_create("bar")
        os.ftruncate(self.fd, size)
        self.address = lib.vfiopy_mmap_aligned(self.fd, 0, size, mmap.PROT_READ | mmap.PROT_WRITE, 0)
        assert self.address > 0
        self.content = mmap.mmap(self.fd, size)

    def region(self, name: str = "test BAR0", **arguments: object) -> Region:
        return Region(name, self.size, [(0, self.address, self.size)], **arguments)

    def vanish(self) -> None:
        os.ftruncate(self.fd, 0)

    def come_back(self) -> None:
        os.ftruncate(self.fd, self.size)

    def close(self) -> None:
        self.content.close()
        assert lib.vfiopy_munmap(self.address, self.size) == 0
        os.close(self.fd)


class Registers:
    """A slow path that keeps a log and stores what was written."""

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.values: dict[int, int] = {}

    def read(self, offset: int, width: int) -> int:
        self.log.append(("read", offset, width))
        return self.values.get(offset, 0)

    def write(self, offset: int, width: int, value: int) -> None:
        self.log.append(("write", offset, width, value))
        self.values[offset] = value


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds vfiopy and this file."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*sys.path, os.path.dirname(__file__)]))  # noqa: PTH120
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
