"""Configuration space of emulated devices: what can be written, and what that means."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from emulated_support import Everything
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiopy.emulated import (
    Bar,
    ConfigSpace,
    Edu,
    Identity,
    Msi,
    MsiX,
    PciExpress,
    PowerManagement,
    VendorSpecific,
)

WHO = Identity(0x1234, 0x5678, 0x020000, revision=3, subsystem_vendor=0xABCD, subsystem=0xEF01)


def make(bars: dict[int, Bar] | None = None, *capabilities: Any, pin: int = 0) -> ConfigSpace:
    return ConfigSpace(WHO, bars or {}, capabilities, pin)


def everything() -> ConfigSpace:
    vendor = VendorSpecific(b"hello", writable=b"\x00\xff\x0f\x00\x00")
    return ConfigSpace(WHO, Everything.bars, (*Everything.capabilities, vendor), 1)


def capabilities(config: ConfigSpace) -> dict[int, int]:
    """Walk the list as software does: id → offset."""
    found = {}
    at = config.read(0x34, 1)[0]
    while at:
        found[config.read(at, 1)[0]] = at
        at = config.read(at + 1, 1)[0]
    return found


def test_header_says_who_it_is() -> None:
    config = make({}, pin=2)
    assert struct.unpack("<HH", config.read(0, 4)) == (0x1234, 0x5678)
    assert config.read(8, 4) == bytes((3, 0x00, 0x00, 0x02))
    assert struct.unpack("<HH", config.read(0x2C, 4)) == (0xABCD, 0xEF01)
    assert config.read(0x3D, 1) == b"\x02"
    assert config.size == 256


def test_without_capabilities_there_is_no_list() -> None:
    config = make()
    assert not config.read16(0x06) & 1 << 4
    assert config.read(0x34, 1) == b"\0"


def test_capabilities_are_chained_aligned_and_complete() -> None:
    config = everything()
    found = capabilities(config)
    assert list(found) == [0x01, 0x05, 0x11, 0x10, 0x09]
    assert all(offset >= 0x40 and offset % 4 == 0 for offset in found.values())
    assert config.read16(0x06) & 1 << 4
    assert config.size == 4096


def test_edu_is_what_qemu_shows() -> None:
    config = Edu().config
    assert struct.unpack("<HH", config.read(0, 4)) == (0x1234, 0x11E8)
    assert config.read(8, 4) == bytes((0x10, 0x00, 0xFF, 0x00))
    assert capabilities(config) == {0x05: 0x40}
    assert config.read16(0x42) == 0x0080  # one vector, 64-bit address, no mask bits
    assert config.size == 256
    assert config.read(0x3D, 1) == b"\x01"


@pytest.mark.parametrize(
    ("bar", "register"),
    [
        (Bar(16), 0xFFFF_FFF0),
        (Bar(1 << 20), 0xFFF0_0000),
        (Bar(0x1000, prefetchable=True), 0xFFFF_F008),
        (Bar(0x4000, address64=True), 0xFFFF_FFFF_FFFF_C004),
        (Bar(1 << 33, address64=True, prefetchable=True), 0xFFFF_FFFE_0000_000C),
    ],
)
def test_bar_sizing(bar: Bar, register: int) -> None:
    config = make({1: bar})
    width = 8 if bar.address64 else 4
    config.write(0x14, b"\xff" * width)
    assert int.from_bytes(config.read(0x14, width), "little") == register
    assert config.read(0x10, 4) == bytes(4)


def test_absent_bars_read_zero() -> None:
    config = make({0: Bar(0x1000)})
    config.write(0x14, b"\xff" * 20)
    assert config.read(0x14, 20) == bytes(20)


def test_bars_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="BAR 1 does not fit"):
        make({0: Bar(0x1000, address64=True), 1: Bar(0x1000)})
    with pytest.raises(ValueError, match="BAR 5 does not fit"):
        make({5: Bar(0x1000, address64=True)})
    with pytest.raises(ValueError, match="power of two"):
        Bar(0x1800)


def test_firmware_places_bars_apart_and_aligned() -> None:
    config = everything()
    config.place_bars(Everything.bars, 0xFEBF_0000)
    first = int.from_bytes(config.read(0x10, 4), "little") & ~0xF
    second = int.from_bytes(config.read(0x18, 8), "little") & ~0xF
    assert first % 0x1000 == 0
    assert second % 0x4000 == 0
    assert second > 0
    assert second + 0x4000 <= first
    assert first < 0xFEBF_0000


def test_command_bits_are_decoded() -> None:
    config = make()
    assert not config.memory_enabled
    assert not config.bus_master
    assert not config.intx_disabled
    config.write16(0x04, 0xFFFF)
    assert config.memory_enabled
    assert config.bus_master
    assert config.intx_disabled
    assert config.read16(0x04) == 0x0507  # the other bits are wired to 0
    config.enable(bus_master=False)
    assert config.read16(0x04) == 0x0503


def test_d3hot_answers_nothing_and_d1_does_not_exist() -> None:
    config = everything()
    control = capabilities(config)[0x01] + PowerManagement.CONTROL
    config.enable(memory=True, bus_master=True)
    config.write16(control, 1)
    assert config.read16(control) & 3 == 0
    config.write16(control, 3)
    assert config.read16(control) & 3 == 3
    assert not config.memory_enabled
    assert not config.bus_master
    config.write16(control, 2)
    assert config.read16(control) & 3 == 3
    config.write16(control, 0)
    assert config.memory_enabled
    assert config.bus_master


def test_function_reset_bit_calls_and_reads_zero() -> None:
    config = everything()
    calls = []
    config.on_function_reset = lambda: calls.append(1)
    control = capabilities(config)[0x10] + PciExpress.DEVICE_CONTROL
    config.write16(control, config.read16(control) | 1 << 15)
    assert calls == [1]
    assert not config.read16(control) & 1 << 15
    config.write16(control, config.read16(control))
    assert calls == [1]


@pytest.mark.parametrize(("vectors", "field"), [(1, 0), (2, 1), (3, 2), (4, 2)])
def test_enable_messages_sets_enable_and_count(vectors: int, field: int) -> None:
    config = everything()
    control = capabilities(config)[0x05] + Msi.CONTROL
    config.enable_messages(Msi, vectors)
    assert config.msi_enabled
    assert config.read16(control) >> 4 & 7 == field
    config.enable_messages(Msi, 0)
    assert not config.msi_enabled
    assert not config.msix_enabled
    config.enable_messages(MsiX, 8)
    assert config.msix_enabled


@pytest.mark.parametrize(
    ("declared", "size"),
    [
        (Msi(address64=False), 10),
        (Msi(), 14),
        (Msi(address64=False, per_vector_mask=True), 20),
        (Msi(per_vector_mask=True), 24),
        (MsiX(1, 0, 0, 0, 0x800), 12),
        (PowerManagement(), 8),
        (PciExpress(), 60),
        (VendorSpecific(b"abc"), 6),
    ],
)
def test_capability_sizes_are_those_of_the_specification(declared: Any, size: int) -> None:
    assert {len(part) for part in declared.layout()} == {size}


def test_declarations_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="MSI has 1, 2, 4"):
        Msi(vectors=3)
    with pytest.raises(ValueError, match="1 to 2048"):
        MsiX(2049, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="multiple of 8"):
        MsiX(1, 0, 4, 0, 8)
    with pytest.raises(ValueError, match="write mask"):
        VendorSpecific(b"abc", b"a")
    with pytest.raises(ValueError, match="does not fit"):
        make({}, VendorSpecific(bytes(150)), VendorSpecific(bytes(60)))


WRITES = st.lists(
    st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=8)),
    max_size=12,
)


@settings(deadline=None)
@given(WRITES)
def test_only_writable_bits_change(writes: list[tuple[int, bytes]]) -> None:
    """Whatever is written in whatever order: read-only bits stay, writable ones hold the last value."""
    config = everything()
    # what follows a write is found by looking: all ones, all zeros
    ones, zeros = everything(), everything()
    ones.write(0, b"\xff" * 4096)
    zeros.write(0, bytes(4096))
    follows = bytes(a ^ b for a, b in zip(ones.read(0, 4096), zeros.read(0, 4096), strict=True))
    power = capabilities(config)[0x01] + PowerManagement.CONTROL
    msi = capabilities(config)[0x05] + Msi.CONTROL
    model = bytearray(config.read(0, 4096))
    for offset, data in writes:
        config.write(offset, data)
        for position, byte in enumerate(data, offset):
            # four vectors: all ones in MSI's count become 2, which hides that its lowest bit follows too
            mask = follows[position] | (0x70 if position == msi else 0)
            # the function has four vectors
            value = byte & ~0x70 | min(byte >> 4 & 7, 2) << 4 if position == msi else byte
            if position == power and value & 3 not in (0, 3):
                mask &= ~3
            model[position] = model[position] & ~mask | value & mask
    assert config.read(0, 4096) == bytes(model)


@settings(deadline=None)
@given(WRITES)
def test_identity_survives_everything(writes: list[tuple[int, bytes]]) -> None:
    config = everything()
    fixed = [(0, 4), (8, 4), (0x0E, 1), (0x2C, 8), (0x3D, 1)]
    before = [config.read(*place) for place in fixed]
    for offset, data in writes:
        config.write(offset, data)
    assert [config.read(*place) for place in fixed] == before
    assert list(capabilities(config)) == [0x01, 0x05, 0x11, 0x10, 0x09]
    config.reset()
    assert config.read(0, 4096) == everything().read(0, 4096)


@settings(deadline=None)
@given(st.integers(0, 0xFFFF))
def test_status_bits_cannot_be_set_by_software(value: int) -> None:
    config = make({}, PowerManagement())
    config.write16(0x06, value)
    assert config.read16(0x06) == 1 << 4
    config.show_intx(True)
    config.write16(0x06, value)
    assert config.read16(0x06) == 1 << 4 | 1 << 3
