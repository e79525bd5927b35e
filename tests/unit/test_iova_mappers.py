"""Kernel mappers: one map reaches all of them or none, and what the errors say."""

from __future__ import annotations

import errno
import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
from iova_kernel import LOST, Entry, FakeKernel, forget_kernel

from vfiopy import errors
from vfiopy.iova import (
    KIND_FILE,
    KIND_MMIO,
    KIND_REMOTE,
    MAPPER_IOAS,
    MAPPER_TYPE1,
    STATE_UNKNOWN,
    IovaSpace,
    leaked_memory,
)

PAGE = 4096
HERE = 0x7F00_0000_0000


class Memory:
    """Something that can be watched as it goes away."""


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def space(kernel: FakeKernel) -> Iterator[IovaSpace]:
    book = IovaSpace("test")
    book.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    book.add_kernel_mapper(MAPPER_IOAS, 11, 5, ioctl=kernel.address)
    yield book
    book.verify()
    forget_kernel(book)


def test_map_reaches_every_mapper(space: IovaSpace, kernel: FakeKernel) -> None:
    iova = space.map(None, HERE, 2 * PAGE, 3)
    assert kernel.tables == {10: {iova: Entry(2 * PAGE, HERE)}, 11: {iova: Entry(2 * PAGE, HERE)}}
    assert space.unmap(iova) == 2 * PAGE
    assert kernel.tables == {10: {}, 11: {}}


def test_file_memory_goes_by_descriptor_under_iommufd(space: IovaSpace, kernel: FakeKernel) -> None:
    iova = space.map(None, HERE, PAGE, 3, kind=KIND_FILE, fd=7, fd_offset=3 * PAGE)
    assert kernel.tables[10][iova].source == HERE
    assert kernel.tables[11][iova].source == 3 * PAGE
    space.map(None, HERE, PAGE, 3, kind=KIND_MMIO, fd=8, fd_offset=PAGE, iova=0x80000)
    assert kernel.tables[11][0x80000].source == PAGE


def test_a_kernel_without_map_file_gets_the_address(kernel: FakeKernel) -> None:
    space = IovaSpace()
    space.add_kernel_mapper(MAPPER_IOAS, 11, 5, ioctl=kernel.address)
    kernel.fail(1, 1, errno.ENOTTY)
    iova = space.map(None, HERE, PAGE, 3, kind=KIND_FILE, fd=7, fd_offset=PAGE)
    assert kernel.tables == {11: {iova: Entry(PAGE, HERE)}}


def test_remote_memory_cannot_go_to_the_kernel(space: IovaSpace, kernel: FakeKernel) -> None:
    with pytest.raises(errors.MemoryKindError, match="cannot map remote memory"):
        space.map(None, HERE, PAGE, 3, kind=KIND_REMOTE)
    assert kernel.tables == {}
    assert len(space) == 0


def test_failure_in_the_second_mapper_undoes_the_first(space: IovaSpace, kernel: FakeKernel) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    kernel.fail(2, 2, errno.EFAULT)
    with pytest.raises(errors.MemoryKindError, match="IOMMU_IOAS_MAP") as caught:
        space.map(memory, HERE, PAGE, 3)
    assert caught.value.errno == errno.EFAULT
    assert "IOVA 0x1000-0x1fff" in str(caught.value)
    assert not any(kernel.tables.values())
    assert len(space) == 0
    del memory
    gc.collect()
    assert alive() is None


def test_failure_that_cannot_be_undone_is_unknown_and_keeps_its_memory(space: IovaSpace, kernel: FakeKernel) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    kernel.fail(2, 3, errno.EIO)
    with pytest.raises(errors.VfioError, match="mapping 0x1000-0x1fff is now in an unknown state"):
        space.map(memory, HERE, PAGE, 3)
    del memory
    assert alive() is not None
    found = space.find(0x1000)
    assert found is not None
    assert found.state == STATE_UNKNOWN
    del found
    with pytest.raises(errors.BusyError, match="is in an unknown state\n  hint: resync"):
        space.map(None, HERE, PAGE, 3, iova=0x1000)
    kernel.fail(1, 1, errno.EBUSY)
    with pytest.raises(errors.VfioError):
        space.resync()
    assert space.resync() == PAGE
    assert alive() is None
    assert kernel.tables == {10: {}}


