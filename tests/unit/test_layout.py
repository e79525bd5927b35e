"""Layouts: offsets, widths, and what is refused."""

from __future__ import annotations

import copy
import pickle
import struct
from array import array
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiopy.layout import Layout

SAMPLE = Layout(
    "sample",
    64,
    {
        "argsz": (0, "I"),
        "devid": (4, "I"),
        "group_id": (4, "I"),
        "fd": (8, "i"),
        "length": (12, "Q"),
        "name": (20, "16s"),
        "idr": (36, "6I"),
        "data": (60, ""),
    },
)


def test_facts_are_as_given() -> None:
    assert SAMPLE.name == "sample"
    assert SAMPLE.size == 64
    assert list(SAMPLE) == ["argsz", "devid", "group_id", "fd", "length", "name", "idr", "data"]
    assert len(SAMPLE) == 8
    assert "fd" in SAMPLE
    assert "header" not in SAMPLE
    assert [SAMPLE.offset(field) for field in ("length", "name", "data")] == [12, 20, 60]
    assert [SAMPLE.width(field) for field in ("fd", "length", "name", "idr", "data")] == [4, 8, 16, 24, 0]
    assert [SAMPLE.code(field) for field in ("fd", "name", "idr", "data")] == ["i", "16s", "6I", ""]
    assert repr(SAMPLE) == "<Layout sample: 64 bytes, 8 fields>"


def test_new_is_zeroed_and_has_room_behind() -> None:
    assert SAMPLE.new() == bytearray(64)
    buf = SAMPLE.new(extra=8, argsz=72, fd=-1, length=1 << 63, name=b"abc", idr=(1, 2, 3, 4, 5, 6))
    assert len(buf) == 72
    expected = struct.pack("=IIiQ16s6I", 72, 0, -1, 1 << 63, b"abc", 1, 2, 3, 4, 5, 6)
    assert buf == expected.ljust(72, b"\0")


def test_unpack_returns_all_but_the_flexible_array() -> None:
    buf = SAMPLE.new(argsz=1, devid=7, name=b"abc")
    assert SAMPLE.unpack(buf) == {
        "argsz": 1,
        "devid": 7,
        "group_id": 7,
        "fd": 0,
        "length": 0,
        "name": b"abc" + bytes(13),
        "idr": (0,) * 6,
    }


def test_members_of_a_union_share_their_bytes() -> None:
    buf = SAMPLE.new(devid=5)
    assert SAMPLE.get(buf, "group_id") == 5
    SAMPLE.put(buf, "group_id", 6)
    assert SAMPLE.get(buf, "devid") == 6


@pytest.mark.parametrize("base", [0, 1, 13])
def test_base_shifts_every_access(base: int) -> None:
    buf = bytearray(base + 64)
    SAMPLE.put(buf, "length", 0x1122334455667788, base)
    SAMPLE.put(buf, "name", b"n" * 16, base)
    SAMPLE.put(buf, "idr", range(6), base)
    assert struct.unpack_from("=Q", buf, base + 12)[0] == 0x1122334455667788
    assert SAMPLE.get(buf, "length", base) == 0x1122334455667788
    assert SAMPLE.get_bytes(buf, "name", base) == b"n" * 16
    assert SAMPLE.get_array(buf, "idr", base) == (0, 1, 2, 3, 4, 5)
    assert SAMPLE.unpack(buf, base)["length"] == 0x1122334455667788
    assert buf[:base] == bytes(base)


@pytest.mark.parametrize("wrap", [bytes, memoryview, lambda buf: array("I", bytes(buf))])
def test_any_buffer_can_be_read(wrap: Callable[[bytearray], Any]) -> None:
    buf = wrap(SAMPLE.new(argsz=9, name=b"xyz"))
    assert SAMPLE.get(buf, "argsz") == 9
    assert SAMPLE.get_bytes(buf, "name") == b"xyz" + bytes(13)


def test_get_bytes_reads_a_field_of_any_kind() -> None:
    buf = SAMPLE.new(fd=-2)
    assert SAMPLE.get_bytes(buf, "fd") == struct.pack("=i", -2)
    assert SAMPLE.get_bytes(buf, "idr") == bytes(24)


def test_put_takes_any_bytes_and_fills_with_zeros() -> None:
    buf = SAMPLE.new(name=b"x" * 16)
    for value in (bytearray(b"ab"), memoryview(b"ab")):
        SAMPLE.put(buf, "name", value)
        assert SAMPLE.get_bytes(buf, "name") == b"ab" + bytes(14)


