"""connect(): which road is taken, what is joined, and that no failure leaves anything open."""

from __future__ import annotations

import errno

import pytest
from connect_tree import ROADS, A, B
from kernel_fake import BAR0_SIZE, FakeVfio
from pci_tree import FakeKernel

from vfiopy.backend import DeviceIo, Mapper
from vfiopy.errors import (
    BusyError,
    StateError,
    VfioError,
)
from vfiopy.kernel import ContainerMapper, connect
from vfiopy.kernel.ioctl._call import replaced


@pytest.mark.parametrize("road", ROADS)
def test_open_and_close_leave_nothing(road: str, tree: FakeKernel, vfio: FakeVfio) -> None:
    io, mapper = connect(A, backend=road, system=tree)
    assert isinstance(io, DeviceIo)
    assert (io.name, io.backend) == (A, road)
    seam: Mapper = mapper
    target = seam.kernel_target
    assert target is not None
    assert target.fd in vfio.fds
    assert [tuple(one) for one in mapper.ranges()] == [(0, 0xFEDFFFFF), (0xFEF00000, 2**39 - 1)]
    io.close()
    io.close()
    mapper.close()
    mapper.close()
    assert vfio.left() == {}


@pytest.mark.parametrize("road", ROADS)
def test_no_failing_call_leaves_anything_open(road: str, tree: FakeKernel) -> None:
    probe = FakeVfio()
    with replaced(probe):
        io, mapper = connect(A, backend=road, system=tree)
        io.close()
        mapper.close()
        steps = probe.log.index("close", 0) if "close" in probe.log else probe.calls
    assert steps > 4
    failed = 0
    for number in range(1, steps + 1):
        for code in (errno.EIO, errno.EBUSY, errno.EINVAL, errno.ENOMEM, errno.EPERM):
            fake = FakeVfio()
            fake.fail_at, fake.fail_errno = number, code
            with replaced(fake):
                try:
                    io, mapper = connect(A, backend=road, system=tree)
                except VfioError:
                    failed += 1
                else:
                    # The call that fails belongs to close(): there the object stays open and can be closed again.
                    for thing in (io, mapper):
                        try:
                            thing.close()
                        except VfioError:
                            thing.close()
                assert fake.left() == {}, f"call {number} ({fake.log[-1]}) failing with {errno.errorcode[code]}"
    assert failed > 10


@pytest.mark.parametrize("road", ROADS)
def test_ctrl_c_before_any_call_leaves_nothing_open(road: str, tree: FakeKernel) -> None:
    interrupted = 0
    for number in range(1, 16):
        fake = FakeVfio()
        fake.interrupt_at = number
        with replaced(fake):
            try:
                io, mapper = connect(A, backend=road, system=tree)
            except KeyboardInterrupt:
                interrupted += 1
            else:
                for thing in (io, mapper):
                    try:
                        thing.close()
                    except KeyboardInterrupt:
                        thing.close()
            assert fake.left() == {}, f"call {number} ({fake.log[-1]})"
    assert interrupted >= 5


@pytest.mark.parametrize("road", ROADS)
def test_no_failure_of_a_second_device_disturbs_the_first(road: str, tree: FakeKernel) -> None:
    for number in range(1, 12):
        fake = FakeVfio()
        with replaced(fake):
            first, mapper = connect(A, backend=road, system=tree)
            before = fake.left()
            fake.calls, fake.fail_at = 0, number
            try:
                second, same = connect(B, backend=road, system=tree, mappers=[mapper])
            except VfioError:
                assert fake.left() == before, f"call {number}"
            else:
                assert same is mapper
                fake.fail_at = 0
                second.close()
            fake.fail_at = 0
            assert first.read(0, 0, 4) == bytes(range(4))
            first.close()
            mapper.close()
            assert fake.left() == {}


def test_auto_takes_iommufd_where_nodes_are_there(tree: FakeKernel, vfio: FakeVfio) -> None:
    io, mapper = connect(A, system=tree)
    assert io.backend == "iommufd"
    assert io.iommufd_id == 77
    io.close()
    mapper.close()


@pytest.mark.parametrize("missing", ["iommu", "vfio/devices/vfio4"])
def test_auto_takes_type1v2_else(missing: str, tree: FakeKernel, vfio: FakeVfio) -> None:
    (tree.dev / missing).unlink()
    io, mapper = connect(A, system=tree)
    assert io.backend == "type1v2"
    io.close()
    mapper.close()


