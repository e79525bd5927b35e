"""The way between two functions, from sysfs and the bridges' ACS bits."""

from __future__ import annotations

from pathlib import Path

from pci_tree import FakeKernel

from vfiopy.pci import Function, PciAddress
from vfiopy.pci.p2p import Route, peer_path

SWITCH = "pci0000:00/0000:00:01.0/0000:01:00.0"  # root port, then the switch's upstream port


def bridge(redirect: bool) -> bytes:
    """Configuration space of a port with ACS, its request redirect on or off."""
    space = bytearray(4096)
    space[0:4] = b"\x86\x80\x34\x12"
    space[0x0B], space[0x0E] = 6, 1
    space[6], space[0x34] = 0x10, 0x40
    space[0x40:0x43] = bytes([0x10, 0, 0x62])  # PCI Express, a downstream port
    space[0x100:0x104] = (0x0D | 1 << 16).to_bytes(4, "little")
    space[0x104:0x108] = bytes([0x5F, 0, 0x1D if redirect else 0, 0])
    return bytes(space)


def build(root: Path, *, redirect: bool = False) -> FakeKernel:
    kernel = FakeKernel.make(root)
    port = bridge(redirect)
    kernel.add("0000:00:01.0", config=bridge(True))
    kernel.add("0000:01:00.0", parent="pci0000:00/0000:00:01.0", config=bridge(False))
    for number in (0, 1):
        kernel.add(f"0000:02:0{number}.0", parent=SWITCH, config=port)
        kernel.add(f"0000:0{number + 3}:00.0", parent=f"{SWITCH}/0000:02:0{number}.0")
    kernel.add("0000:03:00.1", parent=f"{SWITCH}/0000:02:00.0")
    kernel.add("0000:00:02.0")
    kernel.add("0000:80:02.0", parent="pci0000:80")
    return kernel


def path(kernel: FakeKernel, source: str, target: str):  # type: ignore[no-untyped-def]
    return peer_path(Function(source, kernel), Function(target, kernel))


def test_below_one_switch(tmp_path: Path) -> None:
    found = path(build(tmp_path), "0000:03:00.0", "0000:04:00.0")
    assert found.route is Route.SWITCH
    assert found.bridge == PciAddress.parse("0000:01:00.0")
    assert found.redirected == ()
    assert found.through_root_complex is False
    assert "may claim a request" in str(found)


def test_a_switch_that_redirects(tmp_path: Path) -> None:
    found = path(build(tmp_path, redirect=True), "0000:03:00.0", "0000:04:00.0")
    assert found.route is Route.SWITCH
    assert found.redirected == (PciAddress.parse("0000:02:00.0"),)
    assert found.through_root_complex
    assert "ACS of 0000:02:00.0 sends requests through the root complex" in str(found)


def test_through_the_root_complex(tmp_path: Path) -> None:
    kernel = build(tmp_path)
    found = path(kernel, "0000:00:02.0", "0000:04:00.0")
    assert found.route is Route.HOST_BRIDGE
    assert found.bridge is None
    assert found.through_root_complex
    assert path(kernel, "0000:04:00.0", "0000:00:02.0").redirected == (PciAddress.parse("0000:00:01.0"),)


def test_other_routes(tmp_path: Path) -> None:
    kernel = build(tmp_path)
    assert path(kernel, "0000:03:00.0", "0000:03:00.1").route is Route.DEVICE
    assert path(kernel, "0000:03:00.0", "0000:03:00.0").route is Route.SELF
    apart = path(kernel, "0000:80:02.0", "0000:00:02.0")
    assert apart.route is Route.APART
    assert "few machines" in str(apart)
    gone = path(kernel, "0000:09:00.0", "0000:00:02.0")
    assert gone.route is Route.UNKNOWN
    assert gone.through_root_complex is None
