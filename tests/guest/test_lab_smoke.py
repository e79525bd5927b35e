"""The lab itself: the guest is what docs/lab.md promises, so that a failure elsewhere is not the lab's."""

from __future__ import annotations

import fcntl
import gzip
import os
import platform
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

EDU = "1234:11e8"
NVME = "1b36:0010"
IVSHMEM = "1af4:1110"
TESTDEV = "1b36:0005"  # pci-testdev and iommu-testdev share this id
IGB = "8086:10c9"
E1000E = "8086:10d3"

PCI = Path("/sys/bus/pci/devices")
VFIO_GET_API_VERSION = 0x3B64

Bdfs = Callable[[str], list[str]]


def driver(bdf: str) -> str | None:
    link = PCI / bdf / "driver"
    return link.resolve().name if link.exists() else None


def group(bdf: str) -> set[str]:
    return {path.name for path in (PCI / bdf / "iommu_group" / "devices").iterdir()}


def kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int(minor)


@pytest.mark.machine("intel", "noiommu")
def test_kernel_is_new_enough_for_dmabuf_import() -> None:
    assert kernel() >= (6, 19)


@pytest.mark.machine("intel", "noiommu")
@pytest.mark.parametrize("node", ["iommu", "vfio/vfio", "udmabuf", "dma_heap/system"])
def test_character_device(node: str) -> None:
    assert stat.S_ISCHR(Path("/dev", node).stat().st_mode)


@pytest.mark.machine("intel", "noiommu", "old")
def test_container_answers_with_its_version() -> None:
    descriptor = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
    try:
        assert fcntl.ioctl(descriptor, VFIO_GET_API_VERSION) == 0
    finally:
        os.close(descriptor)


@pytest.mark.machine("intel", "noiommu", "old")
@pytest.mark.parametrize(
    ("ids", "addresses"),
    [
        (EDU, ["0000:00:04.0", "0000:02:01.0"]),
        (NVME, ["0000:00:05.0", "0000:00:06.0"]),
        (IVSHMEM, ["0000:00:07.0"]),
        (TESTDEV, ["0000:00:08.0", "0000:02:02.0"]),
        (IGB, ["0000:01:00.0"]),
        (E1000E, ["0000:00:0a.0"]),
    ],
)
def test_devices_are_where_the_documentation_says(bdfs: Bdfs, ids: str, addresses: list[str]) -> None:
    assert bdfs(ids) == addresses


@pytest.mark.machine("intel", "noiommu", "old")
def test_devices_start_on_their_native_drivers(bdfs: Bdfs) -> None:
    drivers = {ids: {driver(bdf) for bdf in bdfs(ids)} for ids in (EDU, NVME, IVSHMEM, TESTDEV, IGB, E1000E)}
    assert drivers == {
        EDU: {None},
        NVME: {"nvme"},
        IVSHMEM: {None},
        TESTDEV: {None},
        IGB: {"igb"},
        E1000E: {"e1000e"},
    }


@pytest.mark.machine("intel", "old")
def test_each_function_on_the_root_bus_has_a_group_of_its_own(bdfs: Bdfs) -> None:
    for ids in (EDU, NVME, IVSHMEM, TESTDEV, E1000E):
        for bdf in bdfs(ids):
            if bdf.startswith("0000:00:"):
                assert group(bdf) == {bdf}


@pytest.mark.machine("intel", "old")
def test_functions_behind_the_plain_pci_bridge_share_its_group() -> None:
    assert group("0000:02:01.0") == {"0000:00:0b.0", "0000:02:01.0", "0000:02:02.0"}


def test_interrupts_are_remapped() -> None:
    assert "DMAR-IR: Enabled IRQ remapping" in Path("/run/lab/boot.dmesg").read_text()


def test_bars_have_the_promised_sizes(bdfs: Bdfs) -> None:
    def size(bdf: str, bar: int) -> int:
        first, last, _ = (PCI / bdf / "resource").read_text().splitlines()[bar].split()
        return int(last, 16) - int(first, 16) + 1

    assert size(bdfs(EDU)[0], 0) == 1 << 20
    assert size(bdfs(IVSHMEM)[0], 2) == 16 << 20
    assert size("0000:02:02.0", 2) == 16 << 20
    assert size("0000:00:05.0", 2) >= 16 << 20  # the NVMe controller memory buffer


@pytest.mark.machine("intel", "noiommu", "old")
def test_huge_pages_of_both_sizes_are_free() -> None:
    sizes = Path("/sys/kernel/mm/hugepages").iterdir()
    free = {size.name: int((size / "free_hugepages").read_text()) for size in sizes}
    assert free == {"hugepages-2048kB": 64, "hugepages-1048576kB": 1}


def test_there_are_two_memory_nodes() -> None:
    assert Path("/sys/devices/system/node/online").read_text().strip() == "0-1"


def test_each_nvme_has_a_disk_of_64_mib() -> None:
    sizes = {path.name: int((path / "size").read_text()) * 512 for path in Path("/sys/block").glob("nvme*")}
    assert sizes == {"nvme0n1": 64 << 20, "nvme1n1": 64 << 20}


def test_igb_offers_virtual_functions() -> None:
    assert int((PCI / "0000:01:00.0" / "sriov_totalvfs").read_text()) == 7


def test_iommu_page_tables_can_be_inspected() -> None:
    assert Path("/sys/kernel/debug/iommu/intel/0000:00:04.0/domain_translation_struct").exists()


def test_iommufd_mock_is_built_in() -> None:
    assert Path("/sys/kernel/debug/fail_iommufd").is_dir()


@pytest.mark.machine("intel", "noiommu", "old")
def test_the_tree_is_read_only() -> None:
    with pytest.raises(OSError, match="Read-only file system"):
        (Path(__file__).parent / "written").touch()


@pytest.mark.machine("noiommu")
def test_noiommu_mode_is_allowed_and_there_is_no_iommu() -> None:
    assert Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode").read_text().strip() == "Y"
    assert not list(Path("/sys/class/iommu").glob("dmar*"))
    assert not (PCI / "0000:00:04.0" / "iommu_group").exists()


@pytest.mark.machine("old")
def test_old_kernel_has_groups_but_no_iommufd() -> None:
    assert kernel() == (6, 1)
    assert not Path("/dev/iommu").exists()
    assert not Path("/dev/vfio/devices").exists()


@pytest.mark.machine("compat")
def test_compat_kernel_serves_the_container_from_iommufd() -> None:
    config = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    assert "CONFIG_IOMMUFD_VFIO_CONTAINER=y\n" in config
    assert "# CONFIG_VFIO_CONTAINER is not set\n" in config
