"""VFIO_DEVICE_FEATURE and the cdev's ioctls against the real kernel."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ioctl_support import PAGE, bound, driver, opened, wait_for
from modes import EDU, IGB, IVSHMEM, NVME

from vfiopy import kernel, pci, uapi
from vfiopy.backend import Area, RegionIndex
from vfiopy.errors import (
    AddressRangeError,
    AlignmentError,
    BusyError,
    DeviceGoneError,
    NotSupportedError,
    PermissionDeniedError,
    RevokedError,
    VfioError,
    WrongFdError,
)
from vfiopy.kernel.cdev import open_cdev
from vfiopy.kernel.ioctl import DeviceFd, IommufdFd

Bdf = Callable[..., str]
GET, SET = uapi.VFIO_DEVICE_FEATURE_GET, uapi.VFIO_DEVICE_FEATURE_SET


@pytest.fixture
def iommufd() -> Iterator[IommufdFd]:
    with IommufdFd.open("/dev/iommu") as fd:
        yield fd


# --- cdev -------------------------------------------------------------------------------------------------------


def test_a_cdev_does_nothing_before_it_is_bound(edu: str) -> None:
    with open_cdev(pci.function(edu)) as fd:
        assert stat.S_ISCHR(os.fstat(fd.fileno()).st_mode)
        assert not os.get_inheritable(fd.fileno())
        for call in (fd.get_info, lambda: fd.get_region_info(0), fd.reset, lambda: fd.attach_iommufd_pt(1)):
            with pytest.raises(VfioError):
                call()
        with pytest.raises(VfioError, match="not bound to an iommufd yet"):
            fd.get_info()


def test_bind_attach_replace_detach(edu: str, iommufd: IommufdFd) -> None:
    with open_cdev(pci.function(edu)) as fd:
        assert fd.bind_iommufd(iommufd) > 0
        with pytest.raises(BusyError, match="the device is bound already"):
            fd.bind_iommufd(iommufd)
        first, second = iommufd.ioas_alloc(), iommufd.ioas_alloc()
        hwpt = fd.attach_iommufd_pt(first)
        assert hwpt != first
        with pytest.raises(BusyError, match="an attached device still uses it"):
            iommufd.destroy(first)
        fd.attach_iommufd_pt(second)
        iommufd.destroy(first)
        for wrong in (0xFFFFFFFF, first):
            with pytest.raises(VfioError, match=rf"no object of this id.*\(to object {wrong}\)"):
                fd.attach_iommufd_pt(wrong)
        fd.detach_iommufd_pt()
        fd.detach_iommufd_pt()
        iommufd.destroy(second)


def test_one_opener(edu: str, iommufd: IommufdFd) -> None:
    with open_cdev(pci.function(edu)) as first, open_cdev(pci.function(edu)) as second:
        first.bind_iommufd(iommufd)
        with pytest.raises(BusyError, match="open through another fd"):
            second.bind_iommufd(iommufd)


def test_bind_to_what_is_no_iommufd(edu: str) -> None:
    with open_cdev(pci.function(edu)) as fd:
        null = IommufdFd(os.open(os.devnull, os.O_RDWR), "/dev/null")
        with pytest.raises(WrongFdError, match="the fd given as iommufd is not one"):
            fd.bind_iommufd(null)
        null.close()


def test_a_token_where_none_is_used(edu: str) -> None:
    for mode in ("iommufd", "type1v2"):
        with pytest.raises(VfioError, match="a VF token was given that"):
            kernel.connect(edu, backend=mode, vf_token=uuid.uuid4())


def test_adopted_over_a_socket(edu: str) -> None:
    import socket  # noqa: PLC0415

    here, there = socket.socketpair()
    with here, there, open_cdev(pci.function(edu)) as fd:
        socket.send_fds(here, [b"x"], [fd.fileno()])
        _, fds, _, _ = socket.recv_fds(there, 1, 1)
        try:
            io, mapper = kernel.connect(edu, device_fd=fds[0])
            assert io.backend == "iommufd"
            assert io.read(0, 0, 4) == bytes.fromhex("ed000001")
            io.close()
            mapper.close()  # although the launcher still has the fd
        finally:
            os.close(fds[0])


def test_a_group_device_adopted_with_its_container(edu: str) -> None:
    with opened(edu, "type1v2") as (launcher, launchers):
        assert isinstance(launchers, kernel.ContainerMapper)
        own = kernel.ContainerMapper.adopt(launchers.container.fileno())
        assert own.container.model == "type1v2"
        io, mapper = kernel.connect(edu, device_fd=launcher.fileno(), mappers=[own])
        assert mapper is own
        assert mapper.ranges() == launchers.ranges()
        io.close()
        own.close()
        io, mapper = kernel.connect(edu, device_fd=launcher.fileno())
        assert isinstance(mapper, kernel.ForeignMapper)
        assert io.read(0, 0, 4) == bytes.fromhex("ed000001")
        io.close()
        mapper.close()


@pytest.mark.parametrize("node", ["/dev/vfio/vfio", "/dev/iommu", "/dev/null"])
def test_only_a_device_is_adopted_as_a_device(edu: str, node: str) -> None:
    fd = os.open(node, os.O_RDWR)
    try:
        with pytest.raises(WrongFdError, match="not a VFIO device"):
            kernel.connect(edu, device_fd=fd)
    finally:
        os.close(fd)


# --- features ---------------------------------------------------------------------------------------------------


def test_probe(edu: str) -> None:
    with opened(edu) as (io, _):
        yes = {number for number in range(16) if io.calls.feature_probe(number)}
        assert uapi.VFIO_DEVICE_FEATURE_DMA_BUF in yes
        assert uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY in yes
        assert uapi.VFIO_DEVICE_FEATURE_MIGRATION not in yes
        assert 15 not in yes
        # edu is no physical function: the token feature is there, but not for it
        for call in (io.calls.migration_flags, io.calls.migration_state, io.calls.dma_logging_stop):
            with pytest.raises(NotSupportedError, match="VFIO_DEVICE_FEATURE_"):
                call()
        with pytest.raises(NotSupportedError, match="not an SR-IOV physical function"):
            io.calls.set_vf_token(uuid.uuid4())
        with pytest.raises(NotSupportedError, match="does not have this feature"):
            io.calls.bus_master(True)
        with pytest.raises(VfioError, match="does not have this operation"):
            io.calls.feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, GET, b"")


def test_low_power(edu: str) -> None:
    with opened(edu) as (io, _):
        io.calls.low_power_entry()
        with pytest.raises(VfioError, match="in this low-power mode already"):
            io.calls.low_power_entry()
        io.calls.low_power_exit()
        io.calls.low_power_exit()
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            io.calls.low_power_entry(fd)
            io.calls.low_power_exit()
            with pytest.raises(VfioError, match="the wake-up fd is not an eventfd"):
                io.calls.low_power_entry(1)
        finally:
            os.close(fd)
        assert io.read(0, 0, 4) == bytes.fromhex("ed000001")


# --- dma-buf ----------------------------------------------------------------------------------------------------


@pytest.fixture
def exporter(bdf: Bdf) -> Iterator[kernel.KernelDeviceIo]:
    address = bdf(IVSHMEM)
    with bound(address), opened(address) as (io, _):
        yield io


def test_export_of_a_bar(exporter: kernel.KernelDeviceIo) -> None:
    size = exporter.region_info(2).size
    assert size == 16 << 20
    with exporter.calls.dma_buf(2, [Area(0, size)]) as buffer:
        assert buffer.size == size
        assert not os.get_inheritable(buffer.fileno())
        assert "exp_name:\tvfio_pci_core" in Path(f"/proc/self/fdinfo/{buffer.fileno()}").read_text()
        assert buffer.identity().startswith("/dmabuf:")
        with pytest.raises(NotSupportedError, match="a dma-buf of a PCI BAR never has") as caught:
            buffer.map(0, PAGE, 3)
        assert "through its device" in caught.value.hint
    with exporter.calls.dma_buf(2, [Area(0x1000, 0x2000), Area(0x8000, 0x1000)]) as buffer:
        assert buffer.size == 0x3000


@pytest.mark.parametrize(
    ("region", "areas", "kind", "says"),
    [
        (2, [], AlignmentError, "whole pages"),
        (2, [Area(0, 0)], AlignmentError, "whole pages"),
        (2, [Area(1, PAGE)], AlignmentError, "whole pages"),
        (2, [Area(0, 100)], AlignmentError, "whole pages"),
        (2, [Area(16 << 20, PAGE)], AlignmentError, "inside of a memory BAR"),
        (0, [Area(0, PAGE)], AlignmentError, "smaller than a page"),
        (5, [Area(0, PAGE)], NotSupportedError, "only BARs can be exported"),
        (RegionIndex.CONFIG, [Area(0, PAGE)], NotSupportedError, "not ROM or config space"),
    ],
)
def test_export_refusals(
    exporter: kernel.KernelDeviceIo, region: int, areas: list[Area], kind: type[VfioError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        exporter.calls.dma_buf(region, areas)
    assert caught.value.call == "VFIO_DEVICE_FEATURE_DMA_BUF"


def test_the_seams_feature_returns_the_fd(exporter: kernel.KernelDeviceIo) -> None:
    layout, item = uapi.vfio_device_feature_dma_buf, uapi.vfio_region_dma_range
    data = layout.new(item.size, region_index=2, open_flags=os.O_RDWR | os.O_CLOEXEC, nr_ranges=1)
    item.put(data, "length", PAGE, layout.size)
    fd = int.from_bytes(exporter.feature(uapi.VFIO_DEVICE_FEATURE_DMA_BUF, GET, bytes(data)), "little", signed=True)
    assert str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("/dmabuf:")
    os.close(fd)


def test_import_and_revocation(exporter: kernel.KernelDeviceIo, bdf: Bdf) -> None:
    other = bdf(EDU)
    with bound(other), opened(other, "iommufd") as (io, mapper):
        assert isinstance(mapper, kernel.IoasMapper)
        ioas = mapper.ioas
        with exporter.calls.dma_buf(2, [Area(0, 0x4000)]) as buffer:
            iova = ioas.map_file(buffer.fileno(), 0, 0x4000)
            with pytest.raises(VfioError, match="overlaps one that is mapped"):
                ioas.map_file(buffer.fileno(), 0, 0x4000, iova=iova)
            with pytest.raises(VfioError, match="goes past its end"):
                ioas.map_file(buffer.fileno(), 0, 0x5000)
            assert ioas.unmap(iova, 0x4000) == 0x4000
            command = exporter.read(RegionIndex.CONFIG, 4, 2)
            exporter.write(RegionIndex.CONFIG, 4, bytes(2))
            with pytest.raises(RevokedError, match="its memory decode is off") as caught:
                ioas.map_file(buffer.fileno(), 0, 0x4000)
            assert "import again" in caught.value.hint
            exporter.write(RegionIndex.CONFIG, 4, command)
            iova = ioas.map_file(buffer.fileno(), 0, 0x4000)
            assert ioas.unmap(iova, 0x4000) == 0x4000
        with (
            exporter.calls.dma_buf(2, [Area(0, 0x1000), Area(0x2000, 0x1000)]) as buffer,
            pytest.raises(NotSupportedError, match="made of one range"),
        ):
            ioas.map_file(buffer.fileno(), 0, 0x2000)
        with exporter.map_region(2, 0, PAGE) as window, pytest.raises(VfioError, match="is it a PCI BAR"):
            ioas.map(window.address, PAGE)
        assert io


def test_a_reset_exporter_takes_its_memory_back(bdf: Bdf) -> None:
    address, other = bdf(NVME), bdf(EDU)
    with bound(address, other), opened(address) as (exporter, _), opened(other, "iommufd") as (_, mapper):
        assert isinstance(mapper, kernel.IoasMapper)
        bar = next(i for i in range(6) if exporter.region_info(i).size >= 16 << 20)
        with exporter.calls.dma_buf(bar, [Area(0, PAGE)]) as buffer:
            iova = mapper.ioas.map_file(buffer.fileno(), 0, PAGE)
            exporter.reset()
            # The IOVA stays taken, and dead, until it is unmapped.
            with pytest.raises(VfioError, match="overlaps"):
                mapper.ioas.map_file(buffer.fileno(), 0, PAGE, iova=iova)
            assert mapper.ioas.unmap(iova, PAGE) == PAGE
            again = mapper.ioas.map_file(buffer.fileno(), 0, PAGE, iova=iova)
            assert again == iova
            mapper.ioas.unmap_all()


# --- SR-IOV -----------------------------------------------------------------------------------------------------


def test_vf_token(bdf: Bdf) -> None:
    switch = Path("/sys/module/vfio_pci/parameters/enable_sriov")
    if not switch.exists():
        switch = Path("/sys/module/vfio_pci_core/parameters/enable_sriov")
    switch.write_text("Y")
    address, token = bdf(IGB), uuid.uuid4()
    numvfs = Path(f"/sys/bus/pci/devices/{address}/sriov_numvfs")
    with bound(address):
        try:
            with opened(address) as (physical, _):
                physical.calls.set_vf_token(token)
                with pytest.raises(VfioError, match="does not have this operation"):
                    physical.calls.feature(uapi.VFIO_DEVICE_FEATURE_PCI_VF_TOKEN, GET, bytes(16))
                numvfs.write_text("1")
                virtual = str(pci.function(address).virtual_functions()[0].address)
                assert wait_for(lambda: driver(virtual) == "vfio-pci")
                for mode in ("iommufd", "type1v2"):
                    for wrong in (None, uuid.uuid4()):
                        with pytest.raises(PermissionDeniedError, match="the VF token is missing or not the one"):
                            kernel.connect(virtual, backend=mode, vf_token=wrong)
                    with opened(virtual, mode, vf_token=token) as (io, _):
                        assert io.info().is_pci
        finally:
            numvfs.write_text("0")
            switch.write_text("N")


def test_a_device_that_is_gone_says_so(edu: str) -> None:
    """Out of range of what the device has: DeviceGone is for what does not answer, not for what is asked wrongly."""
    with opened(edu) as (io, _):
        with pytest.raises(AddressRangeError):
            io.read(0, 1 << 20, 4)
        io.write(RegionIndex.CONFIG, 4, bytes(2))
        with pytest.raises(DeviceGoneError):
            io.read(0, 0, 4)
        assert isinstance(io.calls, DeviceFd)
        assert SET
