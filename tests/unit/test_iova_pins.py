"""Pins: counts, owners, being told before a mapping goes, and page frame numbers."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from iova_kernel import FakeKernel, forget_kernel

from vfiopy import errors
from vfiopy.iova import KIND_MMIO, MAPPER_TYPE1, IovaSpace

PAGE = mmap.PAGESIZE
HERE = 0x7F00_0000_0000


@pytest.fixture
def space() -> Iterator[IovaSpace]:
    book = IovaSpace("test")
    book.map("low", HERE, 8 * PAGE, 3, iova=0x10000)
    book.map("high", HERE + 8 * PAGE, 8 * PAGE, 1, iova=0x18000)
    yield book
    book.verify()


def pins(space: IovaSpace) -> tuple[int, int]:
    stats = space.stats()
    return stats["pins"], stats["pinned_pages"]


def test_pin_counts_and_unpin_releases(space: IovaSpace) -> None:
    for _ in range(3):
        space.pin(0x10000, 2 * PAGE, 3)
    assert pins(space) == (6, 2)
    space.unpin(0x10000, PAGE)
    assert pins(space) == (5, 2)
    for _ in range(2):
        space.unpin(0x10000, 2 * PAGE)
    assert pins(space) == (1, 1)
    assert space.pinned(0, (1 << 64) - 1) == [(0x11000, 0x11FFF)]
    space.unpin(0x11000, PAGE)
    assert pins(space) == (0, 0)


def test_pin_spans_neighbours_and_is_all_or_nothing(space: IovaSpace) -> None:
    space.pin(0x16000, 4 * PAGE, 1)
    assert pins(space) == (4, 4)
    assert [it.pins for it in space.mappings()] == [2, 2]
    # The second mapping gives read access only, and nothing lies behind it.
    with pytest.raises(errors.PermissionDeniedError, match="pin: the mapping 0x18000-0x1ffff gives devices read"):
        space.pin(0x16000, 4 * PAGE, 2)
    with pytest.raises(errors.NotMappedError, match="nothing is mapped at IOVA 0x20000"):
        space.pin(0x1E000, 4 * PAGE, 1)
    assert pins(space) == (4, 4)
    space.unpin(0x16000, 4 * PAGE)


def test_pin_touches_whole_pages(space: IovaSpace) -> None:
    space.pin(0x10FFF, 2, 1)
    assert pins(space) == (2, 2)
    space.unpin(0x10FFF, 2)


def test_unbalanced_unpin_raises_and_changes_nothing(space: IovaSpace) -> None:
    ours, theirs = space.add_owner("ours"), space.add_owner("theirs")
    space.pin(0x10000, 2 * PAGE, 1, ours)
    for iova, size, owner in ((0x10000, 3 * PAGE, ours), (0x12000, PAGE, ours), (0x10000, PAGE, theirs)):
        with pytest.raises(errors.UnpinError, match="Nothing was unpinned"):
            space.unpin(iova, size, owner)
    with pytest.raises(errors.NotMappedError):
        space.unpin(0x40000, PAGE, ours)
    assert pins(space) == (2, 2)
    space.unpin(0x10000, 2 * PAGE, ours)
    with pytest.raises(errors.UnpinError, match="look at IOVA 0x10000"):
        space.unpin(0x10000, PAGE, ours)


def test_owners_that_come_and_go_do_not_grow_the_table(space: IovaSpace) -> None:
    stays = space.add_owner("stays")
    space.pin(0x10000, PAGE, 1, stays)
    seen: dict[int, int] = {}
    for number in range(5000):
        owner = space.add_owner(f"visitor {number}")
        assert owner != stays
        # An old id is met again late: who still has it hears that there is no such owner.
        assert number - seen.get(owner, -5000) > 1000
        seen[owner] = number
        space.pin(0x11000, PAGE, 1, owner)
        assert (f"visitor {number}", owner, 1, 0x10000, 0x8000) in space.holders(0, 0xFFFFF)
        space.unpin(0x11000, PAGE, owner)
        space.remove_owner(owner)
    assert max(seen) < 1100
    assert space.holders(0, 0xFFFFF) == [("stays", stays, 1, 0x10000, 0x8000)]
    space.verify()


def test_owners_are_named_counted_and_removed_only_without_pins(space: IovaSpace) -> None:
    nic, disk = space.add_owner("nic"), space.add_owner("disk")
    space.pin(0x10000, 2 * PAGE, 1, nic)
    space.pin(0x10000, PAGE, 1, disk)
    assert sorted(space.holders(0, 0xFFFFF)) == [
        ("disk", disk, 1, 0x10000, 0x8000),
        ("nic", nic, 2, 0x10000, 0x8000),
    ]
    with pytest.raises(errors.PinnedError, match="the owner still holds 2 pins"):
        space.remove_owner(nic)
    space.unpin(0x10000, 2 * PAGE, nic)
    space.remove_owner(nic)
    with pytest.raises(errors.StateError, match=f"there is no owner {nic}"):
        space.pin(0x10000, PAGE, 1, nic)
    with pytest.raises(TypeError, match="callback must be callable"):
        space.add_owner("bad", 3)  # type: ignore[arg-type]
    space.unpin(0x10000, PAGE, disk)


def test_device_memory_is_pinned_for_peers_only(space: IovaSpace) -> None:
    space.map(None, 0, 4 * PAGE, 3, kind=KIND_MMIO, fd=5, iova=0x40000, physical=0xE000_0000)
    with pytest.raises(errors.MemoryKindError, match="peer=True"):
        space.pin(0x40000, PAGE, 1)
    frames = space.pin(0x41000, 2 * PAGE, 1, peer=True, pfns=True)
    assert frames == [0xE000_1000 // PAGE, 0xE000_2000 // PAGE]
    space.unpin(0x41000, 2 * PAGE)


# --- being told ----------------------------------------------------------------------------------------------------


def test_owner_is_told_the_whole_mapping_once_and_lets_go(space: IovaSpace) -> None:
    told = []

    def let_go(iova: int, size: int) -> None:
        told.append((iova, size))
        space.unpin(0x11000, PAGE, owner)
        space.unpin(0x13000, 2 * PAGE, owner)

    owner = space.add_owner("nic", let_go)
    space.pin(0x11000, PAGE, 1, owner)
    space.pin(0x13000, 2 * PAGE, 1, owner)
    assert space.unmap(0x10000) == 8 * PAGE
    assert told == [(0x10000, 8 * PAGE)]
    assert 0x10000 not in space


def test_nobody_is_told_without_pins(space: IovaSpace) -> None:
    def never(iova: int, size: int) -> None:
        raise AssertionError

    owner = space.add_owner("nic", never)
    space.pin(0x18000, PAGE, 1, owner)
    space.unmap(0x10000)
    space.unpin(0x18000, PAGE, owner)


def test_range_tells_each_owner_for_each_mapping(space: IovaSpace) -> None:
    told: list[tuple[str, int, int]] = []

    def make(name: str) -> int:
        def let_go(iova: int, size: int) -> None:
            told.append((name, iova, size))
            space.unpin(iova, PAGE, numbers[name])

        return space.add_owner(name, let_go)

    numbers: dict[str, int] = {}
    for name in ("nic", "disk"):
        numbers[name] = make(name)
        for iova in (0x10000, 0x18000):
            space.pin(iova, PAGE, 1, numbers[name])
    assert space.unmap_all() == 16 * PAGE
    assert sorted(told) == sorted((name, iova, 0x8000) for name in ("nic", "disk") for iova in (0x10000, 0x18000))


def test_pinned_error_names_owners_and_leaves_everything(space: IovaSpace) -> None:
    nic = space.add_owner("nic 0000:00:05.0", lambda iova, size: None)
    space.pin(0x11000, 3 * PAGE, 1, nic)
    space.pin(0x12000, PAGE, 1)
    before = space.mappings()
    with pytest.raises(errors.PinnedError) as caught:
        space.unmap_range(0, 0xFFFFF)
    text = str(caught.value)
    assert "nic 0000:00:05.0 (3 in 0x10000-0x17fff)" in text
    assert "an unnamed owner (1 in 0x10000-0x17fff)" in text
    assert "the mappings are as they were" in text
    assert space.mappings() == before
    space.pin(0x10000, PAGE, 1)  # not closing any more
    space.unpin(0x10000, PAGE)


def test_no_new_pins_while_closing(space: IovaSpace) -> None:
    refused = []

    def let_go(iova: int, size: int) -> None:
        for call in (lambda: space.pin(0x10000, PAGE, 1), lambda: space.unmap(iova), space.unmap_all):
            with pytest.raises(errors.UnmappingError, match="closing by somebody else") as caught:
                call()
            refused.append(caught.value)
        # What is mapped is still there for a device that is at work.
        assert space.check(iova, size, 1)
        space.unpin(0x10000, PAGE, owner)

    owner = space.add_owner("nic", let_go)
    space.pin(0x10000, PAGE, 1, owner)
    space.unmap(0x10000)
    assert len(refused) == 3


def test_callback_errors_are_reported_and_the_others_are_told(
    space: IovaSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))

    def bad(iova: int, size: int) -> None:
        space.unpin(0x10000, PAGE, first)
        raise ValueError("first")

    def good(iova: int, size: int) -> None:
        space.unpin(0x10000, PAGE, second)

    first, second = space.add_owner("bad", bad), space.add_owner("good", good)
    space.pin(0x10000, PAGE, 1, first)
    space.pin(0x10000, PAGE, 1, second)
    assert space.unmap(0x10000) == 8 * PAGE
    assert [str(error) for error in reported] == ["first"]


def test_interrupt_in_a_callback_gives_up(space: IovaSpace) -> None:
    def interrupted(iova: int, size: int) -> None:
        raise KeyboardInterrupt

    owner = space.add_owner("nic", interrupted)
    space.pin(0x10000, PAGE, 1, owner)
    with pytest.raises(KeyboardInterrupt):
        space.unmap(0x10000)
    space.pin(0x10000, PAGE, 1, owner)
    space.unpin(0x10000, PAGE, owner)
    space.unpin(0x10000, PAGE, owner)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_unmap_waits_for_another_thread_to_unpin(space: IovaSpace) -> None:
    told = threading.Event()
    owner = space.add_owner("nic", lambda iova, size: told.set())
    space.pin(0x10000, 4 * PAGE, 1, owner)

    def later() -> None:
        told.wait()
        time.sleep(0.02)
        space.unpin(0x10000, PAGE, owner)
        space.unpin(0x11000, 3 * PAGE, owner)

    thread = in_thread(later)
    assert space.unmap(0x10000, 10.0) == 8 * PAGE
    thread.join()


def test_unmap_times_out(space: IovaSpace) -> None:
    space.pin(0x10000, PAGE, 1)
    start = time.monotonic()
    with pytest.raises(errors.PinnedError):
        space.unmap(0x10000, timeout=0.1)
    assert 0.1 <= time.monotonic() - start < 5
    with pytest.raises(ValueError, match="nan"):
        space.unmap(0x10000, float("nan"))


def test_signal_ends_the_wait(space: IovaSpace) -> None:
    space.pin(0x10000, PAGE, 1)
    main = threading.get_ident()

    def interrupt() -> None:
        time.sleep(0.1)
        signal.pthread_kill(main, signal.SIGINT)

    thread = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        space.unmap(0x10000, None)
    thread.join()
    space.pin(0x10000, PAGE, 1)  # not closing any more


def test_second_unmapper_is_refused_while_the_first_waits(space: IovaSpace) -> None:
    told = threading.Event()
    owner = space.add_owner("nic", lambda iova, size: told.set())
    space.pin(0x10000, PAGE, 1, owner)
    done: list[int] = []
    thread = in_thread(lambda: done.append(space.unmap(0x10000, 10.0)))
    told.wait()
    with pytest.raises(errors.UnmappingError, match="the mapping 0x10000-0x17fff is closing by somebody else"):
        space.unmap_range(0, 0xFFFFF)
    space.unpin(0x10000, PAGE, owner)
    thread.join()
    assert done == [8 * PAGE]


# --- page frame numbers ----------------------------------------------------------------------------------------------


def pagemap(address: int, count: int) -> list[int | None]:
    with open("/proc/self/pagemap", "rb") as file:  # noqa: PTH123  a seek of half a gigabyte
        file.seek(address // PAGE * 8)
        entries = memoryview(file.read(8 * count)).cast("Q")
    return [entry & ((1 << 55) - 1) or None if entry >> 63 else None for entry in entries]


def test_page_frames_of_memory_that_a_kernel_mapper_holds() -> None:
    kernel, space = FakeKernel(), IovaSpace("frames")
    space.add_kernel_mapper(MAPPER_TYPE1, 3, ioctl=kernel.address)
    memory = mmap.mmap(-1, 64 * PAGE)
    memory[::PAGE] = bytes(64)[:64]
    array = memoryview(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    iova = space.map(memory, address, 64 * PAGE, 3)
    frames = space.pin(iova + PAGE, 62 * PAGE, 1, pfns=True)
    expected = pagemap(address + PAGE, 62)
    assert frames == expected
    if os.geteuid() == 0:
        assert None not in frames
        # What was stored is told again, and costs 8 bytes a page.
        assert space.pin(iova + PAGE, 62 * PAGE, 1, pfns=True) == frames
        assert 62 * 8 <= space.stats()["pin_memory"] < 62 * 10 + 300
    array.release()
    space.verify()
    forget_kernel(space)


def test_no_page_frames_where_nothing_holds_the_page(space: IovaSpace) -> None:
    assert space.pin(0x10000, 3 * PAGE, 1, pfns=True) == [None, None, None]
    assert pins(space) == (3, 3)
