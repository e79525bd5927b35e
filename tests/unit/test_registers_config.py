"""Names of configuration space: against the decoders, which know nothing of them, and linux/pci_regs.h."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest
from config_space import Space, express_with

from vfiopy.backend import DeviceIo, RegionFlag, RegionInfo
from vfiopy.device import ConfigSpace
from vfiopy.errors import RegisterNameError
from vfiopy.pci.aer import AdvancedErrorReporting
from vfiopy.pci.capabilities import Msi, MsiX, PciExpress, PowerManagement
from vfiopy.pci.config import decode
from vfiopy.registers import config_register, config_registers
from vfiopy.registers.config_space import config_offset, hazard
from vfiopy.registers.config_tables import BRIDGE, CAPABILITIES, EXTENDED, FUNCTION

HEADER = Path("/usr/include/linux/pci_regs.h")


class _Io:
    """As much of a device as its configuration space needs."""

    name = "made up"

    def __init__(self, space: Space) -> None:
        self._space = space

    def region_info(self, index: int) -> RegionInfo:
        return RegionInfo(index, len(self._space.data), RegionFlag.READ | RegionFlag.WRITE)

    def read(self, index: int, offset: int, size: int) -> bytes:
        return self._space.read(offset, size)

    def write(self, index: int, offset: int, data: bytes) -> None:
        self._space.data[offset : offset + len(data)] = data


def config_of(space: Space) -> ConfigSpace:
    return ConfigSpace(cast("DeviceIo", _Io(space)))


def made_up(seed: int) -> Space:
    """A function with a capability of each kind and random bits in them."""
    space = express_with((0x100, 0x01, 1), (0x180, 0x0D, 1), (0x190, 0x0E, 1), (0x1A0, 0x10, 1))
    random = Random(seed)
    lists = ((0x60, 0x80, 0x10, 0x3C), (0x80, 0xA0, 0x01, 0x08), (0xA0, 0xC0, 0x05, 0x18), (0xC0, 0, 0x11, 0x0C))
    for offset, following, number, size in lists:
        space.data[offset : offset + size] = random.randbytes(size)
        space.put(offset, "BB", number, following)
    space.data[0x62] = space.data[0x62] & 0xF0 | 2  # version 2
    space.data[0x04:0x08] = random.randbytes(2) + bytes([space.data[0x06], random.randrange(256)])
    for offset in (0x100, 0x180, 0x190, 0x1A0):
        space.data[offset + 4 : offset + 0x10] = random.randbytes(12)
    return space


@pytest.mark.parametrize("seed", range(20))
def test_fields_are_where_the_decoders_find_them(seed: int) -> None:
    space = made_up(seed)
    decoded = decode(space.read)
    regs: Any = config_registers(config_of(space))
    power, msi = decoded.find(PowerManagement), decoded.find(Msi)
    msix, express = decoded.find(MsiX), decoded.find(PciExpress)
    aer = decoded.find(AdvancedErrorReporting)
    assert None not in (power, msi, msix, express, aer)

    control = regs.pm.control.decode(regs.pm.control.read())
    assert (power.state, power.no_soft_reset, power.pme_enable, power.pme_status) == (
        control["power_state"],
        control["no_soft_reset"],
        control["pme_enable"],
        control["pme_status"],
    )
    capable = regs.pm.capabilities.decode(regs.pm.capabilities.read())
    assert (power.version, power.d1, power.d2) == (capable["version"], capable["d1"], capable["d2"])
    assert power.pme_states == tuple(
        state for state, name in enumerate(("d0", "d1", "d2", "d3hot", "d3cold")) if capable[f"pme_{name}"]
    )

    control = regs.msi.control.decode(regs.msi.control.read())
    assert (msi.enabled, msi.is_64bit, msi.maskable) == (
        control["enable"],
        control["address_64bit"],
        control["maskable"],
    )
    address = regs.msi.address.read() | (regs.msi.address_high.read() << 32 if msi.is_64bit else 0)
    assert (msi.address, msi.data) == (address, regs.msi.data.read())
    if msi.maskable:
        assert (msi.mask, msi.pending) == (regs.msi.mask.read(), regs.msi.pending.read())

    control = regs.msix.control.decode(regs.msix.control.read())
    assert (msix.enabled, msix.masked) == (control["enable"], control["function_mask"])
    assert msix.table_size == control["table_size_minus_1"] + 1
    assert (msix.table_bar, msix.table_offset) == (
        regs.msix.table.bar.read(),
        regs.msix.table.offset_by_8.read() * 8,
    )
    assert (msix.pba_bar, msix.pba_offset) == (regs.msix.pba.bar.read(), regs.msix.pba.offset_by_8.read() * 8)

    for name in ("device_capabilities", "device_control", "device_status", "link_capabilities", "link_control"):
        assert getattr(regs.express, name).read() == getattr(express, name), name
    for name in ("link_status", "device_capabilities2", "device_control2", "link_capabilities2", "link_control2"):
        assert getattr(regs.express, name).read() == getattr(express, name), name
    link = regs.express.link_status
    assert (express.link_width, express.max_link_width) == (
        link.width.read(),
        regs.express.link_capabilities.max_width.read(),
    )
    if express.link_speed is not None:
        assert link.speed.spec.words(link.speed.read()) == f"{express.link_speed:g} GT/s"
    assert express.transactions_pending == regs.express.device_status.transactions_pending.read()
    settings = regs.express.device_control
    assert (express.extended_tags, express.relaxed_ordering, express.no_snoop) == (
        settings.extended_tags.read(),
        settings.relaxed_ordering.read(),
        settings.no_snoop.read(),
    )
    for value, field in (
        (express.max_payload, settings.max_payload),
        (express.max_read_request, settings.max_read_request),
    ):
        assert field.spec.words(field.read()) in ("", f"{value} bytes")

    for register, flags in (
        (regs.aer.uncorrectable_status, aer.uncorrectable),
        (regs.aer.correctable_mask, aer.correctable_mask),
    ):
        on = {name for name, value in register.decode(register.read()).items() if value}
        assert on == {flag.name.lower() for flag in flags if flag.name}
    assert regs.aer.control.first_error.read() == aer.first_error

    header = decoded.header
    assert header.command & 0x7FF & ~0x80 == regs.command.read() & 0x77F & 0x7FF
    command = regs.command.decode(regs.command.read())
    assert {name for name, on in command.items() if on} == {flag.name.lower() for flag in header.command if flag.name}
    status = regs.status.decode(regs.status.read())
    del status["devsel"]
    assert {name for name, on in status.items() if on} == {flag.name.lower() for flag in header.status if flag.name}


def names_of_the_kernel() -> dict[str, int]:
    found = {}
    for name, text in re.findall(r"^#define\s+(PCI_\w+)\s+(0x[0-9a-fA-F]+|\d+)\b", HEADER.read_text(), re.MULTILINE):
        found[name] = int(text, 0)
    return found


AT = {
    "header": {
        "vendor": "VENDOR_ID", "device": "DEVICE_ID", "command": "COMMAND", "status": "STATUS",
        "revision": "CLASS_REVISION", "programming_interface": "CLASS_PROG", "cache_line": "CACHE_LINE_SIZE",
        "latency": "LATENCY_TIMER", "header_type": "HEADER_TYPE", "bist": "BIST", "bar0": "BASE_ADDRESS_0",
        "bar5": "BASE_ADDRESS_5", "cardbus_cis": "CARDBUS_CIS", "subsystem_vendor": "SUBSYSTEM_VENDOR_ID",
        "subsystem_device": "SUBSYSTEM_ID", "rom": "ROM_ADDRESS", "capabilities_pointer": "CAPABILITY_LIST",
        "interrupt_line": "INTERRUPT_LINE", "interrupt_pin": "INTERRUPT_PIN", "min_grant": "MIN_GNT",
        "max_latency": "MAX_LAT",
    },
    "bridge": {
        "primary_bus": "PRIMARY_BUS", "secondary_bus": "SECONDARY_BUS", "subordinate_bus": "SUBORDINATE_BUS",
        "secondary_latency": "SEC_LATENCY_TIMER", "io_base": "IO_BASE", "io_limit": "IO_LIMIT",
        "secondary_status": "SEC_STATUS", "memory_base": "MEMORY_BASE", "memory_limit": "MEMORY_LIMIT",
        "prefetchable_base": "PREF_MEMORY_BASE", "prefetchable_limit": "PREF_MEMORY_LIMIT",
        "prefetchable_base_upper": "PREF_BASE_UPPER32", "prefetchable_limit_upper": "PREF_LIMIT_UPPER32",
        "io_base_upper": "IO_BASE_UPPER16", "io_limit_upper": "IO_LIMIT_UPPER16", "rom": "ROM_ADDRESS1",
        "bridge_control": "BRIDGE_CONTROL",
    },
    "pm": {"capabilities": "PM_PMC", "control": "PM_CTRL"},
    "vpd": {"address": "VPD_ADDR", "data": "VPD_DATA"},
    "msi": {"control": "MSI_FLAGS", "address": "MSI_ADDRESS_LO"},
    "msix": {"control": "MSIX_FLAGS", "table": "MSIX_TABLE", "pba": "MSIX_PBA"},
    "af": {"length": "AF_LENGTH", "capabilities": "AF_CAP", "control": "AF_CTRL", "status": "AF_STATUS"},
    "subsystem": {"vendor": "SSVID_VENDOR_ID", "device": "SSVID_DEVICE_ID"},
    "express": {
        "capabilities": "EXP_FLAGS", "device_capabilities": "EXP_DEVCAP", "device_control": "EXP_DEVCTL",
        "device_status": "EXP_DEVSTA", "link_capabilities": "EXP_LNKCAP", "link_control": "EXP_LNKCTL",
        "link_status": "EXP_LNKSTA", "device_capabilities2": "EXP_DEVCAP2", "device_control2": "EXP_DEVCTL2",
        "link_capabilities2": "EXP_LNKCAP2", "link_control2": "EXP_LNKCTL2", "link_status2": "EXP_LNKSTA2",
    },
    "aer": {
        "uncorrectable_status": "ERR_UNCOR_STATUS", "uncorrectable_mask": "ERR_UNCOR_MASK",
        "uncorrectable_severity": "ERR_UNCOR_SEVER", "correctable_status": "ERR_COR_STATUS",
        "correctable_mask": "ERR_COR_MASK", "control": "ERR_CAP", "header_log0": "ERR_HEADER_LOG",
    },
    "acs": {"capabilities": "ACS_CAP", "control": "ACS_CTRL"},
    "ari": {"capabilities": "ARI_CAP", "control": "ARI_CTRL"},
    "ats": {"capabilities": "ATS_CAP", "control": "ATS_CTRL"},
    "sriov": {
        "capabilities": "SRIOV_CAP", "control": "SRIOV_CTRL", "status": "SRIOV_STATUS",
        "initial_vfs": "SRIOV_INITIAL_VF",
        "total_vfs": "SRIOV_TOTAL_VF", "num_vfs": "SRIOV_NUM_VF", "dependency": "SRIOV_FUNC_LINK",
        "first_vf_offset": "SRIOV_VF_OFFSET", "vf_stride": "SRIOV_VF_STRIDE", "vf_device": "SRIOV_VF_DID",
        "supported_pages": "SRIOV_SUP_PGSIZE", "system_page": "SRIOV_SYS_PGSIZE", "vf_bar0": "SRIOV_BAR",
    },
    "pri": {"control": "PRI_CTRL", "status": "PRI_STATUS", "capacity": "PRI_MAX_REQ", "allocation": "PRI_ALLOC_REQ"},
    "rebar": {"capability": "REBAR_CAP", "control": "REBAR_CTRL"},
    "ltr": {"max_snoop": "LTR_MAX_SNOOP_LAT", "max_no_snoop": "LTR_MAX_NOSNOOP_LAT"},
    "pasid": {"capabilities": "PASID_CAP", "control": "PASID_CTRL"},
    "l1_substates": {"capabilities": "L1SS_CAP", "control1": "L1SS_CTL1", "control2": "L1SS_CTL2"},
    "ptm": {"capabilities": "PTM_CAP", "control": "PTM_CTRL"},
    "dvsec": {"header1": "DVSEC_HEADER1", "header2": "DVSEC_HEADER2"},
}  # fmt: skip


@pytest.mark.skipif(not HEADER.exists(), reason="the kernel's headers are not installed")
def test_offsets_are_those_of_the_kernel() -> None:
    kernel = names_of_the_kernel()
    tables = {"header": FUNCTION, "bridge": BRIDGE, **dict(CAPABILITIES.values()), **dict(EXTENDED.values())}
    wrong = [
        (group, name, offset, kernel[f"PCI_{names[name]}"])
        for group, names in AT.items()
        for name, offset, _, _ in tables[group]
        if name in names and offset != kernel[f"PCI_{names[name]}"]
    ]
    assert wrong == []
    missing = [
        (group, name) for group, names in AT.items() for name in names if name not in {r[0] for r in tables[group]}
    ]
    assert missing == []


def test_a_name_reads_its_register_and_no_more() -> None:
    space = made_up(1)
    config = config_of(space)
    space.reads.clear()
    register = config_register(config, "Command")
    assert space.reads == []
    register.read()
    assert space.reads == [(4, 2)]


def test_second_ones_and_unknown_ones() -> None:
    space = express_with((0x100, 0x23, 1), (0x140, 0x23, 1), (0x180, 0x7777, 1))
    regs: Any = config_registers(config_of(space))
    assert (regs.dvsec.header1.offset, regs.dvsec2.header1.offset) == (0x104, 0x144)
    assert regs["ecap7777"].offset == 0x180
    config = config_of(space)
    assert config_offset(config, "ecap7777+0x10") == 0x190
    assert config_offset(config, "PCIe+0x10") == 0x70
    assert config_offset(config, "command") is None
    with pytest.raises(RegisterNameError, match="it has express, dvsec"):
        config_offset(config, "msix+2")


def test_a_bridge_has_its_own_names() -> None:
    space = express_with().put(0x0E, "B", 1).put(0x18, "BBB", 1, 2, 3)
    assert config_register(config_of(space), "secondary_bus").read() == 2
    with pytest.raises(RegisterNameError):
        config_register(config_of(space), "subsystem_vendor")
    assert "behind it" in str(hazard(config_of(space), 0x19, 1))


@pytest.mark.parametrize(
    ("offset", "size", "harm"),
    [
        (0x04, 2, True),
        (0x03, 1, False),
        (0x06, 2, False),
        (0x10, 4, True),
        (0x3C, 1, False),
        (0x84, 2, True),  # power state
        (0x68, 2, True),  # device control
        (0x6A, 2, True),
        (0xC2, 2, True),  # MSI-X
        (0x104, 4, False),  # AER status
        (0x186, 2, True),  # ACS
        (0x1A8, 2, True),  # SR-IOV
    ],
)
def test_what_may_do_harm(offset: int, size: int, harm: bool) -> None:
    assert (hazard(config_of(made_up(2)), offset, size) is not None) == harm
