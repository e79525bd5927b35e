"""Devices that are Python objects in this process: the third way to reach one."""

from vfiopy.emulated.capabilities import Msi, MsiX, PciExpress, PowerManagement, VendorSpecific
from vfiopy.emulated.config_space import Bar, ConfigSpace, Identity
from vfiopy.emulated.device_io import EmulatedDeviceIo
from vfiopy.emulated.edu import Edu
from vfiopy.emulated.host import EmulatedHost, EmulatedMapper
from vfiopy.emulated.nvme import Nvme
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.emulated.records import DeviceError, Fault, Injections
from vfiopy.emulated.registry import connect, create, device_names

__all__ = [
    "Bar",
    "ConfigSpace",
    "DeviceError",
    "Edu",
    "EmulatedDeviceIo",
    "EmulatedHost",
    "EmulatedMapper",
    "Fault",
    "Identity",
    "Injections",
    "Msi",
    "MsiX",
    "Nvme",
    "PciDevice",
    "PciExpress",
    "PowerManagement",
    "VendorSpecific",
    "connect",
    "create",
    "device_names",
]
