"""The book: mapping, looking up, unmapping and the words of its refusals."""

from __future__ import annotations

import gc
import weakref

import pytest

from vfiopy import errors
from vfiopy.iova import KIND_MMIO, KIND_REMOTE, STATE_LIVE, STATE_UNMAPPING, IovaSpace

PAGE = 4096
MIB = 1 << 20
TOP = (1 << 64) - 1
HERE = 0x7F00_0000_0000
"""An address that is congruent to 0 modulo every page size of an IOMMU."""


class Memory:
    """Something that can be watched as it goes away."""


@pytest.fixture
def space() -> IovaSpace:
    book = IovaSpace("test")
    book.set_usable([(0x1000, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)], 0x4020_1000)
    return book


def test_map_finds_place_and_find_finds_it(space: IovaSpace) -> None:
    memory = Memory()
    iova = space.map(memory, HERE, 2 * PAGE, 3)
    assert iova == 0x1000
    for at in (iova, iova + 1, iova + 2 * PAGE - 1):
        found = space.find(at)
        assert found is not None
        assert tuple(found) == (iova, 2 * PAGE, 3, HERE, 0, STATE_LIVE, memory)
        assert found.iova == iova
        assert (found.fd, found.fd_offset, found.pins) == (-1, 0, 0)
    assert space.find(iova - 1) is None
    assert space.find(iova + 2 * PAGE) is None
    assert iova in space
    assert len(space) == 1
    assert space.unmap(iova) == 2 * PAGE
    assert iova not in space
    space.verify()


def test_memory_lives_as_long_as_its_mapping(space: IovaSpace) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    iova = space.map(memory, HERE, PAGE, 1)
    del memory
    gc.collect()
    assert alive() is not None
    space.unmap(iova)
    assert alive() is None


def test_refused_map_keeps_no_memory(space: IovaSpace) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    with pytest.raises(errors.IovaRangeError):
        space.map(memory, HERE, PAGE, 1, iova=0xFEE0_0000)
    del memory
    assert alive() is None


def test_dropped_space_lets_memory_go() -> None:
    space = IovaSpace()
    memory = Memory()
    alive = weakref.ref(memory)
    space.map(memory, HERE, PAGE, 1)
    del memory, space
    assert alive() is None


def test_space_in_a_cycle_is_collected() -> None:
    class Owner:
        def __init__(self) -> None:
            self.space = IovaSpace()
            self.space.add_owner("me", self.gone)
            self.space.map(self, HERE, PAGE, 1)

        def gone(self, iova: int, size: int) -> None:
            """Never called."""

    owner = Owner()
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None


def test_placement_is_congruent_to_the_largest_page_that_fits(space: IovaSpace) -> None:
    # 2 MiB + a bit, beginning 4 KiB into a 2 MiB page: no whole 2 MiB page inside, any place will do.
    assert space.map(None, HERE + PAGE, 2 * MIB, 3) == 0x1000
    # 3 MiB that contain a whole 2 MiB page: congruent modulo 2 MiB.
    at = space.map(None, HERE + 2 * MIB - PAGE, 3 * MIB, 3)
    assert at % (2 * MIB) == 2 * MIB - PAGE
    # 1 GiB pages are possible too.
    at = space.map(None, HERE + (1 << 30) - 2 * MIB, (1 << 30) + 4 * MIB, 3)
    assert at % (1 << 30) == (1 << 30) - 2 * MIB
    space.verify()


def test_big_page_wish_gives_way_where_there_is_no_room() -> None:
    space = IovaSpace()
    space.set_usable([(0x1000, 0x1000 + 2 * MIB - 1)], 0x20_1000)
    assert space.map(None, HERE, 2 * MIB, 3) == 0x1000


def test_best_fit_takes_the_smallest_hole(space: IovaSpace) -> None:
    for index in range(6):
        space.map(None, HERE, (index + 1) * PAGE, 3, iova=0x10_0000 * (index + 1))
    # Holes between them are large; make one of exactly 3 pages inside one of 8.
    space.map(None, HERE, PAGE, 3, iova=0x20_0000 + 5 * PAGE)
    assert space.map(None, HERE, 3 * PAGE, 3) == 0x20_0000 + 2 * PAGE


