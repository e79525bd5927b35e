"""Fixtures of the tests of groups and containers; conftest.py hands them out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ioctl_support import PAGE, Memory, bound, lab_machine
from modes import EDU

from vfiopy import pci, uapi
from vfiopy.kernel.ioctl import ContainerFd, GroupFd

needs_type1 = pytest.mark.skipif(
    lab_machine() == "compat", reason="this kernel has no type1: iommufd serves /dev/vfio/vfio"
)


@pytest.fixture
def edu(bdf: Callable[..., str]) -> Iterator[str]:
    """Address of the first edu, on vfio-pci."""
    address = bdf(EDU)
    with bound(address):
        yield address


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Memory to map."""
    with Memory(8 * PAGE) as memory:
        yield memory


@pytest.fixture
def group(edu: str) -> Iterator[GroupFd]:
    """The edu's group."""
    with GroupFd.open(f"/dev/vfio/{pci.function(edu).iommu_group}") as group:
        yield group


@pytest.fixture
def container(group: GroupFd) -> Iterator[ContainerFd]:
    """A type1v2 container with the edu's group in it."""
    with ContainerFd.open("/dev/vfio/vfio") as container:
        if container.is_iommufd():
            pytest.skip("this kernel has no type1: iommufd serves /dev/vfio/vfio")
        group.set_container(container)
        container.set_iommu(uapi.VFIO_TYPE1v2_IOMMU)
        yield container
        group.unset_container()
