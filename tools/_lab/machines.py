"""Machine configurations: what PCI devices a guest has, and what its kernel is told."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from .served import Served, qemu_device

__all__ = ["DEFAULT", "MACHINES", "Machine"]

# 1 GiB pages are set aside at boot, while memory is still in one piece.
HUGEPAGES = "hugepagesz=1G hugepages=1 default_hugepagesz=2M hugepagesz=2M hugepages=64"
# Two memory nodes, each with a socket; the second is all above 4 GiB, with room for a 1 GiB page.
MEMORY = """
-m 6G
-object memory-backend-ram,id=m0,size=2G -numa node,nodeid=0,cpus=0,memdev=m0
-object memory-backend-ram,id=m1,size=4G -numa node,nodeid=1,cpus=1,memdev=m1
"""
# As above, in files that QEMU can pass on.
SHARED_MEMORY = MEMORY.replace("memory-backend-ram,", "memory-backend-memfd,share=on,")
DISK_BYTES = 64 << 20
DISKS = ("nvme0", "nvme1")

# Fixed slots: documentation and tests may name addresses. The guest's own plumbing sits at 0x18 and up.
DEVICES = """
-device edu,addr=04.0
-device nvme,addr=05.0,drive=nvme0,serial=vfiopy-cmb,cmb_size_mb=16
-device nvme,addr=06.0,drive=nvme1,serial=vfiopy-plain
-object memory-backend-memfd,id=shm,size=16M,share=on
-device ivshmem-plain,addr=07.0,memdev=shm
-device iommu-testdev,addr=08.0
-device pcie-root-port,addr=09.0,id=rp1,chassis=1
-netdev hubport,id=n0,hubid=0 -device igb,bus=rp1,netdev=n0
-netdev hubport,id=n1,hubid=0 -device e1000e,addr=0a.0,netdev=n1
-device pcie-pci-bridge,addr=0b.0,id=pb
-device edu,bus=pb,addr=01.0
-device pci-testdev,bus=pb,addr=02.0,membar=16M
"""
# Where a device can be plugged in while the guest runs: see errands.py.
SPARE_PORT = "-device pcie-root-port,addr=14.0,id=spare,chassis=2"


@dataclasses.dataclass(frozen=True)
class Machine:
    """One boot of the guest."""

    name: str
    summary: str
    board: str = "-M q35"
    iommu: str = ""
    devices: str = DEVICES
    cmdline: str = ""
    flavour: str = "lab"
    """Which kernel it boots: a name in ``kernel.FLAVOURS``."""
    nightly: bool = False
    slowness: int = 1
    """Time limits are multiplied by this."""
    memory: str = MEMORY
    serves: tuple[Served, ...] = ()
    """Devices that vfiopy serves on the host (``vfiopy serve``) and QEMU has as hardware, from slot 0x10 on."""

    def arguments(self, run: Path) -> list[str]:
        """QEMU arguments for board, memory, IOMMU and devices; disk images are made in ``run``."""
        arguments = f"{self.board} -smp 2,sockets=2 {self.memory} {self.iommu} {self.devices}".split()
        for number, served in enumerate(self.serves):
            device = qemu_device(run, served.name, addr=f"{0x10 + number:x}.0")
            arguments += ["-device", json.dumps(device)]
        for disk in DISKS:
            image = run / f"{disk}.img"
            with image.open("wb") as handle:
                handle.truncate(DISK_BYTES)
            arguments += ["-drive", f"if=none,id={disk},format=raw,cache=unsafe,file={image}"]
        return arguments


SPLIT = "-M q35,kernel-irqchip=split"
INTEL = "-device intel-iommu,intremap=on,caching-mode=on"

_ALL = [
    Machine(
        "intel",
        "Intel vIOMMU with interrupt remapping: the default, everything VFIO and iommufd offer",
        board=SPLIT,
        iommu=INTEL,
        cmdline=f"intel_iommu=on,sm_on iommu.strict=1 {HUGEPAGES}",
    ),
    Machine(
        "noiommu",
        "no IOMMU, VFIO's unsafe no-IOMMU mode allowed",
        cmdline=f"intel_iommu=off vfio.enable_unsafe_noiommu_mode=1 {HUGEPAGES}",
    ),
    Machine(
        "vfio-user",
        "as intel, and an edu and an NVMe disk that vfiopy serves on the host, at 0000:00:10.0 and 0000:00:11.0",
        board=SPLIT,
        iommu=INTEL,
        cmdline=f"intel_iommu=on,sm_on iommu.strict=1 {HUGEPAGES}",
        memory=SHARED_MEMORY,
        devices=DEVICES + SPARE_PORT,
        serves=(Served("edu"), Served("nvme", image=256 << 20)),
    ),
    Machine(
        "no-remapping",
        "as intel, without interrupt remapping",
        iommu="-device intel-iommu,intremap=off,caching-mode=on",
        cmdline=f"intel_iommu=on iommu.strict=1 {HUGEPAGES}",
        nightly=True,
    ),
    Machine(
        "compat",
        "as intel, kernel whose /dev/vfio/vfio is served by iommufd",
        board=SPLIT,
        iommu=INTEL,
        cmdline=f"intel_iommu=on,sm_on iommu.strict=1 {HUGEPAGES}",
        flavour="compat",
        nightly=True,
    ),
    Machine(
        "debug",
        "as intel, kernel with KASAN, lockdep and kmemleak",
        board=SPLIT,
        iommu=INTEL,
        cmdline=f"intel_iommu=on,sm_on iommu.strict=1 iommu.debug_pagealloc=1 {HUGEPAGES}",
        flavour="debug",
        nightly=True,
        slowness=6,
    ),
    Machine(
        "old",
        "as intel, Debian 12's Linux 6.1: VFIO without iommufd",
        board=SPLIT,
        iommu=INTEL,
        cmdline=f"intel_iommu=on {HUGEPAGES}",
        flavour="old",
        nightly=True,
    ),
]

MACHINES = {machine.name: machine for machine in _ALL}
DEFAULT = _ALL[0]