def test_auto_stays_on_the_road_of_the_space(tree: FakeKernel, vfio: FakeVfio) -> None:
    first, mapper = connect(A, backend="iommufd-compat-type1v2", system=tree)
    second, same = connect(B, system=tree, mappers=[mapper])
    assert same is mapper
    first.close()
    second.close()
    mapper.close()
    assert vfio.left() == {}


def test_a_mapper_of_another_kind_is_not_joined(tree: FakeKernel, vfio: FakeVfio) -> None:
    first, mapper = connect(A, backend="iommufd", system=tree)
    second, other = connect(B, backend="type1v2", system=tree, mappers=[mapper])
    assert other is not mapper
    for thing in (first, second, mapper, other):
        thing.close()
    assert vfio.left() == {}


@pytest.mark.parametrize(("road", "number"), [("type1v2", 0x3B68), ("iommufd", 0x3B77)])
def test_an_iommu_that_does_not_fit_gets_a_mapper_of_its_own(
    road: str, number: int, tree: FakeKernel, vfio: FakeVfio
) -> None:
    first, mapper = connect(A, backend=road, system=tree)
    tries = []

    def refuse_once(file: object, argument: bytearray) -> int:
        tries.append(1)
        del vfio.scripts[number]
        return -errno.EINVAL

    vfio.scripts[number] = refuse_once
    second, other = connect(B, backend=road, system=tree, mappers=[mapper])
    assert tries == [1]
    assert other is not mapper
    for thing in (first, second, mapper, other):
        thing.close()
    assert vfio.left() == {}


def test_two_devices_of_one_group_share_it(tree: FakeKernel, vfio: FakeVfio) -> None:
    tree.add("0000:00:08.0", driver="vfio-pci", group=4)
    first, mapper = connect(A, backend="type1v2", system=tree)
    second, _ = connect("0000:00:08.0", backend="type1v2", system=tree, mappers=[mapper])
    assert first.group is second.group
    first.close()
    assert second.read(0, 0, 1) == b"\0"
    second.close()
    mapper.close()
    assert vfio.left() == {}


def test_a_group_that_is_open_already_says_what_to_do(tree: FakeKernel, vfio: FakeVfio) -> None:
    first, mapper = connect(A, backend="type1v2", system=tree)
    with pytest.raises(BusyError, match="in one process put all devices of a group into one space") as caught:
        connect(A, backend="type1v2", system=tree)
    assert "fuser" in caught.value.hint
    first.close()
    mapper.close()


def test_type1_keeps_its_last_group_so_that_mappings_stay(tree: FakeKernel, vfio: FakeVfio) -> None:
    first, mapper = connect(A, backend="type1v2", system=tree)
    first.close()
    assert any(name == "group vfio/4" for name in vfio.left().values())
    again, same = connect(A, backend="type1v2", system=tree, mappers=[mapper])
    assert same is mapper
    again.close()
    mapper.close()
    assert vfio.left() == {}


def test_a_second_group_goes_when_its_devices_go(tree: FakeKernel, vfio: FakeVfio) -> None:
    first, mapper = connect(A, backend="type1v2", system=tree)
    second, _ = connect(B, backend="type1v2", system=tree, mappers=[mapper])
    second.close()
    assert not any(name == "group vfio/5" for name in vfio.left().values())
    first.close()
    mapper.close()


def test_a_mapper_with_devices_is_not_closed(tree: FakeKernel, vfio: FakeVfio) -> None:
    for road in ("iommufd", "type1v2"):
        io, mapper = connect(A, backend=road, system=tree)
        with pytest.raises(StateError, match=A):
            mapper.close()
        assert mapper
        io.close()
        mapper.close()
    assert vfio.left() == {}


def test_a_mapped_device_is_not_closed(tree: FakeKernel, vfio: FakeVfio) -> None:
    io, mapper = connect(A, backend="type1v2", system=tree)
    window = io.map_region(0, 0, BAR0_SIZE)
    with pytest.raises(StateError, match=r"parts of it are mapped: 0000:00:04.0 BAR 0"):
        io.close()
    window.close()
    window.close()
    io.close()
    mapper.close()
    assert vfio.left() == {}


def test_compat_container_is_recognised(tree: FakeKernel, vfio: FakeVfio) -> None:
    vfio.type1 = False
    io, mapper = connect(A, backend="type1v2", system=tree)
    assert isinstance(mapper, ContainerMapper)
    assert mapper.container.compat
    io.close()
    mapper.close()
    assert vfio.left() == {}