def test_limit_and_alignment(space: IovaSpace) -> None:
    assert space.map(None, HERE, PAGE, 3, limit=0xFFF_FFFF, align=1 << 20) == 1 << 20
    with pytest.raises(errors.IovaRangeError, match=r"reaches beyond 0x1fff, the highest IOVA"):
        space.map(None, HERE, PAGE, 3, iova=0x2000, limit=0x1FFF)
    space.map(None, HERE, PAGE, 3, iova=0x1000)
    with pytest.raises(errors.NoSpaceError, match=r"the largest free range has 0x[0-9a-f]+ bytes"):
        space.map(None, HERE, PAGE, 3, limit=0x1FFF)
    with pytest.raises(errors.AlignmentError, match="alignment 0x3000 is not a power of two"):
        space.map(None, HERE, PAGE, 3, align=0x3000)
    with pytest.raises(errors.AlignmentError, match="iova 0x3000 is not a multiple of 0x2000"):
        space.map(None, HERE, PAGE, 3, iova=0x3000, align=0x2000)


def test_iova_0_is_never_chosen_but_may_be_asked_for() -> None:
    space = IovaSpace()  # as a vfio-user server's book: a guest's memory begins at 0
    assert space.map(None, HERE, PAGE, 3) != 0
    assert space.map(None, HERE, PAGE, 3, iova=0) == 0
    space.verify()


def test_last_page_of_the_64_bit_space() -> None:
    space = IovaSpace()
    last_page = TOP - PAGE + 1
    assert space.map(None, HERE, PAGE, 3, iova=last_page) == last_page
    assert space.find(TOP) is not None
    assert space.overlapping(TOP, TOP)[0].iova == last_page
    space.pin(last_page, PAGE, 1)
    space.unpin(last_page, PAGE)
    with pytest.raises(errors.IovaRangeError, match="beyond the 64-bit address space"):
        space.map(None, HERE, 2 * PAGE, 3, iova=last_page)
    assert space.check(TOP, 1, 1) == [(HERE + PAGE - 1, 1, None)]
    space.verify()
    assert space.unmap(last_page) == PAGE
    assert space.free_ranges() == [(0, TOP)]


def test_overlap_by_one_page_changes_nothing(space: IovaSpace) -> None:
    space.map(None, HERE, 4 * PAGE, 3, iova=0x10000)
    before = space.mappings(), space.free_ranges()
    for iova, size in ((0x13000, PAGE), (0xF000, 2 * PAGE), (0xF000, 8 * PAGE), (0x11000, PAGE)):
        with pytest.raises(errors.OverlapError, match=r"overlaps the mapping 0x10000-0x13fff"):
            space.map(None, HERE, size, 3, iova=iova)
    assert (space.mappings(), space.free_ranges()) == before
    space.verify()


def test_neighbours_are_never_merged(space: IovaSpace) -> None:
    space.map(None, HERE, PAGE, 3, iova=0x10000)
    space.map(None, HERE + PAGE, PAGE, 3, iova=0x11000)
    assert len(space) == 2
    with pytest.raises(errors.NotMappedError, match="cuts the mapping 0x11000-0x11fff"):
        space.unmap_range(0x10000, 0x117FF)
    assert space.unmap(0x10000) == PAGE
    assert len(space) == 1


def test_unmap_range_takes_holes_and_nothing(space: IovaSpace) -> None:
    assert space.unmap_range(0x10000, 0x1FFFF) == 0
    space.map(None, HERE, PAGE, 3, iova=0x11000)
    space.map(None, HERE, PAGE, 3, iova=0x15000)
    assert space.unmap_range(0x10000, 0x1FFFF) == 2 * PAGE
    assert space.unmap_all() == 0


