"""connect(): what is refused and how, and fds that come from elsewhere."""

from __future__ import annotations

import errno
import re

import pytest
from connect_tree import BRIDGE, A, B, C
from kernel_fake import FakeVfio
from pci_tree import FakeKernel

from vfiopy.errors import (
    DeviceNotFoundError,
    NotBoundError,
    NotSupportedError,
    NotViableError,
    PermissionDeniedError,
    VfioError,
    WrongFdError,
)
from vfiopy.kernel import ContainerMapper, ForeignMapper, IoasMapper, connect
from vfiopy.kernel.ioctl._call import replaced

# --- refusals ---------------------------------------------------------------------------------------------------


def test_not_bound(tree: FakeKernel, vfio: FakeVfio) -> None:
    with pytest.raises(NotBoundError, match="bound to no driver") as caught:
        connect(C, system=tree)
    assert caught.value.hint == f"bind it to vfio-pci: vfiopy bind {C}"
    tree.add("0000:00:09.0", driver="e1000e", group=9)
    with pytest.raises(NotBoundError, match="bound to e1000e, not to a VFIO driver"):
        connect("0000:00:09.0", system=tree)
    assert vfio.log == []


def test_not_there(tree: FakeKernel, vfio: FakeVfio) -> None:
    with pytest.raises(DeviceNotFoundError):
        connect("0000:00:1f.0", system=tree)


def test_unknown_backend(tree: FakeKernel, vfio: FakeVfio) -> None:
    with pytest.raises(NotSupportedError, match="there is no backend 'vfio'") as caught:
        connect(A, backend="vfio", system=tree)
    assert "type1v2" in caught.value.hint


def test_not_viable_names_the_devices_that_block_and_no_bridge(tree: FakeKernel, vfio: FakeVfio) -> None:
    tree.add("0000:00:0a.0", driver="e1000e", group=4)
    tree.add(BRIDGE, driver="pcieport", group=4, class_code=0x060400, header_type=1)

    def not_viable(file: object, argument: bytearray) -> int:
        return 0

    vfio.scripts[0x3B67] = not_viable
    with pytest.raises(NotViableError, match=r"native drivers hold 0000:00:0a.0 \(e1000e\)") as caught:
        connect(A, backend="type1v2", system=tree)
    assert BRIDGE not in str(caught.value)
    assert "bridges may stay" in caught.value.hint
    assert vfio.left() == {}


@pytest.mark.parametrize(("road", "number"), [("type1v2", 0x3B68), ("type1v2", 0x3B6A), ("iommufd", 0x3B76)])
def test_kernel_says_the_group_is_held(road: str, number: int, tree: FakeKernel, vfio: FakeVfio) -> None:
    tree.add("0000:00:0a.0", driver="e1000e", group=4)
    vfio.scripts[number] = lambda file, argument: -errno.EBUSY
    with pytest.raises(NotViableError, match=r"0000:00:0a.0 \(e1000e\)"):
        connect(A, backend=road, system=tree)
    assert vfio.left() == {}


def test_no_interrupt_remapping(tree: FakeKernel, vfio: FakeVfio) -> None:
    vfio.scripts[0x3B76] = lambda file, argument: -errno.EPERM
    with pytest.raises(PermissionDeniedError, match=r"iommufd\.allow_unsafe_interrupts=1"):
        connect(A, backend="iommufd", system=tree)
    assert vfio.left() == {}


def test_noiommu_needs_the_words(tree: FakeKernel, vfio: FakeVfio) -> None:
    (tree.sys / "class/vfio/4").rename(tree.sys / "class/vfio/noiommu-4")
    (tree.dev / "vfio/4").rename(tree.dev / "vfio/noiommu-4")
    with pytest.raises(PermissionDeniedError, match="noiommu=True") as caught:
        connect(A, system=tree)
    assert "all of this machine's memory" in caught.value.hint
    with pytest.raises(NotSupportedError, match="no IOMMU"):
        connect(A, backend="iommufd", noiommu=True, system=tree)
    io, mapper = connect(A, noiommu=True, system=tree)
    assert io.backend == "noiommu"
    assert mapper.kernel_target is None
    io.close()
    mapper.close()
    assert vfio.left() == {}
    with pytest.raises(NotSupportedError, match="it has an IOMMU"):
        connect(B, backend="noiommu", noiommu=True, system=tree)