def test_unmap_that_the_kernel_refuses_leaves_the_mapping(space: IovaSpace, kernel: FakeKernel) -> None:
    space.map("a", HERE, PAGE, 3, iova=0x1000)
    space.map("b", HERE, PAGE, 3, iova=0x2000)
    space.map("c", HERE, PAGE, 3, iova=0x3000)
    kernel.fail(4, 4, errno.EBUSY)  # the second mapping, in the second mapper
    with pytest.raises(errors.BusyError, match="IOVA 0x2000-0x2fff; the mapping 0x2000-0x2fff is now mapped"):
        space.unmap_range(0, 0xFFFF)
    assert [it.memory for it in space.mappings()] == ["b", "c"]
    assert set(kernel.tables[10]) == set(kernel.tables[11]) == {0x2000, 0x3000}
    assert space.unmap_all() == 2 * PAGE


def test_kernel_that_lost_a_mapping_makes_it_unknown(space: IovaSpace, kernel: FakeKernel) -> None:
    space.map(None, HERE, PAGE, 3, iova=0x1000)
    kernel.tables[10].clear()
    with pytest.raises(errors.NotMappedError, match=r"unmapped 0x0 of 0x1000 bytes at 0x1000.*unknown state"):
        space.unmap(0x1000)
    assert space.resync() == PAGE


def test_memlock_error_says_asked_charged_and_limit(space: IovaSpace, kernel: FakeKernel) -> None:
    kernel.fail(1, 1, errno.ENOMEM)
    with pytest.raises(errors.MemlockError) as caught:
        space.map(None, HERE, 16 * PAGE, 3)
    assert "65536 bytes asked for" in str(caught.value)
    assert "locked and" in str(caught.value)
    assert "RLIMIT_MEMLOCK" in str(caught.value)


def test_mapper_that_joins_gets_what_is_there(space: IovaSpace, kernel: FakeKernel) -> None:
    for index in range(4):
        space.map(None, HERE, PAGE, 3, iova=0x1000 * (2 * index + 1))
    token = space.add_kernel_mapper(MAPPER_TYPE1, 12, ioctl=kernel.address)
    space.replay(token)
    assert kernel.tables[12] == kernel.tables[10]
    space.drop(token)
    assert kernel.tables[12] == {}
    assert len(space) == 4
    space.remove_kernel_mapper(token)
    with pytest.raises(errors.StateError, match=f"there is no kernel mapper {token}"):
        space.replay(token)


def test_replay_is_all_or_nothing(space: IovaSpace, kernel: FakeKernel) -> None:
    for index in range(4):
        space.map(None, HERE, PAGE, 3, iova=0x1000 * (2 * index + 1))
    token = space.add_kernel_mapper(MAPPER_TYPE1, 12, ioctl=kernel.address)
    kernel.fail(3, 3, errno.ENOSPC)
    with pytest.raises(errors.NoSpaceError, match="IOVA 0x5000-0x5fff"):
        space.replay(token)
    assert kernel.tables[12] == {}
    # It is not a part of the space before a replay gets through.
    space.map(None, HERE, PAGE, 3, iova=0x10000)
    assert kernel.tables[12] == {}
    space.replay(token)
    assert kernel.tables[12] == kernel.tables[10]


def test_what_is_charged_is_counted_by_mapper(space: IovaSpace) -> None:
    iova = space.map(None, HERE, 4 * PAGE, 3)
    space.map(None, HERE, 2 * PAGE, 3, kind=KIND_MMIO, fd=3)
    by_kind = {row[1]: row for row in space.kernel_mappers()}
    assert by_kind[MAPPER_TYPE1][1:] == (MAPPER_TYPE1, 10, 0, True, 2, 4 * PAGE)
    assert by_kind[MAPPER_IOAS][1:] == (MAPPER_IOAS, 11, 5, True, 2, 4 * PAGE)
    charged = space.stats()["charged"]
    assert (charged["type1"], charged["iommufd"]) == (4 * PAGE, 4 * PAGE)
    space.unmap(iova)
    assert space.stats()["charged"]["type1"] == 0
    forget_kernel(space)


def test_there_are_32_mappers_at_most() -> None:
    space = IovaSpace()
    tokens = [space.add_kernel_mapper(MAPPER_TYPE1, 3) for _ in range(32)]
    with pytest.raises(RuntimeError, match="32 kernel mappers already"):
        space.add_kernel_mapper(MAPPER_TYPE1, 3)
    space.remove_kernel_mapper(tokens[5])
    assert space.add_kernel_mapper(MAPPER_IOAS, 3) not in tokens
    with pytest.raises(ValueError, match="of kind 7"):
        space.add_kernel_mapper(7, 3)