def test_both_ends_are_checked_before_anything_goes(space: IovaSpace) -> None:
    space.map(None, HERE, PAGE, 3, iova=0x11000)
    space.map(None, HERE, 2 * PAGE, 3, iova=0x15000)
    with pytest.raises(errors.NotMappedError, match="cuts the mapping 0x15000-0x16fff in two"):
        space.unmap_range(0x10000, 0x15FFF)
    assert len(space) == 2


def test_unmap_needs_the_first_iova(space: IovaSpace) -> None:
    space.map(None, HERE, 2 * PAGE, 3, iova=0x11000)
    with pytest.raises(errors.NotMappedError, match="cuts the mapping"):
        space.unmap(0x12000)
    with pytest.raises(errors.NotMappedError, match="nothing is mapped at IOVA 0x20000"):
        space.unmap(0x20000)


def test_a_mapping_lies_in_one_usable_range(space: IovaSpace) -> None:
    with pytest.raises(errors.IovaRangeError, match="does not lie inside one usable IOVA range"):
        space.map(None, HERE, 2 * MIB, 3, iova=0xFED0_0000)
    with pytest.raises(errors.IovaRangeError):
        space.map(None, HERE, PAGE, 3, iova=1 << 48)


def test_set_usable_names_the_mapping_that_would_be_left_outside(space: IovaSpace) -> None:
    space.map(None, HERE, PAGE, 3, iova=0x1_0000_0000)
    before = space.usable(), space.free_ranges()
    with pytest.raises(errors.IovaRangeError, match="mapping 0x100000000-0x100000fff"):
        space.set_usable([(0, (1 << 32) - 1)], 0x1000)
    with pytest.raises(errors.AlignmentError, match="whole pages of 0x10000 bytes"):
        space.set_usable([(0, (1 << 48) - 1)], 0x10000)
    with pytest.raises(errors.IovaRangeError, match="overlaps the one before"):
        space.set_usable([(0, 0xFFFF), (0x8000, 0x1FFFF)], 0x1000)
    assert (space.usable(), space.free_ranges()) == before
    space.verify()


def test_39_bit_iommu(space: IovaSpace) -> None:
    space.set_usable([(0x1000, (1 << 39) - 1)], 0x1000)
    at = space.map(None, HERE, PAGE, 3, iova=(1 << 39) - PAGE)
    assert space.find(at + PAGE - 1) is not None
    with pytest.raises(errors.IovaRangeError):
        space.map(None, HERE, PAGE, 3, iova=1 << 39)


def test_number_of_mappings_is_limited(space: IovaSpace) -> None:
    space.set_usable([(0x1000, 0xFFFF_FFFF)], 0x1000, 2)
    space.map(None, HERE, PAGE, 3)
    space.map(None, HERE, PAGE, 3)
    with pytest.raises(errors.NoSpaceError, match="takes 2 mappings"):
        space.map(None, HERE, PAGE, 3)
    with pytest.raises(errors.NoSpaceError, match="takes 1 mappings"):
        space.set_usable([(0x1000, 0xFFFF_FFFF)], 0x1000, 1)


def test_excluded_window(space: IovaSpace) -> None:
    space.exclude(0x1000, 0x3FFF)
    assert space.excluded() == [(0x1000, 0x3FFF)]
    assert space.map(None, HERE, PAGE, 3) == 0x4000
    with pytest.raises(errors.IovaRangeError, match="excluded window 0x1000-0x3fff"):
        space.map(None, HERE, PAGE, 3, iova=0x2000)
    with pytest.raises(errors.IovaRangeError, match="the mapping 0x4000-0x4fff lies in the window"):
        space.exclude(0x4000, 0x4FFF)
    with pytest.raises(errors.IovaRangeError, match="overlaps the excluded window"):
        space.exclude(0x3000, 0x8FFF)
    with pytest.raises(errors.IovaRangeError, match="never excluded"):
        space.include(0x1000, 0x2FFF)
    space.include(0x1000, 0x3FFF)
    assert space.map(None, HERE, PAGE, 3) == 0x1000
    space.verify()


