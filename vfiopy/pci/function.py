"""One PCI function as the kernel shows it in sysfs. All is read when it is asked for, nothing is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vfiopy.errors import DeviceGoneError, PermissionDeniedError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.config import Decoded, decode
from vfiopy.pci.names import class_name, device_name
from vfiopy.pci.system import System

__all__ = ["Function", "Resource", "is_vfio_driver"]

# linux/ioport.h, IORESOURCE_*; an ABI since sysfs shows them
_IO = 0x0000_0100
_MEMORY = 0x0000_0200
_PREFETCH = 0x0000_2000
_READ_ONLY = 0x0000_4000
_MEMORY_64 = 0x0010_0000

_ROM = 6
_VF_FIRST = 7


def is_vfio_driver(name: str | None) -> bool:
    """Whether a driver's name is that of vfio-pci or one of its variants (``mlx5_vfio_pci``, ...)."""
    return name is not None and name.replace("_", "-").endswith("vfio-pci")


@dataclass(frozen=True, slots=True)
class Resource:
    """An address range that a function decodes, as the kernel set it up.

    Attributes:
        index: 0 to 5 for a BAR, 6 for the expansion ROM, 7 to 12 for the BARs of virtual functions.
        start: first address or I/O port; 0 while it is not assigned.
        size: bytes.
        flags: IORESOURCE_* of linux/ioport.h.
    """

    index: int
    start: int
    size: int
    flags: int

    @property
    def is_io(self) -> bool:
        """I/O ports."""
        return bool(self.flags & _IO)

    @property
    def is_memory(self) -> bool:
        """Memory."""
        return bool(self.flags & _MEMORY)

    @property
    def is_64bit(self) -> bool:
        """A 64-bit memory BAR."""
        return bool(self.flags & _MEMORY_64)

    @property
    def prefetchable(self) -> bool:
        """Reads have no side effects."""
        return bool(self.flags & _PREFETCH)

    @property
    def name(self) -> str:
        """``"BAR0"``, ``"ROM"``, ``"VF BAR0"``."""
        if self.index < _ROM:
            return f"BAR{self.index}"
        return "ROM" if self.index == _ROM else f"VF BAR{self.index - _VF_FIRST}"


