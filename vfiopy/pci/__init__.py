"""PCI: addresses, functions in sysfs, binding to VFIO, configuration space decoded; no VFIO ioctl here."""

from vfiopy.pci.address import PciAddress
from vfiopy.pci.binding import Binding, bind, restore
from vfiopy.pci.discovery import find, function
from vfiopy.pci.events import Event, Monitor, monitor
from vfiopy.pci.function import Function, Resource, is_vfio_driver
from vfiopy.pci.permissions import MemlockLimit, grant, memlock_limit, udev_rule
from vfiopy.pci.persistence import Persisted, check_persist, forget, persist, persisted
from vfiopy.pci.system import System
from vfiopy.pci.unbinding import clear_override, unbind
from vfiopy.pci.usage import uses

__all__ = [
    "Binding",
    "Event",
    "Function",
    "MemlockLimit",
    "Monitor",
    "PciAddress",
    "Persisted",
    "Resource",
    "System",
    "bind",
    "check_persist",
    "clear_override",
    "find",
    "forget",
    "function",
    "grant",
    "is_vfio_driver",
    "memlock_limit",
    "monitor",
    "persist",
    "persisted",
    "restore",
    "udev_rule",
    "unbind",
    "uses",
]
