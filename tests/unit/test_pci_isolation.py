"""Which bridges above a function keep devices apart, from their port type and ACS bits."""

from __future__ import annotations

from pathlib import Path

import pytest
from pci_tree import FakeKernel

from vfiopy.pci import Function
from vfiopy.pci.isolation import separators

ROOT, UPSTREAM, DOWNSTREAM, TO_PCI = 4, 5, 6, 7
ALL = 0x5F  # all services but egress control
ON = 0x1D  # source validation, both redirects, upstream forwarding
PORT, DEVICE = "0000:00:01.0", "0000:01:00.0"


def bridge(kind: int | None, supported: int = 0, enabled: int = 0) -> bytes:
    """Configuration space of a port: its PCI Express type, the services its ACS has, and those that are on."""
    space = bytearray(4096)
    space[0:4] = b"\x86\x80\x34\x12"
    space[0x0B], space[0x0E] = 6, 1
    if kind is not None:
        space[6], space[0x34] = 0x10, 0x40
        space[0x40:0x43] = bytes([0x10, 0, kind << 4 | 2])
    if supported:
        space[0x100:0x104] = (0x0D | 1 << 16).to_bytes(4, "little")
        space[0x104:0x108] = bytes([supported, 0, enabled, 0])
    return bytes(space)


def above(root: Path, *configs: bytes) -> list[str]:
    kernel, parent = FakeKernel.make(root), "pci0000:00"
    for bus, config in enumerate(configs):
        kernel.add(f"0000:{bus:02x}:01.0", parent=parent, config=config)
        parent += f"/0000:{bus:02x}:01.0"
    address = f"0000:{len(configs):02x}:00.0"
    kernel.add(address, parent=parent)
    return [f"{one.kind}: {one.reason}, {one.apart}" for one in separators(Function(address, kernel))]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (bridge(ROOT, ALL, ON), "root port: ACS on, True"),
        (bridge(ROOT), "root port: no ACS capability, False"),
        (bridge(ROOT, ALL, ON & ~1), "root port: ACS without source validation, False"),
        (bridge(DOWNSTREAM, ALL, 0x11), "downstream port: ACS without request redirect, completion redirect, False"),
        # what the port cannot control is always on
        (bridge(ROOT, 0x01, 0x01), "root port: ACS on, True"),
        (bridge(ROOT, 0x1C, 0x1C), "root port: ACS on, True"),
        (bridge(TO_PCI), "bridge to conventional PCI: devices on a conventional bus look like one to the IOMMU, False"),
        (bridge(None), "bridge to conventional PCI: devices on a conventional bus look like one to the IOMMU, False"),
    ],
)
def test_one_bridge(tmp_path: Path, config: bytes, says: str) -> None:
    assert above(tmp_path, config) == [says]


def test_a_whole_way_from_the_root_down(tmp_path: Path) -> None:
    way = above(tmp_path, bridge(ROOT, ALL, ON), bridge(UPSTREAM), bridge(DOWNSTREAM))
    assert way == ["root port: ACS on, True", "downstream port: no ACS capability, False"]


def test_nothing_above(tmp_path: Path) -> None:
    assert above(tmp_path) == []
    kernel = FakeKernel.make(tmp_path / "other")
    assert separators(Function("0000:09:00.0", kernel)) == ()


def test_what_only_root_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Function.read_config

    def as_a_user(one: Function, offset: int, size: int) -> bytes:
        if offset >= 64:
            from vfiopy.errors import PermissionDeniedError  # noqa: PLC0415

            raise PermissionDeniedError("may be read by root only", object=str(one))
        return real(one, offset, size)

    monkeypatch.setattr(Function, "read_config", as_a_user)
    assert above(tmp_path, bridge(ROOT, ALL, ON)) == ["bridge: its ACS can be read by root only, None"]
