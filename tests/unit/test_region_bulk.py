"""FIFO bursts and block copies: bytes, checks, holes. Widths and order are in test_region_width.py."""

from __future__ import annotations

import signal
from array import array
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from region_support import PAGE, WIDTHS, Bar, Registers

from vfiopy.errors import AccessError, AddressRangeError
from vfiopy.mmio import Region


@pytest.fixture
def bar() -> Iterator[Bar]:
    bar = Bar(256 * 1024)
    yield bar
    bar.close()


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("width", WIDTHS)
@given(data=st.data())
def test_blocks_are_bytes_as_they_lie(width: int, byteorder: str, data: st.DataObject) -> None:
    bar = Bar(PAGE)
    try:
        region = bar.region(byteorder=byteorder)
        content = data.draw(st.binary(max_size=PAGE)).ljust(PAGE, b"\x33")
        bar.content[:] = content
        first = data.draw(st.integers(0, PAGE // width))
        count = data.draw(st.integers(0, PAGE // width - first))
        part = content[first * width : (first + count) * width]
        assert region.read_block(first * width, count, width) == part
        bar.content[:] = bytes(PAGE)
        region.write_block(first * width, part, width)
        assert bar.content[:] == bytes(first * width) + part + bytes(PAGE - (first + count) * width)
    finally:
        bar.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 9000, 20000])
def test_long_ones_that_leave_the_gil(bar: Bar, width: int, count: int) -> None:
    region = bar.region()
    content = np.random.default_rng(5).bytes(count * width)
    region.write_block(64, content, width=width)
    assert bar.content[64 : 64 + count * width] == content
    assert region.read_block(64, count, width) == content
    assert region.read_fifo(64, count, width) == content[:width] * count
    region.write_fifo(8, content, width)
    assert bar.content[8 : 8 + width] == (content[-width:] if count else bytes(width))
    assert bar.content[8 + width : 64] == bytes(56 - width)


@pytest.mark.parametrize("method", ["read_block", "read_fifo"])
def test_into_a_buffer(bar: Bar, method: str) -> None:
    region = bar.region()
    bar.content[:8] = b"abcdefgh"
    expected = b"abcdefgh" if method == "read_block" else b"abcdabcd"
    target = bytearray(b"-" * 10)
    assert getattr(region, method)(0, 2, into=target) is target
    assert target == expected + b"--"
    for other in (array("I", [0, 0]), np.zeros(2, dtype="u4"), memoryview(bytearray(8))):
        getattr(region, method)(0, 2, into=other)
        assert bytes(other) == expected
    with pytest.raises(AccessError, match="'into' has 7 bytes where 8 are to be read"):
        getattr(region, method)(0, 2, into=bytearray(7))
    with pytest.raises((BufferError, TypeError)):
        getattr(region, method)(0, 2, into=b"12345678")
    with pytest.raises((BufferError, ValueError)):
        getattr(region, method)(0, 1, into=np.zeros(8, dtype="u2")[::2])


def test_any_buffer_can_be_written(bar: Bar) -> None:
    region = bar.region()
    for data in (
        b"12345678",
        bytearray(b"12345678"),
        np.frombuffer(b"12345678", "u2"),
        memoryview(b"12345678"),
    ):
        bar.content[:8] = bytes(8)
        region.write_block(0, data)
        assert bar.content[:8] == b"12345678"
    with pytest.raises(TypeError):
        region.write_block(0, [1, 2])
    with pytest.raises(AccessError, match="7 bytes of data are not a whole number of 2-byte accesses"):
        region.write_fifo(0, b"1234567", 2)


@pytest.mark.parametrize("method", ["read_block", "read_fifo", "write_block", "write_fifo"])
def test_nothing_is_touched_unless_all_may_be(bar: Bar, method: str) -> None:
    log: list[tuple[object, ...]] = []
    region = bar.region()
    region.set_trace(lambda *access: log.append(access))
    call = getattr(region, method)
    argument: object = 4 if method.startswith("read") else bytes(16)
    with pytest.raises(AccessError, match="not naturally aligned"):
        call(2, argument)
    beyond = bar.size if method.endswith("fifo") else bar.size - 12
    with pytest.raises(AddressRangeError, match="is outside of the region"):
        call(beyond, argument)
    for width in (0, 3, 16, -1):
        with pytest.raises(AccessError, match=f"no access is {width} bytes wide"):
            call(0, argument, width)
    forbidden = bar.region(readable="write" in method, writable="read" in method)
    with pytest.raises(AccessError, match=r"the region is (write|read)-only"):
        getattr(forbidden, method)(0, argument)
    assert [type(value) for _, _, _, value in log] == [AccessError, AddressRangeError]
    log.clear()
    call(beyond - 4, argument)
    assert len(log) == 4


def test_impossible_counts(bar: Bar) -> None:
    region = bar.region()
    for count in (-1, 2**64):
        with pytest.raises(AddressRangeError):
            region.read_block(0, count)
    for count in (2**62, 2**64 - 1):
        with pytest.raises(AddressRangeError):
            region.read_block(0, count)
        with pytest.raises(AddressRangeError):
            region.read_fifo(0, count)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_a_block_across_windows_and_holes(bar: Bar, width: int, byteorder: str) -> None:
    class Hole(Registers):
        def read(self, offset: int, width: int) -> int:
            super().read(offset, width)
            return int.from_bytes(bar.content[offset : offset + width], "little")

        def write(self, offset: int, width: int, value: int) -> None:
            super().write(offset, width, value)
            bar.content[offset : offset + width] = value.to_bytes(width, "little")

    hole = Hole()
    pieces = [(0, bar.address, 256), (320, bar.address + 320, 192)]
    region = Region("BAR0", 512, pieces, slow=hole, byteorder=byteorder)
    content = bytes(i % 251 for i in range(512))
    region.write_block(0, content, width)
    assert bar.content[:512] == content
    assert region.read_block(0, 512 // width, width) == content
    expected = list(range(256, 320, width))
    assert [entry[1] for entry in hole.log] == expected * 2
    assert {entry[2] for entry in hole.log} == {width}


def test_ctrl_c_ends_a_long_burst(bar: Bar) -> None:
    region = bar.region()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(KeyboardInterrupt):
            region.read_fifo(0, 100_000_000, width=1)
    finally:
        signal.signal(signal.SIGALRM, earlier)
    assert region.read32(0) == 0
    region.close()
