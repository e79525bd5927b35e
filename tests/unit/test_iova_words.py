"""What the book's refusals say: the object, what stood in the way, and what to do about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import repeat

import pytest
from iova_kernel import FakeKernel, forget_kernel

from vfiopy import errors
from vfiopy.iova import KIND_MMIO, MAPPER_TYPE1, IovaSpace

PAGE = 4096
HERE = 0x7F00_0000_0000
TOP = (1 << 64) - 1
MOST_PINS = (1 << 24) - 1


@pytest.fixture
def space() -> IovaSpace:
    book = IovaSpace("test")
    book.set_usable([(0x1000, 0xF_FFFF)], PAGE)
    book.map("a", HERE, 4 * PAGE, 3, iova=0x10000)
    return book


def test_geometry(space: IovaSpace) -> None:
    with pytest.raises(errors.AlignmentError, match=r"no page size is common to all mappers\n.*space of its own"):
        space.set_usable([(0, TOP)], 0)
    with pytest.raises(errors.IovaRangeError, match=r"0x20000-0x20fff was never excluded\n  hint: .*lists the windows"):
        space.include(0x20000, 0x20FFF)
    with pytest.raises(errors.IovaRangeError, match=r"0x10000-0x13fff would lie outside of .*\n  hint: unmap it"):
        space.set_usable([(0x20000, 0xF_FFFF)], PAGE)
    space.exclude(0x20000, 0x20FFF)
    with pytest.raises(errors.IovaRangeError, match=r"lies in the excluded window 0x20000-0x20fff\n.*gives it back"):
        space.map(None, HERE, PAGE, 3, iova=0x20000)
    with pytest.raises(
        errors.NoSpaceError, match=r"no free range takes 0x100000 bytes .*largest free range has 0xdf000"
    ):
        space.map(None, HERE, 0x100000, 3)


def test_pins(space: IovaSpace) -> None:
    space.map(None, HERE, PAGE, 3, iova=0x30000, kind=KIND_MMIO)
    with pytest.raises(errors.MemoryKindError, match=r"0x30000-0x30fff is device memory \(MMIO\).*\n.*peer=True"):
        space.pin(0x30000, PAGE, 1)
    owner = space.add_owner("sampler")
    space.pin(0x11000, PAGE, 1, owner)
    with pytest.raises(errors.PinnedError, match=r"did not let go in time: sampler \(1 in 0x10000-0x13fff\)\n  hint: "):
        space.unmap(0x10000)
    with pytest.raises(errors.UnpinError, match=rf"owner {owner} does not have a pin .* look at IOVA 0x12000. Nothing"):
        space.unpin(0x11000, 2 * PAGE, owner)


def test_a_page_with_as_many_pins_as_can_be_counted(space: IovaSpace) -> None:
    space.pin(0x10000, PAGE, 1)
    with pytest.raises(errors.NoSpaceError, match=f"page at IOVA 0x10000 has {MOST_PINS} pins already"):
        deque(map(space.pin, repeat(0x10000, MOST_PINS), repeat(PAGE), repeat(1)), maxlen=0)
    assert space.stats()["pins"] == MOST_PINS
    with pytest.raises(errors.NoSpaceError, match=r"page at IOVA 0x10000"):
        space.pin(0x10000, 2 * PAGE, 1)
    assert space.stats()["pins"] == MOST_PINS, "all or nothing"
    space.verify()


def test_what_is_coming_going_or_unknown(space: IovaSpace) -> None:
    kernel = FakeKernel()
    coming = space.begin_map(None, HERE, PAGE, 3, 0x40000)
    with coming, pytest.raises(errors.BusyError, match=r"is reserved\n.*under way"):
        space.map(None, HERE, PAGE, 3, iova=0x40000)
    with space.begin_unmap(0x10000, 0x13FFF), pytest.raises(errors.BusyError, match=r"is being unmapped\n.*wait until"):
        space.map(None, HERE, PAGE, 3, iova=0x10000)
    space.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    space.map(None, HERE, PAGE, 3, iova=0x50000)
    kernel.tables[10].clear()  # behind the book's back
    with suppress(errors.NotMappedError):
        space.unmap(0x50000)
    with pytest.raises(errors.BusyError, match=r"0x50000-0x50fff is in an unknown state\n  hint: resync\(\)"):
        space.map(None, HERE, PAGE, 3, iova=0x50000)
    forget_kernel(space)


@pytest.fixture
def moving() -> Iterator[tuple[IovaSpace, FakeKernel]]:
    kernel, book = FakeKernel(), IovaSpace("moving")
    book.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    book.map("a", HERE, PAGE, 3, iova=0x10000)
    book.map("b", HERE + PAGE, PAGE, 3, iova=0x20000)
    yield book, kernel
    book.verify()
    forget_kernel(book)


def test_nobody_joins_while_memory_has_no_address(moving: tuple[IovaSpace, FakeKernel]) -> None:
    """As the kernel lets no group join then; the mapping may be unmapped all the same."""
    book, kernel = moving
    book.lose_addresses(0x10000, 0x10FFF)
    token = book.add_kernel_mapper(MAPPER_TYPE1, 11, ioctl=kernel.address)
    with pytest.raises(errors.BusyError, match=r"replay: .* mapping 0x10000-0x10fff has no valid address now"):
        book.replay(token)
    assert not kernel.tables.get(11)
    assert book.unmap(0x10000) == PAGE
    book.replay(token)
    assert set(kernel.tables[11]) == {0x20000}
