"""The book on the real kernel: after every operation the kernel's view must equal the book's.

The kernel's view: what unmap returns, the number of mappings left (type1's DMA_AVAIL), what is charged to the process
(VmLck, VmPin), and the IOMMU's page tables in debugfs: which pages, with which rights, to which page frames.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))

from iova_kernel import FakeKernel
from iova_model import Model, Refused
from iova_steps import NumberedSteps

import vfiopy
from vfiopy import errors
from vfiopy.iova import KIND_FILE, MAPPER_IOAS, STATE_UNKNOWN, IovaSpace, charges

PAGE = mmap.PAGESIZE
POOL = 48
"""Pages of memory that mappings are made of; several may have the same."""
SEQUENCES = 40 if os.environ.get("VFIOPY_PROFILE") == "nightly" else 6
STEPS = 40
MODES = ("type1v2", "iommufd")
TOP = (1 << 48) - PAGE
MSI = 0xFEE0_0000


class Machine:
    """A device in a space of its own, memory, and the ways to ask the kernel."""

    def __init__(self, bdf: str, mode: str) -> None:
        self.space = vfiopy.AddressSpace(f"{mode} space")
        self.device = vfiopy.open(bdf, backend=mode, space=self.space)
        self.book: IovaSpace = self.space.book
        self.mapper: Any = self.space.mappers[0]
        self.type1 = mode != "iommufd"
        self.tables = Path(f"/sys/kernel/debug/iommu/intel/{bdf}/domain_translation_struct")
        self.memory = mmap.mmap(-1, POOL * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.anchor = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(self.anchor)
        ctypes.memset(self.address, 0x5A, POOL * PAGE)
        self.pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self.charged = charges()
        self.available = self.dma_avail()

    def close(self) -> None:
        os.close(self.pagemap)
        self.book.unmap_all()
        self.device.close()
        self.space.close()
        del self.anchor
        self.memory.close()

    def dma_avail(self) -> int | None:
        return self.mapper.container.info().dma_avail if self.type1 else None

    def frames(self) -> list[int]:
        """Page frame of each page of the pool."""
        entries = os.pread(self.pagemap, 8 * POOL, self.address // PAGE * 8)
        return [entry & ((1 << 55) - 1) for entry in memoryview(entries).cast("Q")]

    def page_table(self) -> dict[int, tuple[int, int]]:
        """IOVA page to (rights, page frame), as the IOMMU has it."""
        found = {}
        for line in self.tables.read_text().splitlines():
            key, bar, rest = line.partition(" |")
            if bar:
                entry = int(rest.split()[-1], 16)
                found[int(key, 16)] = entry & 3, (entry & ((1 << 52) - 1)) // PAGE
        return found

    def agree(self) -> None:
        """Kernel and book must say the same."""
        self.book.verify()
        mappings = self.book.mappings()
        frames = self.frames()
        expected = {}
        for it in mappings:
            first = (it.address - self.address) // PAGE
            for page in range(it.size // PAGE):
                expected[it.iova // PAGE + page] = it.prot, frames[first + page]
        assert self.page_table() == expected
        now, mapped = charges(), sum(it.size for it in mappings)
        if self.type1:
            assert self.dma_avail() == (self.available or 0) - len(mappings)
            assert now.locked - self.charged.locked == mapped
        else:
            assert now.pinned - self.charged.pinned == mapped
        assert sum(row[6] for row in self.book.kernel_mappers()) == mapped


@pytest.fixture(params=MODES)
def machine_in(request: pytest.FixtureRequest, bound_edu: str) -> Iterator[Machine]:
    machine = Machine(bound_edu, request.param)
    yield machine
    machine.close()


class Sequence:
    """Random operations on book and model; the kernel behind the book is the real one."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine, self.book = machine, machine.book
        self.steps = NumberedSteps(machine.book)
        self.random = random.Random(seed)
        self.model = Model(FakeKernel())
        self.model.set_usable(self.book.usable(), self.book.stats()["page_sizes"], self.book.stats()["max_mappings"])
        token = self.book.kernel_mappers()[0][0]
        self.model.add_mapper(token, 3, ioas=not machine.type1)
        self.pinned: list[tuple[int, int]] = []
        self.outcomes: set[str] = set()

    def both(self, name: str, *arguments: object) -> Any:
        expected, wanted = _outcome(getattr(self.model, name), *arguments)
        side = self.steps if hasattr(self.steps, name) else self.book
        result, raised = _outcome(getattr(side, name), *arguments)
        kind = wanted.kind if isinstance(wanted, Refused) else type(None)
        assert type(raised) is kind, f"{name}{arguments}: book {raised or result!r}, model {wanted or expected!r}"
        if name != "begin_unmap":
            assert result == expected, f"{name}{arguments}"
        self.outcomes.add(f"{name} {kind.__name__}")
        return raised

    def some(self) -> int:
        mapped = self.model.mapped
        return self.random.choice(mapped).iova if mapped and self.random.random() < 0.9 else 0x7000

    def step(self) -> None:
        choose = self.random
        action = choose.choice([self.map, self.map, self.map, self.unmap, self.unmap_range, self.pin, self.in_steps])
        action()

    def request(self) -> tuple[object, ...]:
        choose = self.random
        size = choose.choice([1, 1, 2, 3, 5, 8, 16])
        first = choose.randrange(POOL - size + 1)
        fixed = choose.choice([choose.randrange(1, 64) * PAGE, choose.randrange(1, 64) * PAGE, TOP, MSI, MSI - PAGE])
        iova = choose.choice([-1, fixed])
        limit = choose.choice([(1 << 64) - 1, (1 << 28) - 1])
        return (
            None, self.machine.address + first * PAGE, size * PAGE, choose.randint(1, 3), iova, limit,
            0, 0, -1, 0, False,
        )  # fmt: skip

    def map(self) -> None:
        self.both("map", *self.request())

    def unmap(self) -> None:
        self.both("unmap", self.some() + self.random.choice([0, 0, 0, PAGE]))

    def unmap_range(self) -> None:
        first = self.random.choice([self.some(), self.random.randrange(1, 64) * PAGE])
        self.both("unmap_range", first, first + self.random.randrange(1, 24) * PAGE - 1)

    def pin(self) -> None:
        """Pins have no part in the kernel; but what it says of page frames, pins say too."""
        iova, pages = self.some(), self.random.randint(1, 3)
        if self.both("pin", iova, pages * PAGE, 1, 0, False) is None:
            frames = self.book.pin(iova, pages * PAGE, 1, pfns=True)
            table = self.machine.page_table()
            assert frames == [table[iova // PAGE + page][1] for page in range(pages)]
            self.book.unpin(iova, pages * PAGE)
            self.both("unmap", iova)  # refused: PinnedError, or a mapping that begins lower
            self.both("unpin", iova, pages * PAGE, 0)

    def in_steps(self) -> None:
        if self.random.random() < 0.5:
            request = self.request()
            iova = self.model_iova(request)
            if self.both("begin_map", *request) is None:
                self.both(self.random.choice(["commit_map", "abort_map"]), iova)
            return
        it = next((it for it in self.model.mapped), None)
        if it is not None and self.both("begin_unmap", it.iova, it.last) is None:
            self.both(self.random.choice(["finish_unmap", "abort_unmap"]), 0)

    def model_iova(self, request: tuple[object, ...]) -> int:
        """Where the model would put it, without doing it."""
        mapped = list(self.model.mapped)
        try:
            return self.model.reserve(*request).iova  # type: ignore[arg-type]
        except Refused:
            return 0
        finally:
            self.model.mapped = mapped


def _outcome(call: Any, *arguments: object) -> tuple[Any, Exception | None]:
    try:
        return call(*arguments), None
    except (errors.VfiopyError, ValueError, Refused) as error:
        return None, error


def test_sequences_leave_book_and_kernel_equal(machine_in: Machine) -> None:
    outcomes: set[str] = set()
    for seed in range(SEQUENCES):
        sequence = Sequence(machine_in, seed)
        for _ in range(STEPS):
            sequence.step()
            machine_in.agree()
        outcomes |= sequence.outcomes
        sequence.both("unmap_range", 0, (1 << 64) - 1)
        machine_in.agree()
    # The sequences are worth something only if they got around.
    assert {
        "map NoneType", "map OverlapError", "map IovaRangeError", "unmap NoneType", "unmap NotMappedError",
        "unmap PinnedError", "unmap_range NoneType", "unmap_range NotMappedError", "pin NoneType",
        "commit_map NoneType", "abort_map NoneType", "finish_unmap NoneType", "abort_unmap NoneType",
    } <= outcomes  # fmt: skip


def test_memory_that_the_kernel_refuses_leaves_no_trace(machine_in: Machine) -> None:
    """The device may not write what this process may not write: EFAULT, after the range was reserved."""
    book = machine_in.book
    with mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        anchor = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(anchor)
        ctypes.memset(address, 1, 4 * PAGE)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE), mmap.PROT_READ) == 0
        before = book.free_ranges()
        with pytest.raises(errors.MemoryKindError, match="cannot be pinned"):
            book.map(area, address, 4 * PAGE, 3)
        assert book.free_ranges() == before
        machine_in.agree()
        assert libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(4 * PAGE), mmap.PROT_READ | mmap.PROT_WRITE) == 0
        del anchor


