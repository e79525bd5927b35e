"""What a user holds of a device: registers, configuration space, interrupts."""

from vfiopy.device.config_space import ConfigSpace
from vfiopy.device.device import Device, DeviceDma
from vfiopy.device.irqs import Interrupt, Irqs
from vfiopy.device.regions import Regions
from vfiopy.device.vector import Vector

__all__ = ["ConfigSpace", "Device", "DeviceDma", "Interrupt", "Irqs", "Regions", "Vector"]
