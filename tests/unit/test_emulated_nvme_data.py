"""Where a command's data lie: PRPs and SGLs against a simple model, and the controller memory buffer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvme_support import driven, noise, raw_queue
from ways import WAYS

import vfiopy
from vfiopy.dma import DmaArray
from vfiopy.drivers import nvme
from vfiopy.drivers.nvme import commands
from vfiopy.emulated.nvme import Nvme
from vfiopy.emulated.nvme.memory import Memory, Piece
from vfiopy.emulated.nvme.prp import walk_prps
from vfiopy.emulated.nvme.sgl import DESCRIPTOR, DescriptorType, walk_sgl
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.status import Code

PAGE = 4096
POOL = 64  # pages
both_ways = pytest.mark.parametrize("way", WAYS)
DATA, BUCKET, SEGMENT, LAST = DescriptorType


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same bytes in as few pieces as possible."""
    found: list[Piece] = []
    for address, size in pieces:
        before, length = found[-1] if found else (0, 0)
        if length and (before is address is None or (None not in (before, address) and before + length == address)):
            found[-1] = (before, length + size)
        elif size:
            found.append((address, size))
    return found


@pytest.fixture(scope="module")
def lists() -> Iterator[tuple[Memory, DmaArray]]:
    """Memory as a controller sees it, and pages for lists."""
    disk = Nvme()
    with vfiopy.open(disk) as device, device.dma.allocate(POOL * PAGE, alignment=4 * PAGE) as pool:
        device.bus_master = True
        yield Memory(disk, None), pool


# --- PRPs --------------------------------------------------------------------------------------------------------


def write_list(pool: DmaArray, entries: list[int], pages: list[int], first: int, page: int) -> int:
    """Write a PRP list that begins at an offset of its first page; return where."""
    at = start = pool.iova + pages[0] * page + first
    pages = pages[1:]
    while True:
        room = (page - at % page) // 8
        part = entries if len(entries) <= room else entries[: room - 1]
        entries = entries[len(part) :]
        following = pool.iova + pages[0] * page if entries else 0
        words = np.array(part + ([following] if entries else []), "<u8")
        pool[at - pool.iova : at - pool.iova + 8 * len(words)] = words.view(np.uint8)
        if not entries:
            return start
        at, pages = following, pages[1:]


