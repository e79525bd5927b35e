from __future__ import annotations

import builtins
import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pci_tree import FakeKernel

from vfiopy.errors import DeviceGoneError, DeviceNotFoundError, PermissionDeniedError
from vfiopy.pci import Function, PciAddress, find, function


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    fake = FakeKernel.make(tmp_path)
    for name in ("nvme", "igb", "igbvf", "vfio-pci", "pcieport", "mlx5_vfio_pci"):
        fake.add_driver(name)
    fake.add("0000:00:00.0", ids=(0x8086, 0x29C0), class_code=0x060000)
    fake.add("0000:00:05.0", ids=(0x1B36, 0x0010), class_code=0x010802, driver="nvme", group=5)
    fake.add("0000:00:06.0", group=6)
    fake.add("0000:00:07.0", class_code=0x060400, driver="pcieport", group=7, header_type=1)
    fake.add("0000:01:00.0", ids=(0x8086, 0x10C9), class_code=0x020000, driver="igb", group=7, totalvfs=7)
    fake.add("0001:00:05.1", driver="vfio-pci", group=9)
    return fake


def addresses(found: list[Function]) -> list[str]:
    return [str(one.address) for one in found]


def test_attributes(kernel: FakeKernel) -> None:
    nvme = function("00:05.0", system=kernel)
    assert nvme.address == PciAddress(0, 0, 5, 0)
    assert (nvme.vendor, nvme.device) == (0x1B36, 0x0010)
    assert (nvme.subsystem_vendor, nvme.subsystem_device) == (0x1AF4, 0x1100)
    assert (nvme.class_code, nvme.revision) == (0x010802, 0x10)
    assert (nvme.driver, nvme.driver_override, nvme.iommu_group) == ("nvme", None, 5)
    assert nvme.numa_node is None
    assert nvme.reset_methods == ("flr", "bus")
    assert (nvme.sriov_totalvfs, nvme.sriov_numvfs, nvme.physfn) == (None, None, None)
    assert nvme.sysfs == kernel.pci_devices / "0000:00:05.0"
    assert not nvme.is_bridge
    assert not nvme.is_vfio
    (bar,) = nvme.resources
    assert (bar.name, bar.index, bar.start, bar.size) == ("BAR0", 0, 0xFEBF0000, 0x10000)
    assert bar.is_memory
    assert not bar.is_io
    assert not bar.is_64bit
    assert not bar.prefetchable
    assert repr(nvme) == "<Function 0000:00:05.0 1b36:0010 nvme>"
    assert nvme.name == "NVMe controller [1b36:0010]"
    (nvme.sysfs / "numa_node").write_text("1\n")
    assert nvme.numa_node == 1


def test_resources_of_every_kind(kernel: FakeKernel) -> None:
    igb = function("01:00.0", system=kernel)
    lines = [(0, 0, 0)] * 13
    lines[0] = (0xE0000000, 0xE001FFFF, 0x40200)
    lines[2] = (0xC040, 0xC05F, 0x40101)
    lines[4] = (0x8_0000_0000, 0x8_0000_3FFF, 0x14220C)
    lines[6] = (0xFEA0_0000, 0xFEA3_FFFF, 0x46200)
    lines[7] = (0x8_1000_0000, 0x8_1001_BFFF, 0x14220C)
    (igb.sysfs / "resource").write_text("".join(f"{a:#018x} {b:#018x} {c:#018x}\n" for a, b, c in lines))
    assert [(one.name, one.size) for one in igb.resources] == [
        ("BAR0", 0x20000),
        ("BAR2", 0x20),
        ("BAR4", 0x4000),
        ("ROM", 0x40000),
        ("VF BAR0", 0x1C000),
    ]
    ports, wide = igb.resources[1], igb.resources[2]
    assert ports.is_io
    assert not ports.is_memory
    assert wide.is_64bit
    assert wide.prefetchable
    # the same lines at a bridge are its windows, which it forwards and does not decode
    bridge = function("00:07.0", system=kernel)
    (bridge.sysfs / "resource").write_text((igb.sysfs / "resource").read_text())
    assert [one.name for one in bridge.resources] == ["BAR0", "BAR2", "BAR4", "ROM"]


def test_group_and_what_stands_in_its_way(kernel: FakeKernel) -> None:
    igb = function("01:00.0", system=kernel)
    bridge, other = igb.group_members()
    assert str(bridge.address) == "0000:00:07.0"
    assert bridge.is_bridge
    assert other == igb
    assert igb.group_blockers() == (igb,)
    assert function("0001:00:05.1", system=kernel).group_blockers() == ()
    assert function("00:06.0", system=kernel).group_blockers() == ()
    alone = function("00:00.0", system=kernel)
    assert alone.iommu_group is None
    assert alone.group_members() == (alone,)
    assert alone.is_bridge


