"""Mappers in Python keep in step with the book: while they join, while others map, and wherever Ctrl-C comes."""

from __future__ import annotations

import mmap
import sys
import threading
from collections.abc import Callable

import pytest
from interrupts import Interrupt
from iova_kernel import Entry, FakeKernel

import vfiopy
from vfiopy.backend import IovaRange, MapperTraits, Memory, MemoryKind, Prot
from vfiopy.dma import AddressSpace
from vfiopy.dma import mappers as mappers_module
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.errors import NotMappedError, OverlapError
from vfiopy.iova import MAPPER_TYPE1, STATE_LIVE


class Member:
    def close(self) -> None: ...


MEMBER = Member()


class StrictMapper:
    """Takes nothing twice, and nothing back that it does not have. May wait in its first map."""

    name = "strict mapper"
    kernel_target = None
    adopted = False

    def __init__(self) -> None:
        self.mapped: dict[int, int] = {}
        self.inside = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def traits(self) -> MapperTraits:
        return MapperTraits(PAGE_SIZE, 0, frozenset({MemoryKind.HOST}))

    def ranges(self) -> list[IovaRange]:
        return [IovaRange(0, 0xFFFF_FFFF)]

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        self.inside.set()
        assert self.go_on.wait(10)
        if iova in self.mapped:
            raise OverlapError(f"{iova:#x} is mapped", object=self.name)
        self.mapped[iova] = memory.size

    def unmap(self, iova: int, size: int) -> int:
        if self.mapped.get(iova) != size:
            raise NotMappedError(f"{iova:#x} is not mapped", object=self.name)
        return self.mapped.pop(iova)

    def close(self) -> None: ...


