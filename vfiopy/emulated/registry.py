"""Emulated devices by name, and how they are opened."""

from __future__ import annotations

from collections.abc import Callable

from vfiopy.emulated.device_io import EmulatedDeviceIo
from vfiopy.emulated.edu import Edu
from vfiopy.emulated.host import EmulatedMapper
from vfiopy.emulated.nvme import Nvme
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import DeviceNotFoundError

__all__ = ["connect", "create", "device_names"]

_DEVICES: dict[str, Callable[[], PciDevice]] = {Edu.name: Edu, Nvme.name: Nvme}


def device_names() -> list[str]:
    """Return the names that :func:`create` knows."""
    return sorted(_DEVICES)


def create(name: str) -> PciDevice:
    """Make an emulated device.

    Raises:
        DeviceNotFoundError: there is none of this name.
    """
    make = _DEVICES.get(name)
    if make is None:
        raise DeviceNotFoundError(
            f"there is no emulated device '{name}'",
            object=f"emulated:{name}",
            hint=f"there are: {', '.join(device_names())}; your own: vfiopy.open(MyDevice())",
        )
    return make()


def connect(device: PciDevice | str) -> tuple[EmulatedDeviceIo, EmulatedMapper]:
    """Open an emulated device: what ``vfiopy.open()`` needs to make a ``Device`` of it.

    Raises:
        DeviceNotFoundError: there is none of this name.
        BusyError: this device is open already.
    """
    target = create(device) if isinstance(device, str) else device
    mapper = EmulatedMapper(f"emulated:{target.name}")
    return EmulatedDeviceIo(target, mapper), mapper
