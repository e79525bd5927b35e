"""Debian 12's Linux 6.1: VFIO as it was before iommufd and cdevs. What is not there is refused by name."""

from __future__ import annotations

import pytest
from ioctl_support import PAGE, Memory, linux, opened

from vfiopy import kernel
from vfiopy.backend import Area, HostMemory, Prot, RegionIndex
from vfiopy.errors import NotSupportedError

pytestmark = pytest.mark.machine("old")


def test_this_is_an_old_kernel() -> None:
    assert linux() < (6, 2)


@pytest.mark.parametrize("backend", ["iommufd", "iommufd-compat-type1v2", "iommufd-compat-type1"])
def test_no_iommufd(backend: str, edu: str) -> None:
    with pytest.raises(NotSupportedError, match="there is no /dev/iommu") as caught:
        kernel.connect(edu, backend=backend)
    assert "backend='type1v2'" in caught.value.hint


@pytest.mark.parametrize("backend", [None, "type1v2", "type1"])
def test_type1_works(backend: str | None, edu: str) -> None:
    with opened(edu, backend) as (io, mapper), Memory(4 * PAGE) as memory:
        assert io.backend == backend or backend is None
        assert io.backend.startswith("type1")
        assert io.read(0, 0, 4) == bytes.fromhex("ed000001")
        assert len(mapper.ranges()) == 2
        mapper.map(0x100000, HostMemory(memory.address, memory.size, True, memory), Prot.RW)
        assert mapper.unmap(0x100000, memory.size) == memory.size
        with io.map_region(0, 0, 1 << 20) as window:
            assert window.address % (1 << 20) == 0
        assert io.region_info(RegionIndex.VGA).size == 0


def test_no_dma_buf(edu: str) -> None:
    with opened(edu) as (io, _):
        with pytest.raises(NotSupportedError, match="this kernel cannot export BARs as dma-bufs") as caught:
            io.calls.dma_buf(0, [Area(0, PAGE)])
        assert "Linux 6.19 or later" in caught.value.hint
