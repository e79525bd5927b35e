"""Our NVMe driver on the emulated NVMe controller, in the same process and through a socket."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from ways import opened

import vfiopy
from vfiopy.dma import DmaArray
from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands
from vfiopy.drivers.nvme.rings import Completion, CompletionRing
from vfiopy.emulated.nvme import Namespace, Nvme
from vfiopy.emulated.nvme.command import Command
from vfiopy.emulated.nvme.queues import SubmissionQueue
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.status import Code
from vfiopy.nvme_spec.structures import CQE, SQE

PAGE = 4096
POOL = 64 * PAGE
BASE = 0x10_0000


def noise(size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that nobody else writes by chance."""
    return np.frombuffer(hashlib.shake_128(seed.to_bytes(4, "little")).digest(size), np.uint8)


class Watched(Nvme):
    """A controller whose commands are noted: namespaces 1 (4 MiB, 512-byte blocks) and 3 (1 MiB, 4096), MDTS 128 KiB.

    Attributes:
        commands: (submission queue, opcode), in the order in which they were fetched.
        never_ready, never_stops: CC.EN is not obeyed.
        fatal: it fails when it is enabled.
    """

    def __init__(self, **options: Any) -> None:
        namespaces = {1: Namespace.memory(4 << 20), 3: Namespace.memory(1 << 20, block_size=4096)}
        super().__init__(namespaces, **{"serial": "SERIAL-1", "queues": 4, "entries": 64, "mdts": 5, **options})
        self.commands: list[tuple[int, int]] = []
        self.never_ready = self.never_stops = self.fatal = False
        begin = self._execution.begin

        def noted(sq: SubmissionQueue, command: Command) -> None:
            self.commands.append((sq.number, command.opcode))
            begin(sq, command)

        self._execution.begin = noted  # type: ignore[method-assign]

    def _enable(self) -> None:
        if self.fatal:
            self.fail("as the test wants it")
        elif not self.never_ready:
            super()._enable()

    def _disable(self) -> None:
        if not self.never_stops:
            super()._disable()


def content(target: Nvme, nsid: int = 1) -> bytes:
    """All that a namespace holds."""
    data = bytearray(target.namespaces[nsid].backing.size)
    target.namespaces[nsid].backing.read([memoryview(data)], 0)
    return bytes(data)


def fill(target: Nvme, data: bytes, nsid: int = 1) -> None:
    """Write a whole namespace behind the controller's back."""
    target.namespaces[nsid].backing.write([memoryview(data)], 0)


@contextmanager
def driven(
    target: Nvme | None = None, way: str = "emulated", *, clean: bool = True, **options: Any
) -> Iterator[tuple[Nvme, nvme.Controller]]:
    """Open and drive a controller; in the end it has nothing to complain about, unless ``clean`` is false."""
    disk = target if target is not None else Nvme()
    options.setdefault("timeout", 5.0)
    with opened(disk, way) as device, nvme.Controller(device, **options) as controller:
        yield disk, controller
    if clean:
        assert not disk.errors
        assert not disk.faults
    if target is None:
        disk.close()


def refused(controller: nvme.Controller, command: nvme.Command, data: Any = None, *, io: bool = False) -> int:
    """The status that a command ends with: its type and code as in :class:`Code`."""
    queue = controller.queues[0] if io else controller.admin.queue
    with pytest.raises(nvme.NvmeError) as caught:
        queue.execute(command, data)
    status = caught.value.status
    return Code(status.sct << 8 | status.sc)


