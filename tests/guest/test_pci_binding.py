"""Binding on a real kernel: real drivers leave and come back, crashes and failing writes leave nothing behind."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from modes import E1000E, EDU, IGB, NVME

from vfiopy.errors import (
    BindingError,
    BusyError,
    DeviceInUseError,
    NotBoundError,
    NotViableError,
    VfioError,
)
from vfiopy.pci import Function, System, bind, find, function, grant, restore, uses
from vfiopy.pci.records import State

Bdf = Callable[..., str]

pytestmark = pytest.mark.machine("intel", "old")

BEHIND_BRIDGE = ("0000:02:01.0", "0000:02:02.0")


@pytest.fixture(autouse=True)
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("VFIOPY_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path / "state"
    left = restore()
    assert left == []


def disk(where: str) -> Path:
    """The block device of an NVMe controller, once the kernel has scanned it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for path in Path("/sys/class/block").glob("nvme*n1"):
            if where in str(path.resolve()) and (Path("/dev") / path.name).is_block_device():
                return Path("/dev") / path.name
        time.sleep(0.05)
    raise AssertionError(f"{where} has no disk")


def interface(where: str) -> str:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for path in Path(f"/sys/bus/pci/devices/{where}").glob("net/*"):
            return path.name
        time.sleep(0.05)
    raise AssertionError(f"{where} has no interface")


def snapshot() -> dict[str, State]:
    return {str(one.address): State.of(one) for one in find()}


# --- there and back ---


@pytest.mark.parametrize(("ids", "driver"), [(NVME, "nvme"), (IGB, "igb"), (E1000E, "e1000e"), (EDU, None)])
def test_bind_and_undo(bdf: Bdf, own_records: Path, ids: str, driver: str | None) -> None:
    before = snapshot()
    one = function(bdf(ids))
    assert one.driver == driver
    with bind(one) as binding:
        assert binding.changed == (one,)
        assert (one.driver, one.driver_override) == ("vfio-pci", "vfio-pci")
        assert one.is_vfio
        assert one.group_node is not None
        assert one.group_node.is_char_device()
        assert not one.is_noiommu
        assert one.group_blockers() == ()
        assert [path.name for path in own_records.glob("*.json")] == [f"{one}.json"]
    assert snapshot() == before
    assert list(own_records.glob("*.json")) == []


@pytest.mark.machine("intel")
def test_character_device(bdf: Bdf) -> None:
    one = function(bdf(EDU))
    assert "not bound" in one.cdev_missing
    with bind(one):
        assert one.cdev_missing == ""
        assert one.cdev_node is not None
        assert one.cdev_node.is_char_device()
        numbers = (one.sysfs / "vfio-dev" / str(one.vfio_cdev) / "dev").read_text().strip()
        device = one.cdev_node.stat().st_rdev
        assert numbers == f"{os.major(device)}:{os.minor(device)}"


@pytest.mark.machine("old")
def test_kernel_without_character_devices(bdf: Bdf) -> None:
    one = function(bdf(EDU))
    with bind(one):
        assert one.vfio_cdev is None
        assert one.cdev_missing


def test_disk_works_again(bdf: Bdf) -> None:
    where = bdf(NVME, 1)
    text = b"written by the kernel's own driver".ljust(4096, b".")
    with disk(where).open("r+b", buffering=0) as raw:
        raw.write(text)
        os.fsync(raw.fileno())
    with bind(where):
        assert function(where).driver == "vfio-pci"
    with disk(where).open("rb", buffering=0) as raw:
        assert raw.read(4096) == text


def test_interface_works_again(bdf: Bdf) -> None:
    where = bdf(IGB)
    address = Path(f"/sys/class/net/{interface(where)}/address").read_text()
    with bind(where):
        assert not Path(f"/sys/bus/pci/devices/{where}/net").exists()
    assert Path(f"/sys/class/net/{interface(where)}/address").read_text() == address


