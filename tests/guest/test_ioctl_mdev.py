"""Migration on the kernel's mtty sample, graphics on its mbochs sample: the only such devices a guest has."""

from __future__ import annotations

import mmap
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ioctl_support import wait_for

from vfiopy import uapi
from vfiopy.backend import Area, IrqAction, IrqIndex
from vfiopy.errors import NotSupportedError, VfioError
from vfiopy.kernel.ioctl import DeviceFd, IommufdFd, MigrationFd, MigrationFlag, MigrationState

STATES = MigrationState


@contextmanager
def mdev(parent: str, kind: str) -> Iterator[DeviceFd]:
    """Make a mediated device and open it through its cdev, bound to an iommufd."""
    name = str(uuid.uuid4())
    types = next(Path("/sys/class/mdev_bus").glob(f"{parent}*")) / "mdev_supported_types"
    wanted = next(path for path in types.iterdir() if path.name.endswith(kind))
    (wanted / "create").write_text(name)
    device = Path("/sys/bus/mdev/devices") / name
    try:
        node = next((device / "vfio-dev").iterdir()).name
        with IommufdFd.open("/dev/iommu") as iommufd, DeviceFd.open(f"/dev/vfio/devices/{node}", kind) as fd:
            fd.bind_iommufd(iommufd)
            fd.attach_iommufd_pt(iommufd.ioas_alloc())
            yield fd
    finally:
        (device / "remove").write_text("1")
        assert wait_for(lambda: not device.exists())


@pytest.fixture
def mtty() -> Iterator[DeviceFd]:
    with mdev("mtty", "mtty-2") as fd:
        yield fd


@pytest.fixture
def mbochs() -> Iterator[DeviceFd]:
    with mdev("mbochs", "small") as fd:
        yield fd


def read_all(stream: MigrationFd) -> bytes:
    data = b""
    while chunk := stream.read(4096):
        data += chunk
    return data


def test_stop_copy_and_resume(mtty: DeviceFd) -> None:
    assert mtty.migration_flags() == MigrationFlag.STOP_COPY | MigrationFlag.P2P | MigrationFlag.PRE_COPY
    assert mtty.migration_state() is STATES.RUNNING
    assert mtty.set_migration_state(STATES.STOP) is None
    size = mtty.migration_data_size()
    assert size > 0
    stream = mtty.set_migration_state(STATES.STOP_COPY)
    assert stream is not None
    assert not os.get_inheritable(stream.fileno())
    with stream:
        state = read_all(stream)
    assert len(state) == size
    assert mtty.set_migration_state(STATES.STOP) is None
    stream = mtty.set_migration_state(STATES.RESUMING)
    assert stream is not None
    with stream:
        assert stream.write(state) == len(state)
        assert mtty.set_migration_state(STATES.STOP) is None
        with pytest.raises(VfioError, match="belongs to an earlier migration"):
            stream.write(b"more")
    mtty.set_migration_state(STATES.RUNNING)
    assert mtty.migration_state() is STATES.RUNNING


def test_arcs_that_do_not_exist(mtty: DeviceFd) -> None:
    with pytest.raises(VfioError, match="there is no way from the device's state to this one"):
        mtty.set_migration_state(STATES.ERROR)
    assert mtty.migration_state() is STATES.RUNNING


def test_precopy(mtty: DeviceFd) -> None:
    mtty.enable_precopy_info_v2()
    stream = mtty.set_migration_state(STATES.PRE_COPY)
    assert stream is not None
    with stream:
        info = stream.get_precopy_info()
        assert info.initial_bytes > 0
        assert info.dirty_bytes == 0
        first = stream.read(1 << 16)
        assert len(first) == info.initial_bytes
        assert stream.read(16) == b""  # other drivers say ENOMSG, which is tested with the table
        assert mtty.set_migration_state(STATES.STOP_COPY) is None  # the same stream goes on
        assert read_all(stream)
    mtty.set_migration_state(STATES.RUNNING)


def test_dma_logging(mtty: DeviceFd) -> None:
    assert mtty.feature_probe(uapi.VFIO_DEVICE_FEATURE_DMA_LOGGING_START, uapi.VFIO_DEVICE_FEATURE_SET)
    mtty.dma_logging_start(4096, [Area(0, 1 << 20), Area(1 << 21, 1 << 20)])
    assert not any(mtty.dma_logging_report(0, 1 << 20, 4096))
    mtty.dma_logging_stop()
    for ranges in ([], [Area(0, 8192), Area(4096, 4096)], [Area(1, 4096)]):
        with pytest.raises(VfioError, match="there is no range, or ranges overlap"):
            mtty.dma_logging_start(4096, ranges)
    with pytest.raises(VfioError, match="more than 256 ranges"):
        mtty.dma_logging_start(4096, [Area(number << 20, 4096) for number in range(300)])


def test_interrupts_of_a_mediated_device(mtty: DeviceFd) -> None:
    assert mtty.get_info().num_irqs > 0  # mtty takes the number from this call
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        mtty.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 1, fds=[fd])
        mtty.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 1)
        assert os.eventfd_read(fd) == 1
    finally:
        os.close(fd)
    mtty.reset()


def test_graphics_plane(mbochs: DeviceFd) -> None:
    region = mbochs.get_region_info(9)
    assert region.type == (uapi.VFIO_REGION_TYPE_GFX, uapi.VFIO_REGION_SUBTYPE_GFX_EDID)
    dmabuf = uapi.VFIO_GFX_PLANE_TYPE_DMABUF
    mbochs.query_gfx_plane(uapi.VFIO_GFX_PLANE_TYPE_PROBE | dmabuf)
    with pytest.raises(NotSupportedError, match="does not offer this kind of plane"):
        mbochs.query_gfx_plane(uapi.VFIO_GFX_PLANE_TYPE_PROBE | uapi.VFIO_GFX_PLANE_TYPE_REGION)
    # Program a mode of 64x80 at 32 bit through the Bochs display's registers in BAR 2.
    registers = mbochs.get_region_info(2).offset + 0x500
    for index, value in ((4, 0), (1, 64), (2, 80), (3, 32), (6, 64), (4, 0x41)):
        mbochs.pwrite(registers + 2 * index, value.to_bytes(2, "little"))
    try:
        plane = mbochs.query_gfx_plane(dmabuf)
    except VfioError:  # mbochs makes the buffer and forgets it (ENOMEM), then finds it
        plane = mbochs.query_gfx_plane(dmabuf)
    assert (plane.width, plane.height, plane.stride) == (64, 80, 256)
    assert plane.size >= 64 * 80 * 4
    with mbochs.get_gfx_dmabuf(plane.target) as buffer:
        assert buffer.size >= plane.size
        assert buffer.identity().startswith("/dmabuf:")
        # mbochs exports read-only and then insists on a shared mapping, which read-only files never get.
        with pytest.raises(NotSupportedError, match="the exporter has no mmap"):
            buffer.map(0, 4096, mmap.PROT_READ)
    with pytest.raises(VfioError, match="no dma-buf of this id"):
        mbochs.get_gfx_dmabuf(0x7FFF)
    with pytest.raises(VfioError) as caught:
        mbochs.ioeventfd(0, 0, 4, -1)
    assert caught.value.call == "VFIO_DEVICE_IOEVENTFD"
