"""The way between two functions: what a peer-to-peer request passes, as far as sysfs and the bridges' ACS bits tell.

Whether a root complex passes requests between its ports no register says: Linux keeps a list of those that do
(drivers/pci/p2pdma.c, pci_p2pdma_whitelist), and VFIO does not ask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from vfiopy.errors import PciAddressError, VfioError
from vfiopy.pci.address import PciAddress
from vfiopy.pci.ext_capabilities import AccessControl
from vfiopy.pci.function import Function

__all__ = ["PeerPath", "Route", "ancestors", "peer_path"]


class Route(Enum):
    """What the two functions have in common, nearest first; the value is the text for messages."""

    SELF = "they are the same function"
    DEVICE = "they are functions of one device"
    SWITCH = "they are below the same bridge or switch"
    HOST_BRIDGE = "they are below the same host bridge"
    APART = "they are below different host bridges"
    UNKNOWN = "sysfs does not show where they are"


@dataclass(frozen=True, slots=True)
class PeerPath:
    """The way from a function that does DMA to the function whose memory it reaches.

    Attributes:
        source: the function that does DMA, as the user calls it.
        target: the function whose BAR it is.
        route: what they have in common.
        bridge: the bridge that they are both below, for ``Route.SWITCH``.
        redirected: bridges on the way whose ACS sends requests up to the root complex instead of across.
        unread: bridges on the way whose ACS could not be read (that needs root).
    """

    source: str
    target: str
    route: Route
    bridge: PciAddress | None = None
    redirected: tuple[PciAddress, ...] = ()
    unread: tuple[PciAddress, ...] = ()

    @property
    def through_root_complex(self) -> bool | None:
        """Requests go through the root complex (and its IOMMU); None where that is not known."""
        if self.route in (Route.HOST_BRIDGE, Route.APART) or self.redirected:
            return True
        if self.route is Route.UNKNOWN or self.unread:
            return None
        return False

    def __str__(self) -> str:
        text = f"{self.source} to {self.target}: {self.route.value}"
        if self.bridge is not None:
            text += f" ({self.bridge})"
        if self.redirected:
            text += f"; ACS of {', '.join(map(str, self.redirected))} sends requests through the root complex"
        if self.unread:
            text += f"; ACS of {', '.join(map(str, self.unread))} could not be read"
        if self.route is Route.APART:
            text += "; few machines pass requests from one to the other"
        elif self.through_root_complex:
            text += "; whether the root complex passes requests between its ports only the machine's manual says"
        elif self.route is Route.SWITCH and self.through_root_complex is False:
            text += (
                "; the bridge may claim a request whose IOVA lies in the other's bus window before the IOMMU sees it"
            )
        return text


def peer_path(source: Function, target: Function) -> PeerPath:
    """Find the way from one function to another."""
    names = (str(source), str(target))
    mine, other = ancestors(source), ancestors(target)
    if not mine or not other:
        return PeerPath(*names, Route.UNKNOWN)
    if source.address == target.address:
        return PeerPath(*names, Route.SELF)
    if mine[0] != other[0]:
        return PeerPath(*names, Route.APART)
    shared = [a for a, b in zip(mine, other, strict=False) if a == b]
    here, there = mine[len(shared) :], other[len(shared) :]
    if here[0].rpartition(".")[0] == there[0].rpartition(".")[0] and len(here) == len(there) == 1:
        return PeerPath(*names, Route.DEVICE)
    redirected: list[PciAddress] = []
    unread: list[PciAddress] = []
    for name in here[:-1]:  # the ports that the request comes up through
        bridge = Function(name, source.system)
        redirects = _redirects(bridge)
        if redirects is None:
            unread.append(bridge.address)
        elif redirects:
            redirected.append(bridge.address)
    common = shared[-1]
    route = Route.HOST_BRIDGE if len(shared) == 1 else Route.SWITCH
    bridge_address = None if len(shared) == 1 else PciAddress.parse(common)
    return PeerPath(*names, route, bridge_address, tuple(redirected), tuple(unread))


def ancestors(function: Function) -> list[str]:
    """From the host bridge ("pci0000:00") down to the function itself; empty where sysfs does not show that."""
    try:
        parts = Path(function.sysfs).resolve(strict=True).parts
    except OSError:
        return []
    top = next((n for n, part in enumerate(parts) if part.startswith("pci") and ":" in part), None)
    if top is None:
        return []
    return [parts[top], *(part for part in parts[top + 1 :] if _is_address(part))]


def _is_address(text: str) -> bool:
    try:
        PciAddress.parse(text)
    except (PciAddressError, ValueError):
        return False
    return True


def _redirects(bridge: Function) -> bool | None:
    """Whether its ACS redirects requests upwards; None where it cannot be read."""
    try:
        config = bridge.config()
    except VfioError:
        return None
    return any(
        "request redirect" in capability.enabled
        for capability in config.extended
        if isinstance(capability, AccessControl)
    )