def test_vfio_nodes(kernel: FakeKernel) -> None:
    bound = function("0001:00:05.1", system=kernel)
    assert bound.is_vfio
    assert bound.vfio_cdev == "vfio5"
    assert bound.cdev_node == kernel.dev / "vfio/devices/vfio5"
    assert bound.group_node == kernel.dev / "vfio/9"
    assert bound.cdev_missing == ""
    assert not bound.is_noiommu
    assert bound.cdev_node is not None
    bound.cdev_node.unlink()
    assert "stale copy" in bound.cdev_missing
    (bound.sysfs / "vfio-dev/vfio5/dev").unlink()
    assert bound.vfio_cdev is None
    assert "CONFIG_VFIO_DEVICE_CDEV" in bound.cdev_missing
    (bound.sysfs / "vfio-dev/vfio5").rmdir()
    assert "older than" in bound.cdev_missing
    (kernel.sys / "class/vfio/9").rename(kernel.sys / "class/vfio/noiommu-9")
    assert bound.is_noiommu
    assert bound.group_node == kernel.dev / "vfio/noiommu-9"
    assert "group node only" in bound.cdev_missing
    (kernel.sys / "class/vfio/noiommu-9").rmdir()
    assert not bound.is_noiommu
    (bound.sysfs / "vfio-dev/noiommu-vfio5").mkdir()
    (bound.sysfs / "vfio-dev/noiommu-vfio5/dev").write_text("511:0")
    assert bound.is_noiommu
    assert bound.cdev_node == kernel.dev / "vfio/devices/noiommu-vfio5"
    assert "bound to nvme" in function("00:05.0", system=kernel).cdev_missing
    assert function("00:06.0", system=kernel).cdev_missing == "not bound to vfio-pci"
    assert function("00:06.0", system=kernel).group_node is None


def test_virtual_functions(kernel: FakeKernel) -> None:
    igb = function("01:00.0", system=kernel)
    kernel.write(igb.sysfs.resolve() / "sriov_numvfs", "2")
    assert igb.sriov_numvfs == 2
    vfs = igb.virtual_functions()
    assert [str(one.address) for one in vfs] == ["0000:01:10.0", "0000:01:10.1"]
    assert {one.physfn for one in vfs} == {igb.address}
    assert [one.driver for one in vfs] == ["igbvf", "igbvf"]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ({}, 6),
        ({"vendor": 0x1234}, ["0000:00:06.0", "0000:00:07.0", "0001:00:05.1"]),
        ({"vendor": 0x1B36, "device": 0x0010}, ["0000:00:05.0"]),
        ({"subsystem_vendor": 0x1AF4, "subsystem_device": 1}, []),
        ({"class_code": "nvme"}, ["0000:00:05.0"]),
        ({"class_code": "NVMe"}, ["0000:00:05.0"]),
        ({"class_code": "storage"}, ["0000:00:05.0"]),
        ({"class_code": 0x01}, ["0000:00:05.0"]),
        ({"class_code": 0x0108}, ["0000:00:05.0"]),
        ({"class_code": 0x010802}, ["0000:00:05.0"]),
        ({"class_code": 0x010801}, []),
        ({"class_code": "0200"}, ["0000:01:00.0"]),
        ({"class_code": "bridge"}, ["0000:00:00.0", "0000:00:07.0"]),
        ({"class_code": "host bridge"}, ["0000:00:00.0"]),
        ({"driver": "vfio-pci"}, ["0001:00:05.1"]),
        ({"driver": ""}, ["0000:00:00.0", "0000:00:06.0"]),
        ({"iommu_group": 7}, ["0000:00:07.0", "0000:01:00.0"]),
        ({"address": "00:05.0"}, ["0000:00:05.0"]),
        ({"address": "00:05.0", "driver": "igb"}, []),
        ({"address": "00:1e.0"}, []),
        ({"predicate": lambda one: one.sriov_totalvfs}, ["0000:01:00.0"]),
    ],
)
def test_find(kernel: FakeKernel, query: dict[str, object], found: list[str] | int) -> None:
    result = find(system=kernel, **query)  # type: ignore[arg-type]
    if isinstance(found, int):
        assert len(result) == found
        assert addresses(result) == sorted(addresses(result))
    else:
        assert addresses(result) == found


@pytest.mark.parametrize("word", ["nvmee", "1", "0x01080", "zz", ""])
def test_a_class_that_means_nothing(kernel: FakeKernel, word: str) -> None:
    with pytest.raises(ValueError, match="is not a class"):
        find(class_code=word, system=kernel)