def test_transient_window(space: IovaSpace) -> None:
    space.set_transient(0x10_0000, 0x10_3FFF)
    assert space.transient() == [(0x10_0000, 0x10_3FFF)]
    assert space.map(None, HERE, PAGE, 3) == 0x1000
    one_shot = [space.map(None, HERE, PAGE, 3, transient=True) for _ in range(4)]
    assert one_shot == [0x10_0000, 0x10_1000, 0x10_2000, 0x10_3000]
    # A full window is no reason to fail.
    assert space.map(None, HERE, PAGE, 3, transient=True) == 0x2000
    space.verify()
    space.unmap_all()
    space.set_transient()
    assert space.transient() == []
    space.verify()


def test_memory_to_iovas(space: IovaSpace) -> None:
    first = space.map(None, HERE, 4 * PAGE, 3)
    second = space.map(None, HERE + 2 * PAGE, 4 * PAGE, 1)
    other = space.map(None, HERE + MIB, PAGE, 3)
    assert [it.iova for it in space.by_address(HERE, PAGE)] == [first]
    assert {it.iova for it in space.by_address(HERE + 3 * PAGE, 1)} == {first, second}
    assert [it.iova for it in space.by_address(HERE + 4 * PAGE, MIB)] == [second, other]
    assert space.by_address(HERE + 8 * PAGE, PAGE) == []
    space.unmap(first)
    assert [it.iova for it in space.by_address(HERE, 8 * PAGE)] == [second]


def test_check_cuts_segments_and_refuses_holes_and_prot(space: IovaSpace) -> None:
    low, high = Memory(), Memory()
    space.map(low, HERE, PAGE, 3, iova=0x10000)
    space.map(high, HERE + MIB, PAGE, 1, iova=0x11000)
    assert space.check(0x10800, PAGE, 1) == [(HERE + 0x800, 0x800, low), (HERE + MIB, 0x800, high)]
    with pytest.raises(errors.PermissionDeniedError, match="0x11000-0x11fff gives devices read access only"):
        space.check(0x10800, PAGE, 2)
    with pytest.raises(errors.NotMappedError, match="nothing is mapped at IOVA 0x12000"):
        space.check(0x11FFF, 2, 1)


def test_map_in_two_steps(space: IovaSpace) -> None:
    memory = Memory()
    alive = weakref.ref(memory)
    reserved = space.begin_map(memory, HERE, PAGE, 3)
    iova = reserved.iova
    assert (bool(reserved), reserved.size, reserved.serial) == (True, PAGE, None)
    assert space.find(iova) is None
    assert len(space) == 0
    with pytest.raises(errors.BusyError, match="is reserved"):
        space.map(None, HERE, PAGE, 3, iova=iova)
    with pytest.raises(errors.BusyError, match="is reserved"):
        space.unmap_range(0, 0xFFFF)
    with pytest.raises(errors.BusyError, match="is reserved"):
        space.pin(iova, PAGE, 1)
    found = reserved.commit() and space.find(iova)
    assert found
    assert (bool(reserved), reserved.serial) == (False, found.serial)
    with pytest.raises(errors.StateError, match="this map is over"):
        reserved.commit()
    reserved.abort()
    assert iova in space
    second = space.begin_map(memory, HERE, PAGE, 3)
    second.abort()
    second.abort()
    with pytest.raises(errors.StateError, match="this map is over"):
        second.commit()
    assert second.iova not in space
    assert second.serial is None
    space.unmap(iova)
    del memory, found
    assert alive() is None
    space.verify()


def test_a_map_that_is_dropped_gives_its_range_back(space: IovaSpace) -> None:
    free = space.free_ranges()
    memory = Memory()
    alive = weakref.ref(memory)
    reserved = space.begin_map(memory, HERE, PAGE, 3)
    del memory
    assert alive() is not None
    del reserved
    assert alive() is None
    assert space.free_ranges() == free
    with pytest.raises(KeyError), space.begin_map(None, HERE, PAGE, 3):
        raise KeyError
    assert space.free_ranges() == free
    with space.begin_map(None, HERE, PAGE, 3) as reserved:
        reserved.commit()
    assert reserved.iova in space
    space.verify()


