"""A register map that is on no region yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vfiopy.errors import AccessError, RegisterMapError
from vfiopy.registers.access import WIDTHS, access_of
from vfiopy.registers.bound import Registers
from vfiopy.registers.spec import GroupSpec, MemberSpec, RegisterSpec

if TYPE_CHECKING:
    from vfiopy.registers.access import Target

__all__ = ["RegisterMap"]


class RegisterMap:
    """What a device's data sheet says, ready to be put on one of its regions.

    Attributes:
        spec: the group on top.

    Raises:
        RegisterMapError: a register that no access of 1, 2, 4 or 8 bytes, naturally aligned, reaches.
    """

    def __init__(self, spec: GroupSpec) -> None:
        _check(spec, spec.offset, spec.name)
        self.spec = spec

    def __repr__(self) -> str:
        return f"<register map {self.spec.name}: {', '.join(self.spec.members)}>"

    def on(self, target: Target, offset: int = 0) -> Registers:
        """Put the map on a region, or on anything that reads and writes registers. Reads nothing.

        Args:
            target: a BAR, configuration space, or a :class:`RegisterSpace` of your own.
            offset: where in it the map begins, bytes.

        Raises:
            AccessError: the map does not fit into the region.
        """
        space = access_of(target)
        if offset < 0 or offset + self.spec.size > space.size:
            raise AccessError(
                f"the map {self.spec.name} takes {self.spec.size:#x} bytes from {offset:#x} on, "
                f"the region has {space.size:#x}",
                object=space.name,
                hint="it is another region's, or another device's map",
            )
        return Registers(space, self.spec, offset)


def _check(spec: MemberSpec, offset: int, path: str) -> None:
    if isinstance(spec, GroupSpec):
        for member in spec:
            _check(member, offset + member.offset, f"{path}.{member.name}")
    elif isinstance(spec, RegisterSpec):
        if spec.access not in WIDTHS or spec.size % spec.access:
            raise RegisterMapError(
                f"{spec.size} bytes by accesses of {spec.access} are no register of a bus", object=path
            )
        if offset % spec.access or spec.stride % spec.access:
            raise RegisterMapError(
                f"at {offset:#x}, accesses of {spec.access} bytes are not naturally aligned",
                object=path,
                hint="its accesswidth has to be smaller",
            )