def test_whole_group_behind_the_bridge() -> None:
    before = snapshot()
    with bind(BEHIND_BRIDGE[0], whole_group=True) as binding:
        assert tuple(map(str, binding.functions)) == BEHIND_BRIDGE
        assert {function(one).driver for one in BEHIND_BRIDGE} == {"vfio-pci"}
        assert function("0000:00:0b.0").driver is None
        assert viable(function(BEHIND_BRIDGE[0]))
    assert snapshot() == before


VFIO_GROUP_GET_STATUS, VFIO_GROUP_SET_CONTAINER, VFIO_SET_IOMMU, VFIO_GROUP_GET_DEVICE_FD = (
    0x3B67,
    0x3B68,
    0x3B66,
    0x3B6A,
)


def viable(one: Function) -> bool:
    assert one.group_node is not None
    fd = os.open(one.group_node, os.O_RDWR | os.O_CLOEXEC)
    try:
        status = bytearray(struct.pack("II", 8, 0))
        fcntl.ioctl(fd, VFIO_GROUP_GET_STATUS, status)
        return bool(struct.unpack("II", status)[1] & 1)
    finally:
        os.close(fd)


def test_group_that_is_not_viable() -> None:
    """pci-pf-stub takes any function and leaves DMA to the kernel, so it stands for any native driver."""
    edu, other = map(function, BEHIND_BRIDGE)
    with bind(other, "pci-pf-stub"):
        assert other.driver == "pci-pf-stub"
        assert edu.group_blockers() == (other,)
        with pytest.raises(NotViableError, match=r"0000:02:02.0 \(pci-pf-stub"):
            bind(edu)
        assert edu.driver is None
        with bind(edu, force=True):
            assert edu.is_vfio
            assert not viable(edu)  # the kernel thinks so too
        with bind(edu, whole_group=True):
            assert other.is_vfio
            assert viable(edu)
        assert other.driver == "pci-pf-stub"
    with bind(other, "pci-stub"):
        assert edu.group_blockers() == ()
        with bind(edu):
            assert viable(edu)  # pci-stub does no DMA: no need to bind it


def test_virtual_functions_come_back(bdf: Bdf) -> None:
    one = function(bdf(IGB))
    (one.sysfs / "sriov_numvfs").write_text("2")
    try:
        vfs = one.virtual_functions()
        assert len(vfs) == 2
        native = vfs[1].driver
        bind(vfs[0]).keep()
        before = snapshot()
        with pytest.raises(DeviceInUseError, match="2 virtual functions of it are enabled"):
            bind(one)
        assert snapshot() == before
        with bind(one, force=True):
            assert one.driver == "vfio-pci"
            assert one.sriov_numvfs == 0
            assert not vfs[0].exists
        after = snapshot()
        assert after == before
        assert (vfs[0].driver, vfs[1].driver) == ("vfio-pci", native)
        assert restore(vfs[0].address) == [vfs[0].address]
        assert vfs[0].driver == native
    finally:
        (one.sysfs / "sriov_numvfs").write_text("0")


def test_probe_that_the_kernel_refuses(bdf: Bdf) -> None:
    """The nvme driver cannot drive edu; its errno arrives, and edu is as it was."""
    before = snapshot()
    with pytest.raises(BindingError, match="its probe failed; everything was put back") as caught:
        bind(bdf(EDU), "nvme")
    assert caught.value.errno
    assert snapshot() == before


def test_bridges_are_refused() -> None:
    with pytest.raises(BindingError, match="is a bridge"):
        bind("0000:00:0b.0")
    with pytest.raises(BindingError, match="is a bridge"):
        bind("0000:00:09.0")


def test_missing_driver(bdf: Bdf) -> None:
    with pytest.raises(BindingError, match="modprobe mlx5_vfio_pci"):
        bind(bdf(EDU), "mlx5_vfio_pci")


# --- crashes and failures ---


@dataclass(frozen=True)
class Faulty(System):
    """The real system, but one write ends in what the test wants."""

    at: int = 0
    dies: bool = False
    count: list[int] = field(default_factory=lambda: [0])

    def write(self, path: Path, text: str) -> None:
        self.count[0] += 1
        if self.count[0] == self.at:
            if self.dies:
                os._exit(42)
            raise OSError(errno.EIO, "as the test wants", str(path))
        super().write(path, text)