class RawQueue:
    """An I/O queue pair of a controller, without the driver's care: entries and doorbells by hand, no interrupts."""

    def __init__(self, controller: nvme.Controller, number: int = 2, depth: int = 16) -> None:
        self.controller, self.number, self.depth = controller, number, depth
        self._registers = controller.device.bars[0]
        self._stride = controller.capabilities.doorbell_stride
        self.sq = controller.device.dma.allocate(depth, SQE, alignment=4096)
        self.cq = controller.device.dma.allocate(depth, CQE, alignment=4096)
        controller.admin.execute(commands.create_cq(number, depth, self.cq.iova, None))
        controller.admin.execute(commands.create_sq(number, depth, self.sq.iova, number))
        self.tail, self.completions = 0, CompletionRing(self.cq, f"raw queue {number}")

    def put(self, **fields: Any) -> int:
        """Write an entry; its identifier is its place. Return the new tail."""
        entry = np.zeros(1, SQE)
        entry["cid"] = self.tail
        for name, value in fields.items():
            entry[name] = value
        self.sq[self.tail] = entry[0]
        self.tail = (self.tail + 1) % self.depth
        return self.tail

    def ring(self, tail: int | None = None) -> None:
        self._registers.write32(
            reg.doorbell(self.number, self._stride, completion=False), self.tail if tail is None else tail
        )

    def take(self) -> None:
        """Say what was taken."""
        self._registers.write32(reg.doorbell(self.number, self._stride, completion=True), self.completions.head)

    def wait(self) -> Completion:
        assert self.completions.poll(5.0), "no completion came"
        found = self.completions.take()
        assert found is not None
        return found

    def run(self, **fields: Any) -> int:
        """One command; its status as in :class:`Code`."""
        self.put(**fields)
        self.ring()
        found = self.wait()
        self.take()
        return found.status >> 1 & 0x7FF

    def close(self) -> None:
        self.controller.admin.execute(commands.delete_sq(self.number))
        self.controller.admin.execute(commands.delete_cq(self.number))
        self.completions.close()
        self.sq.free()
        self.cq.free()


@contextmanager
def raw_queue(controller: nvme.Controller, number: int = 2, depth: int = 16) -> Iterator[RawQueue]:
    queue = RawQueue(controller, number, depth)
    try:
        yield queue
    finally:
        queue.close()


class Bare:
    """A controller in manual mode, with an admin and an I/O queue pair of 64 entries in memory that all can hit.

    Args:
        device, target: the controller, opened and as it is.
        pool: POOL bytes at BASE; queues are in the first four pages.
    """

    def __init__(self, device: vfiopy.Device, target: Nvme, pool: DmaArray) -> None:
        self.target, self.pool, self.bar = target, pool, device.bars[0]
        self.step()
        self.bar.write32(reg.CC, 0)
        self.step()
        self.pool[:] = 0
        self.bar.write32(reg.AQA, 63 << 16 | 63)
        self.bar.write64(reg.ASQ, BASE)
        self.bar.write64(reg.ACQ, BASE + PAGE)
        self.bar.write32(reg.CC, 0x460001)
        self.step()
        assert self.bar.read32(reg.CSTS) == 1
        self.tails = {0: 0, 1: 0}
        self.submit(0, opcode=5, prp1=BASE + 3 * PAGE, cdw10=63 << 16 | 1, cdw11=1)
        self.submit(0, opcode=1, prp1=BASE + 2 * PAGE, cdw10=63 << 16 | 1, cdw11=1 << 16 | 1)
        assert set(target.queues.submissions) == {0, 1}

    def step(self) -> None:
        while self.target.step():
            pass

    def put(self, queue: int, **fields: Any) -> None:
        """Put a command in, and ring."""
        entry = np.zeros(1, SQE)
        for name, value in fields.items():
            entry[name] = value
        start = 2 * PAGE * queue + 64 * self.tails[queue]
        self.pool[start : start + 64] = entry.view(np.uint8)
        self.tails[queue] = (self.tails[queue] + 1) % 64
        self.bar.write32(reg.doorbell(queue, 4, completion=False), self.tails[queue])

    def take(self) -> None:
        """Say of all queues that all completions were taken."""
        for number, one in list(self.target.queues.completions.items()):
            if one.head != one.tail:
                self.bar.write32(reg.doorbell(number, 4, completion=True), one.tail)
        self.step()

    def submit(self, queue: int, **fields: Any) -> int:
        """Put a command in and have it done; take the completion, wherever it went; return the status of the last."""
        self.put(queue, **fields)
        self.step()
        status = self.status(queue)
        self.take()
        return status

    def status(self, queue: int) -> int:
        """The status of the newest completion, as in :class:`Code`."""
        one = self.target.queues.completions.get(queue)
        if one is None:
            return -1
        start = PAGE * (2 * queue + 1) + 16 * ((one.tail - 1) % 64)
        return int(self.pool[start + 14 : start + 16].view("<u2")[0]) >> 1 & 0x7FF


@contextmanager
def bare(target: Nvme) -> Iterator[Bare]:
    """Open a controller in manual mode, and drive it by hand."""
    with vfiopy.open(target) as device, device.dma.allocate(POOL, iova=BASE) as pool:
        device.bus_master = True
        yield Bare(device, target, pool)
