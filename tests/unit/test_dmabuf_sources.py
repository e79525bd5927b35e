"""Exporting a BAR where it cannot be done: kernels and drivers that no lab machine has."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from kernel_fake import FakeVfio, File

import vfiopy
from vfiopy import DmaBuf, uapi
from vfiopy.backend import Area
from vfiopy.device import Regions
from vfiopy.errors import NotSupportedError
from vfiopy.kernel import KernelDeviceIo
from vfiopy.kernel.ioctl import DeviceFd


@pytest.fixture
def bar(vfio: FakeVfio) -> Iterator[vfiopy.Region]:
    file = File("cdev", "vfio/devices/vfio0", state={"bound": True})
    io = KernelDeviceIo(DeviceFd(vfio._new(file), "0000:00:1e.0"), "iommufd", iommufd_id=1)
    regions = Regions(io, 6, {})
    yield regions[0]
    regions.close()
    io.close()
    assert not vfio.left()


@pytest.mark.parametrize(
    ("code", "says", "hint"),
    [
        (errno.ENOTTY, "this kernel cannot export", "Linux 6.19"),
        (errno.EOPNOTSUPP, "this device's driver cannot export", "plain vfio-pci"),
    ],
)
def test_a_kernel_or_a_driver_that_cannot_export(
    vfio: FakeVfio, bar: vfiopy.Region, monkeypatch: pytest.MonkeyPatch, code: int, says: str, hint: str
) -> None:
    vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = lambda *_: -code
    with pytest.raises(NotSupportedError, match=says) as caught:
        DmaBuf.of_bar(bar, Area(0, 0x1000))
    assert hint in caught.value.hint
    monkeypatch.setattr(KernelDeviceIo, "read", lambda *_: b"\2\0")  # the command register: memory decode is on
    with vfiopy.AddressSpace("peer") as space:
        with pytest.raises(NotSupportedError, match=says):
            space.peer(bar, size=0x1000)
        assert not space.book.mappings()


def test_the_close_of_a_device_is_the_end_of_its_memory(vfio: FakeVfio) -> None:
    file = File("cdev", "vfio/devices/vfio0", state={"bound": True})
    io = KernelDeviceIo(DeviceFd(vfio._new(file), "0000:00:1e.1"), "iommufd", iommufd_id=1)
    signals = io.signals
    assert not signals.over
    io.close()
    assert signals.over
