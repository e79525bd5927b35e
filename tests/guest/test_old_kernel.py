"""Linux 6.1, as Debian 12 has it: VFIO works, and what came later is refused by name, not by a bare errno."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from modes import EDU

import vfiopy
from vfiopy.drivers.edu import EduDriver

Lookup = Callable[..., str]

pytestmark = pytest.mark.machine("old")


@pytest.fixture
def edu(bdf: Lookup) -> Iterator[str]:
    address = bdf(EDU)
    with vfiopy.bind(address):
        yield address


def test_open_takes_the_group_by_itself(edu: str) -> None:
    with vfiopy.open(edu) as device:
        assert device.backend == "type1v2"


@pytest.mark.parametrize("backend", ["iommufd", "iommufd-compat-type1", "iommufd-compat-type1v2"])
def test_asking_for_iommufd_says_that_the_kernel_has_none(edu: str, backend: str) -> None:
    with pytest.raises(vfiopy.NotSupportedError, match="there is no /dev/iommu") as caught:
        vfiopy.open(edu, backend=backend)
    assert "use backend='type1v2'" in str(caught.value)
    with vfiopy.open(edu) as device:  # and nothing was left half open
        assert device.config.vendor == 0x1234


@pytest.mark.parametrize("backend", ["type1", "type1v2"])
def test_dma_and_msi_work(edu: str, backend: str) -> None:
    with vfiopy.open(edu, backend=backend) as device:
        driver = EduDriver(device)
        device.bus_master = True
        driver.enable_interrupts("msi")
        with device.dma.allocate(512, dtype="u1") as source, device.dma.allocate(512, dtype="u1") as target:
            source[:] = np.arange(512) % 251
            target[:] = 0
            driver.load(source.iova, 512, timeout=10.0)
            driver.store(target.iova, 512, timeout=10.0)
            assert np.array_equal(source, target)
