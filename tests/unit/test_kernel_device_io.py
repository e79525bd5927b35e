"""KernelDeviceIo and the kernel's objects: reads and writes, what is cached, how things end."""

from __future__ import annotations

import errno
import gc
import os
import struct
import warnings
from collections.abc import Iterator

import pytest
from kernel_fake import BAR0_SIZE, FakeVfio, File

from vfiopy import uapi
from vfiopy.backend import DeviceWindow, FileMemory, HostMemory, IrqAction, Prot, RegionIndex
from vfiopy.errors import (
    AddressRangeError,
    BusyError,
    ClosedError,
    DeviceGoneError,
    MemoryKindError,
    NotSupportedError,
    NotViableError,
    StateError,
)
from vfiopy.kernel import ContainerMapper, GroupOnIommufdMapper, IoasMapper, Iommufd, KernelDeviceIo, hot_reset
from vfiopy.kernel.device_io import region_name
from vfiopy.kernel.ioctl import DeviceFd
from vfiopy.lives import drain_finalizers


@pytest.fixture
def io(vfio: FakeVfio) -> Iterator[KernelDeviceIo]:
    with make(vfio) as device:
        yield device


def make(vfio: FakeVfio) -> KernelDeviceIo:
    file = File("cdev", "vfio/devices/vfio0", state={"bound": True})
    return KernelDeviceIo(DeviceFd(vfio._new(file), "0000:00:04.0"), "iommufd", iommufd_id=1)


# --- regions ----------------------------------------------------------------------------------------------------


