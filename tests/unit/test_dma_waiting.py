"""Unmapping from an event loop, through an address space: with mappers of the book's own, and with one in Python."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest

import vfiopy
from vfiopy import AddressSpace, PinnedError, Prot
from vfiopy.backend import IovaRange, MapperTraits, Memory, MemoryKind
from vfiopy.dma.memory import PAGE_SIZE


class Notebook:
    """A mapper in Python that remembers what it has."""

    name = "notebook"
    kernel_target = None

    def __init__(self) -> None:
        self.mapped: dict[int, int] = {}

    def traits(self) -> MapperTraits:
        return MapperTraits(PAGE_SIZE, 0, frozenset({MemoryKind.HOST}))

    def ranges(self) -> list[IovaRange]:
        return [IovaRange(0x1000, 0xFF_FFFF)]

    def map(self, iova: int, memory: Memory, prot: Prot) -> None:
        self.mapped[iova] = memory.size

    def unmap(self, iova: int, size: int) -> int:
        assert self.mapped.pop(iova) == size
        return size

    def close(self) -> None:
        pass


@pytest.fixture(params=["direct", "in Python"])
def space(request: pytest.FixtureRequest) -> Iterator[AddressSpace]:
    with AddressSpace("waiting") as space:
        if request.param == "in Python":
            space.add_mapper(Notebook())
        yield space


def kept(space: AddressSpace) -> list[int]:
    """Mappings of the book, which its mapper in Python has too."""
    iovas = [it.iova for it in space.mappings()]
    for mapper in space.mappers:
        assert isinstance(mapper, Notebook)
        assert sorted(mapper.mapped) == iovas
    return iovas


def test_the_loop_goes_on_while_an_owner_takes_its_time(space: AddressSpace) -> None:
    book = space.book
    buffer, other = space.allocate(PAGE_SIZE, iova=0x10000), space.allocate(PAGE_SIZE, iova=0x20000)
    told: list[tuple[int, int]] = []
    owner = book.add_owner("slow", lambda iova, size: told.append((iova, size)))
    book.pin(buffer.iova, 1, Prot.RW, owner)

    async def main() -> int:
        task = asyncio.create_task(space.unmap_async(0x10000, timeout=10.0))
        for _ in itertools.repeat(None, 5):
            await asyncio.sleep(0.001)
        assert not task.done()
        book.unpin(buffer.iova, 1, owner)
        return await task

    assert asyncio.run(main()) == PAGE_SIZE
    assert told == [(0x10000, PAGE_SIZE)]
    assert kept(space) == [0x20000]
    assert asyncio.run(space.unmap_async(0x10000, 0x100000)) == PAGE_SIZE
    assert kept(space) == []
    assert not other.mapping


@pytest.mark.parametrize("cancel", [False, True])
def test_giving_up_leaves_everything(space: AddressSpace, cancel: bool) -> None:
    book = space.book
    buffer = space.allocate(PAGE_SIZE, iova=0x10000)
    owner = book.add_owner("stubborn")
    book.pin(buffer.iova, 1, Prot.RW, owner)

    async def main() -> None:
        task = asyncio.create_task(space.unmap_async(0x10000, timeout=None if cancel else 0.01))
        await asyncio.sleep(0.001)
        if cancel:
            task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError if cancel else PinnedError):
        asyncio.run(main())
    assert kept(space) == [0x10000]
    book.pin(buffer.iova, 1, Prot.RW, owner)  # it is live again
    book.unpin(buffer.iova, 1, owner)
    book.unpin(buffer.iova, 1, owner)
    assert asyncio.run(space.unmap_async(0x10000)) == PAGE_SIZE


def test_a_mapper_that_joins_during_the_wait_is_not_passed_by() -> None:
    with AddressSpace("waiting") as space:
        buffer = space.allocate(PAGE_SIZE, iova=0x10000)
        owner = space.book.add_owner("slow")
        space.book.pin(buffer.iova, 1, Prot.RW, owner)

        async def main() -> int:
            task = asyncio.create_task(space.unmap_async(0x10000, timeout=10.0))
            await asyncio.sleep(0.001)
            space.add_mapper(Notebook())
            assert kept(space) == [0x10000]
            space.book.unpin(buffer.iova, 1, owner)
            return await task

        assert asyncio.run(main()) == PAGE_SIZE
        assert kept(space) == []


def test_what_is_not_there(space: AddressSpace) -> None:
    space.allocate(2 * PAGE_SIZE, iova=0x10000)
    for arguments in ((0x30000,), (0x11000,), (0x11000, PAGE_SIZE), (0x10000, 0)):
        with pytest.raises(vfiopy.NotMappedError):
            asyncio.run(space.unmap_async(*arguments))
    assert asyncio.run(space.unmap_async(0x30000, PAGE_SIZE)) == 0
    assert kept(space) == [0x10000]