def test_what_was_unmapped_behind_the_books_back_is_unknown_until_resync(machine_in: Machine) -> None:
    book = machine_in.book
    iova = book.map(None, machine_in.address, 4 * PAGE, 3)
    other = book.map(None, machine_in.address, PAGE, 3)
    if machine_in.type1:
        assert machine_in.mapper.container.calls.unmap_dma(iova, 4 * PAGE) == 4 * PAGE
    else:
        ioas = machine_in.mapper.ioas
        assert machine_in.mapper.iommufd.calls.ioas_unmap(ioas.id, iova, 4 * PAGE) == 4 * PAGE
    with pytest.raises(errors.NotMappedError, match="is now in an unknown state"):
        book.unmap(iova)
    found = book.find(iova)
    assert found is not None
    assert found.state == STATE_UNKNOWN
    assert book.resync() == 4 * PAGE
    assert [it.iova for it in book.mappings()] == [other]
    machine_in.agree()


def test_replay_and_drop_on_the_kernel(machine_in: Machine) -> None:
    book = machine_in.book
    token, kind, fd, number, *_ = book.kernel_mappers()[0]
    for index in range(6):
        book.map(None, machine_in.address + index * PAGE, PAGE, 1 + index % 3, 0x10000 * (index + 1))
    machine_in.agree()
    book.drop(token)
    assert machine_in.page_table() == {}
    book.replay(token)
    machine_in.agree()
    # The same object a second time: its ranges are taken, so that nothing stays of the second replay.
    twice = book.add_kernel_mapper(kind, fd, number)
    with pytest.raises(errors.OverlapError):
        book.replay(twice)
    book.remove_kernel_mapper(twice)
    machine_in.agree()