def test_an_aligned_access_is_one_system_call(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    io.region_info(0)
    io.write(0, 0, bytes(4))  # the first asks where configuration space is, to watch writes to it
    for width in (1, 2, 4, 8):
        vfio.log.clear()
        assert io.read(0, 8, width) == bytes(range(8, 8 + width))
        io.write(0, 8, bytes(range(8, 8 + width)))
        assert vfio.log == ["pread", "pwrite"]


def test_short_counts_are_continued(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    assert io.read(0, 0, 1000) == bytes(vfio.bars[:1000])
    data = bytes(255 - n & 0xFF for n in range(300))
    io.write(0, 100, data)
    assert bytes(vfio.bars[100:400]) == data
    assert vfio.bars[400] == 400 & 0xFF


@pytest.mark.parametrize(("offset", "size"), [(BAR0_SIZE, 1), (BAR0_SIZE - 3, 4), (-1, 1), (0, BAR0_SIZE + 1)])
def test_outside_of_a_region(io: KernelDeviceIo, offset: int, size: int) -> None:
    with pytest.raises(AddressRangeError, match=r"BAR 0.*outside of its 0x10000 bytes"):
        io.read(0, offset, size)
    with pytest.raises(IndexError):
        io.write(0, offset, bytes(size))


def test_a_region_that_is_not_there(io: KernelDeviceIo) -> None:
    assert io.region_info(1).size == 0
    assert io.region_info(RegionIndex.VGA).size == 0
    assert io.irq_info(3).count == 0
    with pytest.raises(AddressRangeError, match="no BAR 1"):
        io.read(1, 0, 1)
    with pytest.raises(NotSupportedError, match="config space cannot be mapped"):
        io.map_region(RegionIndex.CONFIG, 0, 4096)


def test_memory_decode_off_is_said(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    vfio.decode = False
    with pytest.raises(DeviceGoneError, match=r"memory decode off.*BAR 0, offset 0x10, 4 bytes") as caught:
        io.read(0, 0x10, 4)
    assert "PCI_COMMAND" in caught.value.hint
    with pytest.raises(DeviceGoneError, match="memory decode off"):
        io.write(0, 0x10, bytes(4))


def test_infos_are_asked_for_once(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    for _ in range(3):
        io.info()
        io.region_info(0)
        io.irq_info(2)
    assert [vfio.log.count(f"ioctl {number:#x}") for number in (0x3B6B, 0x3B6C, 0x3B6D)] == [1, 1, 1]


def test_region_names() -> None:
    names = [region_name(index) for index in (0, 5, 6, 7, 8, 9)]
    assert names == ["BAR 0", "BAR 5", "ROM", "config space", "VGA", "region 9"]


# --- interrupts, reset, features --------------------------------------------------------------------------------


def test_reset_waits_while_others_are_in_the_device(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    answers = [-errno.EAGAIN, -errno.EAGAIN, 0]
    vfio.scripts[uapi.VFIO_DEVICE_RESET] = lambda file, argument: answers.pop(0)
    io.reset()
    assert answers == []


def test_reset_gives_up(vfio: FakeVfio, io: KernelDeviceIo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiopy.kernel.device_io._RESET_PATIENCE", 0.02)
    vfio.scripts[uapi.VFIO_DEVICE_RESET] = lambda file, argument: -errno.EAGAIN
    with pytest.raises(BusyError, match="uses the device"):
        io.reset()


def test_set_irqs_goes_through(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    io.set_irqs(2, IrqAction.TRIGGER, 0, 0)
    vfio.scripts[uapi.VFIO_DEVICE_SET_IRQS] = lambda file, argument: -errno.EINVAL
    with pytest.raises(AddressRangeError, match="irq index 2, vectors 7 to 8"):
        io.set_irqs(2, IrqAction.TRIGGER, 7, 2, fds=[1, 2])


def test_feature_answers_payload_or_fd(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    def answer(file: File, argument: bytearray) -> int:
        argument[8:16] = struct.pack("=Q", 7)
        return 0

    vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = answer
    assert io.feature(uapi.VFIO_DEVICE_FEATURE_MIGRATION, uapi.VFIO_DEVICE_FEATURE_GET, bytes(8)) == struct.pack(
        "=Q", 7
    )
    vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = lambda file, argument: 345
    payload = io.feature(uapi.VFIO_DEVICE_FEATURE_DMA_BUF, uapi.VFIO_DEVICE_FEATURE_GET, bytes(32))
    assert payload == struct.pack("=i", 345)
    probe = io.feature(uapi.VFIO_DEVICE_FEATURE_DMA_BUF, uapi.VFIO_DEVICE_FEATURE_PROBE, b"")
    assert probe == b""


# --- hot reset --------------------------------------------------------------------------------------------------


def hot_reset_answer(flags: int, *devices: tuple[int, int]) -> object:
    def answer(file: File, argument: bytearray) -> int:
        uapi.vfio_pci_hot_reset_info.put(argument, "flags", flags)
        uapi.vfio_pci_hot_reset_info.put(argument, "count", len(devices))
        for number, (who, devfn) in enumerate(devices):
            struct.pack_into("=IHBB", argument, 12 + 8 * number, who, 0, 2, devfn)
        return 0

    return answer


def test_hot_reset_of_what_is_ours(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    done: list[bytes] = []

    def reset(file: File, argument: bytearray) -> int:
        done.append(bytes(argument))
        return -errno.EBUSY if len(done) == 1 else 0

    vfio.scripts[uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO] = hot_reset_answer(3, (1, 8), (0, 16))
    vfio.scripts[uapi.VFIO_DEVICE_PCI_HOT_RESET] = reset
    info = hot_reset(io)
    assert [one.address for one in info.devices] == ["0000:02:01.0", "0000:02:02.0"]
    assert done == [struct.pack("=3I", 12, 0, 0)] * 2


def test_hot_reset_names_what_is_not_ours(vfio: FakeVfio, io: KernelDeviceIo) -> None:
    not_owned = uapi.VFIO_PCI_DEVID_NOT_OWNED
    vfio.scripts[uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO] = hot_reset_answer(1, (1, 8), (not_owned, 16))
    with pytest.raises(NotViableError, match=r"not open here: 0000:02:02\.0 \(no driver\)"):
        hot_reset(io)
    assert f"ioctl {uapi.VFIO_DEVICE_PCI_HOT_RESET:#x}" not in vfio.log


# --- ends -------------------------------------------------------------------------------------------------------


def test_use_after_close_is_refused(vfio: FakeVfio) -> None:
    io = make(vfio)
    io.close()
    for use in (io.info, io.reset, lambda: io.read(0, 0, 1), lambda: io.map_region(0, 0, 1), io.fileno):
        with pytest.raises(ClosedError, match=r"0000:00:04\.0"):
            use()


def test_what_is_dropped_is_closed_by_the_next_operation_with_a_warning(vfio: FakeVfio) -> None:
    io = make(vfio)
    window = io.map_region(0, 0, 4096)
    del io, window
    gc.collect()
    assert len(vfio.left()) == 2  # a finalizer calls nothing
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drain_finalizers()
    assert vfio.left() == {}
    assert {warning.category for warning in caught} == {ResourceWarning}


def test_a_cycle_of_device_and_window_is_closed_in_the_right_order(vfio: FakeVfio) -> None:
    for _ in range(3):
        io = make(vfio)
        io.window = io.map_region(0, 0, 4096)  # type: ignore[attr-defined]
        io.itself = io  # type: ignore[attr-defined]
        del io
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            drain_finalizers()
        assert vfio.left() == {}
    assert vfio.log.index("munmap") < next(n for n, line in enumerate(vfio.log) if line.startswith("close"))


def test_a_forked_child_touches_nothing(vfio: FakeVfio) -> None:
    io = make(vfio)
    window = io.map_region(0, 0, 4096)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            vfio.log.clear()
            window.close()
            io.close()
            status = 0 if vfio.log == [] else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    window.close()
    io.close()


# --- iommufd objects --------------------------------------------------------------------------------------------


def test_iommufd_closes_its_objects(vfio: FakeVfio) -> None:
    iommufd = Iommufd()
    first, second = iommufd.ioas(), iommufd.ioas()
    assert first.id != second.id
    first.close()
    iommufd.close()
    assert not second
    with pytest.raises(ClosedError):
        iommufd.ioas()


def test_an_ioas_that_is_in_use_stays_open(vfio: FakeVfio) -> None:
    iommufd = Iommufd()
    ioas = iommufd.ioas()
    calls = DeviceFd(vfio._new(File("cdev", "vfio/devices/vfio0")), "0000:00:04.0")
    calls.bind_iommufd(iommufd.calls)
    calls.attach_iommufd_pt(ioas.id)
    with pytest.raises(BusyError, match="IOMMU_DESTROY"):
        iommufd.close()
    assert ioas
    assert iommufd
    calls.detach_iommufd_pt()
    iommufd.close()
    calls.close()


def test_an_adopted_ioas_is_not_destroyed(vfio: FakeVfio) -> None:
    launcher = Iommufd()
    ioas = launcher.ioas()
    mapper = IoasMapper.adopt(launcher.fileno(), ioas.id)
    assert mapper.adopted
    assert mapper.kernel_target is not None
    assert mapper.kernel_target.object_id == ioas.id
    mapper.close()
    assert ioas.ranges()
    launcher.close()


# --- what mappers take ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ContainerMapper, GroupOnIommufdMapper])
def test_group_mappers_map_by_address(vfio: FakeVfio, kind: type) -> None:
    seen: list[bytes] = []

    def mapped(file: File, argument: bytearray) -> int:
        seen.append(bytes(argument))
        return 0

    vfio.scripts[uapi.VFIO_IOMMU_MAP_DMA] = mapped
    with kind() as mapper:
        mapper.map(0x1000, HostMemory(0x7F0000, 0x1000, True, None), Prot.WRITE)
        mapper.map(0x2000, FileMemory(5, 0, 0x1000, True, 0x7F1000, None), Prot.READ)
        with pytest.raises(MemoryKindError, match="not mapped in this process"):
            mapper.map(0x3000, FileMemory(5, 0, 0x1000, True, 0, None), Prot.READ)
        window = DeviceWindow(0, 0, 0x1000, -1, 0x7F2000, None)
        if kind is ContainerMapper:
            mapper.map(0x4000, window, Prot.RW)
        else:
            with pytest.raises(MemoryKindError, match="a dma-buf"):
                mapper.map(0x4000, window, Prot.RW)
    flags = [uapi.vfio_iommu_type1_dma_map.get(one, "flags") for one in seen]
    assert flags[:2] == [uapi.VFIO_DMA_MAP_FLAG_WRITE, uapi.VFIO_DMA_MAP_FLAG_READ]


def test_ioas_mapper_maps_files_and_dma_bufs_by_fd(vfio: FakeVfio) -> None:
    seen: list[tuple[str, int]] = []
    vfio.scripts[uapi.IOMMU_IOAS_MAP] = lambda file, argument: seen.append(("map", 0)) or 0
    vfio.scripts[uapi.IOMMU_IOAS_MAP_FILE] = lambda file, argument: (
        seen.append(("file", uapi.iommu_ioas_map_file.get(argument, "fd"))) or 0
    )
    with IoasMapper() as mapper:
        mapper.map(0x1000, HostMemory(0x7F0000, 0x1000, True, None), Prot.RW)
        mapper.map(0x2000, FileMemory(5, 0, 0x1000, True, 0x7F1000, None), Prot.READ)
        mapper.map(0x3000, DeviceWindow(0, 0, 0x1000, 6, 0, None), Prot.RW)
        with pytest.raises(MemoryKindError, match="export the BAR as a dma-buf"):
            mapper.map(0x4000, DeviceWindow(0, 0, 0x1000, -1, 0x7F2000, None), Prot.RW)
        assert mapper.traits().page_sizes == 4096 | 1 << 21 | 1 << 30
    assert seen == [("map", 0), ("file", 5), ("file", 6)]


def test_a_mapper_dropped_with_its_device_is_closed(vfio: FakeVfio) -> None:
    mapper = IoasMapper()
    file = File("cdev", "vfio/devices/vfio0")
    calls = DeviceFd(vfio._new(file), "0000:00:04.0")
    device_id = calls.bind_iommufd(mapper.iommufd.calls)
    calls.attach_iommufd_pt(mapper.ioas.id)
    io = KernelDeviceIo(calls, "iommufd", on_close=mapper._left, iommufd_id=device_id)
    mapper._devices.append(io)
    with pytest.raises(StateError):
        mapper.close()
    del io, mapper, calls
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drain_finalizers()
    assert vfio.left() == {}
