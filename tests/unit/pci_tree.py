"""A sysfs tree in a folder, and a System whose writes do to it what the kernel's driver core does.

This machine has no devices that may be rebound; the guest tests judge the same code against a real kernel.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass, field
from pathlib import Path

from vfiopy.pci.address import PciAddress
from vfiopy.pci.function import is_vfio_driver
from vfiopy.pci.system import System


@dataclass(frozen=True)
class FakeKernel(System):
    """A System over a tree of its own, with the driver core's rules for the files that binding writes."""

    log: list[tuple[str, str]] = field(default_factory=list, compare=False)
    ids: dict[str, str] = field(default_factory=dict, compare=False)  # address → driver that its ID table matches
    probe_errors: dict[tuple[str, str], int] = field(default_factory=dict, compare=False)
    lazy_probes: dict[str, int] = field(default_factory=dict, compare=False)  # driver → probes that do nothing yet
    fail_at: list[int] = field(default_factory=list, compare=False)  # numbers of writes that fail, from 1
    fail_from: list[int] = field(default_factory=list, compare=False)
    busy_nodes: set[str] = field(default_factory=set, compare=False)
    addresses: dict[str, list[str]] = field(default_factory=dict, compare=False)  # interface → addresses
    cdev: bool = True

    # --- building ---

    @classmethod
    def make(cls, root: Path, **more: object) -> FakeKernel:
        roots = {name: root / name for name in ("sys", "proc", "dev", "etc")}
        kernel = cls(**roots, share=(root / "share",), **more)
        for folder in (
            kernel.pci_devices,
            kernel.pci / "drivers",
            kernel.sys / "class/vfio",
            kernel.sys / "class/block",
            kernel.sys / "class/net",
            kernel.sys / "kernel/iommu_groups",
            kernel.sys / "devices",
            kernel.proc / "self",
            kernel.proc / "net",
            kernel.dev / "vfio/devices",
            kernel.share[0],
        ):
            folder.mkdir(parents=True)
        (kernel.proc / "self/mountinfo").write_text("")
        (kernel.proc / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n")
        (kernel.pci / "drivers_probe").write_text("")
        return kernel

    def add_driver(self, name: str) -> Path:
        folder = self.driver(name)
        folder.mkdir()
        for file in ("bind", "unbind", "new_id"):
            (folder / file).write_text("")
        return folder

    def add(
        self,
        address: str,
        *,
        ids: tuple[int, int] = (0x1234, 0x11E8),
        class_code: int = 0x00FF00,
        driver: str | None = None,
        group: int | None = None,
        parent: str = "pci0000:00",
        totalvfs: int | None = None,
        config: bytes | None = None,
        header_type: int = 0,
    ) -> Path:
        real = self.sys / "devices" / parent / address
        real.mkdir(parents=True)
        header = bytearray(config if config is not None else bytes(256))
        if config is None:
            header[0:4] = ids[0].to_bytes(2, "little") + ids[1].to_bytes(2, "little")
            header[8:12] = (class_code << 8).to_bytes(4, "little")
            header[0x0E] = header_type
        for name, text in {
            "vendor": f"{ids[0]:#06x}\n",
            "device": f"{ids[1]:#06x}\n",
            "subsystem_vendor": "0x1af4\n",
            "subsystem_device": "0x1100\n",
            "class": f"{class_code:#08x}\n",
            "revision": "0x10\n",
            "driver_override": "(null)\n",
            "numa_node": "-1\n",
            "resource": "0x00000000febf0000 0x00000000febfffff 0x0000000000040200\n"
            + 12 * f"{0:#018x} {0:#018x} {0:#018x}\n",
            "reset_method": "flr bus\n",
        }.items():
            (real / name).write_text(text)
        (real / "config").write_bytes(bytes(header))
        if totalvfs is not None:
            (real / "sriov_totalvfs").write_text(f"{totalvfs}\n")
            (real / "sriov_numvfs").write_text("0\n")
        link = self.pci_devices / address
        link.symlink_to(os.path.relpath(real, link.parent))
        if group is not None:
            folder = self.sys / "kernel/iommu_groups" / str(group)
            (folder / "devices").mkdir(parents=True, exist_ok=True)
            (folder / "devices" / address).symlink_to(real)
            (real / "iommu_group").symlink_to(os.path.relpath(folder, real))
        if driver is not None:
            self.ids[address] = driver
            self._attach(address, driver)
        return real

    # --- what is not a file ---

    def is_claimed(self, node: Path) -> bool:
        return node.name in self.busy_nodes

    def ipv4_addresses(self) -> list[tuple[str, str]]:
        return [(name, one) for name, several in self.addresses.items() for one in several]

    # --- the driver core ---

    def write(self, path: Path, text: str) -> None:
        number = len(self.log) + 1
        self.log.append((path.name, text))
        if number in self.fail_at or any(number >= first for first in self.fail_from):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        word = text.strip()
        if path.name == "driver_override":
            path.write_text(f"{word or '(null)'}\n")
        elif path.name == "unbind":
            if self.link_name(self.pci_devices / word / "driver") != path.parent.name:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            self._detach(word)
        elif path.name == "drivers_probe":
            self._probe(word)
        elif path.name == "bind":
            self._bind(word, path.parent.name)
        elif path.name == "sriov_numvfs":
            self._set_vfs(path.parent.name, int(word))
        else:
            raise AssertionError(f"unexpected write to {path}")

    def _override(self, address: str) -> str | None:
        text = self.text(self.pci_devices / address / "driver_override")
        return None if text == "(null)" else text

    def _probe(self, address: str) -> None:
        if not (self.pci_devices / address).exists():
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if (self.pci_devices / address / "driver").exists():
            return
        name = self._override(address) or self.ids.get(address)
        if name is None or not self.driver(name).exists() or (name, address) in self.probe_errors:
            return
        if self.lazy_probes.get(name, 0) > 0:
            self.lazy_probes[name] -= 1
            return
        with contextlib.suppress(OSError):  # drivers_probe does not tell
            self._attach(address, name)

    def _bind(self, address: str, name: str) -> None:
        if self._override(address) != name and self.ids.get(address) != name:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        if (name, address) in self.probe_errors:
            number = self.probe_errors[name, address]
            raise OSError(number, os.strerror(number))
        self._attach(address, name)

    def _attach(self, address: str, name: str) -> None:
        real = (self.pci_devices / address).resolve()
        if name == "vfio-pci" and (self.number(real / "sriov_numvfs") or 0):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        (real / "driver").symlink_to(self.driver(name))
        group = self.link_name(real / "iommu_group")
        if is_vfio_driver(name) and group is not None:
            (self.sys / "class/vfio" / group).mkdir(exist_ok=True)
            (self.dev / "vfio" / group).write_text("")
            cdev = f"vfio{PciAddress.parse(address).device}"
            (real / "vfio-dev" / cdev).mkdir(parents=True)
            if self.cdev:
                (real / "vfio-dev" / cdev / "dev").write_text("511:0\n")
                (self.dev / "vfio/devices" / cdev).write_text("")

    def _detach(self, address: str) -> None:
        real = (self.pci_devices / address).resolve()
        name = self.link_name(real / "driver")
        (real / "driver").unlink()
        if is_vfio_driver(name):
            for cdev in self.names(real / "vfio-dev"):
                (self.dev / "vfio/devices" / cdev).unlink(missing_ok=True)
                for file in self.names(real / "vfio-dev" / cdev):
                    (real / "vfio-dev" / cdev / file).unlink()
                (real / "vfio-dev" / cdev).rmdir()
                (real / "vfio-dev").rmdir()
            group = self.link_name(real / "iommu_group")
            members = self.names(real / "iommu_group/devices")
            if group is not None and not any(
                (self.link_name(self.pci_devices / one / "driver") or "").endswith("vfio-pci") for one in members
            ):
                (self.sys / "class/vfio" / group).rmdir()
                (self.dev / "vfio" / group).unlink()

    def _set_vfs(self, address: str, count: int) -> None:
        real = (self.pci_devices / address).resolve()
        if not (real / "driver").exists():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        for name in self.names(real):
            if name.startswith("virtfn"):
                other = self.link_name(real / name) or ""
                (real / name).unlink()
                self.remove(other)
        (real / "sriov_numvfs").write_text(f"{count}\n")
        pf = PciAddress.parse(address)
        for index in range(count):
            name = f"{pf.domain:04x}:{pf.bus:02x}:10.{index}"
            vf = self.add(name, ids=(0x8086, 0x10CA), class_code=0x020000, group=100 + index, parent=real.parent.name)
            self.ids[name] = "igbvf"
            (vf / "physfn").symlink_to(os.path.relpath(real, vf))
            (real / f"virtfn{index}").symlink_to(os.path.relpath(vf, real))
            if self.driver("igbvf").exists():
                self._attach(name, "igbvf")

    def remove(self, address: str) -> None:
        link = self.pci_devices / address
        real = link.resolve()
        if (real / "driver").exists():
            self._detach(address)
        group = (real / "iommu_group").resolve()
        (group / "devices" / address).unlink()
        link.unlink()
        for name in self.names(real):
            (real / name).unlink()
        real.rmdir()