def in_child(action: Callable[[], object]) -> int:
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("ids", [NVME, EDU])
def test_crash_at_every_write_then_restore(bdf: Bdf, own_records: Path, ids: str) -> None:
    where = bdf(ids)
    before = snapshot()
    for number in range(1, 10):
        status = in_child(lambda at=number: bind(where, system=Faulty(at=at, dies=True)))  # type: ignore[misc]
        if status == 0:
            break
        assert status == 42
        assert [path.name for path in own_records.glob("*.json")] == [f"{where}.json"]
        assert [str(one) for one in restore()] == [where]
        assert snapshot() == before
        assert restore() == []
    assert number >= 3
    assert function(where).driver == "vfio-pci"  # the child that lived to the end
    restore(where)
    assert snapshot() == before


def test_crash_while_restoring_then_restore(bdf: Bdf) -> None:
    where = bdf(NVME)
    before = snapshot()
    for number in range(1, 10):
        bind(where)
        status = in_child(lambda at=number: restore(system=Faulty(at=at, dies=True)))  # type: ignore[misc]
        assert status in (0, 42)
        restore()
        assert snapshot() == before
        if status == 0:
            break
    assert number >= 4


def test_bind_after_a_crash_goes_back_to_the_first_driver(bdf: Bdf) -> None:
    where = bdf(NVME)
    before = snapshot()
    assert in_child(lambda: bind(where, system=Faulty(at=3, dies=True))) == 42
    assert function(where).driver is None
    with bind(where):
        assert function(where).driver == "vfio-pci"
    assert snapshot() == before


@pytest.mark.parametrize("whole_group", [False, True])
def test_every_write_may_fail(bdf: Bdf, own_records: Path, whole_group: bool) -> None:
    where = BEHIND_BRIDGE[0] if whole_group else bdf(NVME)
    before = snapshot()
    failures = 0
    for number in range(1, 20):
        system = Faulty(at=number)
        failure = ""
        try:
            bind(where, whole_group=whole_group, system=system)
        except VfioError as error:
            failure = str(error)
        if failure:
            failures += 1
            assert "everything was put back" in failure
        else:
            restore()
        assert snapshot() == before
        assert list(own_records.glob("*.json")) == []
        if system.count[0] < number:
            break
    else:
        pytest.fail("bind never came to an end")
    assert failures >= 2


# --- in use ---


def test_mounted_disk(bdf: Bdf, tmp_path: Path) -> None:
    where = bdf(NVME, 1)
    node = disk(where)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(node)], check=True)
    folder = tmp_path / "a folder"
    folder.mkdir()
    subprocess.run(["mount", str(node), str(folder)], check=True)
    try:
        with pytest.raises(DeviceInUseError) as caught:
            bind(where)
        assert f"{node} is mounted at {folder}" in str(caught.value)
        assert "nvme uses it" in str(caught.value)
        assert function(where).driver == "nvme"
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    with bind(where):
        pass