def test_the_real_ioctl_is_called_where_none_is_given() -> None:
    space = IovaSpace()
    space.add_kernel_mapper(MAPPER_IOAS, -1, 1)
    with pytest.raises(errors.VfioError) as caught:
        space.map(None, HERE, PAGE, 3)
    assert caught.value.errno == errno.EBADF


def test_calls_of_different_mappings_run_at_the_same_time(kernel: FakeKernel) -> None:
    """Two maps meet inside the kernel: neither could go on if a lock were held around the call."""
    meeting = threading.Barrier(2, timeout=10)
    plain = kernel.map

    def map_and_meet(fd: int, iova: int, entry: Entry) -> int:
        meeting.wait()
        return plain(fd, iova, entry)

    kernel.map = map_and_meet  # type: ignore[method-assign]
    space = IovaSpace()
    space.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    threads = [threading.Thread(target=space.map, args=(None, HERE, PAGE, 3, 0x1000 * index)) for index in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(space) == 2


@pytest.mark.parametrize("kind", [KIND_FILE, KIND_MMIO])
def test_type1_is_not_asked_for_memory_that_has_no_address(kernel: FakeKernel, kind: int) -> None:
    """It would map whatever is at address 0, or say EFAULT."""
    book = IovaSpace("test")
    book.map(None, 0, PAGE, 3, kind=kind, fd=7, iova=0x20000)
    token = book.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    with pytest.raises(errors.MemoryKindError, match=r"type1 none that this process has not mapped"):
        book.map(None, 0, PAGE, 3, kind=kind, fd=7, iova=0x10000)
    with pytest.raises(errors.MemoryKindError):
        book.replay(token)
    assert kernel.tables.get(10, {}) == {}
    assert [it.iova for it in book.mappings()] == [0x20000]
    book.verify()


def test_a_book_that_is_dropped_keeps_what_devices_can_reach(kernel: FakeKernel) -> None:
    reachable, other = Memory(), Memory()
    alive = weakref.ref(reachable), weakref.ref(other)
    book = IovaSpace("bare")
    book.map(other, HERE, PAGE, 3)
    book.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)  # without a replay
    book.map(reachable, HERE, PAGE, 3, iova=0x10000)
    before = len(leaked_memory())
    del reachable, other
    with pytest.warns(ResourceWarning, match="space 'bare' was dropped while kernel mappers have 1 mappings of it"):
        del book
    assert alive[0]() is not None
    assert alive[1]() is None
    assert leaked_memory()[before:] == [alive[0]()]
    assert 0x10000 in kernel.tables[10]


def test_a_book_without_its_mappers_lets_everything_go(kernel: FakeKernel) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    book = IovaSpace("bare")
    token = book.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    book.map(memory, HERE, PAGE, 3, iova=0x10000)
    del memory
    book.remove_kernel_mapper(token)  # the container is closed, for instance
    del book
    assert alive() is None


# --- memory that moves -----------------------------------------------------------------------------------------------


@pytest.fixture
def type1(kernel: FakeKernel) -> Iterator[IovaSpace]:
    book = IovaSpace("type1")
    book.add_kernel_mapper(MAPPER_TYPE1, 10, ioctl=kernel.address)
    book.add_kernel_mapper(MAPPER_TYPE1, 11, ioctl=kernel.address)
    book.map("a", HERE, 2 * PAGE, 3, iova=0x10000)
    book.map("b", HERE + 16 * PAGE, PAGE, 3, iova=0x20000)
    yield book
    book.verify()
    forget_kernel(book)


def test_memory_gets_another_address(type1: IovaSpace, kernel: FakeKernel) -> None:
    assert type1.lose_addresses(0, 0xFFFFF) == 3 * PAGE
    assert {entry.source for entry in kernel.tables[10].values()} == {LOST}
    assert type1.by_address(HERE, 64 * PAGE) == []
    for call in (lambda: type1.pin(0x10000, PAGE, 1), lambda: type1.check(0x10000, PAGE, 1)):
        with pytest.raises(errors.BusyError, match="has no valid address now"):
            call()
    with pytest.raises(errors.BusyError, match="has no valid address now"):
        type1.lose_addresses(0, 0xFFFFF)
    type1.map("new", HERE, PAGE, 3, iova=0x30000)  # new mappings are allowed meanwhile
    type1.set_address(0x10000, 2 * PAGE, HERE + 32 * PAGE, "moved")
    with pytest.raises(errors.BusyError, match="has an address"):
        type1.set_address(0x10000, 2 * PAGE, HERE, None)
    assert kernel.tables[11][0x10000].source == HERE + 32 * PAGE
    assert [it.memory for it in type1.by_address(HERE + 33 * PAGE, 1)] == ["moved"]
    with pytest.raises(errors.BusyError):
        type1.pin(0x10000, PAGE, 1)  # one is still without an address: as in the kernel
    assert type1.unmap(0x20000) == PAGE
    type1.pin(0x10000, PAGE, 1)
    type1.unpin(0x10000, PAGE)