def test_class_code_too_large(kernel: FakeKernel) -> None:
    with pytest.raises(ValueError, match="24 bits"):
        find(class_code=0x1000000, system=kernel)


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("0002:00:05.1", "another domain: 0001:00:05.1"),
        ("0001:00:05.0", "another domain: 0000:00:05.0"),
        ("0000:00:06.3", "other functions: 0000:00:06.0"),
        ("0000:05:07.0", "another bus: 0000:00:07.0"),
        ("0000:00:1e.5", "the bus has: 0000:00:00.0, 0000:00:05.0, 0000:00:06.0, 0000:00:07.0"),
        ("0003:00:1e.5", "6 functions"),
    ],
)
def test_nothing_there_names_what_is_near(kernel: FakeKernel, address: str, hint: str) -> None:
    with pytest.raises(DeviceNotFoundError) as caught:
        function(address, system=kernel)
    assert address in str(caught.value)
    assert hint in str(caught.value)


def test_no_bus_at_all(tmp_path: Path) -> None:
    empty = FakeKernel(sys=tmp_path / "nothing")
    with pytest.raises(DeviceNotFoundError, match="shows no PCI bus"):
        function("00:05.0", system=empty)
    assert find(system=empty) == []


def test_function_that_went(kernel: FakeKernel) -> None:
    edu = function("00:06.0", system=kernel)
    kernel.remove("0000:00:06.0")
    assert not edu.exists
    assert repr(edu) == "<Function 0000:00:06.0 (gone)>"
    with pytest.raises(DeviceGoneError, match="was removed"):
        _ = edu.vendor
    with pytest.raises(DeviceGoneError, match="was removed"):
        edu.read_config(0, 4)


def test_names_from_pci_ids(kernel: FakeKernel) -> None:
    text = (
        "# comment\n1b36  Red Hat, Inc.\n\t0010  QEMU NVM Express Controller\n\t\t1af4 1100  subsystem\n"
        "1234  Bochs\nC 01  Mass storage\n\t06  SATA\n"
    )
    (kernel.share[0] / "pci.ids").write_text(text)
    assert function("00:05.0", system=kernel).name == "Red Hat, Inc. QEMU NVM Express Controller"
    assert function("00:06.0", system=kernel).name == "Bochs"
    assert function("01:00.0", system=kernel).name == "Ethernet controller [8086:10c9]"
    (kernel.share[0] / "pci.ids").unlink()
    (kernel.share[0] / "pci.ids.gz").write_bytes(gzip.compress(text.encode()))
    assert function("00:06.0", system=kernel).name == "Bochs"


def test_config_beyond_64_bytes_needs_root(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    nvme = function("00:05.0", system=kernel)
    assert nvme.read_config(0, 4) == bytes.fromhex("361b1000")
    assert nvme.read_config(252, 16) == bytes(4)
    assert nvme.read_config(256, 4) == b""
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: real(fd, min(size, max(0, 64 - at)), at))
    assert len(nvme.read_config(60, 16)) == 4
    with pytest.raises(PermissionDeniedError, match="root only"):
        nvme.read_config(64, 4)


def test_equality_and_hash(kernel: FakeKernel) -> None:
    assert function("00:05.0", system=kernel) == Function("0000:00:05.0", kernel)
    assert function("00:05.0", system=kernel) != function("00:06.0", system=kernel)
    assert len({function("00:05.0", system=kernel), Function("00:05.0", kernel)}) == 1
    assert function("00:05.0", system=kernel) != "0000:00:05.0"


# --- pyudev or not, on this machine's own bus ---

needs_bus = pytest.mark.skipif(not Path("/sys/bus/pci/devices").is_dir(), reason="this machine shows no PCI bus")


@needs_bus
def test_udev_and_sysfs_agree() -> None:
    pytest.importorskip("pyudev")
    assert find(udev=True) == find(udev=False)
    assert addresses(find(udev=False)) == sorted(path.name for path in Path("/sys/bus/pci/devices").iterdir())


@needs_bus
def test_without_pyudev(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: object, **kwargs: object) -> object:
        if name == "pyudev":
            raise ImportError(name)
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    assert find() == find(udev=False)
    with pytest.raises(ImportError):
        find(udev=True)


@needs_bus
def test_without_libudev(monkeypatch: pytest.MonkeyPatch) -> None:
    pyudev = pytest.importorskip("pyudev")

    def no_library() -> None:
        raise ImportError("No library named udev")

    monkeypatch.setattr(pyudev, "Context", no_library)
    assert find() == find(udev=False)


def test_pyudev_is_imported_when_first_needed() -> None:
    code = "import sys, vfiopy.pci; sys.exit('pyudev' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