def test_disk_that_is_mounted_in_another_namespace(bdf: Bdf, tmp_path: Path) -> None:
    where = bdf(NVME, 1)
    node = disk(where)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(node)], check=True)
    command = f"mount {node} {tmp_path} && echo ready && read line"
    with subprocess.Popen(
        ["unshare", "-m", "sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        assert str(node) not in Path("/proc/self/mountinfo").read_text()
        assert System().is_claimed(node)
        assert uses(function(where)) == [f"{node} is mounted at {tmp_path}"]
        with pytest.raises(DeviceInUseError, match="is mounted at"):
            bind(where)
    assert not System().is_claimed(node)
    assert uses(function(where)) == []


def test_swap(bdf: Bdf) -> None:
    where = bdf(NVME, 1)
    node = disk(where)
    subprocess.run(["mkswap", "-q", str(node)], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["swapon", str(node)], check=True)
    try:
        with pytest.raises(DeviceInUseError, match=f"{node} is swap space"):
            bind(where)
    finally:
        subprocess.run(["swapoff", str(node)], check=True)


def test_disk_that_a_process_has_open(bdf: Bdf) -> None:
    where = bdf(NVME)
    node = disk(where)
    with node.open("rb"), pytest.raises(DeviceInUseError, match=rf"this process\) has {node} open"):
        bind(where)
    assert uses(function(where)) == []


def test_forced_away_from_a_mounted_file_system_is_possible(bdf: Bdf) -> None:
    """force=True is for those who know: here an open file that nobody misses."""
    where = bdf(NVME)
    with disk(where).open("rb"), bind(where, force=True):
        assert function(where).is_vfio


SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFFLAGS, SIOCADDRT, SIOCDELRT = 0x8916, 0x891C, 0x8914, 0x890B, 0x890C


def address(text: str) -> bytes:
    return struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))


@contextlib.contextmanager
def up(name: str, where: str) -> Iterator[socket.socket]:
    """Bring an interface up with an address, through the ioctls that need no program."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFADDR, struct.pack("16s16s8x", name.encode(), address(where)))
        fcntl.ioctl(control, SIOCSIFNETMASK, struct.pack("16s16s8x", name.encode(), address("255.255.255.0")))
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), 1))
        try:
            yield control
        finally:
            fcntl.ioctl(control, SIOCSIFADDR, struct.pack("16s16s8x", name.encode(), address("0.0.0.0")))
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), 0))


@pytest.mark.parametrize("ids", [IGB, E1000E])
def test_interface_with_an_address(bdf: Bdf, ids: str) -> None:
    where = bdf(ids)
    name = interface(where)
    with up(name, "192.0.2.7"):
        with pytest.raises(DeviceInUseError, match=f"interface {name} is up with 192.0.2.7"):
            bind(where)
        assert function(where).driver in ("igb", "e1000e")
    assert uses(function(where)) == []


def test_interface_with_the_default_route(bdf: Bdf) -> None:
    where = bdf(E1000E)
    name = interface(where)
    with up(name, "192.0.2.7") as control:
        label = array.array("B", name.encode() + b"\0")
        anywhere, gateway = address("0.0.0.0"), address("192.0.2.1")
        # struct rtentry of linux/route.h; flags are RTF_UP and RTF_GATEWAY
        route = struct.pack(
            "@L16s16s16sHhLPhPLLH",
            *(0, anywhere, gateway, anywhere, 3, 0, 0, 0, 0, label.buffer_info()[0], 0, 0, 0),
        )
        fcntl.ioctl(control, SIOCADDRT, route)
        try:
            with pytest.raises(DeviceInUseError, match=f"interface {name} carries the default route"):
                bind(where)
        finally:
            fcntl.ioctl(control, SIOCDELRT, route)
    assert uses(function(where)) == []


# --- open devices ---


def open_through_group(one: Function) -> tuple[int, int, int]:
    container = os.open("/dev/vfio/vfio", os.O_RDWR | os.O_CLOEXEC)
    assert one.group_node is not None
    group = os.open(one.group_node, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(group, VFIO_GROUP_SET_CONTAINER, struct.pack("i", container))
    fcntl.ioctl(container, VFIO_SET_IOMMU, 3)
    device = fcntl.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, bytearray(f"{one}\0".encode()))
    return container, group, device


def test_undo_waits_for_nobody(bdf: Bdf) -> None:
    """The kernel would block the unbinding until the device is closed; undo() says who has it instead."""
    one = function(bdf(EDU))
    binding = bind(one)
    container, group, device = open_through_group(one)
    try:
        started = time.monotonic()
        with pytest.raises(BusyError, match=rf"process {os.getpid()} .*this process.* has {one.group_node} open"):
            binding.undo()
        assert time.monotonic() - started < 5
    finally:
        for fd in (device, group, container):
            os.close(fd)
    binding.undo()
    assert one.driver is None


@pytest.mark.machine("intel")
def test_undo_while_only_the_device_file_is_open(bdf: Bdf) -> None:
    one = function(bdf(EDU))
    other = function(bdf(EDU, 1))
    binding = bind(one)
    container, group, device = open_through_group(one)
    try:
        os.close(group)
        with pytest.raises(BusyError, match="vfio-device"):
            binding.undo()
        with bind(other, whole_group=True):
            pass  # its own device file is not open
    finally:
        os.close(device)
        os.close(container)
    binding.undo()


@pytest.mark.machine("intel")
def test_undo_while_the_character_device_is_open(bdf: Bdf) -> None:
    one = function(bdf(EDU))
    binding = bind(one)
    assert one.cdev_node is not None
    fd = os.open(one.cdev_node, os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(BusyError, match=str(one.cdev_node)):
            binding.undo()
    finally:
        os.close(fd)
    binding.undo()


# --- an unprivileged user ---

NOBODY = 65534


def as_nobody(*nodes: Path) -> list[int]:
    """errno of opening each node as user nobody; 0 where that works."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        results = []
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        for node in nodes:
            try:
                os.close(os.open(node, os.O_RDWR))
                results.append(0)
            except OSError as error:
                results.append(error.errno or -1)
        os.write(writing, bytes(results))
        os._exit(0)
    os.waitpid(child, 0)
    data = os.read(reading, 64)
    os.close(reading)
    os.close(writing)
    return list(data)


