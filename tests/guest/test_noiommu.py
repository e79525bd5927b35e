"""A device without an IOMMU: only when asked for in so many words, and with physical addresses."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

import pytest
from modes import EDU

import vfiopy
from vfiopy.drivers.edu import EduDriver

pytestmark = pytest.mark.machine("noiommu")
Lookup = Callable[..., str]


@pytest.fixture
def edu(bdf: Lookup) -> Iterator[str]:
    address = bdf(EDU)
    with vfiopy.bind(address):
        yield address


def test_it_must_be_asked_for_and_says_what_it_costs(edu: str) -> None:
    with pytest.raises(vfiopy.PermissionDeniedError, match=r"no IOMMU.*\n.*noiommu=True, which costs: .*all of this"):
        vfiopy.open(edu)
    with pytest.raises(vfiopy.NotSupportedError, match="backend 'iommufd' cannot be used"):
        vfiopy.open(edu, noiommu=True, backend="iommufd")


def test_memory_has_its_physical_address_and_must_be_huge_pages(edu: str) -> None:
    with vfiopy.open(edu, noiommu=True) as device:
        assert device.backend == "noiommu"
        with pytest.raises(vfiopy.MemoryKindError, match=r"only memory of huge pages\b.*\n.*page_size=2 << 20"):
            device.dma.allocate(4096)
        with mmap.mmap(-1, 4096) as page, pytest.raises(vfiopy.MemoryKindError, match="huge pages"):
            device.dma.map(page, iova=0x10000)
        with device.dma.allocate(4096, page_size=vfiopy.HUGE_2M) as buffer:
            assert buffer.iova % vfiopy.HUGE_2M == 0
            found = device.space.find(buffer.iova)
            assert found is not None
            assert found.size == vfiopy.HUGE_2M
        assert device.space.mappings() == []


def test_dma_works(edu: str) -> None:
    with vfiopy.open(edu, noiommu=True) as device:
        device.bus_master = True
        driver = EduDriver(device)
        device.dma.bits = 64
        with device.dma.allocate(8192, page_size=vfiopy.HUGE_2M) as buffer:
            if buffer.iova >= 1 << 28:
                pytest.skip("the huge page lies beyond edu's 28 address bits, and nothing can translate")
            buffer[:1024] = [n % 251 for n in range(1024)]
            driver.load(buffer.iova, 1024)
            driver.store(buffer[4096:].iova, 1024)
            assert bytes(buffer[:1024]) == bytes(buffer[4096:5120])
