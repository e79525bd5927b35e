"""A forked child shares the parent's files and has a copy of its locks: a book is nothing that it may look into."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable

import pytest
from iova_kernel import FakeKernel

from vfiopy import _native
from vfiopy.errors import ForkedError
from vfiopy.iova import MAPPER_TYPE1, IovaReservation, IovaSpace, IovaUnmapping

PAGE = 4096
HERE = 0x7F00_0000_0000


def in_child(work: Callable[[], object]) -> int:
    """What ``work()`` returns in a forked child, as an exit status; 99 where it raises, -SIGALRM where it hangs."""
    child = os.fork()
    if not child:
        status = 99
        try:
            signal.alarm(10)
            status = int(bool(work()))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def space() -> IovaSpace:
    space = IovaSpace("shared")
    space.map("memory", HERE, 4 * PAGE, 3, iova=0x10000)
    return space


def uses(
    space: IovaSpace, token: int, owner: int, reserved: IovaReservation, marked: IovaUnmapping
) -> dict[str, Callable[[], object]]:
    return {
        "set_usable": lambda: space.set_usable([(0, 0xFFFF_FFFF)], PAGE),
        "exclude": lambda: space.exclude(0, PAGE - 1),
        "include": lambda: space.include(0, PAGE - 1),
        "set_transient": space.set_transient,
        "set_transient window": lambda: space.set_transient(0x100_0000, 0x1FF_FFFF),
        "usable": space.usable,
        "excluded": space.excluded,
        "transient": space.transient,
        "free_ranges": space.free_ranges,
        "map": lambda: space.map("m", HERE, PAGE, 3),
        "begin_map": lambda: space.begin_map("m", HERE, PAGE, 3),
        "commit": reserved.commit,
        "add_kernel_mapper": lambda: space.add_kernel_mapper(MAPPER_TYPE1, 5),
        "remove_kernel_mapper": lambda: space.remove_kernel_mapper(token),
        "replay": lambda: space.replay(token),
        "drop": lambda: space.drop(token),
        "unmap": lambda: space.unmap(0x10000),
        "unmap_range": lambda: space.unmap_range(0x10000, 0x13FFF),
        "unmap_all": space.unmap_all,
        "begin_unmap": lambda: space.begin_unmap(0x10000, 0x13FFF),
        "finish": marked.finish,
        "set_stepwise": lambda: space.set_stepwise(False),
        "is_stepwise": space.is_stepwise,
        "resync": space.resync,
        "find": lambda: space.find(0x10000),
        "overlapping": lambda: space.overlapping(0, 0xFFFF_FFFF),
        "mappings": space.mappings,
        "by_address": lambda: space.by_address(HERE, PAGE),
        "holders": lambda: space.holders(0, 0xFFFF_FFFF),
        "pinned": lambda: space.pinned(0, 0xFFFF_FFFF),
        "check": lambda: space.check(0x10000, PAGE, 1),
        "add_owner": lambda: space.add_owner("late"),
        "remove_owner": lambda: space.remove_owner(owner),
        "pin": lambda: space.pin(0x10000, PAGE, 1, owner),
        "unpin": lambda: space.unpin(0x10000, PAGE, owner),
        "stats": space.stats,
        "kernel_mappers": space.kernel_mappers,
        "verify": space.verify,
        "lose_addresses": lambda: space.lose_addresses(0x10000, 0x13FFF),
        "set_address": lambda: space.set_address(0x10000, 4 * PAGE, HERE, "m"),
        "change_process": lambda: space.change_process(token),
        "set_revoked": lambda: space.set_revoked(0x10000, 1),
        "restore": lambda: space.restore(0x10000, 1),
        "closing": lambda: space.closing(0x10000, 0x13FFF),
        "len": lambda: len(space),
        "in": lambda: 0x10000 in space,
        "SpaceBase": lambda: _native.SpaceBase(space),
    }


def is_refused(use: Callable[[], object]) -> bool:
    try:
        use()
    except ForkedError as error:
        return f"'shared' belongs to process {os.getppid()}; this is its child {os.getpid()}" in str(error)
    return False


def test_a_child_is_refused_every_method_and_the_kernel_hears_nothing(space: IovaSpace) -> None:
    kernel = FakeKernel()
    token = space.add_kernel_mapper(MAPPER_TYPE1, 5, ioctl=kernel.address)
    space.replay(token)
    owner = space.add_owner("nic")
    under_way = space.begin_map("m", HERE, PAGE, 3), space.begin_unmap(0, 0xFFF)
    calls = kernel.calls

    def work() -> bool:
        refused = [is_refused(use) for use in uses(space, token, owner, *under_way).values()]
        for step in under_way:
            step.abort()  # as close(): nothing to do here
        return all(refused) and kernel.calls == calls and f"of process {os.getppid()}" in repr(space)

    assert in_child(work) == 1
    methods = {name for name in dir(_native.IovaSpace) if not name.startswith("_")}
    assert methods - set(uses(space, token, owner, *under_way)) == {"name"}
    assert all(under_way)
    assert space.unmap(0x10000) == 4 * PAGE


def test_a_child_is_refused_an_unmap_that_waits(space: IovaSpace) -> None:
    owner = space.add_owner("nic")
    space.pin(0x10000, PAGE, 1, owner)
    closing = space.closing(0x10000, 0x13FFF)
    assert not closing.ready()

    def work() -> bool:
        uses = (closing.ready, closing.finish, closing.raise_pinned, closing.fileno)
        refused = all(is_refused(use) for use in uses)
        closing.give_up()  # as close(): nothing to do here
        return refused

    assert in_child(work) == 1
    space.unpin(0x10000, PAGE, owner)
    assert closing.ready()
    assert closing.finish() == 4 * PAGE


def test_the_collector_of_a_child_does_not_look_into_the_book(space: IovaSpace) -> None:
    def callback(iova: int, size: int) -> None: ...

    space.add_owner("nic", callback)
    assert callback in gc.get_referents(space)
    assert in_child(lambda: gc.get_referents(space) == [IovaSpace]) == 1


def test_a_book_that_dies_in_a_child_leaves_its_memory_alone() -> None:
    memory = object()
    books = [IovaSpace("a"), IovaSpace("b")]
    for book in books:
        book.map(memory, HERE, PAGE, 3, iova=0x10000)
    waits = [books[0].closing(0x10000, 0x10FFF)]
    assert waits[0].ready()

    def work() -> bool:
        before = sys.getrefcount(memory)
        waits.clear()
        books.clear()
        gc.collect()
        return sys.getrefcount(memory) == before

    del book
    assert in_child(work) == 1
    assert waits[0].finish() == PAGE
    before = sys.getrefcount(memory)
    books.clear()
    waits.clear()
    assert sys.getrefcount(memory) == before - 1


def test_an_owner_that_forks_while_it_is_told_leaves_the_unmap_to_the_parent(space: IovaSpace) -> None:
    children: list[int] = []

    def callback(iova: int, size: int) -> None:
        children.append(os.fork())
        if children[-1]:
            space.unpin(iova, PAGE, owner)
        else:
            signal.alarm(10)

    owner = space.add_owner("nic", callback)
    space.pin(0x10000, PAGE, 1, owner)
    try:
        size = space.unmap(0x10000, 5)
    except ForkedError:
        if children == [0]:
            os._exit(7)
        raise
    finally:
        if children == [0]:
            os._exit(1)
    assert size == 4 * PAGE
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7
