"""Finding functions on a real bus, through udev and without, and the bus's events."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from modes import E1000E, EDU, IGB, NVME

from vfiopy.errors import DeviceNotFoundError
from vfiopy.pci import Event, PciAddress, find, function, memlock_limit, monitor, uses

Bdf = Callable[..., str]
Bdfs = Callable[[str], list[str]]

everywhere = pytest.mark.machine("intel", "noiommu", "old")


def addresses(found: object) -> list[str]:
    return [str(one.address) for one in found]  # type: ignore[attr-defined]


@everywhere
@pytest.mark.parametrize("ids", [EDU, NVME, IGB, E1000E])
def test_find_by_id(bdfs: Bdfs, ids: str) -> None:
    vendor, device = (int(part, 16) for part in ids.split(":"))
    assert addresses(find(vendor=vendor, device=device)) == bdfs(ids)


@everywhere
@pytest.mark.parametrize(("word", "ids"), [("nvme", [NVME]), ("ethernet", [IGB, E1000E]), (0x0108, [NVME])])
def test_find_by_class(bdfs: Bdfs, word: str | int, ids: list[str]) -> None:
    assert addresses(find(class_code=word)) == sorted(where for one in ids for where in bdfs(one))


@everywhere
def test_find_by_driver_and_predicate(bdfs: Bdfs) -> None:
    assert addresses(find(driver="igb")) == bdfs(IGB)
    assert addresses(find(driver="nvme")) == bdfs(NVME)
    assert set(bdfs(EDU)) <= set(addresses(find(driver="")))
    assert addresses(find(predicate=lambda one: one.sriov_totalvfs is not None)) == bdfs(IGB)


@everywhere
def test_udev_and_sysfs_agree() -> None:
    pytest.importorskip("pyudev")
    assert find(udev=True) == find(udev=False)
    assert addresses(find()) == sorted(path.name for path in Path("/sys/bus/pci/devices").iterdir())


@everywhere
def test_nothing_there() -> None:
    with pytest.raises(DeviceNotFoundError, match=r"other functions: 0000:00:05\.0"):
        function("0000:00:05.1")


@pytest.mark.machine("intel", "old")
def test_group_behind_the_bridge() -> None:
    members = function("0000:02:01.0").group_members()
    assert addresses(members) == ["0000:00:0b.0", "0000:02:01.0", "0000:02:02.0"]
    assert [one.is_bridge for one in members] == [True, False, False]
    assert addresses(find(iommu_group=members[0].iommu_group)) == addresses(members)
    assert addresses(find(address="02:01.0", iommu_group=members[0].iommu_group)) == ["0000:02:01.0"]


@everywhere
def test_what_the_system_lives_on_is_seen() -> None:
    """The guest's root file system is the host's folder, which comes through a virtio device."""
    reasons = {str(one.address): uses(one) for one in find(driver="virtio-pci")}
    mounted = [reason for several in reasons.values() for reason in several if "mounted at" in reason]
    assert any(reason.endswith("is mounted at /") for reason in mounted)
    assert any("/dev/vport" in reason for several in reasons.values() for reason in several)
    for one in find(driver="nvme"):
        assert uses(one) == []


def provoke(where: str, action: str) -> None:
    Path(f"/sys/bus/pci/devices/{where}/uevent").write_text(action)


@everywhere
def test_kernel_events(bdf: Bdf) -> None:
    where = bdf(EDU)
    with monitor(udev=False) as watch:
        assert watch.wait(0) is None
        provoke(where, "change")
        assert watch.wait(5) == Event("change", PciAddress.parse(where), None)
        provoke(bdf(NVME), "change")
        assert select.select([watch], [], [], 5)[0] == [watch]
        event = next(iter(watch))
        assert event.address == PciAddress.parse(bdf(NVME))
        assert event.driver == "nvme"
        # other buses' events are passed over
        Path("/sys/class/mem/null/uevent").write_text("change")
        assert watch.wait(0.2) is None


@everywhere
def test_events_of_binding(bdf: Bdf) -> None:
    where = bdf(E1000E)
    driver = Path("/sys/bus/pci/drivers/e1000e")
    with monitor(udev=False) as watch:
        (driver / "unbind").write_text(where)
        (driver / "bind").write_text(where)
        seen = []
        while len(seen) < 2:
            event = watch.wait(10)
            assert event is not None
            if event.address == PciAddress.parse(where):
                seen.append((event.action, event.driver))
    assert seen == [("unbind", None), ("bind", "e1000e")]


def as_udevd(properties: dict[str, str]) -> bytes:
    """A message as udevd sends it to those who watch: header of libudev's monitor, then KEY=value strings."""
    body = b"".join(f"{name}={value}\0".encode() for name, value in properties.items())
    size = 40

    def murmur(text: str) -> int:
        # MurmurHash2 with seed 0, which the socket filter compares subsystems by
        data, mask = text.encode(), 0xFFFFFFFF
        value = len(data)
        while len(data) >= 4:
            part = int.from_bytes(data[:4], "little") * 0x5BD1E995 & mask
            part = (part ^ part >> 24) * 0x5BD1E995 & mask
            value = (value * 0x5BD1E995 & mask) ^ part
            data = data[4:]
        if data:
            value = (value ^ int.from_bytes(data, "little")) * 0x5BD1E995 & mask
        value = (value ^ value >> 13) * 0x5BD1E995 & mask
        return value ^ value >> 15

    head = struct.pack("=8sI", b"libudev\0", 0xFEEDCAFE.to_bytes(4, "big") and socket.htonl(0xFEEDCAFE))
    head += struct.pack("=III", size, size, len(body))
    head += struct.pack("=IIII", socket.htonl(murmur(properties["SUBSYSTEM"])), 0, 0, 0)
    assert len(head) == size
    return head + body


@everywhere
def test_udev_events(bdf: Bdf) -> None:
    """The lab has no udevd; this test speaks in its place, to the real libudev."""
    pytest.importorskip("pyudev")
    where = bdf(EDU)
    with monitor(udev=True) as watch:
        message = as_udevd(
            {
                "ACTION": "bind",
                "DEVPATH": str(Path(f"/sys/bus/pci/devices/{where}").resolve()).removeprefix("/sys"),
                "SUBSYSTEM": "pci",
                "DRIVER": "vfio-pci",
                "SEQNUM": "1",
            }
        )
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 15) as voice:
            voice.sendto(message, (0, 2))
        assert watch.wait(5) == Event("bind", PciAddress.parse(where), "vfio-pci")
        assert watch.wait(0) is None


@everywhere
def test_memlock_counts_what_is_locked() -> None:
    before = memlock_limit()
    assert before.exempt == (os.geteuid() == 0)
    assert before.allows(1 << 40) == before.exempt