@settings(deadline=None, max_examples=150)
@given(
    data=st.data(),
    shift=st.sampled_from([12, 12, 13, 14]),
    offset=st.integers(0, PAGE // 4 - 1).map(lambda dwords: 4 * dwords),
    size=st.one_of(st.integers(1, 5 * PAGE), st.integers(1, 1100 * PAGE)),
    contiguous=st.booleans(),
)
def test_prps_say_the_same_as_the_model(
    lists: tuple[Memory, DmaArray], data: st.DataObject, shift: int, offset: int, size: int, contiguous: bool
) -> None:
    memory, pool = lists
    page = 1 << shift
    count = -(-max(0, size - (page - offset)) // page)
    base = data.draw(st.integers(1, 1 << 30)) << shift
    if contiguous:
        frames = [base + page * (number + 1) for number in range(count)]
    else:
        random = data.draw(st.randoms(use_true_random=False))
        frames = [random.randrange(1 << 34) << shift for _ in range(count)]
    expected = joined([(base + offset, min(size, page - offset))] + [
        (frame, min(page, size - (page - offset) - page * number)) for number, frame in enumerate(frames)
    ])  # fmt: skip
    if count < 2:
        prp2 = frames[0] if frames else 0xDEAD
    else:
        most = page // 8
        # so near to the end of its page that the list goes on in another, or anywhere
        left = data.draw(st.one_of(st.integers(1, min(count, most)), st.integers(1, most)))
        first = page - 8 * left
        order = data.draw(st.permutations(range(POOL * PAGE // page)))
        if first == page - 8 and page - 8 + 8 * count > page:
            first -= 8  # a list's first page holds an entry, or it would be a pointer to the list
        prp2 = write_list(pool, frames, list(order), first, page)
    assert walk_prps(memory, base + offset, prp2, size, page) == expected


@pytest.mark.parametrize(
    ("prp1", "prp2", "size", "at"),
    [(0x1002, 0, 512, 24), (0x1000, 0x3010, 8192, 32), (0x1000, 0x3004, 3 * PAGE, 32), (0x1801, 0x3000, 8192, 24)],
)
def test_prps_that_are_not_aligned(prp1: int, prp2: int, size: int, at: int) -> None:
    with driven() as (_, controller), raw_queue(controller) as queue:
        fields = {"opcode": 2, "nsid": 1, "prp1": prp1, "prp2": prp2, "cdw12": size // 512 - 1}
        assert queue.run(**fields) == Code.PRP_OFFSET_INVALID
        entry = controller.admin.error_log(1)[0]
        assert (entry["parameter_location"], entry["sqid"], entry["cid"], entry["nsid"]) == (at, 2, 0, 1)
        assert entry["status"] >> 1 & 0x7FF == Code.PRP_OFFSET_INVALID


def test_a_list_with_an_entry_that_is_no_page() -> None:
    with driven() as (_, controller), raw_queue(controller) as queue:
        table = controller.device.dma.allocate(512, "<u8", alignment=PAGE)
        table[:2] = [table.iova, table.iova + 8]
        fields = {"opcode": 2, "nsid": 1, "prp1": table.iova, "cdw12": 3 * PAGE // 512 - 1}
        assert queue.run(prp2=table.iova, **fields) == Code.PRP_OFFSET_INVALID


@both_ways
def test_a_list_that_is_not_mapped(way: str) -> None:
    with driven(None, way, clean=False) as (_, controller), raw_queue(controller) as queue:
        fields = {"opcode": 2, "nsid": 1, "prp1": 0x1000, "prp2": 0x7000_0000, "cdw12": 3 * PAGE // 512 - 1}
        assert queue.run(**fields) == Code.DATA_TRANSFER_ERROR
        assert queue.run(opcode=0, nsid=1) == Code.SUCCESS


# --- SGLs --------------------------------------------------------------------------------------------------------


def descriptor(kind: int, address: int, length: int) -> bytes:
    return DESCRIPTOR.pack(address, length, kind << 4)


def write_segments(pool: DmaArray, segments: list[list[bytes]]) -> tuple[int, int]:
    """Write a chain of segments; return the 16 bytes of the first descriptor as PRP 1 and 2."""
    lead, at = b"", pool.nbytes
    for number, segment in enumerate(reversed(segments)):
        content = b"".join(segment) + lead
        at -= len(content)
        pool[at : at + len(content)] = np.frombuffer(content, np.uint8)
        lead = descriptor(SEGMENT if number else LAST, pool.iova + at, len(content))
    return struct.unpack("<QQ", lead)  # type: ignore[return-value]


PARTS = st.lists(
    st.tuples(
        st.sampled_from([DATA, DATA, DATA, BUCKET]),
        st.one_of(st.integers(0, 1 << 40), st.just(-1)),  # -1: where the one before ends
        st.integers(0, 100_000),
    ),
    min_size=1,
    max_size=60,
)


@settings(deadline=None, max_examples=200)
@given(parts=PARTS, cuts=st.sets(st.integers(1, 59)), to_host=st.booleans())
def test_sgls_say_the_same_as_the_model(
    lists: tuple[Memory, DmaArray],
    parts: list[tuple[DescriptorType, int, int]],
    cuts: set[int],
    to_host: bool,
) -> None:
    memory, pool = lists
    end, expected, described = 0, [], []
    for kind, address, length in parts:
        start = end if address < 0 else address
        described.append(descriptor(kind, start, length))
        if kind == BUCKET:
            expected += [(None, length)] if to_host else []
        else:
            expected.append((start, length))
            end = start + length
    size = sum(length for _, length in expected)
    bounds = [0, *sorted(cut for cut in cuts if cut < len(parts)), len(parts)]
    segments = [described[start:stop] for start, stop in pairwise(bounds)]
    prp1, prp2 = write_segments(pool, segments)
    if size:
        assert joined(walk_sgl(memory, prp1, prp2, size, to_host=to_host)) == joined(expected)
        with pytest.raises(Exception, match=f"{Code.SGL_LENGTH_INVALID:#x}"):
            walk_sgl(memory, prp1, prp2, size + 1, to_host=to_host)
        if size > 1:
            with pytest.raises(Exception, match=f"{Code.SGL_LENGTH_INVALID:#x}"):
                walk_sgl(memory, prp1, prp2, size - 1, to_host=to_host)


@both_ways
def test_data_by_sgl(way: str) -> None:
    with driven(None, way) as (disk, controller), raw_queue(controller) as queue:
        assert controller.info.raw["sgls"] == 0x10001
        buffer = controller.device.dma.allocate(4 * PAGE, alignment=PAGE)
        pool = controller.device.dma.allocate(PAGE, alignment=PAGE)
        buffer[:3000] = noise(3000)
        buffer[5001 : 5001 + 1096] = noise(1096, 1)
        written = np.concatenate([noise(3000), noise(1096, 1)])
        segments = [
            [descriptor(DATA, buffer.iova, 3000), descriptor(BUCKET, 0, 77)],
            [descriptor(DATA, buffer.iova + 5001, 1096)],
        ]
        prp1, prp2 = write_segments(pool, segments)
        fields = {"nsid": 1, "flags": 0x40, "cdw10": 3, "cdw12": 7}
        assert queue.run(opcode=1, prp1=prp1, prp2=prp2, **fields) == Code.SUCCESS
        assert (controller.namespace(1).read(3, 8) == written).all()
        buffer[:] = 0
        segments = [[descriptor(DATA, buffer.iova + 8000, 1000), descriptor(BUCKET, 0, 3000)],
                    [descriptor(DATA, buffer.iova, 96)]]  # fmt: skip
        prp1, prp2 = write_segments(pool, segments)
        assert queue.run(opcode=2, prp1=prp1, prp2=prp2, **fields) == Code.SUCCESS
        assert (buffer[8000:9000] == written[:1000]).all()
        assert (buffer[:96] == written[4000:]).all()
        assert not buffer[96:8000].any()
        assert not buffer[9000:].any()
        # and one descriptor alone, in the command
        prp1, prp2 = struct.unpack("<QQ", descriptor(DATA, buffer.iova + 1, 4096))
        assert queue.run(opcode=2, prp1=prp1, prp2=prp2, **fields) == Code.SUCCESS
        assert (buffer[1:4097] == written).all()
        assert disk.logs.reads == 3


SGL_REFUSALS = {
    "unknown type": (descriptor(5, 0, 4096), Code.SGL_TYPE_INVALID),
    "unknown sub type": (DESCRIPTOR.pack(0, 4096, 1), Code.SGL_TYPE_INVALID),
    "too short": (descriptor(DATA, 0, 4095), Code.SGL_LENGTH_INVALID),
    "too long": (descriptor(DATA, 0, 4097), Code.SGL_LENGTH_INVALID),
    "empty segment": (descriptor(LAST, 0, 0), Code.INVALID_SGL_SEGMENT),
    "odd segment": (descriptor(LAST, 0, 24), Code.INVALID_SGL_SEGMENT),
    "segment out of place": (descriptor(LAST, 4, 16), Code.INVALID_SGL_SEGMENT),
    "enormous segment": (descriptor(LAST, 0, 1 << 20), Code.INVALID_SGL_COUNT),
    "not mapped": (descriptor(LAST, 0x7000_0000, 16), Code.DATA_TRANSFER_ERROR),
}


@pytest.mark.parametrize("which", SGL_REFUSALS)
def test_sgls_that_are_refused(which: str) -> None:
    first, code = SGL_REFUSALS[which]
    with driven(clean=False) as (_, controller), raw_queue(controller) as queue:
        prp1, prp2 = struct.unpack("<QQ", first)
        assert queue.run(opcode=2, nsid=1, flags=0x40, prp1=prp1, prp2=prp2, cdw12=7) == code


def test_segments_that_are_refused() -> None:
    with driven() as (_, controller), raw_queue(controller) as queue:
        pool = controller.device.dma.allocate(PAGE, alignment=PAGE)

        def run(kind: int, *descriptors: bytes) -> int:
            content = b"".join(descriptors)
            pool[: len(content)] = np.frombuffer(content, np.uint8)
            prp1, prp2 = struct.unpack("<QQ", descriptor(kind, pool.iova, len(content)))
            return queue.run(opcode=2, nsid=1, flags=0x40, prp1=prp1, prp2=prp2, cdw12=7)

        onward = descriptor(SEGMENT, pool.iova, 16)
        assert run(LAST, descriptor(DATA, pool.iova, 96), onward) == Code.INVALID_SGL_SEGMENT
        assert run(SEGMENT, onward, descriptor(DATA, pool.iova, 96)) == Code.INVALID_SGL_COUNT
        assert run(SEGMENT, onward) == Code.INVALID_SGL_COUNT, "a segment that leads to itself"
        # PRPs only for admin commands; no SGL for metadata; nothing fused
        queue.put(opcode=0, nsid=1, flags=0x01)
        assert queue.run(opcode=0, nsid=1, flags=0x80) == Code.INVALID_FIELD
    with driven() as (_, controller), raw_queue(controller) as queue:
        assert queue.run(opcode=2, nsid=1, flags=0x80, cdw12=7) == Code.INVALID_FIELD
        assert queue.run(opcode=0, nsid=1, flags=0x01) == Code.INVALID_FIELD


# --- the controller memory buffer --------------------------------------------------------------------------------

SIZE = 64 << 10
BASE = 0xE000_0000


def switch_on(controller: nvme.Controller, base: int = BASE) -> None:
    registers = controller.device.bars[0]
    registers.write32(reg.CMBMSC + 4, base >> 32)
    registers.write32(reg.CMBMSC, base & 0xFFFF_F000 | 3)


@both_ways
def test_queue_lists_and_data_in_the_memory_buffer(way: str) -> None:
    with driven(Nvme(memory_buffer=SIZE), way) as (_, controller):
        registers, memory = controller.device.bars[0], controller.device.bars[2]
        assert controller.capabilities.memory_buffer
        assert registers.read32(reg.CMBSZ) == registers.read32(reg.CMBLOC) == 0
        switch_on(controller)
        assert registers.read32(reg.CMBLOC) == 2
        assert registers.read32(reg.CMBSZ) == SIZE | 0x1F
        assert registers.read32(reg.CMBSTS) == 0
        controller.namespace(1).write(0, noise(3 * PAGE))
        # a submission queue of 16 at 0, its completion queue behind, a PRP list, three pages of data
        controller.admin.execute(commands.create_cq(2, 16, BASE + 0x1000, None))
        controller.admin.execute(commands.create_sq(2, 16, BASE, 2))
        for number, page in enumerate((BASE + 0x5000, BASE + 0x3000)):
            memory.write64(0x2000 + 8 * number, page)
        entry = np.zeros(1, nvme_sqe())
        entry["opcode"], entry["cid"], entry["nsid"], entry["cdw12"] = 2, 7, 1, 3 * PAGE // 512 - 1
        entry["prp1"], entry["prp2"] = BASE + 0x4000, BASE + 0x2000
        memory.write_block(0, entry.tobytes(), 4)
        registers.write32(reg.doorbell(2, 4, completion=False), 1)
        memory.poll32(0x100C, 0x10000, 0x10000, 5.0)
        assert memory.read32(0x100C) == 0x10007
        found = b"".join(bytes(memory.read_block(place, PAGE // 4, 4)) for place in (0x4000, 0x5000, 0x3000))
        assert found == bytes(noise(3 * PAGE))
        controller.admin.execute(commands.delete_sq(2))
        controller.admin.execute(commands.delete_cq(2))


def nvme_sqe() -> np.dtype[np.void]:
    from vfiopy.nvme_spec.structures import SQE  # noqa: PLC0415

    return SQE


def test_what_does_not_fit_into_the_memory_buffer() -> None:
    with driven(Nvme(memory_buffer=SIZE), clean=False) as (_, controller), raw_queue(controller) as queue:
        switch_on(controller)
        fields = {"opcode": 2, "nsid": 1, "cdw12": 15}
        assert queue.run(prp1=BASE + SIZE - PAGE, prp2=BASE + SIZE, **fields) == Code.INVALID_CMB_USE
        assert queue.run(prp1=BASE - PAGE, prp2=BASE, **fields) == Code.INVALID_CMB_USE
        controller.device.bars[0].write32(reg.CMBMSC, 0)
        assert queue.run(prp1=BASE, **{**fields, "cdw12": 0}) == Code.DATA_TRANSFER_ERROR
        switch_on(controller, (1 << 64) - PAGE)
        assert controller.device.bars[0].read32(reg.CMBSTS) == 1


def test_no_memory_buffer() -> None:
    with driven() as (_, controller):
        registers = controller.device.bars[0]
        switch_on(controller)
        assert not controller.capabilities.memory_buffer
        assert registers.read32(reg.CMBSZ) == registers.read32(reg.CMBLOC) == registers.read32(reg.CMBMSC) == 0
        assert controller.namespace(1).read(0, 1).size == 512
