"""How far a function is from being opened through VFIO, in one word and a reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum

from vfiopy.pci.function import Function
from vfiopy.pci.holders import vfio_holders
from vfiopy.pci.usage import uses

__all__ = ["Readiness", "State", "readiness"]


class State(Enum):
    """Nearest to an open device first; the value is the word that people and scripts see."""

    READY = "ready"
    BUSY = "busy"
    DENIED = "denied"
    BLOCKED = "blocked"
    NO_NODE = "no node"
    BINDABLE = "bindable"
    IN_USE = "in use"
    BRIDGE = "bridge"
    NO_IOMMU = "no IOMMU"


@dataclass(frozen=True, slots=True)
class Readiness:
    """What stands between a function and ``vfiopy.open()``.

    Attributes:
        state: one word.
        reasons: why, a sentence each; empty where the word says it all.
    """

    state: State
    reasons: tuple[str, ...] = ()


def readiness(function: Function) -> Readiness:
    """Say how far a function is from being opened, from sysfs, procfs and the nodes; opens nothing.

    Who holds a device is known as far as this user may look into processes.
    """
    if function.is_bridge:
        return Readiness(State.BRIDGE)
    return _bound(function) if function.is_vfio else _not_bound(function)


def _not_bound(function: Function) -> Readiness:
    users = tuple(uses(function))
    if function.iommu_group is None:
        return Readiness(State.NO_IOMMU, users)
    return Readiness(State.IN_USE, users) if users else Readiness(State.BINDABLE, _others(function))


def _bound(function: Function) -> Readiness:
    nodes = [node for node in (function.cdev_node, function.group_node) if node is not None and node.exists()]
    if not nodes:
        return Readiness(State.NO_NODE, (function.cdev_missing,))
    blockers = _others(function)
    if blockers:
        return Readiness(State.BLOCKED, blockers)
    holders = vfio_holders(function)
    if holders:
        return Readiness(State.BUSY, tuple(map(str, holders)))
    denied = [node for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if len(denied) == len(nodes):
        return Readiness(State.DENIED, tuple(f"this user may not open {node}" for node in denied))
    return Readiness(State.READY)


def _others(function: Function) -> tuple[str, ...]:
    return tuple(
        f"{other.driver} holds {other} of its group" for other in function.group_blockers() if other != function
    )
