"""Decoding, against configuration spaces put together by hand from the specifications' layouts."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from config_space import Space, express_with, with_list
from hypothesis import given
from hypothesis import strategies as st

from vfiopy.pci import capabilities as standard
from vfiopy.pci import ext_capabilities as extended
from vfiopy.pci.aer import CorrectableError, UncorrectableError
from vfiopy.pci.capability_names import CAPABILITY_NAMES, EXTENDED_CAPABILITY_NAMES
from vfiopy.pci.config import Bar, Command, Status, decode, decode_header
from vfiopy.pci.express import PortType
from vfiopy.pci.fields import bits

# --- header ---


def test_header_of_an_endpoint() -> None:
    space = Space(256)
    space.put(0x00, "HHHHBBBBBBBB", 0x8086, 0x10C9, 0x0506, 0x0010, 1, 0x00, 0x00, 0x02, 16, 0, 0x80, 0)
    space.put(0x10, "IIIIII", 0xFE04_0000, 0xFE02_000C, 0x0000_0001, 0xC021, 0xFE00_0008, 0)
    space.put(0x2C, "HHI", 0x1AF4, 0x1100, 0xFEA0_0001)
    space.put(0x3C, "BB", 11, 1)
    header = decode_header(space.read)
    assert (header.vendor, header.device, header.revision) == (0x8086, 0x10C9, 1)
    assert header.class_code == 0x020000
    assert header.command == Command.MEMORY | Command.BUS_MASTER | Command.SERR | Command.INTX_DISABLE
    assert header.status == Status.CAPABILITIES
    assert header.cache_line == 64
    assert header.type == 0
    assert header.multifunction
    assert header.bars == (
        Bar(0, 0xFE04_0000, is_io=False, is_64bit=False, prefetchable=False),
        Bar(1, 0x1_FE02_0000, is_io=False, is_64bit=True, prefetchable=True),
        Bar(3, 0xC020, is_io=True, is_64bit=False, prefetchable=False),
        Bar(4, 0xFE00_0000, is_io=False, is_64bit=False, prefetchable=True),
    )
    assert (header.subsystem_vendor, header.subsystem_device) == (0x1AF4, 0x1100)
    assert (header.rom_address, header.rom_enabled) == (0xFEA0_0000, True)
    assert (header.interrupt_pin, header.interrupt_line) == (1, 11)
    assert header.bridge is None
    assert space.reads == [(0, 64)]


def test_header_of_a_bridge() -> None:
    space = Space(256).put(0x0E, "B", 0x01).put(0x18, "BBB", 0, 1, 3)
    space.put(0x1C, "BB", 0xC1, 0xD1).put(0x30, "HH", 0x1, 0x1)
    space.put(0x20, "HH", 0xFE80, 0xFE90).put(0x24, "HH", 0x0001, 0x3FF1).put(0x28, "II", 8, 9)
    space.put(0x38, "I", 0xFE00_0801).put(0x3E, "H", 0x0003)
    header = decode_header(space.read)
    assert header.type == 1
    assert (header.subsystem_vendor, header.subsystem_device) == (0, 0)
    assert (header.rom_address, header.rom_enabled) == (0xFE00_0800, True)
    bridge = header.bridge
    assert bridge is not None
    assert (bridge.primary_bus, bridge.secondary_bus, bridge.subordinate_bus) == (0, 1, 3)
    assert bridge.io == (0x1C000, 0x1DFFF)
    assert bridge.memory == (0xFE80_0000, 0xFE9F_FFFF)
    assert bridge.prefetchable == (0x8_0000_0000, 0x9_3FFF_FFFF)
    assert bridge.control == 3


def test_bridge_without_windows() -> None:
    # base above limit: forwards nothing (7.5.1.3.6)
    space = Space(256).put(0x0E, "B", 0x01).put(0x1C, "BB", 0xF1, 0x01)
    space.put(0x20, "HH", 0xFFF0, 0).put(0x24, "HH", 0xFFF1, 1)
    bridge = decode_header(space.read).bridge
    assert bridge is not None
    assert (bridge.io, bridge.memory, bridge.prefetchable) == (None, None, None)


# --- standard capabilities ---


def test_power_management() -> None:
    space = with_list((0x40, 0x01)).put(0x42, "HH", 0xC9C3 | 1 << 9, 0x810B)
    (power,) = standard.walk_capabilities(space.read)
    assert isinstance(power, standard.PowerManagement)
    assert (power.version, power.d1, power.d2) == (3, True, False)
    assert power.pme_states == (0, 3, 4)
    assert (power.state, power.no_soft_reset, power.pme_enable, power.pme_status) == (3, True, True, True)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("maskable", [False, True])
def test_msi(wide: bool, maskable: bool) -> None:
    control = 1 | 5 << 1 | 2 << 4 | wide << 7 | maskable << 8
    space = with_list((0x50, 0x05)).put(0x52, "HI", control, 0xFEE0_1004)
    if wide:
        space.put(0x58, "IH", 0x12, 0x4041)
    else:
        space.put(0x58, "H", 0x4041)
    space.put(0x60 if wide else 0x5C, "II", 0xAAAA, 0x5)
    (msi,) = standard.walk_capabilities(space.read)
    assert isinstance(msi, standard.Msi)
    assert (msi.enabled, msi.vectors, msi.vectors_enabled) == (True, 32, 4)
    assert (msi.is_64bit, msi.maskable, msi.extended_data) == (wide, maskable, False)
    assert msi.address == (0x12_FEE0_1004 if wide else 0xFEE0_1004)
    assert msi.data == 0x4041
    assert (msi.mask, msi.pending) == ((0xAAAA, 5) if maskable else (None, None))


def test_msix() -> None:
    space = with_list((0x70, 0x11)).put(0x72, "HII", 0xC009, 0x0000_2003, 0x0000_3004)
    (msix,) = standard.walk_capabilities(space.read)
    assert isinstance(msix, standard.MsiX)
    assert (msix.enabled, msix.masked, msix.table_size) == (True, True, 10)
    assert (msix.table_bar, msix.table_offset, msix.pba_bar, msix.pba_offset) == (3, 0x2000, 4, 0x3000)


def test_small_ones() -> None:
    space = with_list((0x40, 0x03), (0x48, 0x09), (0x60, 0x0D), (0x68, 0x13), (0x80, 0x42), (0x90, 0x14))
    space.put(0x4A, "B", 6).put(0x4B, "3s", b"abc").put(0x64, "HH", 0x8086, 0x3420)
    space.put(0x6A, "BBBB", 6, 3, 0, 1)
    vpd, vendor, subsystem, advanced, unknown, allocation = standard.walk_capabilities(space.read)
    assert isinstance(vpd, standard.VitalProductData)
    assert isinstance(vendor, standard.VendorSpecific)
    assert (vendor.length, vendor.data) == (6, b"\x09\x60\x06abc")
    assert isinstance(subsystem, standard.SubsystemId)
    assert (subsystem.vendor, subsystem.device) == (0x8086, 0x3420)
    assert isinstance(advanced, standard.AdvancedFeatures)
    assert (advanced.flr, advanced.transactions_pending_support, advanced.transactions_pending) == (
        True,
        True,
        True,
    )
    assert (type(unknown), unknown.id, unknown.offset) == (standard.Capability, 0x42, 0x80)
    assert unknown.name == "unknown (0x42)"
    assert allocation.name == "Enhanced Allocation"


def test_express() -> None:
    space = with_list((0xA0, 0x10))
    space.put(0xA2, "H", 0x0002 | 3 << 9)
    space.put(0xA4, "IHH", 1 << 28 | 1 << 15 | 2, 0x2810 | 1 << 5 | 1 << 8, 0x0029)
    space.put(0xAC, "IHH", 0x0007_9000 | 3 << 10 | 8 << 4 | 4, 0x0042, 0x1043)
    space.put(0xC4, "IH", 0x0000_0BB0, 0x0450).put(0xCC, "IHH", 0x1E, 4, 1)
    (express,) = standard.walk_capabilities(space.read)
    assert isinstance(express, standard.PciExpress)
    assert express.version == 2
    assert express.port_type is PortType.ENDPOINT
    assert (express.slot_implemented, express.interrupt_message) == (False, 3)
    assert express.flr
    assert (express.max_payload_supported, express.max_payload, express.max_read_request) == (512, 256, 512)
    assert express.relaxed_ordering
    assert express.no_snoop
    assert express.extended_tags
    assert express.transactions_pending
    assert express.error_status == ("correctable", "unsupported request")
    assert express.has_link
    assert (express.max_link_speed, express.max_link_width) == (16.0, 8)
    assert (express.link_speed, express.link_width) == (8.0, 4)
    assert express.aspm_supported == ("L0s", "L1")
    assert express.aspm_enabled == ("L1",)
    assert express.atomic_completer == (4, 8, 16)
    assert not express.atomic_routing
    assert express.ari_forwarding
    assert express.ltr_supported
    assert express.atomic_requester
    assert express.completion_timeout_disabled
    assert (express.link_capabilities2, express.link_control2, express.link_status2) == (0x1E, 4, 1)


def test_first_version_of_express_has_no_second_set() -> None:
    space = with_list((0xA0, 0x10)).put(0xA2, "H", 0x0091).put(0xC4, "I", 0xFFFF_FFFF)
    (express,) = standard.walk_capabilities(space.read)
    assert isinstance(express, standard.PciExpress)
    assert express.port_type is PortType.INTEGRATED_ENDPOINT
    assert not express.has_link
    assert express.device_capabilities2 == 0
    assert express.atomic_completer == ()


def test_reserved_port_type_is_kept_as_number() -> None:
    space = with_list((0xA0, 0x10)).put(0xA2, "H", 0x00F2)
    (express,) = standard.walk_capabilities(space.read)
    assert isinstance(express, standard.PciExpress)
    assert express.port_type == 15


# --- the lists ---


def test_list_that_loops_ends() -> None:
    space = with_list((0x40, 0x01), (0x50, 0x05)).put(0x51, "B", 0x40)
    assert [one.id for one in standard.walk_capabilities(space.read)] == [1, 5]


def test_list_into_the_header_ends() -> None:
    space = with_list((0x40, 0x01)).put(0x41, "B", 0x10)
    assert [one.id for one in standard.walk_capabilities(space.read)] == [1]


def test_low_bits_of_a_pointer_do_not_count() -> None:
    space = with_list((0x40, 0x01)).put(0x34, "B", 0x43)
    assert [one.offset for one in standard.walk_capabilities(space.read)] == [0x40]


def test_status_bit_says_whether_there_is_a_list() -> None:
    space = with_list((0x40, 0x01)).put(0x06, "H", 0)
    assert standard.walk_capabilities(space.read) == []


def test_cardbus_bridge_keeps_its_pointer_elsewhere() -> None:
    space = with_list((0x40, 0x01)).put(0x0E, "B", 2).put(0x34, "B", 0).put(0x14, "B", 0x40)
    assert [one.id for one in standard.walk_capabilities(space.read)] == [1]


def test_a_function_that_is_gone_has_nothing() -> None:
    def gone(_offset: int, size: int) -> bytes:
        return b"\xff" * size

    assert standard.walk_capabilities(gone) == []
    assert extended.walk_extended(gone) == []
    assert decode(gone).header.vendor == 0xFFFF


def test_conventional_function_is_not_read_above_256_bytes() -> None:
    space = with_list((0x40, 0x01), (0x50, 0x05), size=256)
    assert extended.walk_extended(space.read) == []
    assert max(offset + size for offset, size in space.reads) <= 256


def test_capability_at_the_very_end_is_not_read_past_it() -> None:
    space = with_list((0xF8, 0x05), size=256).put(0xFA, "H", 0x0180)
    (msi,) = standard.walk_capabilities(space.read)
    assert isinstance(msi, standard.Msi)
    assert msi.mask == 0
    assert max(offset + size for offset, size in space.reads) <= 256


def test_extended_list_that_loops_ends() -> None:
    space = express_with((0x100, 0x03, 1), (0x140, 0x0E, 1))
    space.put(0x140, "I", 0x0E | 1 << 16 | 0x100 << 20)
    assert [one.id for one in extended.walk_extended(space.read)] == [3, 0x0E]


def test_null_capability_only_points_on() -> None:
    space = express_with((0x100, 0x00, 1), (0x140, 0x0E, 1))
    assert [one.offset for one in extended.walk_extended(space.read)] == [0x140]


@pytest.mark.parametrize("first", [0, 0xFFFF_FFFF])
def test_no_extended_capability(first: int) -> None:
    space = with_list((0x60, 0x10)).put(0x100, "I", first)
    assert extended.walk_extended(space.read) == []


@given(st.integers(0, 2**32))
def test_any_bytes_decode(seed: int) -> None:
    space = Space()
    space.data[:] = Random(seed).randbytes(4096)
    space.data[0x06] |= 0x10
    decoded = decode(space.read)
    assert len(decoded.capabilities) <= 48
    assert len(decoded.extended) <= 960
    assert all(offset + size <= 4096 for offset, size in space.reads)


@given(st.lists(st.integers(0x40, 0xFC), max_size=30), st.binary(min_size=192, max_size=192))
def test_any_pointers_end(pointers: list[int], noise: bytes) -> None:
    space = Space().put(0x06, "H", 0x10).put(0x34, "B", pointers[0] if pointers else 0)
    space.data[0x40:0x100] = noise
    for here, following in pairwise(pointers):
        space.put(here & 0xFC, "BB", 0x10, following)
    offsets = [one.offset for one in decode(space.read).capabilities]
    assert len(offsets) == len(set(offsets))


# --- extended capabilities ---


def test_error_reporting() -> None:
    space = express_with((0x100, 0x01, 2))
    space.put(0x104, "IIIIII", 1 << 20 | 1 << 14, 1 << 22, 1 << 18, 1 << 13, 1 << 15, 20 | 1 << 6)
    space.put(0x11C, "16s", bytes(range(16)))
    (aer,) = extended.walk_extended(space.read)
    assert isinstance(aer, extended.AdvancedErrorReporting)
    assert aer.version == 2
    assert aer.uncorrectable == UncorrectableError.UNSUPPORTED_REQUEST | UncorrectableError.COMPLETION_TIMEOUT
    assert aer.uncorrectable_mask == UncorrectableError.INTERNAL
    assert aer.fatal == UncorrectableError.MALFORMED_TLP
    assert aer.correctable == CorrectableError.ADVISORY_NON_FATAL
    assert aer.correctable_mask == CorrectableError.HEADER_LOG_OVERFLOW
    assert (aer.first_error, aer.ecrc_generation, aer.ecrc_check) == (20, True, False)
    assert aer.header_log == bytes(range(16))


def test_sriov() -> None:
    space = express_with((0x160, 0x10, 1))
    space.put(0x100, "I", 0x0E | 1 << 16 | 0x160 << 20)
    space.put(0x168, "H", 0x0019).put(0x16C, "HHH", 8, 8, 2).put(0x174, "HH", 0x180, 2)
    space.put(0x17A, "HII", 0x10CA, 0x553, 1).put(0x184, "6I", 0xC, 1, 0, 0xC, 0, 0)
    _, sriov = extended.walk_extended(space.read)
    assert isinstance(sriov, extended.SrIov)
    assert (sriov.enabled, sriov.memory_enabled, sriov.ari) == (True, True, True)
    assert (sriov.initial_vfs, sriov.total_vfs, sriov.num_vfs) == (8, 8, 2)
    assert (sriov.first_offset, sriov.stride, sriov.vf_device) == (0x180, 2, 0x10CA)
    assert (sriov.page_sizes, sriov.page_size) == (0x553, 4096)
    assert sriov.bars == (0xC, 1, 0, 0xC, 0, 0)


def test_isolation_and_translation() -> None:
    space = express_with((0x100, 0x0D, 1), (0x110, 0x0E, 1), (0x120, 0x0F, 1), (0x130, 0x13, 1), (0x140, 0x1B, 1))
    space.put(0x104, "HH", 0x005F, 0x001D).put(0x114, "HH", 0x0103, 0x0020)
    space.put(0x124, "HH", 0x0020, 0x8001).put(0x134, "HHII", 0x0001, 0x8103, 256, 64)
    space.put(0x144, "HH", 0x1406, 0x0001)
    acs, ari, ats, pri, pasid = extended.walk_extended(space.read)
    assert isinstance(acs, extended.AccessControl)
    assert len(acs.supported) == 6
    assert "egress control" not in acs.supported
    assert acs.isolates
    assert isinstance(ari, extended.AlternativeRoutingId)
    assert (ari.next_function, ari.function_group) == (1, 2)
    assert isinstance(ats, extended.AddressTranslation)
    assert (ats.queue_depth, ats.page_aligned, ats.enabled, ats.smallest_unit) == (32, True, True, 8192)
    assert isinstance(pri, extended.PageRequest)
    assert (pri.enabled, pri.stopped, pri.failed, pri.unexpected_group) == (True, True, True, True)
    assert (pri.pasid_required, pri.capacity, pri.allocated) == (True, 256, 64)
    assert isinstance(pasid, extended.ProcessAddressSpace)
    assert (pasid.width, pasid.execute, pasid.privileged, pasid.enabled) == (20, True, True, True)
    space.put(0x106, "H", 0x0015)
    first = extended.walk_extended(space.read)[0]
    assert isinstance(first, extended.AccessControl)
    assert not first.isolates


def test_identity_and_latency() -> None:
    space = express_with((0x100, 0x03, 1), (0x110, 0x0B, 1), (0x120, 0x23, 1), (0x130, 0x18, 1), (0x140, 0x1E, 1))
    space.put(0x104, "II", 0xFFA0_0001, 0x0011_2233).put(0x114, "I", 0x0123 | 2 << 16 | 0x40 << 20)
    space.put(0x124, "IH", 0x1E98 | 1 << 16 | 0x38 << 20, 8)
    space.put(0x134, "HH", 0x1003, 0x0864).put(0x144, "II", 0x1F, 0x5)
    serial, vsec, dvsec, ltr, l1ss = extended.walk_extended(space.read)
    assert isinstance(serial, extended.SerialNumber)
    assert str(serial) == "00-11-22-33-ff-a0-00-01"
    assert isinstance(vsec, extended.VendorSpecificExtended)
    assert (vsec.vsec_id, vsec.revision, vsec.length) == (0x123, 2, 0x40)
    assert isinstance(dvsec, extended.DesignatedVendorSpecific)
    assert (dvsec.vendor, dvsec.dvsec_id, dvsec.revision, dvsec.length) == (0x1E98, 8, 1, 0x38)
    assert isinstance(ltr, extended.LatencyTolerance)
    assert (ltr.max_snoop_ns, ltr.max_no_snoop_ns) == (3 * 32**4, 100 * 1024)
    assert isinstance(l1ss, extended.L1Substates)
    assert l1ss.supported == ("PCI-PM L1.2", "PCI-PM L1.1", "ASPM L1.2", "ASPM L1.1")
    assert l1ss.enabled == ("PCI-PM L1.2", "ASPM L1.2")


def test_resizable_bars() -> None:
    space = express_with((0x100, 0x15, 1), (0x200, 0x9999, 3))
    space.put(0x104, "IIII", 0x0001_F000, 0 | 2 << 5 | 8 << 8, 0x10, 2 | 28 << 8 | 3 << 16)
    bars, unknown = extended.walk_extended(space.read)
    assert isinstance(bars, extended.ResizableBars)
    first, second = bars.bars
    assert (first.bar, first.size) == (0, 256 << 20)
    assert first.sizes == tuple((256 << 20) << power for power in range(5))
    assert (second.bar, second.size) == (2, 1 << 48)
    assert second.sizes == (1 << 20, 1 << 48, 1 << 49)
    assert (unknown.name, unknown.version) == ("unknown (0x9999)", 3)


def test_find_in_decoded() -> None:
    space = express_with((0x100, 0x0E, 1))
    decoded = decode(space.read)
    assert decoded.find(standard.PciExpress) is decoded.capabilities[0]
    assert decoded.find(extended.AlternativeRoutingId) is decoded.extended[0]
    assert decoded.find(standard.MsiX) is None


def test_bits() -> None:
    assert bits(0b1011_0100, 5, 2) == 0b1101
    assert bits(0xFFFF_FFFF, 31, 20) == 0xFFF


# --- a second reader: the system's own list of numbers ---

HEADER = Path("/usr/include/linux/pci_regs.h")


@pytest.mark.skipif(not HEADER.exists(), reason="linux/pci_regs.h is not installed")
def test_ids_are_those_of_linux() -> None:
    text = HEADER.read_text()
    short = {int(number, 16): name for name, number in re.findall(r"define\s+PCI_CAP_ID_(\w+)\s+(0x\w+)", text)}
    short = {number: name for number, name in short.items() if name not in ("LIST_ID", "MASK")}
    long = {int(number, 16): name for name, number in re.findall(r"define\s+PCI_EXT_CAP_ID_(\w+)\s+(0x\w+)", text)}
    assert len(short) >= 20
    assert len(long) >= 30
    assert set(short) - {0xFF} <= set(CAPABILITY_NAMES)
    assert set(long) - {0x14} <= set(EXTENDED_CAPABILITY_NAMES)
    for number, name in {
        0x10: "EXP",
        0x11: "MSIX",
        0x05: "MSI",
        0x01: "PM",
        0x09: "VNDR",
        0x13: "AF",
        0x0D: "SSVID",
    }.items():
        assert short[number] == name
    for number, name in {
        0x01: "ERR",
        0x0D: "ACS",
        0x0F: "ATS",
        0x10: "SRIOV",
        0x13: "PRI",
        0x15: "REBAR",
        0x18: "LTR",
        0x1B: "PASID",
        0x1E: "L1SS",
        0x23: "DVSEC",
    }.items():
        assert long[number] == name


@pytest.mark.skipif(not HEADER.exists(), reason="linux/pci_regs.h is not installed")
def test_error_bits_are_those_of_linux() -> None:
    text = HEADER.read_text()
    for prefix, flags in (("UNC", UncorrectableError), ("COR", CorrectableError)):
        values = {int(value, 16) for value in re.findall(rf"PCI_ERR_{prefix}_\w+\s+(0x\w{{8}})", text)}
        assert values - {1} <= {int(flag) for flag in flags}
