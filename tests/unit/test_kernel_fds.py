"""Typed file descriptors: which fds they take, how they end, and capability chains, whole and broken."""

from __future__ import annotations

import errno
import os
import struct
import threading

import pytest
from kernel_fake import FakeVfio, File, chain_into
from kernel_ioctl_support import Recorder, device

from vfiopy import uapi
from vfiopy.backend import Area, IovaRange, RegionFlag
from vfiopy.errors import ClosedError, VfioError, WrongFdError
from vfiopy.kernel.ioctl import (
    CompatContainerFd,
    ContainerFd,
    DeviceFd,
    DmaBufFd,
    DmaHeapFd,
    GroupFd,
    IommufdFd,
    SyncFileFd,
    UdmabufFd,
)
from vfiopy.kernel.ioctl._call import KernelSyscalls
from vfiopy.kernel.ioctl.caps import chain, checked_ranges

# --- kinds of fd ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (ContainerFd, ["vfio/vfio"], ["vfio/12", "iommu", "/memfd:vfio/vfio"]),
        (CompatContainerFd, ["iommu"], ["vfio/vfio"]),
        (GroupFd, ["vfio/12", "vfio/noiommu-0"], ["vfio/vfio", "vfio/devices/vfio0"]),
        (DeviceFd, ["vfio/devices/vfio0", "anon_inode:[vfio-device]"], ["vfio/vfio", "vfio/12", "iommu", ""]),
        (IommufdFd, ["iommu"], ["vfio/vfio", "anon_inode:[vfio-device]"]),
        (DmaBufFd, ["/dmabuf:", "/dmabuf:name"], ["/memfd:x (deleted)"]),
        (DmaHeapFd, ["dma_heap/system"], ["udmabuf"]),
        (UdmabufFd, ["udmabuf"], ["dma_heap/system"]),
        (SyncFileFd, ["anon_inode:sync_file"], ["anon_inode:[eventfd]"]),
    ],
)
def test_only_fds_of_the_right_kind_are_adopted(vfio: FakeVfio, kind: type, good: list[str], bad: list[str]) -> None:
    for name in good:
        fd = vfio._new(File("x", name))
        adopted = kind.adopt(fd)
        assert adopted.fileno() != fd
        adopted.close()
        vfio.close(fd)
    for name in bad:
        fd = vfio._new(File("x", name))
        with pytest.raises(WrongFdError, match=f"not a {kind.kind}"):
            kind.adopt(fd)
        vfio.close(fd)
    with pytest.raises(WrongFdError, match="cannot be identified"):
        kind.adopt(4000)


def test_identity_of_real_fds() -> None:
    calls = KernelSyscalls()
    memfd, null = os.memfd_create("x"), os.open("/dev/null", os.O_RDWR)
    try:
        assert calls.identity(memfd) == "/memfd:x (deleted)"
        assert calls.identity(null) == "null"
        assert calls.identity(4000) == ""
    finally:
        os.close(memfd)
        os.close(null)


def test_an_fd_is_closed_once_and_not_used_after(vfio: FakeVfio) -> None:
    fd = device(vfio)
    fd.close()
    fd.close()
    assert not fd
    with pytest.raises(ClosedError, match=r"0000:00:04\.0 is closed"):
        fd.get_info()
    assert vfio.log.count("close 100") == 1