class SlowKernel(FakeKernel):
    """Waits in its first map."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def map(self, fd: int, iova: int, entry: Entry) -> int:
        self.inside.set()
        assert self.go_on.wait(10)
        return super().map(fd, iova, entry)


@pytest.fixture
def page() -> mmap.mmap:
    return mmap.mmap(-1, PAGE_SIZE)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def agree(space: AddressSpace, *mappers: StrictMapper) -> None:
    space.book.verify()
    live = {it.iova: it.size for it in space.book.mappings() if it.state == STATE_LIVE}
    assert len(live) == len(space.book.mappings())
    for mapper in mappers:
        assert mapper.mapped == live


def test_what_others_map_and_unmap_during_a_replay_is_neither_missed_nor_done_twice(page: mmap.mmap) -> None:
    with AddressSpace() as space:
        mapper, member = StrictMapper(), Member()
        for iova in (0x1000, 0x2000, 0x3000):
            space.map(page, iova=iova)
        mapper.go_on.clear()
        joining = in_thread(lambda: space.join(mapper, member))
        assert mapper.inside.wait(10)
        others = [in_thread(lambda: space.map(page, iova=0x4000)), in_thread(lambda: space.unmap(0x2000))]
        for other in others:
            other.join(0.05)  # wait for the replay to end, if they do
        mapper.go_on.set()
        for thread in (joining, *others):
            thread.join(10)
        assert set(mapper.mapped) == {0x1000, 0x3000, 0x4000}
        agree(space, mapper)
        space.unmap_all()
        space.leave(mapper, member)


def test_a_map_that_the_kernel_is_at_while_a_mapper_joins_is_replayed(page: mmap.mmap) -> None:
    kernel = SlowKernel()
    with AddressSpace() as space:
        mapper, member = StrictMapper(), Member()
        token = space.book.add_kernel_mapper(MAPPER_TYPE1, 99, ioctl=kernel.address)
        space.book.set_usable([(0, 0xFFFF_FFFF)], PAGE_SIZE)
        mapping = in_thread(lambda: space.map(page, iova=0x4000))
        assert kernel.inside.wait(10)
        joining = in_thread(lambda: space.join(mapper, member))
        joining.join(0.05)
        kernel.go_on.set()
        for thread in (mapping, joining):
            thread.join(10)
        assert mapper.mapped == {0x4000: PAGE_SIZE}
        agree(space, mapper)
        space.unmap_all()
        space.leave(mapper, member)
        space.book.remove_kernel_mapper(token)


def test_threads_that_map_while_mappers_come_and_go(page: mmap.mmap) -> None:
    stop = threading.Event()
    troubles: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                space.map(page).unmap()
                with space.map(page), space.map(page):
                    pass
                for one in space.map_many([page] * 3):
                    one.unmap()
        except Exception as error:
            troubles.append(error)

    with AddressSpace() as space:
        space.map(page, iova=0x1000)
        workers = [in_thread(work) for _ in range(3)]
        for _ in range(60):
            mapper, member = StrictMapper(), Member()
            space.join(mapper, member)
            space.leave(mapper, member)
        stop.set()
        for worker in workers:
            worker.join()
        # An unmap that a mapper in Python came in between of may say so, and has done nothing.
        assert [error for error in troubles if "call the AddressSpace's map" not in str(error)] == []
        assert len(space.mappings()) <= 1 + 3 * len(troubles)
        agree(space)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------

def interrupted_everywhere(work: Callable[[AddressSpace], object], prepare: Callable[[AddressSpace], object]) -> int:
    """Interrupt ``work`` at each place in turn; book and mappers must agree, and go on working."""
    at = 0
    while True:
        at += 1
        assert at < 1000
        with AddressSpace() as space, mmap.mmap(-1, PAGE_SIZE) as memory:
            first, second = StrictMapper(), StrictMapper()
            space.join(first, MEMBER)
            space.join(second, MEMBER)
            prepare(space)
            interrupt = Interrupt(at, mappers_module.__file__)
            outcome: BaseException | None = None  # with its traceback, as in an interactive session
            sys.settrace(interrupt)
            try:
                work(space)
            except KeyboardInterrupt as error:
                outcome = error
            finally:
                sys.settrace(None)
            agree(space, first, second)
            other = in_thread(lambda: space.map(memory, iova=0x9000).unmap())
            other.join(2)
            assert not other.is_alive()
            space.unmap_all()
            agree(space, first, second)
            for mapper in space.mappers:
                space.leave(mapper, MEMBER)
            if interrupt.places < at:
                assert outcome is None
                return at - 1
            del outcome


def test_ctrl_c_anywhere_in_a_map(page: mmap.mmap) -> None:
    assert interrupted_everywhere(lambda space: space.map(page, iova=0x4000), lambda space: None) >= 5


def test_ctrl_c_anywhere_in_an_unmap(page: mmap.mmap) -> None:
    def prepare(space: AddressSpace) -> None:
        space.map(page, iova=0x4000)
        space.map(page, iova=0x5000)

    assert interrupted_everywhere(lambda space: space.unmap(0x4000, 0x2000), prepare) >= 5


def test_ctrl_c_anywhere_while_a_mapper_joins(page: mmap.mmap) -> None:
    def join(space: AddressSpace) -> None:
        mapper = StrictMapper()
        try:
            space.join(mapper, MEMBER)
        finally:
            if mapper in space.mappers:  # all of it, or nothing of it
                assert mapper.mapped == {0x4000: PAGE_SIZE}

    interrupted_everywhere(join, lambda space: space.map(page, iova=0x4000))


def test_what_is_unknown_is_in_no_python_mapper(page: mmap.mmap) -> None:
    """Whoever resyncs the book asks the kernel only."""
    kernel = FakeKernel()
    with AddressSpace() as space:
        mapper, member = StrictMapper(), Member()
        space.join(mapper, member)
        token = space.book.add_kernel_mapper(MAPPER_TYPE1, 99, ioctl=kernel.address)
        space.map(page, iova=0x4000)
        kernel.tables[99].clear()  # the kernel lost it
        with pytest.raises(vfiopy.VfioError, match="resync"):
            space.unmap(0x4000)
        assert mapper.mapped == {}
        late = StrictMapper()
        space.join(late, member)
        assert late.mapped == {}
        assert space.book.resync() == PAGE_SIZE
        space.map(page, iova=0x4000)
        agree(space, mapper, late)
        space.unmap_all()
        space.leave(mapper, member)
        space.leave(late, member)
        space.book.remove_kernel_mapper(token)
