"""Which parts of a BAR are mapped: whole pages, without the MSI-X table."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vfiopy.backend import Area, RegionFlag, RegionInfo
from vfiopy.device.regions import mappable_areas
from vfiopy.dma.memory import PAGE_SIZE

RWM = RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP


def info(size: int, flags: RegionFlag = RWM, sparse: tuple[Area, ...] | None = None) -> RegionInfo:
    return RegionInfo(0, size, flags, sparse=sparse)


def test_whole_bar() -> None:
    assert mappable_areas(info(0x10000), None) == [Area(0, 0x10000)]


def test_without_the_mmap_flag_nothing() -> None:
    assert mappable_areas(info(0x10000, RegionFlag.READ), None) == []


def test_table_in_the_middle_leaves_two_pieces() -> None:
    assert mappable_areas(info(0x10000), Area(0x2010, 0x40)) == [Area(0, 0x2000), Area(0x3000, 0xD000)]


def test_table_at_either_end() -> None:
    assert mappable_areas(info(0x3000), Area(0, 0x1000)) == [Area(0x1000, 0x2000)]
    assert mappable_areas(info(0x3000), Area(0x2800, 0x800)) == [Area(0, 0x2000)]


def test_table_that_fills_the_bar() -> None:
    assert mappable_areas(info(0x1000), Area(0, 0x200)) == []


def test_sparse_areas_are_the_only_ones() -> None:
    sparse = (Area(0x4000, 0x2000), Area(0, 0x1000))
    assert mappable_areas(info(0x8000, sparse=sparse), None) == [Area(0, 0x1000), Area(0x4000, 0x2000)]
    assert mappable_areas(info(0x8000, sparse=sparse), Area(0x5000, 16)) == [
        Area(0, 0x1000),
        Area(0x4000, 0x1000),
    ]


pages = st.integers(0, 40)


@given(size=st.integers(1, 64), table=st.tuples(st.integers(0, 64 * PAGE_SIZE), st.integers(1, 2048)))
def test_pages_are_mapped_exactly_where_the_table_is_not(size: int, table: tuple[int, int]) -> None:
    offset, entries = table
    msix = Area(offset, entries * 16)
    areas = mappable_areas(info(size * PAGE_SIZE), msix)
    spans = [(area.offset // PAGE_SIZE, (area.offset + area.size) // PAGE_SIZE) for area in areas]
    mapped = {page for first, end in spans for page in range(first, end)}
    holds_table = set(range(msix.offset // PAGE_SIZE, (msix.offset + msix.size - 1) // PAGE_SIZE + 1))
    assert mapped == set(range(size)) - holds_table
    assert all(area.offset % PAGE_SIZE == 0 == area.size % PAGE_SIZE for area in areas)