MISUSE: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: SAMPLE.new(flgs=1), TypeError, "sample has no field 'flgs'; it has argsz, devid"),
    (lambda: SAMPLE.offset("flgs"), TypeError, "sample has no field 'flgs'"),
    (lambda: SAMPLE.new(extra=-1), ValueError, "extra is -1 bytes"),
    (lambda: SAMPLE.new(data=b""), TypeError, "is a flexible array; its content starts at offset 60"),
    (lambda: SAMPLE.get(bytes(64), "data"), TypeError, "flexible array"),
    (lambda: SAMPLE.get_bytes(bytes(64), "data"), TypeError, "flexible array"),
    (lambda: SAMPLE.get(bytes(64), "name"), TypeError, "is a byte string; use get_bytes()"),
    (lambda: SAMPLE.get(bytes(64), "idr"), TypeError, "is an array of integers; use get_array()"),
    (lambda: SAMPLE.get_array(bytes(64), "fd"), TypeError, "is one integer; use get()"),
    (lambda: SAMPLE.get(bytes(11), "fd"), ValueError, "takes bytes 8 to 12, the buffer has 11"),
    (lambda: SAMPLE.get(bytes(64), "argsz", 61), ValueError, "takes bytes 61 to 65, the buffer has 64"),
    (lambda: SAMPLE.get(bytes(64), "argsz", -4), ValueError, "takes bytes -4 to 0"),
    (lambda: SAMPLE.get_bytes(bytes(64), "name", -30), ValueError, "takes bytes -10 to 6"),
    (lambda: SAMPLE.get_bytes(bytes(30), "name"), ValueError, "takes bytes 20 to 36"),
    (lambda: SAMPLE.get_array(bytes(40), "idr"), ValueError, "takes bytes 36 to 60"),
    (lambda: SAMPLE.get_array(bytes(64), "idr", -36), ValueError, "takes bytes 0 to 24"),
    (lambda: SAMPLE.put(bytearray(11), "fd", 1), ValueError, "takes bytes 8 to 12"),
    (lambda: SAMPLE.put(bytearray(64), "fd", 1, -8), ValueError, "takes bytes 0 to 4"),
    (lambda: SAMPLE.put(bytearray(30), "name", b""), ValueError, "takes bytes 20 to 36"),
    (lambda: SAMPLE.new(argsz=-1), ValueError, "sample.argsz cannot hold -1"),
    (lambda: SAMPLE.new(argsz=1 << 32), ValueError, "sample.argsz cannot hold 4294967296"),
    (lambda: SAMPLE.new(fd=1 << 31), ValueError, "sample.fd cannot hold"),
    (lambda: SAMPLE.new(argsz="x"), TypeError, "sample.argsz takes an integer"),  # type: ignore[arg-type]
    (lambda: SAMPLE.new(argsz=1.5), TypeError, "sample.argsz takes an integer"),  # type: ignore[arg-type]
    (lambda: SAMPLE.new(name=4), TypeError, "sample.name takes bytes, not int"),
    (lambda: SAMPLE.new(name="abc"), TypeError, "sample.name takes bytes, not str"),  # type: ignore[arg-type]
    (lambda: SAMPLE.new(name=b"x" * 17), ValueError, "sample.name holds 16 bytes, not 17"),
    (lambda: SAMPLE.new(idr=3), TypeError, "sample.idr takes a sequence of integers, not one"),
    (lambda: SAMPLE.new(idr=(1, 2)), ValueError, "sample.idr cannot hold (1, 2)"),
    (lambda: SAMPLE.new(idr="abcdef"), TypeError, "sample.idr takes an integer"),  # type: ignore[arg-type]
    (lambda: Layout("x", 4, {"a": (2, "I")}), ValueError, "x.a takes bytes 2 to 6, the structure has 4"),
    (lambda: Layout("x", 4, {"a": (-1, "B")}), ValueError, "x.a takes bytes -1 to 0"),
    (lambda: Layout("x", 4, {"a": (0, "u")}), ValueError, "x.a: 'u' is not a struct code"),
]


@pytest.mark.parametrize(("use", "error", "text"), MISUSE)
def test_misuse_is_refused_by_name(use: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        use()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("argsz", -1), ("name", b"x" * 17), ("idr", (1, 2, 3, 4, 5, -6)), ("fd", 1 << 40)]
)
def test_a_failed_put_leaves_the_neighbours_alone(field: str, value: Any) -> None:
    buf = bytearray(b"\x5a" * 64)
    with pytest.raises(ValueError, match=field):
        SAMPLE.put(buf, field, value)
    start = SAMPLE.offset(field)
    end = start + SAMPLE.width(field)
    assert buf[:start] + buf[end:] == b"\x5a" * (64 - end + start)


def test_a_read_only_buffer_cannot_be_written() -> None:
    with pytest.raises((TypeError, BufferError)):
        SAMPLE.put(bytes(64), "argsz", 1)


def test_layouts_cannot_be_changed() -> None:
    with pytest.raises(AttributeError, match="layout sample cannot be changed"):
        SAMPLE.other = 4  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="layout sample cannot be changed"):
        SAMPLE.size = 4  # type: ignore[misc]
    with pytest.raises(AttributeError, match="layout sample cannot be changed"):
        del SAMPLE._fields


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_layouts_can_be_copied(copied: Callable[[Layout], Layout]) -> None:
    twin = copied(SAMPLE)
    assert (twin.name, twin.size, list(twin)) == ("sample", 64, list(SAMPLE))
    assert [(twin.offset(field), twin.code(field)) for field in twin] == [
        (SAMPLE.offset(field), SAMPLE.code(field)) for field in SAMPLE
    ]


@given(st.sampled_from("BHIQbhiq"), st.integers(0, 40), st.integers(0, 9), st.data())
def test_every_value_that_fits_comes_back(code: str, offset: int, base: int, data: st.DataObject) -> None:
    width = struct.calcsize("=" + code)
    layout = Layout("any", 48, {"before": (0, f"{offset}s"), "value": (offset, code)})
    bits = 8 * width
    low, high = (0, (1 << bits) - 1) if code.isupper() else (-(1 << bits - 1), (1 << bits - 1) - 1)
    value = data.draw(st.integers(low, high))
    buf = bytearray(b"\xa5" * (base + 48))
    layout.put(buf, "value", value, base)
    assert layout.get(buf, "value", base) == value
    at = base + offset
    assert buf[at : at + width] == struct.pack("=" + code, value)
    assert buf[:at] + buf[at + width :] == b"\xa5" * (base + 48 - width)
