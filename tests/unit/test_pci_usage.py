"""What the in-use guard sees. Kernel's files stand in a folder; the guest tests mount and route for real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pci_tree import FakeKernel

from vfiopy.errors import DeviceInUseError
from vfiopy.pci import Function, System, bind, function, uses

NVME, NIC, VGA = "0000:00:05.0", "0000:01:00.0", "0000:00:02.0"


class Bench:
    def __init__(self, root: Path) -> None:
        self.kernel = FakeKernel.make(root)
        for name in ("nvme", "igb", "virtio-pci", "vfio-pci"):
            self.kernel.add_driver(name)
        self.nvme = self.kernel.add(NVME, class_code=0x010802, driver="nvme", group=5)
        self.nic = self.kernel.add(NIC, class_code=0x020000, driver="igb", group=7)
        self.kernel.add(VGA, class_code=0x030000, group=2)
        self.interface("eth0", self.nic)
        self.disk("nvme0n1", self.nvme / "nvme/nvme0", "259:0")
        self.disk("nvme0n1p1", self.nvme / "nvme/nvme0/nvme0n1", "259:1")

    def function(self, address: str) -> Function:
        return function(address, system=self.kernel)

    def uses(self, address: str = NVME) -> list[str]:
        return uses(self.function(address))

    def disk(self, name: str, parent: Path, number: str) -> Path:
        folder = parent / name
        (folder / "holders").mkdir(parents=True)
        (folder / "dev").write_text(f"{number}\n")
        (folder / "uevent").write_text(f"MAJOR={number.partition(':')[0]}\nDEVNAME={name}\n")
        (self.kernel.sys / "class/block" / name).symlink_to(folder)
        (self.kernel.dev / name).write_text("")
        return folder

    def virtual(self, name: str, number: str) -> Path:
        return self.disk(name, self.kernel.sys / "devices/virtual/block", number)

    def interface(self, name: str, parent: Path) -> Path:
        folder = parent / "net" / name
        folder.mkdir(parents=True)
        (folder / "flags").write_text("0x1002\n")
        (self.kernel.sys / "class/net" / name).symlink_to(folder)
        return folder

    def mount(self, number: str, source: str, where: str, process: str = "self") -> None:
        path = self.kernel.proc / process / "mountinfo"
        path.parent.mkdir(exist_ok=True)
        with path.open("a") as file:
            file.write(f"36 25 {number} / {where} rw,noatime shared:1 - ext4 {source} rw\n")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_idle(bench: Bench) -> None:
    for address in (NVME, NIC, VGA):
        assert bench.uses(address) == []


def test_mounted(bench: Bench) -> None:
    bench.mount("259:1", "/dev/root", r"/srv/my\040data")
    bench.mount("8:1", "/dev/sda1", "/elsewhere")
    assert bench.uses() == ["/dev/nvme0n1p1 is mounted at /srv/my data"]
    with pytest.raises(DeviceInUseError) as caught:
        bind(NVME, system=bench.kernel, state_dir=bench.kernel.sys.parent / "state")
    assert "nvme uses it: /dev/nvme0n1p1 is mounted at /srv/my data" in str(caught.value)
    assert "force=True" in caught.value.hint
    assert bench.kernel.log == []


def test_file_system_that_hides_its_device_number(bench: Bench) -> None:
    bench.mount("0:42", "/dev/nvme0n1p1", "/btrfs")
    assert bench.uses() == ["/dev/nvme0n1p1 is mounted at /btrfs"]


def test_mounted_in_another_namespace(bench: Bench) -> None:
    for process, namespace in (("self", 1), ("1", 1), ("77", 2), ("78", 2)):
        folder = bench.kernel.proc / process
        (folder / "ns").mkdir(parents=True)
        (folder / "ns/mnt").symlink_to(f"mnt:[{namespace}]")
        (folder / "mountinfo").touch()
    bench.mount("259:0", "/dev/nvme0n1", "/container", "77")
    bench.mount("259:0", "/dev/nvme0n1", "/container", "78")
    assert bench.uses() == ["/dev/nvme0n1 is mounted at /container"]


def test_claimed_for_a_reason_that_is_hidden(bench: Bench) -> None:
    bench.kernel.busy_nodes.add("nvme0n1p1")
    assert bench.uses() == ["/dev/nvme0n1p1 is claimed exclusively in the kernel (mounted or assembled elsewhere)"]


def test_swap(bench: Bench) -> None:
    (bench.kernel.proc / "swaps").write_text("Filename Type Size Used Priority\n/dev/nvme0n1p1 partition 1 0 -2\n")
    assert bench.uses() == ["/dev/nvme0n1p1 is swap space"]


def test_volume_made_of_a_partition_and_what_it_carries(bench: Bench) -> None:
    volume = bench.virtual("dm-0", "254:0")
    (volume / "dm").mkdir()
    (volume / "dm/name").write_text("vg-root\n")
    (bench.kernel.sys / "class/block/nvme0n1p1/holders/dm-0").symlink_to(volume)
    bench.mount("254:0", "/dev/mapper/vg-root", "/")
    assert bench.uses() == ["/dev/dm-0 (vg-root) is made of /dev/nvme0n1p1", "/dev/dm-0 is mounted at /"]


def test_loop_device(bench: Bench) -> None:
    loop = bench.virtual("loop0", "7:0")
    (loop / "loop").mkdir()
    (loop / "loop/backing_file").write_text("/dev/nvme0n1\n")
    assert bench.uses() == ["/dev/loop0 is made of /dev/nvme0n1"]


def test_disk_behind_nvme_multipath(bench: Bench) -> None:
    # the disk hangs below the virtual subsystem, which links to the controllers that reach it
    head = bench.kernel.sys / "devices/virtual/nvme-subsystem/nvme-subsys0"
    bench.disk("nvme1n1", head, "259:8")
    (head / "nvme0").symlink_to(bench.nvme / "nvme/nvme0")
    (bench.kernel.sys / "class/nvme-subsystem").mkdir()
    (bench.kernel.sys / "class/nvme-subsystem/nvme-subsys0").symlink_to(head)
    bench.mount("259:8", "/dev/nvme1n1", "/data")
    assert bench.uses() == ["/dev/nvme1n1 is mounted at /data"]
    assert bench.uses(NIC) == []


def test_shared_folder(bench: Bench) -> None:
    virtio = bench.kernel.add("0000:00:19.0", driver="virtio-pci", group=9)
    (virtio / "virtio1").mkdir()
    (virtio / "virtio1/mount_tag").write_text("hostroot\0")
    assert bench.uses("0000:00:19.0") == []
    bench.mount("0:21", "hostroot", "/")
    assert bench.uses("0000:00:19.0") == ["the host's folder 'hostroot' is mounted at /"]
    shares = bench.kernel.sys / "fs/virtiofs/3"
    shares.mkdir(parents=True)
    (shares / "tag").write_text("home\n")
    (bench.nic / "virtio2").mkdir()
    (shares / "device").symlink_to(bench.nic / "virtio2")
    bench.mount("0:22", "home", "/home")
    assert bench.uses(NIC) == ["the host's folder 'home' is mounted at /home"]


def test_routes(bench: Bench) -> None:
    header = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n"
    route = bench.kernel.proc / "net/route"
    route.write_text(header + "eth0 0002A8C0 00000000 0001 0 0 0 00FFFFFF 0 0 0\n")
    assert bench.uses(NIC) == []
    route.write_text(header + "eth0 00000000 0102A8C0 0003 0 0 0 00000000 0 0 0\n")
    assert bench.uses(NIC) == ["interface eth0 carries the default route"]
    assert bench.uses(NVME) == []
    route.unlink()
    route6 = bench.kernel.proc / "net/ipv6_route"
    line = f"{0:032x} 00 {0:032x} 00 {'fe80':<032} 00000400 00000001 00000000 {{flags}} eth0\n"
    route6.write_text(line.format(flags="00200200"))  # rejects: the kernel's own fallback entry
    assert bench.uses(NIC) == []
    route6.write_text(line.format(flags="00000003"))
    assert bench.uses(NIC) == ["interface eth0 carries the default route"]


def test_addresses(bench: Bench) -> None:
    bench.kernel.addresses["eth0"] = ["192.0.2.1", "192.0.2.2"]
    assert bench.uses(NIC) == []  # down: nobody can reach it
    (bench.nic / "net/eth0/flags").write_text("0x1003\n")
    assert bench.uses(NIC) == ["interface eth0 is up with 192.0.2.1, 192.0.2.2"]
    bench.kernel.addresses.clear()
    inet6 = bench.kernel.proc / "net/if_inet6"
    inet6.write_text("fe800000000000000000000000000001 02 40 20 80 eth0\n")
    assert bench.uses(NIC) == []
    inet6.write_text("20010db8000000000000000000000001 02 40 00 80 eth0\n")
    assert bench.uses(NIC) == ["interface eth0 is up with 2001:db8::1"]


def test_bond_and_vlan(bench: Bench) -> None:
    folder = bench.nic / "net/eth0"
    bond = bench.kernel.sys / "devices/virtual/net/bond0"
    bond.mkdir(parents=True)
    (folder / "upper_vlan7").symlink_to(bond)
    assert bench.uses(NIC) == ["interface vlan7 is on top of eth0"]
    (folder / "master").symlink_to(bond)
    assert bench.uses(NIC) == ["interface eth0 is a part of bond0"]


def test_console(bench: Bench) -> None:
    vga = bench.function(VGA)
    (vga.sysfs / "boot_vga").write_text("1\n")
    assert bench.uses(VGA) == ["it is the graphics card of the boot console (boot_vga)"]
    (vga.sysfs / "boot_vga").write_text("0\n")
    assert bench.uses(VGA) == []
    tty = bench.nic / "tty/ttyS4"
    tty.mkdir(parents=True)
    (bench.kernel.sys / "class/tty/console").mkdir(parents=True)
    (bench.kernel.sys / "class/tty/console/active").write_text("tty0 ttyS4\n")
    (bench.kernel.sys / "class/tty/ttyS4").symlink_to(tty)
    assert bench.uses(NIC) == ["the kernel's console is on its ttyS4"]


def test_open_nodes(bench: Bench) -> None:
    for pid, target in (("10", bench.kernel.dev / "nvme0n1"), ("11", bench.kernel.dev / "sda")):
        folder = bench.kernel.proc / pid
        (folder / "fd").mkdir(parents=True)
        (folder / "comm").write_text("smartd\n")
        (folder / "fd/3").symlink_to(target)
        (folder / "fd/4").symlink_to(target)
    assert bench.uses() == [f"process 10 (smartd) has {bench.kernel.dev}/nvme0n1 open"]


def test_functions_behind_a_bridge_are_not_its_own(bench: Bench) -> None:
    bridge = bench.kernel.add("0000:00:07.0", class_code=0x060400, group=17, header_type=1)
    behind = bridge / "0000:03:00.0"
    bench.disk("nvme9n1", behind / "nvme/nvme9", "259:9")
    folder = bench.kernel.proc / "10"
    (folder / "fd").mkdir(parents=True)
    (folder / "fd/3").symlink_to(bench.kernel.dev / "nvme9n1")
    assert bench.uses("0000:00:07.0") == []


def test_force(bench: Bench) -> None:
    bench.mount("259:0", "/dev/nvme0n1", "/")
    with bind(NVME, force=True, system=bench.kernel, state_dir=bench.kernel.sys.parent / "state", timeout=0.1):
        assert bench.function(NVME).is_vfio


# --- this machine ---


def test_own_addresses() -> None:
    assert ("lo", "127.0.0.1") in System().ipv4_addresses()


def test_claim_of_something_that_is_no_disk(tmp_path: Path) -> None:
    assert not System().is_claimed(tmp_path / "missing")


def test_open_file_of_this_process_is_found() -> None:
    from vfiopy.pci.holders import node_holders  # noqa: PLC0415

    with Path("/dev/full").open("rb"):
        mine = [one for one in node_holders(System(), [Path("/dev/full")]) if one.pid == os.getpid()]
    assert len(mine) == 1
    assert "this process) has /dev/full open" in str(mine[0])
