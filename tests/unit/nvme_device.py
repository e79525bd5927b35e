"""An NVMe controller as a test device: strict about what the specification asks of a host, and able to go wrong.

It works through the emulated machine: registers are accesses, queues and data are DMA through the book, completions
come later, in any order, from another thread. What a driver does wrong ends in ``errors`` or in an error status.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from vfiopy.emulated import Bar, Identity, Msi, MsiX, PciDevice, PciExpress
from vfiopy.nvme_spec.structures import CQE, IDENTIFY_CONTROLLER, IDENTIFY_NAMESPACE, SQE

PAGE = 4096
OK = (0, 0x00)
INVALID_OPCODE = (0, 0x01)
INVALID_FIELD = (0, 0x02)
INVALID_NAMESPACE = (0, 0x0B)
BAD_PRP = (0, 0x13)
OUT_OF_RANGE = (0, 0x80)
BAD_QUEUE = (1, 0x01)
BAD_QUEUE_SIZE = (1, 0x02)


class RefusedError(Exception):
    """A command ends with this status."""

    def __init__(self, status: tuple[int, int]) -> None:
        super().__init__(status)
        self.status = status


@dataclass
class Completions:
    iova: int
    entries: int
    vector: int | None
    head: int = 0  # what the host has taken, as it says
    tail: int = 0
    phase: int = 1
    users: int = 0


@dataclass
class Submissions:
    iova: int
    entries: int
    cq: int
    head: int = 0
    tail: int = 0
    busy: set[int] = field(default_factory=set)


class NvmeDevice(PciDevice):
    """NVMe 2.0, NVM command set, namespaces 1 (512-byte blocks) and 3 (4096-byte blocks), MDTS 128 KiB."""

    name: ClassVar[str] = "nvme"
    identity = Identity(0x1B36, 0x0010, 0x010802)
    bars: ClassVar[Any] = {0: Bar(0x4000, address64=True)}
    capabilities: ClassVar[Any] = (
        MsiX(vectors=5, table_bar=0, table_offset=0x2000, pba_bar=0, pba_offset=0x3000),
        PciExpress(function_reset=True),
    )
    interrupt_pin = 1
    mdts = 5

    def __init__(self, *, stride: int = 0, max_queues: int = 4, queue_entries: int = 64, **options: Any) -> None:
        super().__init__(**options)
        self.stride = stride
        self.max_queues = max_queues
        self.cap = (queue_entries - 1) | 1 << 16 | 4 << 24 | stride << 32 | 1 << 37 | 4 << 52
        self.disks = {1: (512, bytearray(4 << 20)), 3: (4096, bytearray(1 << 20))}
        self.commands: list[tuple[int, int]] = []  # (queue, opcode), as executed
        self.shutdowns = 0
        # what is to go wrong
        self.hang: set[tuple[int, int]] = set()  # (0 admin or 1 I/O, opcode) that is never completed
        self.fail_with: dict[tuple[int, int], tuple[int, int]] = {}
        self.never_ready = False
        self.never_stops = False
        self.wrong_cid = False
        self.reset()

    def reset(self) -> None:
        self.cc = self.csts = self.aqa = self.asq = self.acq = 0
        self.generation = getattr(self, "generation", 0) + 1
        self.sqs: dict[int, Submissions] = {}
        self.cqs: dict[int, Completions] = {}
        self.events: list[tuple[int, int]] = []  # (submission queue, cid) of open event requests

    # --- registers -----------------------------------------------------------------------------------------------

    def read(self, bar: int, offset: int, width: int) -> int:
        if width != 4:
            self.record_error(f"{width}-byte read at {offset:#x}")
        return {
            0x00: self.cap & 0xFFFFFFFF,
            0x04: self.cap >> 32,
            0x08: 0x20000,
            0x14: self.cc,
            0x1C: self.csts,
            0x24: self.aqa,
        }.get(offset, 0)

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        if width != 4:
            self.record_error(f"{width}-byte write at {offset:#x}")
        if offset >= 0x1000:
            number, kind = divmod((offset - 0x1000) // (4 << self.stride), 2)
            (self._head_doorbell if kind else self._tail_doorbell)(number, value)
        elif offset == 0x14:
            self._configure(value)
        elif offset in (0x24, 0x28, 0x2C, 0x30, 0x34):
            if self.cc & 1:
                self.record_error(f"admin queue register {offset:#x} written while enabled")
            shift = 32 * (offset in (0x2C, 0x34))
            attribute = {0x24: "aqa", 0x28: "asq", 0x2C: "asq", 0x30: "acq", 0x34: "acq"}[offset]
            old = getattr(self, attribute)
            setattr(self, attribute, old & ~(0xFFFFFFFF << shift) | value << shift)

    def _configure(self, value: int) -> None:
        before, self.cc = self.cc, value
        generation = self.generation
        if value & 1 and not before & 1:
            if value & ~1 & 0xFFFFFFFF != 0x460000:
                self.record_error(f"CC is {value:#x}: entry sizes, page size or command set are wrong")
            if not self.never_ready:
                self.later(lambda: self._ready(generation))
        elif before & 1 and not value & 1:
            if not self.never_stops:
                self.later(lambda: self._stopped(generation))
        elif value >> 14 & 3 == 1 and before >> 14 & 3 == 0:
            if set(self.sqs) - {0}:
                self.record_error("shutdown with I/O queues left")
            self.later(self._shut)

    def _ready(self, generation: int) -> None:
        if generation != self.generation:
            return
        depth = (self.aqa & 0xFFF) + 1
        self.sqs[0] = Submissions(self.asq, depth, 0)
        self.cqs[0] = Completions(self.acq, (self.aqa >> 16 & 0xFFF) + 1, 0, users=1)
        self.csts = 1

    def _stopped(self, generation: int) -> None:
        if generation == self.generation:
            aqa, asq, acq = self.aqa, self.asq, self.acq
            self.reset()
            self.aqa, self.asq, self.acq = aqa, asq, acq
            self.deassert()

    def _shut(self) -> None:
        self.shutdowns += 1
        self.csts |= 2 << 2

    # --- queues --------------------------------------------------------------------------------------------------

    def _tail_doorbell(self, number: int, value: int) -> None:
        sq = self.sqs.get(number)
        if sq is None or value >= sq.entries:
            self.record_error(f"tail {value} of submission queue {number}")
            return
        if (value - sq.head) % sq.entries < (sq.tail - sq.head) % sq.entries:
            self.record_error(f"tail of submission queue {number} went back from {sq.tail} to {value}")
        sq.tail = value
        generation = self.generation
        self.later(lambda: self._fetch(generation, number), delay=0)

    def _head_doorbell(self, number: int, value: int) -> None:
        cq = self.cqs.get(number)
        if cq is None or value >= cq.entries:
            self.record_error(f"head {value} of completion queue {number}")
            return
        if (value - cq.head) % cq.entries > (cq.tail - cq.head) % cq.entries:
            self.record_error(f"head of completion queue {number} overtook its tail")
        cq.head = value
        messages = self.config.msix_enabled or self.config.msi_enabled
        if not messages and all(each.head == each.tail or each.vector is None for each in self.cqs.values()):
            self.deassert()

    def _fetch(self, generation: int, number: int) -> None:
        while generation == self.generation and number in self.sqs:
            sq = self.sqs[number]
            if sq.head == sq.tail:
                return
            entry = np.frombuffer(self.dma_read(sq.iova + sq.head * 64, 64), SQE)[0]
            sq.head = (sq.head + 1) % sq.entries
            if int(entry["cid"]) in sq.busy:
                self.record_error(f"command identifier {entry['cid']} is in use")
            sq.busy.add(int(entry["cid"]))
            if (min(number, 1), int(entry["opcode"])) not in self.hang:
                self.later(lambda entry=entry: self._execute(generation, number, entry))  # type: ignore[misc]

    def _execute(self, generation: int, number: int, entry: np.void) -> None:
        if generation != self.generation or number not in self.sqs:
            return
        key = (min(number, 1), int(entry["opcode"]))
        self.commands.append((number, key[1]))
        result = 0
        try:
            if key in self.fail_with:
                raise RefusedError(self.fail_with[key])
            handler = (self.io_commands if number else self.admin_commands).get(key[1])
            if handler is None:
                raise RefusedError(INVALID_OPCODE)
            outcome = handler(self, entry)
            if outcome is None:
                self.events.append((number, int(entry["cid"])))
                return
            result, status = outcome, OK
        except RefusedError as refused:
            status = refused.status
        self.complete(number, int(entry["cid"]), result, status)

    def complete(self, number: int, cid: int, result: int, status: tuple[int, int]) -> None:
        sq = self.sqs[number]
        cq = self.cqs[sq.cq]
        sq.busy.discard(cid)
        if (cq.tail + 1) % cq.entries == cq.head:
            self.record_error(f"completion queue {sq.cq} overflows")
            return
        if self.wrong_cid:
            self.wrong_cid = False
            cid = 0x7777
        record = np.zeros(1, CQE)
        record[0] = (result, 0, sq.head, number, cid, status[0] << 9 | status[1] << 1 | cq.phase)
        self.dma_write(cq.iova + cq.tail * 16, record.tobytes())
        cq.tail += 1
        if cq.tail == cq.entries:
            cq.tail, cq.phase = 0, cq.phase ^ 1
        if cq.vector is not None:
            self.interrupt(cq.vector)

    def event(self, dw0: int) -> None:
        """Report an asynchronous event, if anybody asked."""
        with self.lock:
            if self.events:
                number, cid = self.events.pop(0)
                self.later(lambda: self.complete(number, cid, dw0, OK))

    # --- data ----------------------------------------------------------------------------------------------------

    def pages(self, entry: np.void, size: int) -> list[tuple[int, int]]:
        """Walk the PRPs: (iova, bytes) of each piece, checked as the specification allows a controller to."""
        prp1, prp2 = int(entry["prp1"]), int(entry["prp2"])
        if prp1 % 4 or not prp1:
            raise RefusedError(BAD_PRP)
        pieces = [(prp1, min(size, PAGE - prp1 % PAGE))]
        left = size - pieces[0][1]
        if not left:
            return pieces
        if left <= PAGE:
            entries = [prp2]
        else:
            entries = []
            listed, at = -(-left // PAGE), prp2
            while len(entries) < listed:
                room = (PAGE - at % PAGE) // 8
                count = min(room, listed - len(entries))
                chained = count < listed - len(entries)
                words = struct.unpack(f"<{count}Q", self.dma_read(at, 8 * count))
                entries += words[:-1] if chained else words
                at = words[-1]
        for iova in entries:
            if iova % PAGE:
                raise RefusedError(BAD_PRP)
            pieces.append((iova, min(left, PAGE)))
            left -= PAGE
        return pieces

    def to_host(self, entry: np.void, data: bytes | bytearray) -> None:
        done = 0
        for iova, size in self.pages(entry, len(data)):
            self.dma_write(iova, bytes(data[done : done + size]))
            done += size

    def from_host(self, entry: np.void, size: int) -> bytes:
        return b"".join(self.dma_read(iova, length) for iova, length in self.pages(entry, size))

    # --- admin commands ------------------------------------------------------------------------------------------

    def _identify(self, entry: np.void) -> int:
        cns, nsid = int(entry["cdw10"]) & 0xFF, int(entry["nsid"])
        if cns == 1:
            record = np.zeros(1, IDENTIFY_CONTROLLER)
            record["sn"], record["mn"], record["fr"] = b"SERIAL-1".ljust(20), b"vfiopy test".ljust(40), b"1.0     "
            record["vid"], record["mdts"], record["nn"], record["ver"] = 0x1B36, self.mdts, 4, 0x20000
            record["oncs"], record["vwc"], record["aerl"], record["rtd3e"] = 0x0C, 1, 3, 1_000_000
            record["elpe"] = 3
        elif cns == 0:
            if not 1 <= nsid <= 4:
                raise RefusedError(INVALID_NAMESPACE)
            record = np.zeros(1, IDENTIFY_NAMESPACE)
            if nsid in self.disks:
                block, data = self.disks[nsid]
                record["nsze"] = record["ncap"] = record["nuse"] = len(data) // block
                record["flbas"], record["nlbaf"] = 1, 1
                record["lbaf"][0][1]["lbads"] = block.bit_length() - 1
        elif cns == 2:
            self.to_host(entry, np.array([n for n in self.disks if n > nsid], "<u4").tobytes().ljust(PAGE, b"\0"))
            return 0
        else:
            raise RefusedError(INVALID_FIELD)
        self.to_host(entry, record.tobytes())
        return 0

    def _set_features(self, entry: np.void) -> int:
        if int(entry["cdw10"]) & 0xFF != 7:
            raise RefusedError(INVALID_FIELD)
        if set(self.sqs) != {0}:
            raise RefusedError((0, 0x0C))
        return (self.max_queues - 1) * 0x10001

    def _get_log(self, entry: np.void) -> int:
        size = ((int(entry["cdw10"]) >> 16 | int(entry["cdw11"]) << 16) + 1) * 4
        self.to_host(entry, bytes(i & 0xFF for i in range(size)))
        return 0

    def _create_cq(self, entry: np.void) -> int:
        number, size = int(entry["cdw10"]) & 0xFFFF, (int(entry["cdw10"]) >> 16) + 1
        vector = int(entry["cdw11"]) >> 16 if entry["cdw11"] & 2 else None
        if number in self.cqs or not 1 <= number <= self.max_queues:
            raise RefusedError(BAD_QUEUE)
        if size < 2 or size > (self.cap & 0xFFFF) + 1:
            raise RefusedError(BAD_QUEUE_SIZE)
        if entry["prp1"] % PAGE or not entry["cdw11"] & 1:
            raise RefusedError(INVALID_FIELD)
        self.cqs[number] = Completions(int(entry["prp1"]), size, vector)
        return 0

    def _create_sq(self, entry: np.void) -> int:
        number, size = int(entry["cdw10"]) & 0xFFFF, (int(entry["cdw10"]) >> 16) + 1
        cq = int(entry["cdw11"]) >> 16
        if cq not in self.cqs:
            raise RefusedError((1, 0x00))
        if number in self.sqs:
            raise RefusedError(BAD_QUEUE)
        if entry["prp1"] % PAGE or not entry["cdw11"] & 1:
            raise RefusedError(INVALID_FIELD)
        self.sqs[number] = Submissions(int(entry["prp1"]), size, cq)
        self.cqs[cq].users += 1
        return 0

    def _delete_sq(self, entry: np.void) -> int:
        sq = self.sqs.pop(int(entry["cdw10"]), None)
        if sq is None:
            raise RefusedError(BAD_QUEUE)
        self.cqs[sq.cq].users -= 1
        return 0

    def _delete_cq(self, entry: np.void) -> int:
        number = int(entry["cdw10"])
        if number not in self.cqs:
            raise RefusedError(BAD_QUEUE)
        if self.cqs[number].users:
            raise RefusedError((1, 0x0C))
        del self.cqs[number]
        return 0

    def _event_request(self, entry: np.void) -> None:
        if len(self.events) > 3:
            raise RefusedError((1, 0x05))

    # --- I/O commands --------------------------------------------------------------------------------------------

    def _extent(self, entry: np.void, block: int, data: bytearray) -> slice:
        start = (int(entry["cdw10"]) | int(entry["cdw11"]) << 32) * block
        size = ((int(entry["cdw12"]) & 0xFFFF) + 1) * block
        if start + size > len(data):
            raise RefusedError(OUT_OF_RANGE)
        return slice(start, start + size)

    def _disk(self, entry: np.void) -> tuple[int, bytearray]:
        if int(entry["nsid"]) not in self.disks:
            raise RefusedError(INVALID_NAMESPACE)
        return self.disks[int(entry["nsid"])]

    def _check_size(self, size: int) -> None:
        if self.mdts and size > PAGE << self.mdts:
            raise RefusedError(INVALID_FIELD)

    def _read(self, entry: np.void) -> int:
        block, data = self._disk(entry)
        extent = self._extent(entry, block, data)
        self._check_size(extent.stop - extent.start)
        self.to_host(entry, data[extent])
        return 0

    def _write(self, entry: np.void) -> int:
        block, data = self._disk(entry)
        extent = self._extent(entry, block, data)
        self._check_size(extent.stop - extent.start)
        data[extent] = self.from_host(entry, extent.stop - extent.start)
        return 0

    def _zero(self, entry: np.void) -> int:
        block, data = self._disk(entry)
        extent = self._extent(entry, block, data)
        data[extent] = bytes(extent.stop - extent.start)
        return 0

    def _manage(self, entry: np.void) -> int:
        block, data = self._disk(entry)
        count = int(entry["cdw10"]) + 1
        for attributes, blocks, lba in struct.iter_unpack("<IIQ", self.from_host(entry, 16 * count)):
            if attributes or (lba + blocks) * block > len(data):
                raise RefusedError(OUT_OF_RANGE)
            data[lba * block : (lba + blocks) * block] = bytes(blocks * block)
        return 0

    def _flush(self, entry: np.void) -> int:
        self._disk(entry)
        return 0

    admin_commands: ClassVar[dict[int, Any]] = {
        0x00: _delete_sq, 0x01: _create_sq, 0x02: _get_log, 0x04: _delete_cq, 0x05: _create_cq,
        0x06: _identify, 0x09: _set_features, 0x0C: _event_request,
    }  # fmt: skip
    io_commands: ClassVar[dict[int, Any]] = {0x00: _flush, 0x01: _write, 0x02: _read, 0x08: _zero, 0x09: _manage}


class MsiOnly(NvmeDevice):
    capabilities: ClassVar[Any] = (Msi(vectors=4), PciExpress())


class IntxOnly(NvmeDevice):
    capabilities: ClassVar[Any] = (PciExpress(),)


class Silent(NvmeDevice):
    capabilities: ClassVar[Any] = (PciExpress(),)
    interrupt_pin = 0