class Function:
    """A PCI function. Cheap to make; holds no resource; properties read sysfs each time.

    A property of a function that has gone raises :class:`~vfiopy.errors.DeviceGoneError`; one that this
    function or kernel does not have is None or empty.
    """

    def __init__(self, address: PciAddress | str, system: System | None = None) -> None:
        self._address = PciAddress.parse(address)
        self._system = System() if system is None else system

    # --- identity ---

    @property
    def address(self) -> PciAddress:
        """Where it sits."""
        return self._address

    @property
    def system(self) -> System:
        """The file systems that it is read from."""
        return self._system

    @property
    def sysfs(self) -> Path:
        """Its folder in sysfs, below the PCI bus."""
        return self._system.pci_devices / str(self._address)

    @property
    def exists(self) -> bool:
        """The kernel knows it now."""
        return self.sysfs.exists()

    def _need(self, name: str) -> int:
        value = self._system.number(self.sysfs / name)
        if value is None:
            raise DeviceGoneError(
                f"its sysfs attribute '{name}' is not there: the function was removed",
                object=str(self._address),
                hint="find() again; after a hot removal, write 1 to /sys/bus/pci/rescan",
            )
        return value

    @property
    def vendor(self) -> int:
        """Vendor ID."""
        return self._need("vendor")

    @property
    def device(self) -> int:
        """Device ID. A virtual function's is that of its physical function's SR-IOV capability."""
        return self._need("device")

    @property
    def subsystem_vendor(self) -> int:
        """Subsystem vendor ID."""
        return self._need("subsystem_vendor")

    @property
    def subsystem_device(self) -> int:
        """Subsystem ID."""
        return self._need("subsystem_device")

    @property
    def class_code(self) -> int:
        """Class code, 24 bits: base class, sub-class, programming interface."""
        return self._need("class")

    @property
    def revision(self) -> int:
        """Revision ID."""
        return self._need("revision")

    @property
    def class_name(self) -> str:
        """What the class code stands for: ``"NVMe controller"``."""
        return class_name(self.class_code)

    @property
    def name(self) -> str:
        """Vendor and device name from ``pci.ids``; else what the class and the numbers say."""
        vendor, device = self.vendor, self.device
        known = device_name(self._system.share, vendor, device)
        return known if known is not None else f"{self.class_name} [{vendor:04x}:{device:04x}]"

    @property
    def is_bridge(self) -> bool:
        """A bridge of any kind (base class 6, or header type 1 or 2): never bound to VFIO with its group."""
        return self.class_code >> 16 == 0x06 or self.header_type != 0

    @property
    def header_type(self) -> int:
        """0 for a function, 1 for a PCI-to-PCI bridge, 2 for a CardBus bridge; vfio-pci takes only type 0."""
        data = self.read_config(0x0E, 1)
        return data[0] & 0x7F if data else 0

    @property
    def numa_node(self) -> int | None:
        """NUMA node that it is near to, None where the machine does not say."""
        node = self._system.number(self.sysfs / "numa_node")
        return None if node is None or node < 0 else node

    @property
    def resources(self) -> tuple[Resource, ...]:
        """BARs and ROM that exist, and the BARs of virtual functions, with start, size and flags."""
        found = []
        for index, line in enumerate((self._system.text(self.sysfs / "resource") or "").splitlines()):
            start, end, flags = (int(word, 16) for word in line.split())
            # A bridge's windows come after; they are not something that the function itself decodes.
            if flags and not (index >= _VF_FIRST and self.sriov_totalvfs is None):
                found.append(Resource(index, start, end - start + 1, flags))
        return tuple(found)

    @property
    def reset_methods(self) -> tuple[str, ...]:
        """How the kernel can reset it, in the order that it tries: of ``device_specific acpi flr af_flr pm
        bus cxl_bus``; empty where it cannot.
        """
        return tuple((self._system.text(self.sysfs / "reset_method") or "").split())

    # --- driver ---

    @property
    def driver(self) -> str | None:
        """The driver that holds it."""
        return self._system.link_name(self.sysfs / "driver")

    @property
    def driver_override(self) -> str | None:
        """The only driver that may bind to it, where one was set."""
        text = self._system.text(self.sysfs / "driver_override")
        return None if text in (None, "", "(null)") else text

    # --- IOMMU group ---

    @property
    def iommu_group(self) -> int | None:
        """Number of its IOMMU group, None where there is no IOMMU."""
        name = self._system.link_name(self.sysfs / "iommu_group")
        return None if name is None else int(name)

    def group_members(self) -> tuple[Function, ...]:
        """All functions of its IOMMU group, itself included; itself alone where there is no group."""
        names = self._system.names(self.sysfs / "iommu_group" / "devices")
        found = []
        for name in names:
            try:
                found.append(Function(name, self._system))
            except ValueError:
                continue  # a platform device may share a group; it has no PCI address
        return tuple(sorted(found, key=lambda function: function.address)) or (self,)

    def group_blockers(self) -> tuple[Function, ...]:
        """Members of its group that keep it from being used through VFIO: those that a driver of the kernel
        holds.

        VFIO's own drivers, pci-stub and pcieport leave DMA to user space (their ``driver_managed_dma`` is
        set), and so does having no driver.
        """
        return tuple(
            member
            for member in self.group_members()
            if (driver := member.driver) is not None
            and driver not in ("pcieport", "pci-stub")
            and not is_vfio_driver(driver)
        )

    # --- VFIO ---

    @property
    def is_vfio(self) -> bool:
        """A VFIO driver holds it."""
        return is_vfio_driver(self.driver)

    @property
    def is_noiommu(self) -> bool:
        """VFIO gave it a group without an IOMMU behind it (``enable_unsafe_noiommu_mode``)."""
        # The group's own name in sysfs is "vfio-noiommu" for mediated devices too; VFIO's devices tell. Since
        # 7.3 there may be a character device for it (CONFIG_IOMMUFD_NOIOMMU), with or without the group.
        group = self.iommu_group
        if group is not None and (self._system.sys / "class/vfio" / f"noiommu-{group}").exists():
            return True
        return any(name.startswith("noiommu-") for name in self._system.names(self.sysfs / "vfio-dev"))

    @property
    def group_node(self) -> Path | None:
        """Where ``/dev/vfio/N`` (``noiommu-N``) is or should be, None where VFIO has no group for it."""
        group = self.iommu_group
        for prefix in ("", "noiommu-"):
            if group is not None and (self._system.sys / "class/vfio" / f"{prefix}{group}").exists():
                return self._system.dev / "vfio" / f"{prefix}{group}"
        return None

    @property
    def vfio_cdev(self) -> str | None:
        """Name of its VFIO character device (``"vfio0"``), None where it has none."""
        folder = self.sysfs / "vfio-dev"
        for name in self._system.names(folder):
            # The folder is there on each kernel since 6.1; the "dev" file only with CONFIG_VFIO_DEVICE_CDEV.
            if (folder / name / "dev").exists():
                return name
        return None

    @property
    def cdev_node(self) -> Path | None:
        """Where ``/dev/vfio/devices/vfioX`` is or should be, None where the kernel has none for it."""
        name = self.vfio_cdev
        return None if name is None else self._system.dev / "vfio/devices" / name

    @property
    def cdev_missing(self) -> str:
        """Why it cannot be opened as a character device; empty where it can."""
        node = self.cdev_node
        if node is not None:
            if node.exists():
                return ""
            return f"the kernel has it but {node} is missing: this /dev is a stale copy (a container's?)"
        if not self.is_vfio:
            driver = self.driver
            return f"bound to {driver}, not to vfio-pci" if driver else "not bound to vfio-pci"
        if self.is_noiommu:
            return "without CONFIG_IOMMUFD_NOIOMMU (7.3) a device without an IOMMU has a group node only"
        if self._system.names(self.sysfs / "vfio-dev"):
            return "this kernel is built without CONFIG_VFIO_DEVICE_CDEV"
        return "this kernel is older than VFIO's character devices (6.6)"

    # --- SR-IOV ---

    @property
    def sriov_totalvfs(self) -> int | None:
        """Most virtual functions that it can have; None where it is not a physical function."""
        return self._system.number(self.sysfs / "sriov_totalvfs")

    @property
    def sriov_numvfs(self) -> int | None:
        """Virtual functions that it has now; None where it is not a physical function."""
        return self._system.number(self.sysfs / "sriov_numvfs")

    @property
    def physfn(self) -> PciAddress | None:
        """The physical function of a virtual function."""
        name = self._system.link_name(self.sysfs / "physfn")
        return None if name is None else PciAddress.parse(name)

    def virtual_functions(self) -> tuple[Function, ...]:
        """Its virtual functions, in order of their number."""
        found = []
        for index in range(self.sriov_numvfs or 0):
            name = self._system.link_name(self.sysfs / f"virtfn{index}")
            if name is not None:
                found.append(Function(name, self._system))
        return tuple(found)

    # --- configuration space ---

    def read_config(self, offset: int, size: int) -> bytes:
        """Read configuration space through sysfs; fewer bytes than asked where it ends.

        Raises:
            PermissionDeniedError: beyond the first 64 bytes without CAP_SYS_ADMIN.
        """
        path = self.sysfs / "config"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DeviceGoneError("the function was removed", object=str(self._address)) from error
        try:
            data = os.pread(fd, size, offset)
            length = os.fstat(fd).st_size
        finally:
            os.close(fd)
        if not data and size and offset < length:
            # 64 bytes for everybody, the rest for CAP_SYS_ADMIN (drivers/pci/pci-sysfs.c)
            raise PermissionDeniedError(
                f"configuration space at {offset:#x} may be read by root only",
                object=str(self._address),
                call="read config",
                hint="run as root, or open() the device: VFIO shows all of it",
            )
        return data

    def config(self) -> Decoded:
        """Decode header and capabilities through sysfs; needs CAP_SYS_ADMIN."""
        return decode(self.read_config)

    # --- as a value ---

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Function):
            return NotImplemented
        return self._address == other._address and self._system == other._system

    def __hash__(self) -> int:
        return hash(self._address)

    def __str__(self) -> str:
        return str(self._address)

    def __repr__(self) -> str:
        if not self.exists:
            return f"<Function {self._address} (gone)>"
        driver = self.driver
        return f"<Function {self._address} {self.vendor:04x}:{self.device:04x} {driver or 'no driver'}>"
