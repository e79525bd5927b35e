"""Every kind of memory, in all five modes, with a device that really moves data: edu."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from modes import MODES

import vfiopy
from vfiopy import Prot
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.drivers.edu import EduDriver

PATTERN = bytes(n % 253 for n in range(1024))


@pytest.fixture(params=MODES)
def driver(request: pytest.FixtureRequest, bound_edu: str) -> Iterator[EduDriver]:
    with vfiopy.open(bound_edu, backend=request.param) as device:
        device.bus_master = True
        yield EduDriver(device)


def test_plain_memory_both_ways(driver: EduDriver) -> None:
    with mmap.mmap(-1, 2 * PAGE_SIZE) as area:
        area[:1024] = PATTERN
        with driver.device.dma.map(area) as mapping:
            driver.load(mapping.iova, 1024)
            driver.store(mapping.iova + PAGE_SIZE, 1024)
            assert area[PAGE_SIZE : PAGE_SIZE + 1024] == PATTERN


def test_a_range_of_a_memfd(driver: EduDriver) -> None:
    """The same pages through the file and through this process's mapping of it."""
    fd = os.memfd_create("dma")
    os.ftruncate(fd, 4 * PAGE_SIZE)
    os.pwrite(fd, PATTERN, 2 * PAGE_SIZE)
    with mmap.mmap(fd, 2 * PAGE_SIZE, offset=2 * PAGE_SIZE) as area:
        memory = vfiopy.file_memory(fd, 2 * PAGE_SIZE, offset=2 * PAGE_SIZE, mapped=area)
        os.close(fd)
        with driver.device.dma.map(memory) as mapping:
            driver.load(mapping.iova, 1024)
            driver.store(mapping.iova + PAGE_SIZE, 1024)
        assert area[PAGE_SIZE : PAGE_SIZE + 1024] == PATTERN
        del memory


def test_read_only_memory_is_not_written(driver: EduDriver) -> None:
    """The device may read it; a write is stopped by the IOMMU."""
    buffer = driver.device.dma.allocate(PAGE_SIZE, prot=Prot.READ)
    buffer[:1024] = list(PATTERN)
    target = driver.device.dma.allocate(PAGE_SIZE)
    driver.load(buffer.iova, 1024)
    driver.store(target.iova, 1024)
    assert bytes(target[:1024]) == PATTERN
    buffer[:] = 0x77
    driver.store(buffer.iova, 1024)
    assert bytes(buffer) == b"\x77" * PAGE_SIZE
    buffer.free()
    target.free()


@pytest.mark.parametrize("road", ["type1v2", "iommufd"])
def test_huge_pages_and_memory_nodes(road: str, bound_edu: str) -> None:
    with vfiopy.open(bound_edu, backend=road) as device:
        device.bus_master = True
        driver = EduDriver(device)
        huge = device.dma.allocate(vfiopy.HUGE_2M, page_size=vfiopy.HUGE_2M)
        huge[-1024:] = list(PATTERN)
        driver.load(huge[-1024:].iova, 1024)
        driver.store(huge.iova, 1024)
        assert bytes(huge[:1024]) == PATTERN
        huge.free()
        for node in (0, 1):
            near = device.dma.allocate(4 * PAGE_SIZE, numa_node=node)
            line = next(
                line
                for line in Path("/proc/self/numa_maps").read_text().splitlines()
                if int(line.split()[0], 16) == near.address
            )
            assert re.findall(r"\bN(\d)=\d+\b", line) == [str(node)], line
            near.free()
        with pytest.raises(vfiopy.NoSpaceError, match=r"no 4096 free huge pages of 2 MiB.*\n  hint: .*nr_hugepages"):
            device.dma.allocate(8 << 30, page_size=vfiopy.HUGE_2M)


@pytest.mark.parametrize("road", ["type1v2", "iommufd"])
def test_a_device_that_joins_later_sees_what_is_mapped(road: str, bound_edu: str, bdf: Callable[..., str]) -> None:
    other = bdf("1af4:1110")
    with vfiopy.AddressSpace("shared") as space, vfiopy.bind(other):
        first = vfiopy.open(other, backend=road, space=space)
        buffer = space.allocate(PAGE_SIZE, limit=(1 << 28) - 1)
        buffer[:1024] = list(PATTERN)
        with vfiopy.open(bound_edu, backend=road, space=space) as edu:
            edu.bus_master = True
            driver = EduDriver(edu)
            driver.load(buffer.iova, 1024)
            first.close()
            driver.store(buffer[2048:].iova, 1024)
        assert bytes(buffer[2048:3072]) == PATTERN
        # without a device the book keeps the mapping; a new one gets it replayed
        with vfiopy.open(bound_edu, backend=road, space=space) as edu:
            edu.bus_master = True
            driver = EduDriver(edu)
            driver.load(buffer.iova, 1024)
            driver.store(buffer[1024:].iova, 1024)
        assert bytes(buffer[1024:2048]) == PATTERN
        buffer.free()
