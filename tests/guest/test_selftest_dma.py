"""The kernel's vfio_dma_mapping_test and vfio_dma_mapping_mmio_test, scenario by scenario, in all five modes."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from modes import IVSHMEM, MODES

import vfiopy
from vfiopy.backend import HostMemory
from vfiopy.dma.memory import PAGE_SIZE

HUGE = {"anon_4k": PAGE_SIZE, "hugetlb_2m": vfiopy.HUGE_2M, "hugetlb_1g": vfiopy.HUGE_1G}
MMIO_WORKS = ("type1", "type1v2")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device(mode: str, bound_edu: str) -> Iterator[vfiopy.Device]:
    with vfiopy.open(bound_edu, backend=mode) as device:
        yield device


def free_huge_pages(size: int) -> int:
    pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{size >> 10}kB/free_hugepages")
    return int(pool.read_text()) if pool.exists() else 0


def page_table_entry(address: str, iova: int) -> list[int]:
    """The VT-d page-table entries on the way to an IOVA, PML5 first, from the intel-iommu debugfs.

    A table that does not exist is 0; what is 0 below the last entry was cut off by a bigger page.
    """
    dump = Path(f"/sys/kernel/debug/iommu/intel/{address}/domain_translation_struct")
    for line in dump.read_text().splitlines():
        words = line.replace("|", " ").split()
        if words and words[0].startswith("0x") and int(words[0], 16) == iova >> 12:
            return [int(word, 16) for word in words[1:]]
    return []


@pytest.mark.parametrize("kind", HUGE)
def test_dma_map_unmap(device: vfiopy.Device, mode: str, kind: str) -> None:
    size = HUGE[kind]
    if size != PAGE_SIZE and not free_huge_pages(size):
        pytest.skip(f"the guest has no free huge page of {size >> 20} MiB")
    buffer = device.dma.allocate(size, page_size=size)
    found = device.space.find(buffer.iova)
    assert found is not None
    assert (found.iova, found.size, found.address) == (buffer.iova, size, buffer.address)
    assert buffer.iova % size == 0, "big pages can only be used where IOVA and memory are congruent"
    entries = page_table_entry(device.name, buffer.iova)
    assert entries, "the IOMMU's page table has no entry for the IOVA"
    if mode != "type1" and not mode.endswith("-type1"):
        leaf = max(level for level, entry in enumerate(entries) if entry & 3)
        wanted = {PAGE_SIZE: 4, vfiopy.HUGE_2M: 3, vfiopy.HUGE_1G: 2}[size]
        assert leaf == wanted, f"not mapped by one page of {size} bytes: {entries}"
    iova = buffer.iova
    assert device.space.unmap(iova) == size
    assert device.space.find(iova) is None
    assert not page_table_entry(device.name, iova), "the IOMMU still translates the IOVA"


@pytest.mark.parametrize("how", ["unmap_range", "unmap_all"])
def test_dma_map_limit(device: vfiopy.Device, how: str) -> None:
    """The very last page that the IOMMU can reach maps and unmaps."""
    last = device.space.usable_ranges()[-1].last
    with mmap.mmap(-1, PAGE_SIZE) as page:
        mapping = device.space.map(page, iova=last + 1 - PAGE_SIZE)
        assert mapping.last == last
        if how == "unmap_range":
            assert device.space.unmap(mapping.iova, PAGE_SIZE) == PAGE_SIZE
        else:
            assert device.space.unmap_all() == PAGE_SIZE
        assert device.space.find(last) is None


def test_overflow(device: vfiopy.Device) -> None:
    """A range that would wrap round the 64-bit space is refused, and changes nothing."""
    with mmap.mmap(-1, 2 * PAGE_SIZE) as pages:
        with pytest.raises(vfiopy.IovaRangeError):
            device.space.map(pages, iova=(1 << 64) - PAGE_SIZE)
        with pytest.raises(vfiopy.NotMappedError, match="ends within the 64-bit space"):
            device.space.unmap((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE)
    assert device.space.mappings() == []


@pytest.mark.parametrize("part", ["map_full_bar", "map_partial_bar", "map_bar_misaligned"])
def test_mmio(mode: str, bdf: Callable[..., str], part: str, machine: str) -> None:
    """A BAR by its virtual address: works under type1, and under iommufd fails with the way that does work."""
    address = bdf(IVSHMEM)
    with vfiopy.bind(address), vfiopy.open(address, backend=mode) as device:
        bar = device.bars[2]
        with bar.hold() as hold:
            size = {"map_full_bar": bar.size, "map_partial_bar": PAGE_SIZE}.get(part, bar.size - PAGE_SIZE)
            offset = PAGE_SIZE if part == "map_bar_misaligned" else 0
            memory = HostMemory(hold.address + offset, size, True, hold)
            if mode in MMIO_WORKS and machine != "compat":  # there iommufd plays type1, without this
                mapping = device.space.map(memory)
                mapping.unmap()
            else:
                with pytest.raises(vfiopy.VfioError, match="dma-buf") as caught:
                    device.space.map(memory)
                assert caught.value.errno == 14  # EFAULT
            del memory