def test_unmap_in_two_steps(space: IovaSpace) -> None:
    first = space.map("a", HERE, PAGE, 3)
    second = space.map("b", HERE, PAGE, 3)
    marked = space.begin_unmap(first, second + PAGE - 1)
    assert [(it.memory, it.state) for it in marked.mappings] == [("a", STATE_UNMAPPING), ("b", STATE_UNMAPPING)]
    with pytest.raises(errors.UnmappingError, match="is being unmapped by somebody else"):
        space.unmap(first)
    with pytest.raises(errors.BusyError, match="is being unmapped"):
        space.map(None, HERE, PAGE, 3, iova=first)
    with pytest.raises(errors.NotMappedError):
        space.check(first, PAGE, 1)
    assert marked
    marked.abort()
    assert not marked
    assert space.check(first, PAGE, 1) == [(HERE, PAGE, "a")]
    with pytest.raises(errors.StateError, match="this unmap is over"):
        marked.finish()
    assert space.begin_unmap(first, first + PAGE - 1).finish() == PAGE
    assert [it.memory for it in space.mappings()] == ["b"]
    space.verify()


def test_an_unmap_that_is_dropped_leaves_everything(space: IovaSpace) -> None:
    iova = space.map("a", HERE, PAGE, 3)
    marked = space.begin_unmap(iova, iova + PAGE - 1)
    del marked
    assert space.check(iova, PAGE, 1) == [(HERE, PAGE, "a")]
    with pytest.raises(KeyError), space.begin_unmap(iova, iova + PAGE - 1):
        raise KeyError
    assert space.unmap(iova) == PAGE
    space.verify()


@pytest.mark.parametrize("finish", [True, False])
def test_an_unmap_ends_only_what_it_began(space: IovaSpace, finish: bool) -> None:
    everything = 0, 2**64 - 1
    space.map("a", HERE, PAGE, 3, iova=0x10000)
    first = space.begin_unmap(*everything)
    assert [it.memory for it in first.mappings] == ["a"]
    space.map("b", HERE, PAGE, 3, iova=0x20000)
    second = space.begin_unmap(0x20000, 0x20FFF)
    assert [it.memory for it in second.mappings] == ["b"]
    if finish:
        assert first.finish() == PAGE
    else:
        first.abort()
    assert (0x10000 in space, 0x20000 in space) == (not finish, True)
    assert space.find(0x20000)[5] == STATE_UNMAPPING  # type: ignore[index]
    space.verify()
    assert second.finish() == PAGE
    space.verify()


def test_an_unmap_of_nothing_leaves_what_came_later(space: IovaSpace) -> None:
    marked = space.begin_unmap(0x10000, 0x1FFFF)
    assert marked.mappings == []
    space.map("b", HERE, PAGE, 3, iova=0x10000)
    again = space.begin_unmap(0x10000, 0x1FFFF)
    assert marked.finish() == 0
    assert space.find(0x10000)[5] == STATE_UNMAPPING  # type: ignore[index]
    assert again.finish() == PAGE
    space.verify()


