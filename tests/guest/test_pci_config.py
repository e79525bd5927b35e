"""Decoded configuration space of the lab's devices, against what the kernel says and what QEMU's models have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from modes import E1000E, EDU, IGB, IVSHMEM, NVME

from vfiopy.pci import Function, find, function
from vfiopy.pci.capabilities import (
    Msi,
    MsiX,
    PciExpress,
    PowerManagement,
    SubsystemId,
    VendorSpecific,
)
from vfiopy.pci.config import Command
from vfiopy.pci.express import PortType
from vfiopy.pci.ext_capabilities import (
    AccessControl,
    AdvancedErrorReporting,
    AlternativeRoutingId,
    SerialNumber,
    SrIov,
)

pytestmark = pytest.mark.machine("intel", "noiommu", "old")

Bdf = Callable[..., str]


def attribute(one: Function, name: str) -> str | None:
    path = one.sysfs / name
    return path.read_text().strip() if path.exists() else None


def test_header_agrees_with_sysfs() -> None:
    for one in find():
        header = one.config().header
        assert (header.vendor, header.device) == (one.vendor, one.device)
        assert (header.class_code, header.revision) == (one.class_code, one.revision)
        assert header.type == one.header_type
        if header.type == 0:
            subsystem = (one.subsystem_vendor, one.subsystem_device)
            assert (header.subsystem_vendor, header.subsystem_device) == subsystem
        assert [(bar.index, bar.address, bar.is_io, bar.is_64bit) for bar in header.bars] == [
            (bar.index, bar.start, bar.is_io, bar.is_64bit) for bar in one.resources if bar.index < 6
        ]


def test_bus_numbers_of_bridges() -> None:
    bridges = [one for one in find() if one.header_type == 1]
    assert len(bridges) == 2
    for one in bridges:
        bridge = one.config().header.bridge
        assert bridge is not None
        assert bridge.secondary_bus == int(attribute(one, "secondary_bus_number") or "", 0)
        assert bridge.subordinate_bus == int(attribute(one, "subordinate_bus_number") or "", 0)
        children = [other for other in find() if other.address.bus == bridge.secondary_bus]
        assert {other.sysfs.resolve().parent for other in children} == {one.sysfs.resolve()}
        for other in children:
            for bar in other.resources:
                if bar.is_memory and bar.start and bar.index < 6:
                    windows = [window for window in (bridge.memory, bridge.prefetchable) if window]
                    assert any(first <= bar.start <= last for first, last in windows)


def test_link_agrees_with_sysfs() -> None:
    checked = 0
    for one in find():
        express = one.config().find(PciExpress)
        if express is None or attribute(one, "current_link_speed") is None:
            continue
        checked += 1
        if not express.has_link:
            assert attribute(one, "current_link_speed") == "Unknown"
            continue
        assert attribute(one, "current_link_speed") == f"{express.link_speed:.1f} GT/s PCIe"
        assert attribute(one, "max_link_speed") == f"{express.max_link_speed:.1f} GT/s PCIe"
        assert attribute(one, "current_link_width") == str(express.link_width)
        assert attribute(one, "max_link_width") == str(express.max_link_width)
    assert checked >= 3


def test_flr_is_what_the_kernel_resets_by() -> None:
    for one in find():
        express = one.config().find(PciExpress)
        if one.header_type == 0:
            assert ("flr" in one.reset_methods) == (express is not None and express.flr)


def test_interrupts_in_use_agree_with_sysfs() -> None:
    for one in find():
        kinds = {path.read_text().strip() for path in one.sysfs.glob("msi_irqs/*")}
        decoded = one.config()
        msi, msix = decoded.find(Msi), decoded.find(MsiX)
        assert ("msi" in kinds) == bool(msi and msi.enabled)
        assert ("msix" in kinds) == bool(msix and msix.enabled)
        if msix:
            assert len(list(one.sysfs.glob("msi_irqs/*"))) <= msix.table_size


def test_edu_is_a_conventional_function(bdfs: Callable[[str], list[str]]) -> None:
    for where in bdfs(EDU):
        decoded = function(where).config()
        msi = decoded.find(Msi)
        assert msi is not None
        assert (msi.vectors, msi.is_64bit, msi.maskable) == (1, True, False)
        assert [type(one) for one in decoded.capabilities] == [Msi]
        assert decoded.extended == ()
        assert [one.size for one in function(where).resources] == [1 << 20]


def test_nvme(bdfs: Callable[[str], list[str]]) -> None:
    for where in bdfs(NVME):
        one = function(where)
        decoded = one.config()
        msix, express, power = decoded.find(MsiX), decoded.find(PciExpress), decoded.find(PowerManagement)
        assert msix is not None
        assert express is not None
        assert power is not None
        assert msix.table_size == 65  # 64 queue pairs and the admin queue
        assert (msix.table_bar, msix.table_offset, msix.pba_bar) == (0, 0x2000, 0)
        assert one.resources[0].size >= msix.pba_offset + 16
        assert express.port_type is PortType.INTEGRATED_ENDPOINT
        assert not express.has_link
        assert express.flr
        assert power.state == 0
        assert decoded.header.command & Command.BUS_MASTER


def test_igb(bdf: Bdf) -> None:
    one = function(bdf(IGB))
    decoded = one.config()
    msix, express, sriov = decoded.find(MsiX), decoded.find(PciExpress), decoded.find(SrIov)
    assert msix is not None
    assert express is not None
    assert sriov is not None
    assert (msix.table_size, msix.table_bar, msix.pba_bar) == (10, 3, 3)
    assert express.port_type is PortType.ENDPOINT
    assert express.flr
    assert decoded.find(AdvancedErrorReporting) is not None
    assert decoded.find(AlternativeRoutingId) is not None
    assert sriov.initial_vfs == sriov.total_vfs == 8
    assert sriov.num_vfs == one.sriov_numvfs == 0
    # one of the eight is not offered by the driver
    assert one.sriov_totalvfs == 7
    assert sriov.vf_device == int(attribute(one, "sriov_vf_device") or "", 16)
    assert sriov.first_offset == int(attribute(one, "sriov_offset") or "")
    assert sriov.stride == int(attribute(one, "sriov_stride") or "")
    assert sriov.page_size == 4096


def test_virtual_functions_are_where_sriov_says(bdf: Bdf) -> None:
    one = function(bdf(IGB))
    (one.sysfs / "sriov_numvfs").write_text("2")
    try:
        sriov = one.config().find(SrIov)
        assert sriov is not None
        assert (sriov.enabled, sriov.memory_enabled, sriov.num_vfs) == (True, True, 2)
        vfs = one.virtual_functions()
        expected = [one.address.requester_id + sriov.first_offset + number * sriov.stride for number in range(2)]
        assert [vf.address.requester_id for vf in vfs] == expected
        assert [vf.physfn for vf in vfs] == [one.address] * 2
        assert {vf.device for vf in vfs} == {sriov.vf_device}
    finally:
        (one.sysfs / "sriov_numvfs").write_text("0")


def test_root_port_and_others(bdf: Bdf) -> None:
    port = function("0000:00:09.0").config()
    express, acs = port.find(PciExpress), port.find(AccessControl)
    assert express is not None
    assert express.port_type is PortType.ROOT_PORT
    assert express.slot_implemented
    assert acs is not None
    assert "source validation" in acs.supported
    assert port.find(SubsystemId) is not None
    bridge = function("0000:00:0b.0").config().find(PciExpress)
    assert bridge is not None
    assert bridge.port_type is PortType.PCIE_TO_PCI_BRIDGE
    serial = function(bdf(E1000E)).config().find(SerialNumber)
    assert serial is not None
    mac = next(Path(f"/sys/bus/pci/devices/{bdf(E1000E)}/net").iterdir()) / "address"
    # an EUI-64 made of the MAC address: ff-ff in the middle
    octets = mac.read_text().strip().split(":")
    assert str(serial) == "-".join([*octets[:3], "ff", "ff", *octets[3:]])
    assert function(bdf(IVSHMEM)).config().capabilities == ()


@pytest.mark.machine("intel")
def test_acs_is_on_where_groups_are_separate() -> None:
    acs = function("0000:00:09.0").config().find(AccessControl)
    assert acs is not None
    assert acs.isolates


def test_virtio_lists_its_own_capabilities() -> None:
    for one in find(vendor=0x1AF4, driver="virtio-pci"):
        kinds = [found.data[3] for found in one.config().capabilities if isinstance(found, VendorSpecific)]
        assert sorted(kinds) == [1, 2, 3, 4, 5]  # virtio 1.2, 4.1.4: common, notify, isr, device, pci cfg