def test_type1_memory_moves_under_the_device(bound_edu: str) -> None:
    """VADDR update: the page tables stay as they are while the process maps the same file somewhere else."""
    machine = Machine(bound_edu, "type1v2")
    book = machine.book
    fd = os.memfd_create("moving")
    os.ftruncate(fd, 8 * PAGE)
    old, new = mmap.mmap(fd, 8 * PAGE), mmap.mmap(fd, 8 * PAGE)
    anchors = [ctypes.c_char.from_buffer(area) for area in (old, new)]
    addresses = [ctypes.addressof(anchor) for anchor in anchors]
    ctypes.memset(addresses[0], 7, 8 * PAGE)
    first = book.map(old, addresses[0], 4 * PAGE, 3)
    second = book.map(old, addresses[0] + 4 * PAGE, 4 * PAGE, 3)
    table = machine.page_table()
    assert len(table) == 8
    assert book.lose_addresses(0, (1 << 64) - 1) == 8 * PAGE
    with pytest.raises(errors.BusyError, match="no valid address"):
        book.pin(first, PAGE, 1)
    for iova, offset in ((first, 0), (second, 4 * PAGE)):
        book.set_address(iova, 4 * PAGE, addresses[1] + offset, new)
    assert machine.page_table() == table
    assert [it.memory for it in book.by_address(addresses[1], 8 * PAGE)] == [new, new]
    assert book.unmap_all() == 8 * PAGE
    assert machine.page_table() == {}
    book.verify()
    del anchors
    machine.close()
    old.close()
    new.close()
    os.close(fd)


def test_iommufd_changes_the_process_of_file_memory_only(bound_edu: str) -> None:
    machine = Machine(bound_edu, "iommufd")
    book = machine.book
    fd = os.memfd_create("moving")
    os.ftruncate(fd, 4 * PAGE)
    token = next(row[0] for row in book.kernel_mappers() if row[1] == MAPPER_IOAS)
    iova = book.map(None, 0, 4 * PAGE, 3, kind=KIND_FILE, fd=fd)
    book.change_process(token)
    assert book.lose_addresses(iova, iova + 4 * PAGE - 1) == 4 * PAGE
    book.set_address(iova, 4 * PAGE, 0, None)
    book.map(None, machine.address, PAGE, 3)
    with pytest.raises(errors.VfioError, match="IOMMU_IOAS_CHANGE_PROCESS"):
        book.change_process(token)
    machine.close()
    os.close(fd)
