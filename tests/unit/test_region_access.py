"""Single accesses of Region: values, byte order, checks, windows, slow path."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from region_support import PAGE, WIDTHS, Bar, Registers

from vfiopy.errors import AccessError, AddressRangeError
from vfiopy.mmio import Region

METHODS = [(width, suffix) for width in WIDTHS for suffix in ("", "_relaxed")]


@pytest.fixture
def bar() -> Iterator[Bar]:
    bar = Bar()
    yield bar
    bar.close()


def read(region: Region, width: int, offset: int, suffix: str = "") -> int:
    return getattr(region, f"read{8 * width}{suffix}")(offset)


def write(region: Region, width: int, offset: int, value: int, suffix: str = "") -> None:
    getattr(region, f"write{8 * width}{suffix}")(offset, value)


@pytest.mark.parametrize(("width", "suffix"), METHODS)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_reads_and_writes_what_lies_there(bar: Bar, width: int, suffix: str, byteorder: str) -> None:
    region = bar.region(byteorder=byteorder)
    assert region.byteorder == byteorder
    pattern = bytes(range(0xA1, 0xA1 + width))
    bar.content[64 : 64 + width] = pattern
    assert read(region, width, 64, suffix) == int.from_bytes(pattern, byteorder)
    value = int.from_bytes(pattern[::-1], "little")
    write(region, width, 128, value, suffix)
    assert bar.content[128 : 128 + width] == value.to_bytes(width, byteorder)
    assert bar.content[128 - 8 : 128] == bytes(8)
    assert bar.content[128 + width : 144] == bytes(16 - width)


def test_native_is_the_byte_order_of_the_cpu(bar: Bar) -> None:
    assert bar.region(byteorder="native").byteorder == "little"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("byteorder", ["little", "big"])
@given(data=st.data())
def test_every_value_of_a_width_goes_through(width: int, byteorder: str, data: st.DataObject) -> None:
    bar = Bar(PAGE)
    try:
        region = bar.region(byteorder=byteorder)
        offset = data.draw(st.integers(0, PAGE // width - 1)) * width
        value = data.draw(st.integers(0, 2 ** (8 * width) - 1))
        write(region, width, offset, value)
        assert read(region, width, offset) == value
        assert bar.content[offset : offset + width] == value.to_bytes(width, byteorder)
    finally:
        bar.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_extremes_of_values(bar: Bar, width: int) -> None:
    region = bar.region()
    largest = 2 ** (8 * width) - 1
    write(region, width, 8, largest)
    assert read(region, width, 8) == largest
    for wrong in (largest + 1, -1, 1 << 200):
        with pytest.raises(AccessError, match=rf"value {wrong} does not fit into {8 * width} unsigned bits"):
            write(region, width, 8, wrong)
    assert read(region, width, 8) == largest
    assert bar.content[8 + width : 24] == bytes(16 - width)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_end_of_the_region(bar: Bar, width: int) -> None:
    region = bar.region()
    last = bar.size - width
    write(region, width, last, 0x5A)
    assert read(region, width, last) == 0x5A
    for beyond in (bar.size, bar.size + 8 * width, 2**63, 2**64 - 8):
        what = f"test BAR0: read of {width} byte{'s' * (width > 1)} at offset {beyond:#x}"
        text = f"{what} is outside of the region, which has {bar.size:#x} bytes"
        with pytest.raises(AddressRangeError, match=re.escape(text)):
            read(region, width, beyond)
        with pytest.raises(IndexError):
            write(region, width, beyond, 0)
    for nonsense in (-1, 2**64, -(2**70)):
        with pytest.raises(AddressRangeError, match="is negative or exceeds 64 bits"):
            read(region, width, nonsense)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_misaligned_is_refused(bar: Bar, width: int) -> None:
    region = bar.region()
    for offset in range(1, width):
        with pytest.raises(AccessError, match="is not naturally aligned\n  hint: use a narrower access"):
            read(region, width, 16 + offset)
        with pytest.raises(ValueError, match=r"write of .* is not naturally aligned"):
            write(region, width, 16 + offset, 0)


def test_direction_is_checked(bar: Bar) -> None:
    read_only = bar.region("ROM", writable=False)
    write_only = bar.region("doorbells", readable=False)
    assert read_only.read32(0) == 0
    write_only.write32(0, 7)
    with pytest.raises(AccessError, match="ROM: write of 4 bytes at offset 0x0: the region is read-only"):
        read_only.write32(0, 1)
    with pytest.raises(AccessError, match=r"doorbells: read of 4 .*: the region is write-only"):
        write_only.read32(0)
    assert bar.content[:4] == b"\7\0\0\0"


def test_offsets_may_be_anything_with_an_index(bar: Bar) -> None:
    region = bar.region()
    region.write32(np.uint32(8), np.uint32(0x12345678))
    assert region.read32(np.int64(8)) == 0x12345678
    assert region.read8(True) == 0
    for wrong in ("8", 8.0, None):
        with pytest.raises(TypeError):
            region.read32(wrong)
        with pytest.raises(TypeError):
            region.write32(0, wrong)
        with pytest.raises(TypeError):
            region.write32(wrong, 0)


def test_argument_counts(bar: Bar) -> None:
    region = bar.region()
    with pytest.raises(TypeError):
        region.read32()
    with pytest.raises(TypeError, match=r"write32\(\) takes exactly 2 arguments, .* \(1 given\)"):
        region.write32(0)
    with pytest.raises(TypeError, match="3 given"):
        region.write64_relaxed(0, 1, 2)


def test_an_earlier_error_does_not_leak_into_a_later_access(bar: Bar) -> None:
    region = bar.region()
    with pytest.raises(AddressRangeError):
        region.read32(-1)
    assert region.read32(0) == 0
    region.write64(0, 2**64 - 1)
    assert region.read64(0) == 2**64 - 1


class TestWindows:
    """A region of which only pieces are mapped, as around an MSI-X table."""

    def test_holes_go_the_slow_way_and_nothing_else_does(self, bar: Bar) -> None:
        slow = Registers()
        pieces = [(0, bar.address, PAGE), (3 * PAGE, bar.address + 3 * PAGE, PAGE)]
        region = Region("BAR0", 4 * PAGE, pieces, slow=slow)
        assert region.windows == ((0, PAGE), (3 * PAGE, PAGE))
        for offset in (0, PAGE - 4, 3 * PAGE, 4 * PAGE - 4, 0):
            region.write32(offset, 0x1000 + offset)
            assert region.read32(offset) == 0x1000 + offset
            assert bar.content[offset : offset + 4] == (0x1000 + offset).to_bytes(4, "little")
        assert slow.log == []
        for offset in (PAGE, 3 * PAGE - 4):
            region.write32(offset, 0xABCD)
            assert region.read32(offset) == 0xABCD
            assert bar.content[offset : offset + 4] == bytes(4)
        assert slow.log == [
            ("write", PAGE, 4, 0xABCD),
            ("read", PAGE, 4),
            ("write", 3 * PAGE - 4, 4, 0xABCD),
            ("read", 3 * PAGE - 4, 4),
        ]

    def test_a_hole_without_a_slow_path(self, bar: Bar) -> None:
        region = Region("BAR0", 2 * PAGE, [(0, bar.address, PAGE)])
        with pytest.raises(AccessError, match="this part is not mapped and there is no other way"):
            region.read32(PAGE)
        with pytest.raises(AccessError, match="write of 8 bytes at offset 0x1000"):
            region.write64(PAGE, 0)

    def test_a_window_with_an_odd_end(self, bar: Bar) -> None:
        slow = Registers()
        region = Region("BAR0", 64, [(0, bar.address, 20)], slow=slow)
        region.write32(16, 0x11223344)
        assert bar.content[16:20] == b"\x44\x33\x22\x11"
        assert slow.log == []
        region.write64(16, 5)  # half of it is not mapped
        assert slow.log == [("write", 16, 8, 5)]
        assert bar.content[16:20] == b"\x44\x33\x22\x11"

    def test_no_window_at_all(self) -> None:
        slow = Registers()
        region = Region("config", 256, slow=slow)
        region.write16(4, 6)
        assert region.read16(4) == 6
        assert region.windows == ()
        assert slow.log == [("write", 4, 2, 6), ("read", 4, 2)]
        with pytest.raises(AddressRangeError):
            region.read32(256)
        assert len(slow.log) == 2

    def test_byte_order_on_the_slow_path(self) -> None:
        slow = Registers()
        region = Region("big", 256, slow=slow, byteorder="big")
        region.write32(0, 0x11223344)
        assert slow.log == [("write", 0, 4, 0x44332211)]
        assert region.read32(0) == 0x11223344

    def test_a_slow_path_that_lies_about_width(self) -> None:
        slow = Registers()
        slow.values[0] = 0x100
        with pytest.raises(AccessError, match="value 256 does not fit into 8 unsigned bits"):
            Region("BAR0", 16, slow=slow).read8(0)
        slow.values[0] = "no number"  # type: ignore[assignment]
        with pytest.raises(TypeError):
            Region("BAR0", 16, slow=slow).read8(0)

    def test_errors_of_a_slow_path_come_through(self) -> None:
        class Broken:
            def read(self, offset: int, width: int) -> int:
                raise KeyError(offset)

            def write(self, offset: int, width: int, value: int) -> None:
                raise KeyError(value)

        region = Region("BAR0", 16, slow=Broken())
        with pytest.raises(KeyError, match="4"):
            region.read32(4)
        with pytest.raises(KeyError, match="9"):
            region.write32(4, 9)

    @pytest.mark.parametrize(
        ("pieces", "text"),
        [
            ([(0, 0, PAGE)], "window 0 has address 0"),
            ([(0, PAGE, 0)], "window 0 is empty"),
            ([(0, PAGE, PAGE), (PAGE // 2, PAGE, PAGE)], "window 1 overlaps the one before it"),
            ([(PAGE, 2 * PAGE, PAGE), (0, PAGE, PAGE)], "window 1 overlaps .* or they are not sorted"),
            ([(PAGE, PAGE, 4 * PAGE)], "window 0 reaches past the end"),
            ([(2**63, PAGE, PAGE)], "window 0 reaches past the end"),
            ([(0, 2**64 - PAGE, 2 * PAGE)], "window 0 wraps around"),
            ([(0, PAGE + 4, PAGE)], "window 0 is mapped at an address that is not congruent"),
        ],
    )
    def test_impossible_windows(self, pieces: list[tuple[int, int, int]], text: str) -> None:
        with pytest.raises(AccessError, match=text):
            Region("BAR0", 4 * PAGE, pieces)


def test_construction_checks_its_arguments(bar: Bar) -> None:
    with pytest.raises(AccessError, match="byteorder 'middle' is none of 'little', 'big' and 'native'"):
        bar.region(byteorder="middle")
    with pytest.raises(AttributeError):
        bar.region(slow=object())
    with pytest.raises(TypeError):
        Region("BAR0")
    with pytest.raises(TypeError):
        Region(5, 4096)
    with pytest.raises(AddressRangeError):
        Region("BAR0", -1)
    with pytest.raises(TypeError, match="a window is"):
        Region("BAR0", PAGE, [(0, 4096)])
    with pytest.raises(TypeError):
        Region("BAR0", PAGE, 5)


def test_attributes(bar: Bar) -> None:
    region = bar.region("0000:00:05.0 BAR0")
    assert region.name == "0000:00:05.0 BAR0"
    assert region.size == bar.size
    assert region.readable
    assert region.writable
    assert region.slow is None
    assert region.holds == ()
    assert repr(region) == f"<Region 0000:00:05.0 BAR0, {bar.size:#x} bytes, open>"
    with pytest.raises(AttributeError):
        region.size = 5  # type: ignore[misc]
    slow = Registers()
    assert bar.region(slow=slow).slow is slow


def test_a_subclass_keeps_everything(bar: Bar) -> None:
    class Bar0(Region):
        note = "mine"

        def version(self) -> int:
            return self.read32(8)

    region = Bar0("BAR0", bar.size, [(0, bar.address, bar.size)])
    bar.content[8:12] = b"\1\2\3\4"
    assert region.version() == 0x04030201
    region.extra = 5  # type: ignore[attr-defined]
    with region:
        pass
    assert region.state == "closed"
