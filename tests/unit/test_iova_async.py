"""Unmapping from an event loop, the end of a book, and its pictures."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time

import pytest

from vfiopy import errors
from vfiopy.iova import KIND_MMIO, IovaSpace, leaked_memory, stretches

PAGE = 4096
HERE = 0x7F00_0000_0000
TOP = (1 << 64) - 1


@pytest.fixture
def space() -> IovaSpace:
    book = IovaSpace("test")
    book.set_usable([(0x1000, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 39) - 1)], 0x20_1000)
    book.map("a", HERE, 4 * PAGE, 3, iova=0x10000)
    book.map("b", HERE, 4 * PAGE, 3, iova=0x14000)
    return book


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_unmap_async_waits_without_blocking_the_loop(space: IovaSpace) -> None:
    told: list[int] = []
    owner = space.add_owner("nic", lambda iova, size: told.append(iova))

    async def main() -> int:
        ticks = 0
        task = asyncio.create_task(space.unmap_async(0x10000, timeout=10.0))
        while not told:
            await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0.002)
            ticks += 1
            assert not task.done()
        space.unpin(0x10000, PAGE, owner)
        space.unpin(0x10000, PAGE, owner)
        assert await task == 4 * PAGE
        return ticks

    for _ in range(2):
        space.pin(0x10000, PAGE, 1, owner)
    before = descriptors()
    assert asyncio.run(main()) == 5
    assert told == [0x10000]
    assert descriptors() == before
    space.verify()


def test_unmap_async_hears_of_pins_that_another_thread_takes_off(space: IovaSpace) -> None:
    told = threading.Event()
    owner = space.add_owner("nic", lambda iova, size: told.set())
    space.pin(0x10000, 8 * PAGE, 1, owner)

    def let_go() -> None:
        told.wait()
        for page in range(8):
            time.sleep(0.002)
            space.unpin(0x10000 + page * PAGE, PAGE, owner)

    thread = threading.Thread(target=let_go)
    thread.start()
    assert asyncio.run(space.unmap_async(0x10000, 0x17FFF, timeout=None)) == 8 * PAGE
    thread.join()
    space.verify()


def test_unmap_async_without_pins_and_its_refusals(space: IovaSpace) -> None:
    assert asyncio.run(space.unmap_async(0x10000)) == 4 * PAGE
    with pytest.raises(errors.NotMappedError, match="nothing is mapped at IOVA 0x10000"):
        asyncio.run(space.unmap_async(0x10000))
    with pytest.raises(errors.NotMappedError, match="cuts the mapping 0x14000-0x17fff"):
        asyncio.run(space.unmap_async(0x15000))
    assert asyncio.run(space.unmap_async(0x100000, 0x1FFFFF)) == 0


@pytest.mark.parametrize("timeout", [0.0, 0.05])
def test_unmap_async_gives_up(space: IovaSpace, timeout: float) -> None:
    space.pin(0x10000, PAGE, 1)
    with pytest.raises(errors.PinnedError, match="an unnamed owner"):
        asyncio.run(space.unmap_async(0x10000, timeout=timeout))
    space.pin(0x10000, PAGE, 1)  # as it was
    space.verify()


def test_cancelled_unmap_leaves_everything(space: IovaSpace) -> None:
    space.pin(0x10000, PAGE, 1)

    async def main() -> None:
        task = asyncio.create_task(space.unmap_async(0x10000, timeout=None))
        await asyncio.sleep(0.01)
        with pytest.raises(errors.UnmappingError):
            space.unmap(0x10000)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = descriptors()
    asyncio.run(main())
    assert descriptors() == before
    space.unpin(0x10000, PAGE)
    assert space.unmap(0x10000) == 4 * PAGE


def test_dropped_closing_gives_up(space: IovaSpace) -> None:
    space.pin(0x10000, PAGE, 1)
    closing = space.closing(0x10000, 0x17FFF)
    assert not closing.ready()
    with pytest.raises(errors.StateError, match="still pinned"):
        closing.finish()
    with pytest.raises(errors.UnmappingError):
        space.pin(0x14000, PAGE, 1)
    del closing
    space.pin(0x14000, PAGE, 1)
    space.unpin(0x14000, PAGE)
    space.unpin(0x10000, PAGE)
    ready = space.closing(0x10000, 0x17FFF)
    assert ready.ready()
    ready.give_up()
    with pytest.raises(errors.StateError, match="over"):
        ready.ready()
    space.verify()
    assert space.unmap_all() == 8 * PAGE


# --- the end -------------------------------------------------------------------------------------------------------


def test_close_tells_everyone_and_refuses(space: IovaSpace) -> None:
    told = []
    owner = space.add_owner("nic", lambda iova, size: told.append(iova))
    space.pin(0x14000, PAGE, 1, owner)
    with pytest.raises(errors.PinnedError, match="nic"):
        space.close()
    assert told == [0x14000]
    assert len(space) == 2
    space.unpin(0x14000, PAGE, owner)
    assert space.close() == []
    assert len(space) == 0


def test_forced_close_keeps_memory_that_is_pinned(space: IovaSpace) -> None:
    owner = space.add_owner("nic")
    space.pin(0x14000, 2 * PAGE, 1, owner)
    before = len(leaked_memory())
    with pytest.warns(ResourceWarning, match="nic left 2 pins in 0x14000-0x17fff; that memory is never freed"):
        leaks = space.close(force=True)
    assert leaks == [("nic", 2, 0x14000, 4 * PAGE)]
    assert leaked_memory()[before:] == ["b"]
    assert [it.memory for it in space.mappings()] == ["b"]
    space.verify()


# --- pictures --------------------------------------------------------------------------------------------------------


def test_stretches_divide_the_whole_space(space: IovaSpace) -> None:
    space.exclude(0x8000_0000, 0x8FFF_FFFF)
    space.set_transient(0x100_0000, 0x10F_FFFF)
    space.map(None, 0, PAGE, 1, kind=KIND_MMIO, fd=3, iova=0x9000_0000)
    rows = stretches(space)
    assert rows[0].first == 0
    assert rows[-1].last == TOP
    assert all(a.last + 1 == b.first for a, b in itertools.pairwise(rows))
    uses = {row.use for row in rows}
    assert uses == {"not usable", "free", "host", "device", "excluded", "transient, free"}
    host = next(row for row in rows if row.use == "host")
    assert (host.first, host.last, host.detail, host.mappings) == (0x10000, 0x17FFF, "rw", 2)


def test_text_map(space: IovaSpace) -> None:
    space.pin(0x11000, PAGE, 1)
    space.pin(0x14000, 4 * PAGE, 1)
    text = space.text_map()
    assert "space 'test': 2 mappings, 32 KiB mapped, 20 KiB pinned" in text
    assert "0x0000000000010000-0x0000000000017fff     32 KiB  host rw x2  .#..####" in text
    assert "0x00000000fee00000-0x00000000feefffff      1 MiB  not usable" in text
    for index in range(100):
        space.map(None, HERE, PAGE, 1 + index % 2, iova=0x100000 + 2 * index * PAGE)
    assert "more rows ..." in space.text_map()
    assert len(space.text_map().splitlines()) < 70


def test_plot(space: IovaSpace) -> None:
    pytest.importorskip("matplotlib")
    space.pin(0x11000, PAGE, 1)
    axes = space.plot()
    assert len(axes.patches) == len(stretches(space)) + 1
    assert "space 'test'" in axes.get_title()
    assert space.plot(axes) is axes