@pytest.mark.machine("intel")
@pytest.mark.parametrize("who", [{"user": NOBODY}, {"group": NOBODY}, {"user": NOBODY, "group": NOBODY}])
def test_grant(bdf: Bdf, who: dict[str, int]) -> None:
    one = function(bdf(EDU))
    shared = Path("/dev/iommu")
    was = shared.stat()
    with pytest.raises(NotBoundError, match="no VFIO node"):
        grant(one, **who)
    try:
        with bind(one):
            assert one.group_node is not None
            assert one.cdev_node is not None
            assert as_nobody(one.group_node, one.cdev_node) == [errno.EACCES] * 2
            changed = grant(one, **who)
            assert {one.group_node, one.cdev_node} <= set(changed)
            assert as_nobody(one.group_node, one.cdev_node, shared) == [0, 0, 0]
            mode = one.group_node.stat().st_mode & 0o777
            assert mode == (0o660 if "group" in who else 0o600)
            assert shared not in grant(one, **who)
    finally:
        os.chown(shared, was.st_uid, was.st_gid)
        shared.chmod(was.st_mode & 0o777)


# --- no IOMMU ---


@pytest.mark.machine("noiommu")
def test_without_an_iommu(bdf: Bdf) -> None:
    one = function(bdf(EDU))
    assert one.iommu_group is None
    with bind(one):
        assert one.is_noiommu
        assert one.group_node is not None
        assert one.group_node.name.startswith("noiommu-")
        assert one.group_node.is_char_device()
        if one.cdev_node is None:  # up to 7.2
            assert "without an IOMMU" in one.cdev_missing
        else:
            assert one.cdev_node.name.startswith("noiommu-vfio")
            assert one.cdev_node.is_char_device()
    assert one.iommu_group is None
    assert one.driver is None


@pytest.mark.machine("noiommu")
def test_without_an_iommu_and_not_allowed(bdf: Bdf) -> None:
    switch = Path("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode")
    switch.write_text("N")
    try:
        with pytest.raises(BindingError, match="it has no IOMMU group") as caught:
            bind(bdf(EDU))
        assert "intel_iommu=on" in caught.value.hint
        # and the kernel agrees: past our own check, its probe fails
        one = function(bdf(EDU))
        (one.sysfs / "driver_override").write_text("vfio-pci")
        with pytest.raises(OSError, match="Invalid argument"):
            Path("/sys/bus/pci/drivers/vfio-pci/bind").write_text(str(one))
        (one.sysfs / "driver_override").write_text("\n")
    finally:
        switch.write_text("Y")
