"""What the typed methods put into and read out of the kernel's structures, call by call."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from uuid import UUID

import pytest
from kernel_fake import FakeVfio, File
from kernel_ioctl_support import Recorder, device

from vfiopy import uapi
from vfiopy.backend import Area, IrqAction, Prot
from vfiopy.errors import IrqCountError, NotSupportedError, VfioError
from vfiopy.kernel.ioctl import (
    ContainerFd,
    DmaBufFd,
    DmaHeapFd,
    GroupFd,
    IommufdFd,
    MemfdPart,
    MigrationState,
    SyncAccess,
    SyncFileFd,
    UdmabufFd,
)

# --- interrupts -------------------------------------------------------------------------------------------------


def test_set_irqs_layout(vfio: FakeVfio) -> None:
    script = vfio.scripts[uapi.VFIO_DEVICE_SET_IRQS] = Recorder()
    with device(vfio) as fd:
        fd.set_irqs(2, IrqAction.TRIGGER, 1, 3, fds=[7, -1, 0])
        fd.set_irqs(0, IrqAction.MASK, 0, 1, bools=[True])
        fd.set_irqs(1, IrqAction.TRIGGER, 0, 0)
        with pytest.raises(ValueError, match="not both"):
            fd.set_irqs(1, IrqAction.TRIGGER, 0, 1, fds=[1], bools=[True])
    assert script.seen == [
        struct.pack("=5I3i", 32, 0x24, 2, 1, 3, 7, -1, 0),
        struct.pack("=5IB", 21, 0x0A, 0, 0, 1, 1),
        struct.pack("=5I", 20, 0x21, 1, 0, 0),
    ]


def test_fewer_vectors_than_asked_is_an_error_that_says_how_many(vfio: FakeVfio) -> None:
    vfio.scripts[uapi.VFIO_DEVICE_SET_IRQS] = Recorder(5)
    with device(vfio) as fd, pytest.raises(IrqCountError, match="only 5 interrupt vectors are available, 8") as caught:
        fd.set_irqs(2, IrqAction.TRIGGER, 0, 8, fds=list(range(8)))
    assert caught.value.available == 5
    assert "nothing has been enabled" in caught.value.hint


# --- answers that need a second call ----------------------------------------------------------------------------


def test_hot_reset_info_grows(vfio: FakeVfio) -> None:
    def answer(file: File, argument: bytearray) -> int:
        layout = uapi.vfio_pci_hot_reset_info
        layout.put(argument, "count", 20)
        if layout.get(argument, "argsz") < 12 + 20 * 8:
            return -errno.ENOSPC
        layout.put(argument, "flags", 1)
        for number in range(20):
            struct.pack_into("=IHBB", argument, 12 + 8 * number, number, 0, 2, number << 3 | 1)
        return 0

    vfio.scripts[uapi.VFIO_DEVICE_GET_PCI_HOT_RESET_INFO] = answer
    with device(vfio) as fd:
        info = fd.get_pci_hot_reset_info()
    assert info.by_device_id
    assert not info.owned
    assert info.devices[19] == (19, "0000:02:13.1")


def test_hot_reset_passes_groups_or_none(vfio: FakeVfio) -> None:
    script = vfio.scripts[uapi.VFIO_DEVICE_PCI_HOT_RESET] = Recorder()
    with device(vfio) as fd, GroupFd(vfio._new(File("group", "vfio/3")), "g") as group:
        fd.pci_hot_reset([group])
        fd.pci_hot_reset()
        assert script.seen == [struct.pack("=4I", 16, 0, 1, group.fileno()), struct.pack("=3I", 12, 0, 0)]


def test_iova_ranges_grow(vfio: FakeVfio) -> None:
    def answer(file: File, argument: bytearray) -> int:
        layout = uapi.iommu_ioas_iova_ranges
        room = layout.get(argument, "num_iovas")
        layout.put(argument, "num_iovas", 50)
        layout.put(argument, "out_iova_alignment", 4096)
        if room < 50:
            return -errno.EMSGSIZE
        table = b"".join(struct.pack("=QQ", n << 20, (n << 20) + 0xFFF) for n in range(50))
        ctypes.memmove(layout.get(argument, "allowed_iovas"), table, len(table))
        return 0

    vfio.scripts[uapi.IOMMU_IOAS_IOVA_RANGES] = answer
    with IommufdFd(vfio._new(File("iommufd", "iommu")), "/dev/iommu") as fd:
        ranges, alignment = fd.ioas_iova_ranges(1)
    assert len(ranges) == 50
    assert ranges[49] == (49 << 20, (49 << 20) + 0xFFF)
    assert alignment == 4096


def test_hw_info_grows(vfio: FakeVfio) -> None:
    def answer(file: File, argument: bytearray) -> int:
        layout = uapi.iommu_hw_info
        room, pointer = layout.get(argument, "data_len"), layout.get(argument, "data_uptr")
        ctypes.memmove(pointer, bytes(range(100))[:room], min(room, 100))
        layout.put(argument, "data_len", 100)
        layout.put(argument, "out_data_type", 1)
        layout.put(argument, "out_capabilities", 9)
        layout.put(argument, "out_max_pasid_log2", 20)
        return 0

    vfio.scripts[uapi.IOMMU_GET_HW_INFO] = answer
    with IommufdFd(vfio._new(File("iommufd", "iommu")), "/dev/iommu") as fd:
        info = fd.get_hw_info(1)
    assert info.data == bytes(range(100))
    assert (info.type, info.capabilities, info.max_pasid_log2) == (1, 9, 20)


# --- container --------------------------------------------------------------------------------------------------


def test_type1_info(vfio: FakeVfio) -> None:
    vfio.scripts[uapi.VFIO_IOMMU_GET_INFO] = lambda file, argument: vfio._iommu_info(argument)
    with ContainerFd(vfio._new(File("container", "vfio/vfio")), "/dev/vfio/vfio") as fd:
        info = fd.iommu_get_info()
    assert info.page_sizes == 0x40201000
    assert info.ranges == ((0, 0xFEDFFFFF), (0xFEF00000, 2**39 - 1))
    assert info.dma_avail == 65535
    assert info.migration is None


def test_map_and_unmap_layout(vfio: FakeVfio) -> None:
    mapped = vfio.scripts[uapi.VFIO_IOMMU_MAP_DMA] = Recorder()
    unmapped = vfio.scripts[uapi.VFIO_IOMMU_UNMAP_DMA] = Recorder(size=(16, "Q", 0x2000))
    with ContainerFd(vfio._new(File("container", "vfio/vfio")), "c") as fd:
        fd.map_dma(0x7F0000000000, 0x10000, 0x1000, 3)
        assert fd.unmap_dma(0x10000, 0x4000) == 0x2000
        assert fd.unmap_all() == 0x2000
    assert mapped.seen == [struct.pack("=II3Q", 32, 3, 0x7F0000000000, 0x10000, 0x1000)]
    assert unmapped.seen == [struct.pack("=II2Q", 24, 0, 0x10000, 0x4000), struct.pack("=II2Q", 24, 2, 0, 0)]


def test_dirty_bitmaps_are_read_through_the_pointer(vfio: FakeVfio) -> None:
    def answer(base: int) -> object:
        def mark(file: File, argument: bytearray) -> int:
            pgsize, size, data = struct.unpack_from("=3Q", argument, base)
            assert (pgsize, size) == (4096, 16)
            ctypes.memmove(data, struct.pack("=2Q", 1, 1 << 63), 16)
            return 0

        return mark

    vfio.scripts[uapi.VFIO_IOMMU_DIRTY_PAGES] = answer(8 + 16)
    vfio.scripts[uapi.VFIO_IOMMU_UNMAP_DMA] = answer(24)
    bits = struct.pack("=2Q", 1, 1 << 63)
    with ContainerFd(vfio._new(File("container", "vfio/vfio")), "c") as fd:
        assert fd.dirty_pages_get(0, 100 * 4096, 4096) == bits
        assert fd.unmap_dma_dirty(0, 100 * 4096, 4096) == (100 * 4096, bits)
        for wrong in (0, 3, -4096):
            with pytest.raises(ValueError, match="power of two"):
                fd.dirty_pages_get(0, 4096, wrong)


# --- groups, devices, features ----------------------------------------------------------------------------------


def test_device_fd_by_name_and_token(vfio: FakeVfio) -> None:
    names: list[bytes] = []

    def answer(file: File, argument: bytearray) -> int:
        names.append(bytes(argument))
        return vfio._new(File("cdev", "vfio/devices/vfio0"))

    vfio.scripts[uapi.VFIO_GROUP_GET_DEVICE_FD] = answer
    token = UUID("01234567-89ab-cdef-0123-456789abcdef")
    with GroupFd(vfio._new(File("group", "vfio/3")), "g") as group:
        with group.get_device_fd("0000:00:04.0") as fd:
            assert fd.label == "0000:00:04.0"
        with group.get_device_fd("0000:00:04.0", token):
            pass
    assert names == [b"0000:00:04.0\0", b"0000:00:04.0 vf_token=01234567-89ab-cdef-0123-456789abcdef\0"]


def test_bind_attach_detach_layout(vfio: FakeVfio) -> None:
    token = UUID("01234567-89ab-cdef-0123-456789abcdef")
    seen: list[bytes] = []

    def bind(file: File, argument: bytearray) -> int:
        seen.append(bytes(argument[:12]))
        pointer = uapi.vfio_device_bind_iommufd.get(argument, "token_uuid_ptr")
        if pointer:
            assert ctypes.string_at(pointer, 16) == token.bytes
        uapi.vfio_device_bind_iommufd.put(argument, "out_devid", 9)
        return 0

    vfio.scripts[uapi.VFIO_DEVICE_BIND_IOMMUFD] = bind
    attach = vfio.scripts[uapi.VFIO_DEVICE_ATTACH_IOMMUFD_PT] = Recorder(pt=(8, "I", 4))
    detach = vfio.scripts[uapi.VFIO_DEVICE_DETACH_IOMMUFD_PT] = Recorder()
    with device(vfio) as fd, IommufdFd(vfio._new(File("iommufd", "iommu")), "i") as iommufd:
        assert fd.bind_iommufd(iommufd) == 9
        assert fd.bind_iommufd(iommufd, token) == 9
        assert seen == [struct.pack("=IIi", 24, 0, iommufd.fileno()), struct.pack("=IIi", 24, 1, iommufd.fileno())]
        assert fd.attach_iommufd_pt(3) == 4
        assert fd.attach_iommufd_pt(3, pasid=0) == 4
        fd.detach_iommufd_pt()
        fd.detach_iommufd_pt(pasid=5)
    assert attach.seen == [struct.pack("=4I", 16, 0, 3, 0), struct.pack("=4I", 16, 1, 3, 0)]
    assert detach.seen == [struct.pack("=3I", 12, 0, 0), struct.pack("=3I", 12, 1, 5)]


def test_dma_buf_export_layout(vfio: FakeVfio) -> None:
    seen: list[bytes] = []

    def answer(file: File, argument: bytearray) -> int:
        seen.append(bytes(argument))
        return vfio._new(File("x", "/dmabuf:"))

    vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = answer
    with device(vfio) as fd, fd.dma_buf(2, [Area(0x1000, 0x2000), Area(0, 0x1000)]) as buffer:
        assert "region 2" in buffer.label
        assert buffer.size == 0x10000
    flags = os.O_RDWR | os.O_CLOEXEC
    ranges = struct.pack("=4Q", 0x1000, 0x2000, 0, 0x1000)
    assert seen == [struct.pack("=6I", 8 + 16 + 32, 11 | 1 << 16, 2, flags, 0, 2) + ranges]


def test_probe_of_a_feature(vfio: FakeVfio) -> None:
    with device(vfio) as fd:
        for code, known in ((0, True), (-errno.ENOTTY, False), (-errno.EOPNOTSUPP, False)):
            vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = Recorder(code)
            assert fd.feature_probe(uapi.VFIO_DEVICE_FEATURE_DMA_BUF) is known
        vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = Recorder(-errno.EIO)
        with pytest.raises(VfioError):
            fd.feature_probe(uapi.VFIO_DEVICE_FEATURE_DMA_BUF)


def test_migration_state_opens_a_stream_or_not(vfio: FakeVfio) -> None:
    stream = vfio._new(File("x", "anon_inode:mtty_mig"))
    with device(vfio) as fd:
        script = vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = Recorder(fd=(12, "i", stream))
        with fd.set_migration_state(MigrationState.STOP_COPY) or pytest.fail("no stream") as data:
            assert data.fileno() == stream
        assert script.seen == [struct.pack("=3Ii", 16, 2 | 1 << 17, 3, -1)]
        vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = Recorder(fd=(12, "i", -1))
        assert fd.set_migration_state(MigrationState.STOP) is None


def test_errors_name_call_feature_and_region(vfio: FakeVfio) -> None:
    with device(vfio) as fd:
        vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = Recorder(-errno.ENOTTY)
        with pytest.raises(NotSupportedError, match=r"0000:00:04\.0: VFIO_DEVICE_FEATURE_LOW_POWER_EXIT") as caught:
            fd.low_power_exit()
        assert caught.value.call == "VFIO_DEVICE_FEATURE_LOW_POWER_EXIT"
        vfio.scripts[uapi.VFIO_DEVICE_GET_REGION_INFO] = Recorder(-errno.EINVAL)
        with pytest.raises(VfioError, match=r"no such region.*\(region 12\)"):
            fd.get_region_info(12)


# --- iommufd ----------------------------------------------------------------------------------------------------


def test_ioas_map_layout(vfio: FakeVfio) -> None:
    mapped = vfio.scripts[uapi.IOMMU_IOAS_MAP] = Recorder(iova=(32, "Q", 0xABC000))
    filed = vfio.scripts[uapi.IOMMU_IOAS_MAP_FILE] = Recorder(iova=(32, "Q", 0xABC000))
    with IommufdFd(vfio._new(File("iommufd", "iommu")), "i") as fd:
        assert fd.ioas_map(3, 0x7F0000, 0x1000, Prot.READ) == 0xABC000
        assert fd.ioas_map(3, 0x7F0000, 0x1000, Prot.RW, iova=0) == 0xABC000
        assert fd.ioas_map_file(3, 9, 0x2000, 0x1000, Prot.WRITE, iova=0x5000) == 0xABC000
    assert mapped.seen == [
        struct.pack("=4I3Q", 40, 4, 3, 0, 0x7F0000, 0x1000, 0),
        struct.pack("=4I3Q", 40, 7, 3, 0, 0x7F0000, 0x1000, 0),
    ]
    assert filed.seen == [struct.pack("=3Ii3Q", 40, 3, 3, 9, 0x2000, 0x1000, 0x5000)]


def test_invalidate_says_how_far_it_came(vfio: FakeVfio) -> None:
    vfio.scripts[uapi.IOMMU_HWPT_INVALIDATE] = Recorder(-errno.EIO, done=(24, "I", 1))
    with IommufdFd(vfio._new(File("iommufd", "iommu")), "i") as fd:
        with pytest.raises(VfioError, match="1 of 3 requests done"):
            fd.hwpt_invalidate(5, 0, [bytes(24)] * 3)
        with pytest.raises(ValueError, match="not all entries"):
            fd.hwpt_invalidate(5, 0, [bytes(24), bytes(16)])


def test_the_compat_container_is_the_same_context(vfio: FakeVfio) -> None:
    with IommufdFd.open("/dev/iommu") as fd, fd.as_container() as container:
        assert container.fileno() != fd.fileno()
        assert vfio.fds[container.fileno()] is vfio.fds[fd.fileno()]


# --- dma-buf and the rest ---------------------------------------------------------------------------------------


def test_sync_is_restarted_as_its_header_says(vfio: FakeVfio) -> None:
    answers = [-errno.EINTR, -errno.EAGAIN, 0]
    flags: list[int] = []

    def answer(file: File, argument: bytearray) -> int:
        flags.append(struct.unpack("=Q", argument)[0])
        return answers.pop(0)

    vfio.scripts[uapi.DMA_BUF_IOCTL_SYNC] = answer
    with DmaBufFd(vfio._new(File("x", "/dmabuf:")), "d") as buffer:
        buffer.sync_start(SyncAccess.WRITE)
        answers.append(0)
        buffer.sync_end(SyncAccess.RW)
    assert flags == [2, 2, 2, 7]


def test_udmabuf_list_layout(vfio: FakeVfio) -> None:
    seen: list[bytes] = []

    def answer(file: File, argument: bytearray) -> int:
        seen.append(bytes(argument))
        return vfio._new(File("x", "/dmabuf:"))

    vfio.scripts[uapi.UDMABUF_CREATE_LIST] = vfio.scripts[uapi.UDMABUF_CREATE] = answer
    with UdmabufFd(vfio._new(File("x", "udmabuf")), "/dev/udmabuf") as node:
        node.create_list([MemfdPart(5, 0, 0x1000), MemfdPart(6, 0x1000, 0x2000)]).close()
        node.create(MemfdPart(5, 0x1000, 0x1000)).close()
    items = struct.pack("=II2Q", 5, 0, 0, 0x1000) + struct.pack("=II2Q", 6, 0, 0x1000, 0x2000)
    assert seen == [struct.pack("=II", 1, 2) + items, struct.pack("=II2Q", 5, 1, 0x1000, 0x1000)]


def test_heap_alloc(vfio: FakeVfio) -> None:
    fd = vfio._new(File("x", "/dmabuf:"))
    script = vfio.scripts[uapi.DMA_HEAP_IOCTL_ALLOC] = Recorder(fd=(8, "I", fd))
    with DmaHeapFd(vfio._new(File("x", "dma_heap/system")), "heap") as heap, heap.alloc(0x3000) as buffer:
        assert buffer.fileno() == fd
    assert script.seen == [struct.pack("=QIIQ", 0x3000, 0, os.O_RDWR | os.O_CLOEXEC, 0)]


def test_sync_file_info_asks_for_the_number_first(vfio: FakeVfio) -> None:
    def answer(file: File, argument: bytearray) -> int:
        layout = uapi.sync_file_info
        room, pointer = layout.get(argument, "num_fences"), layout.get(argument, "sync_fence_info")
        layout.put(argument, "num_fences", 2)
        layout.put(argument, "name", b"both")
        layout.put(argument, "status", 1)
        if room:
            fences = b"".join(struct.pack("=32s32siIQ", b"tl", b"sw_sync", 1, 0, at) for at in (5, 6))
            ctypes.memmove(pointer, fences, len(fences))
        return 0

    vfio.scripts[uapi.SYNC_IOC_FILE_INFO] = answer
    with SyncFileFd(vfio._new(File("x", "anon_inode:sync_file")), "s") as file:
        info = file.file_info()
    assert (info.name, info.status) == ("both", 1)
    assert [(f.object_name, f.driver_name, f.timestamp_ns) for f in info.fences] == [
        ("tl", "sw_sync", 5),
        ("tl", "sw_sync", 6),
    ]
    with pytest.raises(ValueError, match="longer than 31"):
        DmaBufFd.set_name(file, "x" * 32)  # type: ignore[arg-type]
