"""Groups and the order of things against the real kernel: who may open what when, and what stands in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from ioctl_fixtures import needs_type1
from ioctl_support import PAGE, Memory, bound, lab_machine, opened
from modes import EDU, MODES

from vfiopy import kernel, pci, uapi
from vfiopy.errors import (
    BusyError,
    NotBoundError,
    NotSupportedError,
    NotViableError,
    VfioError,
)
from vfiopy.kernel.ioctl import ContainerFd, GroupFd, IommufdFd
from vfiopy.kernel.ioctl._call import os_calls

Bdf = Callable[..., str]
RW = uapi.VFIO_DMA_MAP_FLAG_READ | uapi.VFIO_DMA_MAP_FLAG_WRITE
VADDR = uapi.VFIO_DMA_MAP_FLAG_VADDR


# --- order of things --------------------------------------------------------------------------------------------


def test_versions_and_extensions() -> None:
    with ContainerFd.open("/dev/vfio/vfio") as container:
        assert container.get_api_version() == uapi.VFIO_API_VERSION
        assert container.is_iommufd() is (lab_machine() == "compat")
        assert container.check_extension(uapi.VFIO_TYPE1v2_IOMMU)
        assert not container.check_extension(uapi.VFIO_UPDATE_VADDR)  # the model's to say, and none is chosen
        assert not container.check_extension(2)  # sPAPR
        for refused in (container.iommu_get_info, container.unmap_all, lambda: container.set_iommu(3)):
            with pytest.raises(VfioError):
                refused()
    with IommufdFd.open("/dev/iommu") as iommufd, iommufd.as_container() as container:
        assert container.get_api_version() == uapi.VFIO_API_VERSION
        assert container.check_extension(uapi.VFIO_TYPE1v2_IOMMU)


@needs_type1
def test_set_iommu_needs_a_group_and_is_final(group: GroupFd) -> None:
    with ContainerFd.open("/dev/vfio/vfio") as container:
        with pytest.raises(VfioError, match="VFIO_GROUP_SET_CONTAINER, then VFIO_SET_IOMMU"):
            container.set_iommu(uapi.VFIO_TYPE1v2_IOMMU)
        group.set_container(container)
        with pytest.raises(NotSupportedError, match=r"no IOMMU driver in this kernel offers the model.*\(model 2\)"):
            container.set_iommu(2)
        container.set_iommu(uapi.VFIO_TYPE1v2_IOMMU)
        with pytest.raises(VfioError, match="has been chosen already"):
            container.set_iommu(uapi.VFIO_TYPE1v2_IOMMU)
        with pytest.raises(VfioError, match="the group is in a container already"):
            group.set_container(container)
        group.unset_container()
        with pytest.raises(VfioError, match="the group is in no container"):
            group.unset_container()


@needs_type1
def test_device_needs_container_and_model(edu: str, group: GroupFd) -> None:
    with pytest.raises(VfioError, match="the group is in no container"):
        group.get_device_fd(edu)
    assert group.get_status() == (True, False)
    with ContainerFd.open("/dev/vfio/vfio") as container:
        group.set_container(container)
        assert group.get_status() == (True, True)
        with pytest.raises(VfioError, match="its IOMMU model has not been chosen"):
            group.get_device_fd(edu)
        container.set_iommu(uapi.VFIO_TYPE1v2_IOMMU)
        with pytest.raises(NotBoundError, match=r"\(device 0000:ff:1f\.7\)"):
            group.get_device_fd("0000:ff:1f.7")
        group.unset_container()


def test_a_group_has_one_opener(edu: str, group: GroupFd) -> None:
    with pytest.raises(BusyError, match="the group is open already"):
        GroupFd.open(group.label)
    with pytest.raises(BusyError, match="in one process put all devices of a group into one space"):
        kernel.connect(edu, backend="type1v2")


def test_group_and_cdev_exclude_each_other(edu: str, group: GroupFd) -> None:
    with pytest.raises(NotViableError, match="the device's group is open") as caught:
        kernel.connect(edu, backend="iommufd")
    assert "close /dev/vfio/N" in caught.value.hint


def test_a_bound_cdev_keeps_the_group_closed(edu: str) -> None:
    with opened(edu, "iommufd"), pytest.raises(BusyError, match="cdev"):
        kernel.connect(edu, backend="type1v2")


def test_unset_container_waits_for_the_last_mapping_of_a_bar(edu: str, group: GroupFd, container: ContainerFd) -> None:
    with group.get_device_fd(edu) as fd:
        address = fd.map(fd.get_region_info(0).offset, PAGE, 3, 0)
        with pytest.raises(BusyError, match="still open, or a BAR of it is still mapped"):
            group.unset_container()
    try:
        # The mapping holds the open file, although no fd is left.
        with pytest.raises(BusyError, match="unmap the BARs"):
            group.unset_container()
    finally:
        assert os_calls().munmap(address, PAGE) == 0


def test_not_a_container(group: GroupFd) -> None:
    with open(os.devnull, "rb") as null:  # noqa: PTH123  an fd that is neither
        impostor = ContainerFd(os.dup(null.fileno()), "/dev/null")
    with pytest.raises(VfioError, match="neither a VFIO container nor an iommufd"):
        group.set_container(impostor)
    impostor.close()


def test_what_blocks_a_group_and_what_does_not(bdfs: Callable[[str], list[str]]) -> None:
    behind = next(one for one in bdfs(EDU) if len(pci.function(one).group_members()) > 1)
    sibling = next(
        str(one.address)
        for one in pci.function(behind).group_members()
        if str(one.address) != behind and not one.is_bridge
    )
    with ExitStack() as stack:
        stack.enter_context(bound(behind))
        # Bridges of the group have pcieport or no driver: they must not count.
        with opened(behind, "type1v2"):
            pass
        # pci-stub lets user space have the DMA; a driver that takes it is needed to block.
        with bound(sibling, to="pci-stub"), opened(behind, "type1v2"):
            pass
        # pci-pf-stub leaves DMA to the kernel, as native drivers do.
        stack.enter_context(bound(sibling, to="pci-pf-stub"))
        with GroupFd.open(f"/dev/vfio/{pci.function(behind).iommu_group}") as group:
            assert not group.get_status().viable
            with ContainerFd.open("/dev/vfio/vfio") as container, pytest.raises(VfioError) as caught:
                group.set_container(container)
            assert "to vfio-pci or to nothing" in caught.value.hint
        for mode in MODES:
            with pytest.raises(NotViableError, match=rf"native drivers hold {sibling} \(pci-pf-stub\)"):
                kernel.connect(behind, backend=mode)


@needs_type1
def test_the_container_forgets_with_its_last_group(group: GroupFd, memory: Memory) -> None:
    with ContainerFd.open("/dev/vfio/vfio") as container:
        for _ in range(2):
            group.set_container(container)
            container.set_iommu(uapi.VFIO_TYPE1v2_IOMMU)
            container.map_dma(memory.address, 0x100000, PAGE, RW)  # would overlap if the first were still there
            group.unset_container()