def test_losing_addresses_is_all_or_nothing(type1: IovaSpace, kernel: FakeKernel) -> None:
    before = kernel.tables[10].copy(), kernel.tables[11].copy()
    kernel.fail(4, 4, errno.EBUSY)
    with pytest.raises(errors.BusyError):
        type1.lose_addresses(0, 0xFFFFF)
    assert (kernel.tables[10], kernel.tables[11]) == before
    with pytest.raises(errors.NotMappedError, match="cuts the mapping 0x10000-0x11fff"):
        type1.lose_addresses(0x11000, 0x20FFF)
    assert type1.check(0x10000, PAGE, 1) == [(HERE, PAGE, "a")]


def test_address_that_the_kernel_refuses_is_not_taken(type1: IovaSpace, kernel: FakeKernel) -> None:
    type1.lose_addresses(0x10000, 0x11FFF)
    kernel.fail(2, 2, errno.ENOMEM)
    with pytest.raises(errors.MemlockError):
        type1.set_address(0x10000, 2 * PAGE, HERE + 32 * PAGE, "moved")
    assert kernel.tables[10][0x10000].source == kernel.tables[11][0x10000].source == LOST
    with pytest.raises(errors.AlignmentError, match="address 0x1 is not a multiple"):
        type1.set_address(0x10000, 2 * PAGE, 1, None)
    with pytest.raises(errors.NotMappedError, match="cuts"):
        type1.set_address(0x10000, PAGE, HERE, None)
    type1.set_address(0x10000, 2 * PAGE, HERE + 32 * PAGE, "moved")


def test_another_process_takes_over(type1: IovaSpace, kernel: FakeKernel) -> None:
    type1.lose_addresses(0, 0xFFFFF)
    other = IovaSpace("other process")
    for fd in (10, 11):
        other.add_kernel_mapper(MAPPER_TYPE1, fd, ioctl=kernel.address)
    other.map("a", HERE + 64 * PAGE, 2 * PAGE, 3, iova=0x10000, take_over=True)
    assert kernel.tables[10][0x10000].source == HERE + 64 * PAGE
    kernel.fail(2, 2, errno.ENOMEM)
    with pytest.raises(errors.MemlockError):
        other.map("b", HERE + 80 * PAGE, PAGE, 3, iova=0x20000, take_over=True)
    # Undone: it is without an address again, not unmapped.
    assert kernel.tables[10][0x20000].source == kernel.tables[11][0x20000].source == LOST
    other.map("b", HERE + 80 * PAGE, PAGE, 3, iova=0x20000, take_over=True)
    other.verify()
    assert other.unmap_all() == 3 * PAGE
    assert kernel.tables[10] == {}


def test_iommufd_moves_file_memory_only(kernel: FakeKernel) -> None:
    space = IovaSpace()
    token = space.add_kernel_mapper(MAPPER_IOAS, 11, 5, ioctl=kernel.address)
    space.map("file", HERE, PAGE, 3, kind=KIND_FILE, fd=7, iova=0x10000)
    space.change_process(token)
    assert space.lose_addresses(0, 0xFFFFF) == PAGE
    space.set_address(0x10000, PAGE, HERE + PAGE, "file")
    space.map("host", HERE, PAGE, 3, iova=0x20000)
    with pytest.raises(errors.VfioError, match="IOVA 0x20000-0x20fff") as caught:
        space.lose_addresses(0, 0xFFFFF)
    assert caught.value.errno == errno.EOPNOTSUPP
    kernel.fail(1, 1, errno.EINVAL)
    with pytest.raises(errors.VfioError, match="IOMMU_IOAS_CHANGE_PROCESS"):
        space.change_process(token)
    space.verify()
    forget_kernel(space)
