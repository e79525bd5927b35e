"""iommufd ioctls against the real kernel, with edu behind the guest's IOMMU."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ioctl_support import PAGE, Memory, as_nobody, bound, linux, opened
from modes import EDU

from vfiopy import uapi
from vfiopy.backend import IovaRange, Prot
from vfiopy.errors import (
    BusyError,
    IovaRangeError,
    MemoryKindError,
    NotMappedError,
    NotSupportedError,
    OverlapError,
    VfioError,
    WrongFdError,
)
from vfiopy.kernel import IoasMapper, Iommufd
from vfiopy.kernel.ioctl import WHOLE_SPACE, IommufdFd

Bdf = Callable[..., str]


@pytest.fixture
def iommufd() -> Iterator[Iommufd]:
    with Iommufd() as iommufd:
        yield iommufd


@pytest.fixture
def calls(iommufd: Iommufd) -> IommufdFd:
    return iommufd.calls


@pytest.fixture
def mapper(bdf: Bdf) -> Iterator[IoasMapper]:
    """An IOAS with edu attached."""
    address = bdf(EDU)
    with bound(address), opened(address, "iommufd") as (_, mapper):
        assert isinstance(mapper, IoasMapper)
        yield mapper


def memfd(size: int) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


# --- without a device -------------------------------------------------------------------------------------------


def test_a_new_ioas_is_the_whole_space(calls: IommufdFd) -> None:
    ioas = calls.ioas_alloc()
    assert calls.ioas_iova_ranges(ioas) == ((IovaRange(0, WHOLE_SPACE),), 1)
    assert calls.ioas_unmap(ioas, 0, WHOLE_SPACE) == 0
    calls.destroy(ioas)
    with pytest.raises(VfioError, match=rf"no object of this id.*\(object {ioas}\)"):
        calls.destroy(ioas)


def test_the_fd_is_not_inherited_and_knows_its_kind(calls: IommufdFd) -> None:
    assert not os.get_inheritable(calls.fileno())
    assert calls.identity() == "iommu"


def test_allowed_ranges(calls: IommufdFd, memory: Memory) -> None:
    ioas = calls.ioas_alloc()
    calls.ioas_allow_iovas(ioas, [IovaRange(0x100000, 0x1FFFFF), IovaRange(0x400000, 0x4FFFFF)])
    iova = calls.ioas_map(ioas, memory.address, PAGE, Prot.RW)
    assert 0x100000 <= iova <= 0x4FFFFF
    with pytest.raises(IovaRangeError, match="fewer than two addresses, or two ranges overlap"):
        calls.ioas_allow_iovas(ioas, [IovaRange(0x1000, 0x1000)])
    with pytest.raises(IovaRangeError):
        calls.ioas_allow_iovas(ioas, [IovaRange(0, 0x1FFF), IovaRange(0x1000, 0x2FFF)])
    calls.ioas_allow_iovas(ioas, [])
    assert calls.ioas_unmap(ioas, 0, WHOLE_SPACE) == PAGE


def test_without_a_device_nothing_is_checked_until_one_attaches(calls: IommufdFd, bdf: Bdf) -> None:
    ioas = calls.ioas_alloc()
    calls.ioas_map(ioas, 1 << 40, PAGE, Prot.RW, iova=0x100000)  # no memory there
    address = bdf(EDU)
    with bound(address):
        from vfiopy import pci  # noqa: PLC0415
        from vfiopy.kernel.cdev import open_cdev  # noqa: PLC0415

        with open_cdev(pci.function(address)) as fd:
            fd.bind_iommufd(calls)
            with pytest.raises(MemoryKindError, match="turns out not to be mappable"):
                fd.attach_iommufd_pt(ioas)
            calls.ioas_unmap(ioas, 0, WHOLE_SPACE)
            with Memory(PAGE) as memory:
                calls.ioas_map(ioas, memory.address, PAGE, Prot.RW, iova=0xFEE00000)  # the MSI window
                with pytest.raises(IovaRangeError, match="collides with a reserved range"):
                    fd.attach_iommufd_pt(ioas)
                calls.ioas_unmap(ioas, 0, WHOLE_SPACE)
            fd.attach_iommufd_pt(ioas)
            with pytest.raises(IovaRangeError, match="holds a reserved one"):
                calls.ioas_allow_iovas(ioas, [IovaRange(0xFE000000, 0xFF000000)])


def test_options(calls: IommufdFd) -> None:
    mode, huge = uapi.IOMMU_OPTION_RLIMIT_MODE, uapi.IOMMU_OPTION_HUGE_PAGES
    assert calls.get_option(mode) == 0
    with pytest.raises(VfioError, match="must be 0"):
        calls.set_option(mode, 2)
    calls.set_option(mode, 1)
    assert calls.get_option(mode) == 1
    ioas = calls.ioas_alloc()
    with pytest.raises(BusyError, match="right after opening"):
        calls.set_option(mode, 0)
    assert calls.get_option(huge, ioas) == 1
    calls.set_option(huge, 0, ioas)
    assert calls.get_option(huge, ioas) == 0
    with pytest.raises(VfioError):
        calls.set_option(huge, 2, ioas)
    with pytest.raises(VfioError, match="no object of this id"):
        calls.get_option(huge, 0)
    with pytest.raises(NotSupportedError):
        calls.get_option(77)


def test_the_ioas_of_groups(calls: IommufdFd) -> None:
    with pytest.raises(VfioError, match="no IOAS for VFIO groups yet"):
        calls.vfio_ioas_get()
    ioas = calls.ioas_alloc()
    calls.vfio_ioas_set(ioas)
    assert calls.vfio_ioas_get() == ioas
    calls.vfio_ioas_clear()
    with pytest.raises(VfioError):
        calls.vfio_ioas_get()
    with pytest.raises(VfioError, match="no object of this id"):
        calls.vfio_ioas_set(0x7FFFFFFF)


def test_ioctls_with_ids_that_do_not_exist(calls: IommufdFd, memory: Memory) -> None:
    none = 0x7FFFFFFF
    for call in (
        lambda: calls.ioas_iova_ranges(none),
        lambda: calls.ioas_map(none, memory.address, PAGE, Prot.RW),
        lambda: calls.get_hw_info(none),
        lambda: calls.hwpt_set_dirty_tracking(none, True),
        lambda: calls.hwpt_invalidate(none, 0, []),
        lambda: calls.viommu_alloc(1, none, none),
        lambda: calls.vdevice_alloc(none, none, 0),
        lambda: calls.veventq_alloc(none, 1, 1),
        lambda: calls.hw_queue_alloc(none, 1, 0, 0, PAGE),
    ):
        with pytest.raises(VfioError) as caught:
            call()
        assert caught.value.object == "/dev/iommu"
        assert str(none) in str(caught.value) or "no object" in str(caught.value)


def test_change_process_takes_files_only(calls: IommufdFd, memory: Memory) -> None:
    ioas = calls.ioas_alloc()
    calls.ioas_change_process()
    fd = memfd(PAGE)
    try:
        calls.ioas_map_file(ioas, fd, 0, PAGE, Prot.RW)
        calls.ioas_change_process()
        calls.ioas_map(ioas, memory.address, PAGE, Prot.RW)
        with pytest.raises(NotSupportedError, match="only memfds can change hands"):
            calls.ioas_change_process()
        calls.ioas_unmap(ioas, 0, WHOLE_SPACE)
    finally:
        os.close(fd)


def test_physical_addresses_are_for_devices_without_an_iommu(calls: IommufdFd, memory: Memory) -> None:
    ioas = calls.ioas_alloc()
    calls.ioas_map(ioas, memory.address, PAGE, Prot.RW, iova=0x1000)
    with pytest.raises(VfioError) as caught:
        calls.ioas_noiommu_get_pa(ioas, 0x1000, PAGE)
    assert caught.value.call == "IOMMU_IOAS_NOIOMMU_GET_PA"
    if linux() < (7, 3):
        assert isinstance(caught.value, NotSupportedError)


# --- with a device ----------------------------------------------------------------------------------------------


def test_ranges_and_alignment(mapper: IoasMapper) -> None:
    ranges = mapper.ranges()
    assert ranges[0] == (0, 0xFEDFFFFF)
    assert ranges[1].first == 0xFEF00000
    assert mapper.ioas.alignment() == PAGE
    assert mapper.traits().page_sizes == PAGE | 1 << 21 | 1 << 30


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        ("misaligned iova", IovaRangeError, "alignment"),
        ("misaligned size", IovaRangeError, "alignment"),
        ("no rights", IovaRangeError, "neither read nor write"),
        ("nothing", IovaRangeError, "usable IOVAs"),
        ("msi window", IovaRangeError, "MSI window"),
        ("beyond aperture", IovaRangeError, "usable IOVAs"),
        ("wrap", IovaRangeError, "beyond 64 bits"),
        ("overlap", OverlapError, "overlaps one that is mapped"),
        ("no memory there", MemoryKindError, "not mapped in this process"),
    ],
)
def test_map_refusals(mapper: IoasMapper, memory: Memory, what: str, kind: type[VfioError], says: str) -> None:
    ioas, base = mapper.ioas, 0x100000
    ioas.map(memory.address, 2 * PAGE, iova=base)
    address, size, prot, iova = {
        "misaligned iova": (memory.address, PAGE, Prot.RW, 1),
        "misaligned size": (memory.address, 100, Prot.RW, 0),
        "no rights": (memory.address, PAGE, Prot(0), 0),
        "nothing": (memory.address, 0, Prot.RW, 0),
        "msi window": (memory.address, PAGE, Prot.RW, 0xFEE00000),
        "beyond aperture": (memory.address, PAGE, Prot.RW, 1 << 57),
        "wrap": (memory.address, 2 * PAGE, Prot.RW, (1 << 64) - PAGE),
        "overlap": (memory.address, PAGE, Prot.RW, base + PAGE),
        "no memory there": (1 << 40, PAGE, Prot.RW, 0),
    }[what]
    with pytest.raises(kind, match=says) as caught:
        ioas.map(address, size, prot, iova=iova)
    assert f"IOAS {ioas.id}, iova {iova:#x}" in str(caught.value)
    assert ioas.unmap_all() == 2 * PAGE


def test_unmap_is_not_atomic_and_says_so(mapper: IoasMapper, memory: Memory) -> None:
    ioas = mapper.ioas
    ioas.map(memory.address, PAGE, iova=0x10000)
    ioas.map(memory.address, 4 * PAGE, iova=0x20000)
    with pytest.raises(NotMappedError, match="mappings below that place are unmapped by now"):
        ioas.unmap(0x10000, 0x12000)
    ioas.map(memory.address, PAGE, iova=0x10000)  # it was
    with pytest.raises(IovaRangeError, match="the size is 0"):
        ioas.unmap(0x10000, 0)
    with pytest.raises(NotMappedError, match="holds no mapping"):
        ioas.unmap(0x90000, PAGE)
    assert ioas.unmap_all() == 5 * PAGE


def test_copy(mapper: IoasMapper, memory: Memory) -> None:
    iommufd, ioas = mapper.iommufd, mapper.ioas
    other = iommufd.ioas()
    iova = ioas.map(memory.address, 4 * PAGE, Prot.READ)
    there = other.copy_from(ioas, iova, 4 * PAGE, Prot.READ, iova=0x5000)
    assert there == 0x5000
    with pytest.raises(NotMappedError, match="source range is not mapped"):
        other.copy_from(ioas, iova + 0x100000, PAGE)
    assert ioas.unmap(iova, 4 * PAGE) == 4 * PAGE
    assert other.unmap(0x5000, 4 * PAGE) == 4 * PAGE
    other.close()


def test_map_file(mapper: IoasMapper) -> None:
    ioas = mapper.ioas
    fd = memfd(8 * PAGE)
    try:
        # A write seal does not keep a device from writing: documented, and so shown.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert ioas.map_file(fd, 2 * PAGE, 4 * PAGE, iova=0x10000) == 0x10000
        with pytest.raises(MemoryKindError, match="goes past its end"):
            ioas.map_file(fd, 7 * PAGE, 2 * PAGE)
        with pytest.raises(WrongFdError, match="the file's fd is not open"):
            ioas.map_file(4000, 0, PAGE)
        assert ioas.unmap_all() == 4 * PAGE
    finally:
        os.close(fd)
    file = os.open("/tmp/regular", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(file, PAGE)
        regular = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with pytest.raises(VfioError):
                ioas.map_file(regular, 0, PAGE)
        finally:
            os.close(regular)
    finally:
        os.close(file)
        os.unlink("/tmp/regular")  # noqa: PTH108


def test_hw_info(mapper: IoasMapper) -> None:
    io = mapper._devices[0]
    assert io.iommufd_id is not None
    info = mapper.iommufd.hw_info(io.iommufd_id)
    assert info.type == uapi.IOMMU_HW_INFO_TYPE_INTEL_VTD
    assert len(info.data) == uapi.iommu_hw_info_vtd.size
    assert uapi.iommu_hw_info_vtd.get(info.data, "cap_reg")
    assert info.max_pasid_log2 == 0
    with pytest.raises(NotSupportedError):
        mapper.iommufd.calls.get_hw_info(io.iommufd_id, uapi.IOMMU_HW_INFO_TYPE_AMD)


def test_hwpt(mapper: IoasMapper) -> None:
    io, iommufd = mapper._devices[0], mapper.iommufd
    assert io.iommufd_id is not None
    with iommufd.hwpt(io.iommufd_id, mapper.ioas) as hwpt:
        assert io.calls.attach_iommufd_pt(hwpt.id) == hwpt.id
        with pytest.raises(BusyError, match="IOMMU_DESTROY"):
            hwpt.close()
        with pytest.raises(NotSupportedError, match="not made for dirty tracking"):
            iommufd.calls.hwpt_set_dirty_tracking(hwpt.id, True)
        with pytest.raises(NotSupportedError, match="not made for dirty tracking"):
            iommufd.calls.hwpt_get_dirty_bitmap(hwpt.id, 0, PAGE, PAGE)
        with pytest.raises(VfioError, match="takes no invalidation"):
            iommufd.calls.hwpt_invalidate(hwpt.id, 0, [])
        io.calls.attach_iommufd_pt(mapper.ioas.id)
    for flag in (uapi.IOMMU_HWPT_ALLOC_NEST_PARENT, uapi.IOMMU_HWPT_ALLOC_DIRTY_TRACKING):
        with pytest.raises(NotSupportedError, match="does not have what the flags ask for"):
            iommufd.hwpt(io.iommufd_id, mapper.ioas, flag)
    with pytest.raises(VfioError, match="the parent does not exist"):
        iommufd.calls.hwpt_alloc(io.iommufd_id, 0x7FFFFFFF)
    with pytest.raises(VfioError, match="the device or fault queue id does not exist"):
        iommufd.calls.hwpt_alloc(0x7FFFFFFF, mapper.ioas.id)
    with pytest.raises(NotSupportedError), iommufd.hwpt(io.iommufd_id, mapper.ioas) as hwpt:
        iommufd.calls.viommu_alloc(uapi.IOMMU_VIOMMU_TYPE_ARM_SMMUV3, io.iommufd_id, hwpt.id)


def test_fault_queue(mapper: IoasMapper) -> None:
    io, iommufd = mapper._devices[0], mapper.iommufd
    assert io.iommufd_id is not None
    with iommufd.fault_queue() as queue:
        assert queue.calls.identity() == "anon_inode:[iommufd-pgfault]"
        assert queue.calls.read() == []
        with pytest.raises(VfioError, match="no group of faults waits"):
            queue.calls.respond(5, success=True)
        hwpt = iommufd.calls.hwpt_alloc(io.iommufd_id, mapper.ioas.id, fault_id=queue.id)
        with pytest.raises(NotSupportedError, match="no page request interface"):
            io.calls.attach_iommufd_pt(hwpt)
        with pytest.raises(BusyError):
            iommufd.calls.destroy(queue.id)
        iommufd.calls.destroy(hwpt)


def test_memlock_counts_the_user(mapper: IoasMapper) -> None:
    size = 64 * PAGE
    ioas, number = mapper.ioas.id, mapper.iommufd.fileno()

    def map_too_much() -> None:
        with Memory(size) as mine:
            IommufdFd.adopt(number, "/dev/iommu").ioas_map(ioas, mine.address, size, Prot.RW)

    text = as_nobody(map_too_much, memlock=4 * PAGE)
    assert text.startswith("MemlockError: /dev/iommu: IOMMU_IOAS_MAP: RLIMIT_MEMLOCK")
    assert "all of the user's processes together" in text
    text = as_nobody(lambda: IommufdFd.adopt(number, "i").set_option(uapi.IOMMU_OPTION_RLIMIT_MODE, 1))
    assert text.startswith("PermissionDeniedError: ")
    assert "CAP_SYS_RESOURCE" in text


def test_pages_are_pinned_while_mapped(mapper: IoasMapper, memory: Memory) -> None:
    def pinned() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmPin:")) * 1024 // PAGE

    before = pinned()
    iova = mapper.ioas.map(memory.address, memory.size)
    assert pinned() == before + memory.size // PAGE
    mapper.ioas.unmap(iova, memory.size)
    assert pinned() == before


def test_vectors_of_pages_of_2_mib_use_one_entry(mapper: IoasMapper) -> None:
    size = 2 << 20
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000) as huge:  # MAP_HUGETLB
        import ctypes  # noqa: PLC0415

        anchor = ctypes.c_char.from_buffer(huge)
        iova = mapper.ioas.map(ctypes.addressof(anchor), size)
        assert iova % size == 0
        assert mapper.ioas.unmap(iova, size) == size
        del anchor
