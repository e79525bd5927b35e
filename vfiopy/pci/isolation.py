"""What makes an IOMMU group as large as it is: the bridges above a function, and whether they keep devices apart.

The rules are the kernel's (drivers/iommu/iommu.c, pci_device_group(); drivers/pci/pci.c, pci_acs_enabled()). What it
knows of single devices by quirk is not seen here: a port that it trusts without ACS shows as one without.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfiopy.errors import VfioError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.express import PciExpress, PortType
from vfiopy.pci.ext_capabilities import AccessControl
from vfiopy.pci.function import Function
from vfiopy.pci.p2p import ancestors

__all__ = ["CONVENTIONAL", "Separator", "separators"]

CONVENTIONAL = "bridge to conventional PCI"
"""A :attr:`Separator.kind`: what no ACS can be asked of."""

_WANTED = ("source validation", "request redirect", "completion redirect", "upstream forwarding")


@dataclass(frozen=True, slots=True)
class Separator:
    """A bridge on the way to a function.

    Attributes:
        address: the bridge.
        kind: what it is.
        apart: it keeps what is below it apart from others; None where its ACS could not be read.
        reason: why it does or does not.
    """

    address: PciAddress
    kind: str
    apart: bool | None
    reason: str

    def __str__(self) -> str:
        return f"{self.address} ({self.kind}): {self.reason}"


def separators(function: Function) -> tuple[Separator, ...]:
    """The bridges above a function, from the root down, that decide about its group."""
    way = ancestors(function)[1:]
    found = [_bridge(Function(name, function.system)) for name in way[:-1]]
    return tuple(one for one in found if one is not None)


def _bridge(bridge: Function) -> Separator | None:
    try:
        config = bridge.config()
    except VfioError:
        return Separator(bridge.address, "bridge", None, "its ACS can be read by root only")
    express = config.find(PciExpress)
    port = None if express is None else express.port_type
    if port in (None, PortType.PCIE_TO_PCI_BRIDGE, PortType.PCI_TO_PCIE_BRIDGE):
        reason = "devices on a conventional bus look like one to the IOMMU"
        return Separator(bridge.address, CONVENTIONAL, False, reason)
    if port not in (PortType.ROOT_PORT, PortType.DOWNSTREAM_PORT):
        return None  # an upstream port: its downstream ports decide
    kind = "root port" if port is PortType.ROOT_PORT else "downstream port"
    acs = config.find(AccessControl)
    if acs is None:
        return Separator(bridge.address, kind, False, "no ACS capability")
    # The kernel takes a service that the port cannot control for one that is always on.
    missing = [name for name in _WANTED if name in acs.supported and name not in acs.enabled]
    if missing:
        return Separator(bridge.address, kind, False, f"ACS without {', '.join(missing)}")
    return Separator(bridge.address, kind, True, "ACS on")
