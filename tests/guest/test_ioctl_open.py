"""Opening devices in all modes, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ioctl_support import PAGE, Memory, bound
from modes import EDU, MODES, NVME

from vfiopy import kernel
from vfiopy.backend import HostMemory, IrqIndex, Prot, RegionIndex
from vfiopy.errors import StateError

Bdf = Callable[..., str]


@pytest.mark.parametrize("mode", MODES)
def test_open_read_map_close(mode: str, edu: str) -> None:
    io, mapper = kernel.connect(edu, backend=mode)
    assert io.backend == mode
    assert io.info().is_pci
    assert io.region_info(RegionIndex.BAR0).size == 1 << 20
    assert io.region_info(RegionIndex.BAR3).size == 0
    assert io.irq_info(IrqIndex.MSI).count == 1
    assert io.read(RegionIndex.CONFIG, 0, 4) == bytes.fromhex("3412e811")
    assert io.read(RegionIndex.BAR0, 0, 4) == bytes.fromhex("ed000001")
    ranges = mapper.ranges()
    assert ranges[0].first == 0
    assert mapper.traits().page_sizes & PAGE
    with Memory(4 * PAGE) as memory:
        host = HostMemory(memory.address, memory.size, True, memory)
        mapper.map(0x10000, host, Prot.RW)
        assert mapper.unmap(0x10000, memory.size) == memory.size
    window = io.map_region(RegionIndex.BAR0, 0, 1 << 20)
    with pytest.raises(StateError, match=r"BAR 0"):
        io.close()
    with pytest.raises(StateError, match=edu):
        mapper.close()
    window.close()
    io.close()
    mapper.close()
    assert not io
    assert not mapper


@pytest.mark.parametrize("mode", MODES)
def test_two_devices_in_one_space(mode: str, bdf: Bdf) -> None:
    first, second = bdf(EDU), bdf(NVME)
    with bound(first, second):
        a, mapper = kernel.connect(first, backend=mode)
        b, same = kernel.connect(second, backend=mode, mappers=[mapper])
        assert same is mapper
        a.close()
        b.close()
        mapper.close()