def test_threads_that_close_at_once_close_once(vfio: FakeVfio) -> None:
    for _ in range(20):
        fd = device(vfio)
        barrier = threading.Barrier(4)

        def close(fd: DeviceFd = fd, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            fd.close()

        threads = [threading.Thread(target=close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert vfio.left() == {}


def test_detach_gives_the_fd_away(vfio: FakeVfio) -> None:
    fd = device(vfio)
    number = fd.detach()
    fd.close()
    assert list(vfio.left()) == [number]
    vfio.close(number)


def test_fd_zero_is_an_fd(vfio: FakeVfio) -> None:
    vfio.fds[0] = File("x", "/dmabuf:")
    vfio.scripts[uapi.VFIO_DEVICE_FEATURE] = Recorder(0)
    with device(vfio) as fd, fd.dma_buf(0, [Area(0, 4096)]) as buffer:
        assert buffer.fileno() == 0


# --- capability chains ------------------------------------------------------------------------------------------


def header(number: int, following: int, body: bytes = b"") -> bytes:
    return struct.pack("=HHI", number, 1, following) + body


def test_a_chain_that_loops_is_refused() -> None:
    buffer = bytes(24) + header(1, 32) + header(2, 24)
    with pytest.raises(VfioError, match="comes back to offset 0x18"):
        list(chain(buffer, 24, "x"))
    with pytest.raises(VfioError, match="comes back"):
        list(chain(bytes(24) + header(1, 24), 24, "x"))


def test_a_chain_that_leaves_the_buffer_is_refused() -> None:
    with pytest.raises(VfioError, match=r"at 0x1000 is beyond the 0x20 bytes") as caught:
        list(chain(bytes(24) + header(1, 0x1000), 24, "0000:00:04.0"))
    assert caught.value.errno == errno.EBADMSG
    assert caught.value.object == "0000:00:04.0"
    with pytest.raises(VfioError, match="beyond"):
        list(chain(bytes(30), 24, "x"))


def test_an_empty_chain_is_empty() -> None:
    assert list(chain(bytes(24), 0, "x")) == []


def test_ranges_are_sorted_and_must_be_disjoint() -> None:
    assert checked_ranges([(8, 9), (0, 3)], "x") == (IovaRange(0, 3), IovaRange(8, 9))
    assert checked_ranges([(0, 2**64 - 1)], "x") == (IovaRange(0, 2**64 - 1),)
    with pytest.raises(VfioError, match="overlap"):
        checked_ranges([(0, 8), (8, 9)], "x")
    with pytest.raises(VfioError, match="ends before it starts"):
        checked_ranges([(9, 8)], "x")


REGION = uapi.vfio_region_info


def region_answer(capabilities: bytes) -> object:
    def answer(file: File, argument: bytearray) -> int:
        REGION.put(argument, "flags", 0xF)
        REGION.put(argument, "size", 0x10000)
        return chain_into(REGION, argument, capabilities)

    return answer


def test_region_capabilities_known_and_unknown(vfio: FakeVfio) -> None:
    sparse = header(1, 32 + 16 + 48, struct.pack("=II6Q", 3, 0, 0x8000, 0x4000, 0, 0x1000, 0x2000, 0))
    unknown = header(0x7777, 32 + 16 + 48 + 16, bytes(8))
    mappable = header(3, 32 + 16 + 48 + 16 + 8)
    kind = header(2, 0, struct.pack("=II", 0x80008086, 1))
    vfio.scripts[uapi.VFIO_DEVICE_GET_REGION_INFO] = region_answer(sparse + unknown + mappable + kind)
    with device(vfio) as fd:
        info = fd.get_region_info(0)
    assert info.sparse == (Area(0, 0x1000), Area(0x8000, 0x4000))
    assert info.msix_mappable
    assert info.type == (0x80008086, 1)
    assert info.flags == RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP


def test_a_chain_longer_than_the_first_guess_is_asked_for_again(vfio: FakeVfio) -> None:
    areas = b"".join(struct.pack("=QQ", number << 12, 0x1000) for number in range(100))
    vfio.scripts[uapi.VFIO_DEVICE_GET_REGION_INFO] = region_answer(header(1, 0, struct.pack("=II", 100, 0) + areas))
    with device(vfio) as fd:
        info = fd.get_region_info(2)
        assert info.sparse is not None
        assert len(info.sparse) == 100
    assert vfio.log.count(f"ioctl {uapi.VFIO_DEVICE_GET_REGION_INFO:#x}") == 2


def test_a_sparse_list_that_claims_too_much_is_refused(vfio: FakeVfio) -> None:
    lie = header(1, 0, struct.pack("=II", 0xFFFFFFFF, 0))
    vfio.scripts[uapi.VFIO_DEVICE_GET_REGION_INFO] = region_answer(lie)
    with device(vfio) as fd, pytest.raises(VfioError, match="claims 4294967295 entries"):
        fd.get_region_info(0)


def test_a_kernel_that_always_wants_more_is_given_up(vfio: FakeVfio) -> None:
    def greedy(file: File, argument: bytearray) -> int:
        REGION.put(argument, "argsz", min(2 * len(argument), 0xFFFFFFFF))
        return 0

    vfio.scripts[uapi.VFIO_DEVICE_GET_REGION_INFO] = greedy
    with device(vfio) as fd, pytest.raises(VfioError) as caught:
        fd.get_region_info(0)
    assert caught.value.errno == errno.EMSGSIZE


def test_device_info_atomics(vfio: FakeVfio) -> None:
    def answer(file: File, argument: bytearray) -> int:
        uapi.vfio_device_info.put(argument, "flags", 0x83)
        return chain_into(uapi.vfio_device_info, argument, header(5, 0, struct.pack("=II", 5, 0)))

    vfio.scripts[uapi.VFIO_DEVICE_GET_INFO] = answer
    with device(vfio) as fd:
        assert fd.get_info().atomics == (4, 16)


# --- completeness -----------------------------------------------------------------------------------------------


def test_every_ioctl_of_the_headers_has_a_method() -> None:
    import ast  # noqa: PLC0415
    from pathlib import Path  # noqa: PLC0415

    from vfiopy.kernel import ioctl  # noqa: PLC0415

    def is_ioctl(name: str) -> bool:
        value = getattr(uapi, name)
        if not isinstance(value, int) or name.startswith(("IOMMUFD_CMD", "VFIO_BASE")):
            return False
        plain = uapi.VFIO_TYPE << 8
        return plain + uapi.VFIO_BASE <= value < plain + 0xFF or (
            value >> 8 & 0xFF in (0x62, 0x48, 0x75, 0x3E) and value > 1 << 29
        )

    known = {name for name in uapi.__all__ if is_ioctl(name)}
    assert len(known) > 55
    used = set()
    pairs = []
    for path in Path(ioctl.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "uapi":
                used.add(node.attr)
            if isinstance(node, ast.Call) and len(node.args) > 1:
                first, second = node.args[:2]
                if isinstance(first, ast.Constant) and isinstance(second, ast.Attribute) and second.attr in known:
                    pairs.append((first.value, second.attr))
    # SET_NAME has one number for each width of long; _B is the 64-bit one.
    assert known - used == {"DMA_BUF_SET_NAME", "DMA_BUF_SET_NAME_A"}
    wrong = [(call, name) for call, name in pairs if call != name]
    assert wrong == [("DMA_BUF_SET_NAME", "DMA_BUF_SET_NAME_B")]
