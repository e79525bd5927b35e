"""A device whose BAR is exported, a device that reaches it, and the ways to ask the kernel what is so."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

import vfiopy
from vfiopy import DmaBuf, DmaBufMapping, ImportState
from vfiopy.backend import Area
from vfiopy.drivers.edu import EduDriver

PAGE = mmap.PAGESIZE
MEM_BAR = 2  # of ivshmem and pci-testdev: 16 MiB of memory
BAR_SIZE = 16 << 20
RIGHTS = 3
LARGE = 1 << 7  # in an entry of the IOMMU's page tables: a page of 2 MiB


class Peers:
    """An edu on iommufd that does DMA, and another device whose memory is the target."""

    def __init__(
        self, importer: str, exporter: str, bar: int = MEM_BAR, exporter_space: vfiopy.AddressSpace | None = None
    ) -> None:
        with ExitStack() as undo:
            self.importer = undo.enter_context(vfiopy.open(importer, backend="iommufd"))
            self.exporter = undo.enter_context(vfiopy.open(exporter, space=exporter_space))
            self.space = self.importer.space
            self.edu = EduDriver(self.importer)
            self.importer.bus_master = True
            self.bar = self.exporter.bars[bar]
            self.tables = Path(f"/sys/kernel/debug/iommu/intel/{importer}/domain_translation_struct")
            resources = Path(f"/sys/bus/pci/devices/{exporter}/resource").read_text().splitlines()
            self.physical = int(resources[bar].split()[0], 16)
            self._undo = undo.pop_all()

    def close(self) -> None:
        self._undo.close()

    # --- the kernel's word ---

    def page_table(self) -> dict[int, tuple[int, int]]:
        """IOVA page to (rights, page frame), as the IOMMU has it."""
        found = {}
        for line in self.tables.read_text().splitlines():
            key, bar, rest = line.partition(" |")
            if bar:
                entry = int(rest.split()[-1], 16)
                frame = (entry & ((1 << 52) - 1)) // PAGE
                for page in range(512 if entry & LARGE else 1):
                    found[int(key, 16) + page] = entry & 3, frame + page
        return found

    def reaches(self, iova: int, size: int, offset: int = 0, rights: int = RIGHTS) -> bool:
        """Whether the IOMMU leads these IOVAs to the BAR, all of them and nowhere else."""
        table = self.page_table()
        frame = (self.physical + offset) // PAGE
        pages = [table.get(iova // PAGE + page) for page in range(size // PAGE)]
        return pages == [(rights, frame + page) for page in range(size // PAGE)]

    def is_dead(self, iova: int, size: int) -> bool:
        """Whether the IOMMU has nothing for these IOVAs."""
        table = self.page_table()
        return not any(iova // PAGE + page in table for page in range(size // PAGE))

    # --- DMA ---

    def write_by_dma(self, iova: int, text: bytes) -> None:
        """Have edu write bytes at an IOVA."""
        with self.importer.dma.allocate(PAGE) as source:
            source[: len(text)] = np.frombuffer(text, dtype=np.uint8)
            self.edu.load(source.iova, len(text))
        self.edu.store(iova, len(text))

    def read_by_dma(self, iova: int, size: int) -> bytes:
        """Have edu read bytes at an IOVA."""
        with self.importer.dma.allocate(PAGE) as target:
            self.edu.load(iova, size)
            self.edu.store(target.iova, size)
            return bytes(target[:size])

    # --- state machine ---

    def check_live(self, imported: DmaBufMapping) -> None:
        assert imported.state is ImportState.LIVE
        imported.check()
        memory = imported.mapping.memory
        offset: int = memory.offset  # type: ignore[attr-defined]
        assert self.reaches(imported.mapping.iova, imported.size, offset, int(imported.prot))
        found = self.space.book.find(imported.mapping.iova)
        assert found is not None
        assert not found.revoked
        self.space.book.verify()

    def check_dead(self, imported: DmaBufMapping) -> None:
        assert imported.state is ImportState.REVOKED
        assert self.is_dead(imported.mapping.iova, imported.size)
        found = self.space.book.find(imported.mapping.iova)
        assert found is not None
        assert found.revoked
        self.space.book.verify()


def export(peers: Peers, *areas: Area) -> DmaBuf:
    return DmaBuf.of_bar(peers.bar, *areas)


# --- leaks ---


def dmabufs() -> list[str]:
    """The dma-bufs that the kernel knows, from debugfs: one line each, with the reference count."""
    lines = Path("/sys/kernel/debug/dma_buf/bufinfo").read_text().splitlines()
    return [line for line in lines if "exp_name" not in line and len(line.split()) >= 5 and line.split()[0].isdigit()]


@contextmanager
def no_dmabuf_left() -> Iterator[None]:
    before = dmabufs()
    yield
    assert dmabufs() == before


# --- another process ---


class Child:
    """A Python program in a process of its own, with one end of a socket pair as its standard input."""

    def __init__(self, program: str, socket_fd: int, *arguments: object) -> None:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        self.process = subprocess.Popen(
            command, stdin=socket_fd, stdout=subprocess.PIPE, text=True, env=environment
        )  # fmt: skip

    def line(self) -> object:
        """What it prints next, as JSON."""
        assert self.process.stdout is not None
        text = self.process.stdout.readline()
        assert text, f"the child ended: {self.process.wait(10)}"
        return json.loads(text)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()


def raises_nothing(work: Callable[[], object]) -> bool:
    try:
        work()
    except vfiopy.VfiopyError:
        return False
    return True
