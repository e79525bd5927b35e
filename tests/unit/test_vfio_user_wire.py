"""vfio-user's layouts, negotiation and region descriptions: the specification's numbers, and any bytes at all."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiopy.backend import Area, RegionFlag, RegionInfo
from vfiopy.errors import ProtocolError, VfioError
from vfiopy.vfio_user import wire
from vfiopy.vfio_user.region_info import decode_region_info, encode_region_info
from vfiopy.vfio_user.version import Capabilities, TwinSocket, decode_version, encode_version

# bytes of the fixed part, from the tables of the specification
SIZES = {
    "HEADER": 16,
    "VERSION": 4,
    "DMA_MAP": 32,
    "DMA_UNMAP": 24,
    "DIRTY_BITMAP": 16,
    "DEVICE_INFO": 16,
    "REGION_INFO": 32,
    "IO_FDS": 16,
    "IO_FD": 40,
    "IRQ_INFO": 16,
    "SET_IRQS": 20,
    "REGION_ACCESS": 16,
    "DMA_ACCESS": 16,
    "WRITE_MULTI": 8,
    "WRITE": 24,
    "FEATURE": 8,
    "MIGRATION_DATA": 8,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_sizes_are_the_specifications(name: str, size: int) -> None:
    assert getattr(wire, name).size == size


def test_a_map_request_as_it_is_on_the_wire() -> None:
    packed = wire.DMA_MAP.pack(32, 3, 0x1000, 0x8000_0000, 0x20_0000)
    assert packed == struct.pack("=IIQQQ", 32, 3, 0x1000, 0x8000_0000, 0x20_0000)
    assert wire.DMA_MAP.unpack(b"xx" + packed, 2) == wire.DmaMap(32, 3, 0x1000, 0x8000_0000, 0x20_0000)


def test_a_record_that_is_cut_off_is_refused() -> None:
    for data, offset in ((b"", 0), (bytes(15), 0), (bytes(16), 1), (bytes(16), -1)):
        with pytest.raises(ProtocolError):
            wire.HEADER.unpack(data, offset)


def test_commands_have_the_specifications_numbers() -> None:
    assert [int(command) for command in wire.Command] == [*range(1, 14), 15, 16, 17, 18]
    assert set(wire.COMMANDS) == set(wire.Command)


def check(command: int, size: int, fds: int = 0, from_client: bool = True) -> int:
    try:
        wire.check_request(command, size, fds, from_client=from_client)
    except VfioError as error:
        return error.errno or -1
    return 0


EINVAL, ENOSYS = 22, 38


@pytest.mark.parametrize("command", list(wire.Command))
def test_lengths_of_each_command(command: wire.Command) -> None:
    rule = wire.COMMANDS[command]
    fixed = rule.form.size if rule.form else 0
    assert check(command, fixed, from_client=rule.from_client) == 0
    assert check(command, fixed, from_client=not rule.from_client) == ENOSYS
    if fixed:
        assert check(command, fixed - 1, from_client=rule.from_client) == EINVAL
    if rule.tail is wire.Tail.NONE:
        assert check(command, fixed + 1, from_client=rule.from_client) == EINVAL
    assert check(command, fixed, rule.fds, rule.from_client) == 0
    assert check(command, fixed, rule.fds + 1, rule.from_client) == EINVAL


def test_unmap_has_a_bitmap_request_or_nothing() -> None:
    assert [check(wire.Command.DMA_UNMAP, 24 + more) for more in (0, 8, 16, 17)] == [0, EINVAL, 0, EINVAL]


@pytest.mark.parametrize("command", [0, 14, 19, 0xFFFF])
def test_commands_that_do_not_exist(command: int) -> None:
    assert check(command, 0) == ENOSYS


# --- VERSION ---------------------------------------------------------------------------------------------------------

QEMU = (
    b'{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"max_data_xfer_size":1048576,'
    b'"migration":{"max_bitmap_size":268435456,"pgsize":4096},"write_multiple":true}}\0'
)


def payload(text: bytes, major: int = 0, minor: int = 0) -> bytes:
    return struct.pack("=HH", major, minor) + text


def test_what_qemu_says() -> None:
    assert decode_version(payload(QEMU)) == (0, Capabilities(max_msg_fds=16, write_multiple=True))


def test_saying_nothing_is_the_defaults() -> None:
    assert decode_version(payload(b"", minor=1)) == (1, Capabilities())
    assert decode_version(payload(b"{}\0")) == (0, Capabilities())


def test_a_reply_fits_into_qemus_request() -> None:
    largest = Capabilities.ours(twin_socket=True, fd_index=0, max_dma_maps=65534)
    assert 16 + len(encode_version(2, largest)) <= 16 + 4 + len(QEMU)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",  # no NUL
        b"{}\0\0",
        b"\xff\0",
        b"[]\0",
        b'{"capabilities":3}\0',
        b"{" * 3000 + b"\0",
        b"x" * 5000 + b"\0",
        *(
            json.dumps({"capabilities": capabilities}).encode() + b"\0"
            for capabilities in (
                {"max_msg_fds": -1},
                {"max_msg_fds": 1025},
                {"max_msg_fds": True},
                {"max_msg_fds": "1"},
                {"max_msg_fds": 1.5},
                {"max_data_xfer_size": 0},
                {"max_data_xfer_size": (64 << 20) + 1},
                {"max_dma_maps": 0},
                {"pgsizes": 512},
                {"pgsizes": 4097},
                {"twin_socket": True},
                {"twin_socket": {"supported": 1}},
                {"twin_socket": {"supported": True, "fd_index": -1}},
                {"write_multiple": "yes"},
            )
        ),
    ],
)
def test_capabilities_that_are_refused(text: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_version(payload(text))


def test_another_major_version_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"version 1\.0"):
        decode_version(payload(b"{}\0", major=1))


numbers = st.integers(1, 1 << 20)
offers = st.builds(
    Capabilities,
    max_msg_fds=st.integers(0, 16),
    max_data_xfer_size=st.integers(64, 1 << 20),
    max_dma_maps=numbers,
    pgsizes=numbers.map(lambda bits: bits << 12),
    twin_socket=st.one_of(
        st.just(TwinSocket()), st.builds(TwinSocket, st.just(True), st.none() | st.integers(0, 16))
    ),
    write_multiple=st.booleans(),
)


@given(offers, st.integers(0, 0xFFFF))
def test_negotiation_round_trip(capabilities: Capabilities, minor: int) -> None:
    assert decode_version(encode_version(minor, capabilities)) == (minor, capabilities)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(
    ["max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "twin_socket", "write_multiple", "migration"]
)


@given(st.dictionaries(names, json_values))
def test_any_json_is_read_or_refused(capabilities: dict[str, Any]) -> None:
    text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
    try:
        _, found = decode_version(payload(text))
    except ProtocolError:
        return
    assert 0 <= found.max_msg_fds <= 16
    assert 64 <= found.max_data_xfer_size <= 64 << 20


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(text: bytes) -> None:
    try:
        decode_version(text)
    except ProtocolError:
        return


# --- GET_REGION_INFO -------------------------------------------------------------------------------------------------


@st.composite
def regions(draw: st.DrawFn) -> RegionInfo:
    size = draw(st.integers(1, 1 << 40))
    areas = st.builds(lambda start, length: Area(start, min(length, size - start)), st.integers(0, size - 1), numbers)
    sparse = draw(st.none() | st.lists(areas, max_size=5).map(lambda found: tuple(sorted(found))))
    return RegionInfo(
        draw(st.integers(0, 20)),
        size,
        RegionFlag(draw(st.integers(0, 7))),
        draw(st.integers(0, 1 << 40)),
        sparse,
        draw(st.booleans()),
        draw(st.none() | st.tuples(numbers, numbers)),
    )


@given(regions())
def test_region_info_round_trip(info: RegionInfo) -> None:
    whole = encode_region_info(info, 1 << 20)
    assert decode_region_info(whole) == (info, len(whole))


@given(regions(), st.integers(32, 200))
def test_what_does_not_fit_is_asked_for_again(info: RegionInfo, argsz: int) -> None:
    reply = encode_region_info(info, argsz)
    assert len(reply) <= argsz
    needed = wire.REGION_INFO.unpack(reply).argsz
    assert needed == len(encode_region_info(info, needed))
    if needed > argsz:
        assert wire.REGION_INFO.unpack(reply).cap_offset == 0


def chained(*capabilities: tuple[int, int, bytes], first: int = 32, size: int = 0x10000) -> bytes:
    body = b"".join(struct.pack("=HHI", number, 1, following) + data for number, following, data in capabilities)
    return wire.REGION_INFO.pack(32 + len(body), 0xF, 2, first, size, 0) + body


@pytest.mark.parametrize(
    "reply",
    [
        bytes(31),
        chained((1, 32, bytes(8))),  # comes back to itself
        chained((9, 1000, b"")),
        chained((1, 0, b"")),  # ends before the number of areas
        chained((1, 0, struct.pack("=II", 1, 0))),  # one area too few
        chained((1, 0, struct.pack("=II", 0xFFFF_FFFF, 0))),
        chained((1, 0, struct.pack("=IIQQ", 1, 0, 0x8000, 0x8001))),  # leaves the region
        chained((1, 0, struct.pack("=IIQQ", 1, 0, (1 << 64) - 1, 2))),
        chained((2, 0, bytes(4))),
        chained(first=8),
    ],
)
def test_malformed_chains_are_refused(reply: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_region_info(reply)


def test_unknown_capabilities_are_passed_over() -> None:
    info, _ = decode_region_info(chained((77, 48, bytes(8)), (3, 0, b"")))
    assert info.msix_mappable


@given(st.binary(max_size=120))
def test_any_reply_is_read_or_refused(reply: bytes) -> None:
    for whole in (reply, wire.REGION_INFO.pack(0, 0xF, 0, 32, 1 << 20, 0) + reply):
        try:
            info, _ = decode_region_info(whole)
        except ProtocolError:
            continue
        assert all(area.offset + area.size <= info.size for area in info.sparse or ())