def test_a_stepwise_space_refuses_what_would_pass_by_its_mappers(space: IovaSpace) -> None:
    iova = space.map("a", HERE, PAGE, 3)
    closing = space.closing(iova, iova + PAGE - 1)
    assert closing.ready()
    space.set_stepwise(True)
    assert space.is_stepwise()
    for call in (
        closing.finish,
        space.unmap_all,
        lambda: space.unmap(iova),
        lambda: space.map("b", HERE, PAGE, 3),
        space.closing(iova, iova + PAGE - 1).ready,
    ):
        with pytest.raises(errors.StateError, match=r"would pass by its mappers .* call the AddressSpace's map"):
            call()
        assert [(it.memory, it.state) for it in space.mappings()] == [("a", STATE_LIVE)]
    assert space.begin_unmap(iova, iova + PAGE - 1).finish() == PAGE
    space.begin_map("b", HERE, PAGE, 3).commit()
    space.set_stepwise(False)
    assert space.unmap_all() == PAGE
    space.verify()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            (None, HERE + 1, PAGE, 3),
            errors.AlignmentError,
            "address 0x7f0000000001 is not a multiple",
        ),
        ((None, HERE, PAGE + 1, 3), errors.AlignmentError, "size 0x1001 is not a multiple of 0x1000"),
        ((None, HERE, PAGE, 3, 0x1800), errors.AlignmentError, "iova 0x1800 is not a multiple of 0x1000"),
        ((None, HERE, 0, 3), errors.IovaRangeError, "a size of 0 bytes"),
        ((None, HERE, PAGE, 0), ValueError, "prot must be 1"),
        ((None, HERE, PAGE, 4), ValueError, "prot must be 1"),
        ((None, HERE, PAGE, 3, -1, TOP, 0, 9), errors.MemoryKindError, "unknown kind"),
        ((None, -1, PAGE, 3), ValueError, "address must be an int from 0 to 2"),
        ((None, HERE, 1 << 64, 3), ValueError, "size must be an int from 0 to 2"),
        ((None, HERE, PAGE, 3, -2), ValueError, "iova must be an int from 0 to 2"),
        ((None, HERE, PAGE, 3, TOP), ValueError, "no page begins at iova 18446744073709551615"),
        ((None, HERE, "1", 3), TypeError, "str"),
        ((None, HERE, PAGE), TypeError, r"map\(\) needs argument 'prot'"),
        ((None,) * 14, TypeError, "takes at most 13 arguments"),
    ],
)
def test_bad_map_arguments(space: IovaSpace, arguments: tuple[object, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        space.map(*arguments)  # type: ignore[arg-type]
    assert len(space) == 0
    space.verify()


def test_keyword_arguments(space: IovaSpace) -> None:
    iova = space.map(memory=None, address=HERE, size=PAGE, prot=1, iova=0x8000, kind=KIND_REMOTE)
    assert iova == 0x8000
    with pytest.raises(TypeError, match="unexpected argument 'colour'"):
        space.map(None, HERE, PAGE, 1, colour=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="two values for argument 'size'"):
        space.map(None, HERE, PAGE, 1, size=3)  # type: ignore[misc]


def test_stats(space: IovaSpace) -> None:
    space.map(None, HERE, 4 * PAGE, 3, iova=0x10000)
    space.map(None, 0, PAGE, 3, kind=KIND_MMIO, fd=7, fd_offset=PAGE, iova=0x20000)
    space.pin(0x10000, 3 * PAGE, 1)
    space.pin(0x10000, PAGE, 1)
    stats = space.stats()
    assert stats["mappings"] == 2
    assert stats["mapped_bytes"] == 5 * PAGE
    assert stats["bytes_by_kind"] == {"host": 4 * PAGE, "file": 0, "mmio": PAGE, "remote": 0}
    assert stats["mappings_by_state"]["live"] == 2
    assert (stats["pins"], stats["pinned_pages"], stats["pinned_bytes"]) == (4, 3, 3 * PAGE)
    assert stats["free_bytes"] == sum(last - first + 1 for first, last in space.free_ranges())
    assert stats["largest_free_bytes"] == max(last - first + 1 for first, last in space.free_ranges())
    assert 0 < stats["fragmentation"] < 1
    found = space.find(0x20000)
    assert found is not None
    assert (found.fd, found.fd_offset) == (7, PAGE)


def test_an_empty_book_is_true_and_says_its_name() -> None:
    space = IovaSpace("dma of 0000:00:05.0")
    assert space
    assert len(space) == 0
    assert repr(space) == "<IovaSpace 'dma of 0000:00:05.0': 0 mappings>"
    assert space.stats()["free_bytes"] == 1 << 64