def test_a_stale_node_is_not_opened_as_the_device(tree: FakeKernel, vfio: FakeVfio) -> None:
    class Stale(FakeVfio):
        def identity(self, fd: int) -> str:
            return "vfio/devices/vfio9"

    fake = Stale()
    with replaced(fake), pytest.raises(WrongFdError, match="stale copy"):
        connect(A, backend="iommufd", system=tree)
    assert fake.left() == {}


# --- fds from elsewhere -----------------------------------------------------------------------------------------


def test_adopted_cdev_is_bound_and_attached(tree: FakeKernel, vfio: FakeVfio) -> None:
    fd = vfio.new_fd("/dev/vfio/devices/vfio4")
    io, mapper = connect(A, device_fd=fd, system=tree)
    assert isinstance(mapper, IoasMapper)
    assert io.backend == "iommufd"
    assert io.fileno() != fd
    io.close()
    mapper.close()
    assert list(vfio.left()) == [fd]  # still the caller's
    vfio.close(fd)


def test_no_failing_call_of_adoption_takes_the_callers_fd(tree: FakeKernel) -> None:
    for number in range(2, 9):
        fake = FakeVfio()
        with replaced(fake):
            fd = fake.new_fd("/dev/vfio/devices/vfio4")
            fake.fail_at = number
            try:
                io, mapper = connect(A, device_fd=fd, system=tree)
            except VfioError:
                assert list(fake.left()) == [fd]
            else:
                fake.fail_at = 0
                io.close()
                mapper.close()


def test_adopted_group_device_has_no_dma_unless_the_container_comes_too(tree: FakeKernel, vfio: FakeVfio) -> None:
    launcher, launchers_mapper = connect(A, backend="type1v2", system=tree)
    assert isinstance(launchers_mapper, ContainerMapper)
    io, mapper = connect(A, device_fd=launcher.fileno(), system=tree)
    assert isinstance(mapper, ForeignMapper)
    assert mapper.ranges() == []
    assert mapper.traits().memory == frozenset()
    assert io.read(0, 1, 2) == b"\1\2"
    io.close()
    mapper.close()

    own = ContainerMapper.adopt(launchers_mapper.container.fileno())
    io, mapper = connect(A, device_fd=launcher.fileno(), mappers=[own], system=tree)
    assert mapper is own
    assert mapper.ranges()
    io.close()
    own.close()
    launcher.close()
    launchers_mapper.close()
    assert vfio.left() == {}


def test_a_container_is_not_adopted_as_a_device(tree: FakeKernel, vfio: FakeVfio) -> None:
    fd = vfio.new_fd("/dev/vfio/vfio")
    with pytest.raises(WrongFdError, match=re.escape("is 'vfio/vfio', not a VFIO device")):
        connect(A, device_fd=fd, system=tree)
    assert list(vfio.left()) == [fd]
    vfio.close(fd)


def test_a_container_that_lost_its_last_group_chooses_its_model_again(tree: FakeKernel, vfio: FakeVfio) -> None:
    (tree.sys / "class/vfio/4").rename(tree.sys / "class/vfio/noiommu-4")
    (tree.dev / "vfio/4").rename(tree.dev / "vfio/noiommu-4")
    io, mapper = connect(A, noiommu=True, system=tree)
    io.close()  # its group leaves, and the kernel forgets the model
    again, same = connect(A, noiommu=True, mappers=[mapper], system=tree)
    assert same is mapper
    again.close()
    mapper.close()
    assert vfio.left() == {}


def test_a_close_that_was_interrupted_can_be_done_again(tree: FakeKernel, vfio: FakeVfio) -> None:
    io, mapper = connect(A, backend="iommufd", system=tree)
    io.calls.close()  # as far as an interrupted close() may come
    io.close()
    mapper.close()
    assert vfio.left() == {}
