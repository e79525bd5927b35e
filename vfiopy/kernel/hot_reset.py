"""Resetting a whole slot or bus: the way to reset a device that has no function reset of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence

from vfiopy import pci, uapi
from vfiopy.errors import BusyError, NotViableError
from vfiopy.kernel.device_io import KernelDeviceIo
from vfiopy.kernel.ioctl import HotResetInfo

__all__ = ["hot_reset", "hot_reset_info"]

_PATIENCE = 2.0  # seconds
_PAUSE = 0.01


def hot_reset_info(io: KernelDeviceIo) -> HotResetInfo:
    """Say which functions a hot reset of this device takes along.

    Raises:
        NotSupportedError: the device sits on a root bus, which cannot be reset.
    """
    return io.calls.get_pci_hot_reset_info()


def hot_reset(io: KernelDeviceIo, others: Sequence[KernelDeviceIo] = ()) -> HotResetInfo:
    """Reset the slot or bus that a device is on, and with it all other functions there.

    Args:
        io: the device.
        others: this process's other devices there; for devices that came through groups they are the proof
            that all of it is ours. Those of the same iommufd need not be named.

    Returns:
        What has been reset.

    Raises:
        NotViableError: a function there is not in this process's hands; the message names it and its driver.
        NotSupportedError: there is no slot or bus to reset.
    """
    info = hot_reset_info(io)
    members = {one.name: one for one in (io, *others)}
    if info.by_device_id:
        foreign = [one.address for one in info.devices if one.id == uapi.VFIO_PCI_DEVID_NOT_OWNED]
        groups = []
    else:
        owned = {io.group.number: io.group.calls for io in members.values() if io.group is not None}
        foreign = [one.address for one in info.devices if one.id not in owned]
        groups = list(owned.values())
    if foreign or (info.by_device_id and not info.owned):
        raise _not_ours(io, foreign)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            io.calls.pci_hot_reset(groups)
        except BusyError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_PAUSE)
        else:
            return info


def _not_ours(io: KernelDeviceIo, foreign: Sequence[str]) -> NotViableError:
    names = ", ".join(f"{address} ({pci.Function(address).driver or 'no driver'})" for address in foreign)
    return NotViableError(
        f"a hot reset would hit functions that are not open here: {names or 'of another iommufd'}",
        object=io.name,
        call="VFIO_DEVICE_PCI_HOT_RESET",
        hint="bind them to vfio-pci and open them in the same space, or leave them without a driver",
    )
