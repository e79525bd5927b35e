"""What a user names, found: a target, one of its regions, an offset or a register in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import vfiopy
from vfiopy.backend import RegionIndex
from vfiopy.cli.complete import complete_backend, complete_region, complete_target
from vfiopy.cli.numbers import hexadecimal, number
from vfiopy.device import ConfigSpace, Device
from vfiopy.device.config_space import COMMAND_MEMORY
from vfiopy.errors import AccessError, DeviceGoneError, RegisterNameError, VfioError
from vfiopy.pci.capabilities import PowerManagement
from vfiopy.registers import Array, Field, Register, Registers, RegisterSpace, access_of, config_registers, load
from vfiopy.registers.config_space import config_name, config_offset, config_register
from vfiopy.registers.spec import FieldSpec

__all__ = [
    "REGIONS",
    "BackendOption",
    "Item",
    "JsonOption",
    "MapOption",
    "OffsetArgument",
    "Place",
    "RegionArgument",
    "TargetArgument",
    "WidthOption",
    "opened",
]

REGIONS: dict[str, int] = {
    **{f"bar{index}": index for index in range(6)},
    "rom": RegionIndex.ROM,
    "config": RegionIndex.CONFIG,
    "vga": RegionIndex.VGA,
}
_DEFAULT_WIDTH = 4

TargetArgument = Annotated[
    str,
    typer.Argument(
        help="PCI address bound to vfio-pci, emulated:edu, or vfio-user:PATH.", autocompletion=complete_target
    ),
]
RegionArgument = Annotated[str, typer.Argument(help=f"{', '.join(REGIONS)}.", autocompletion=complete_region)]
OffsetArgument = Annotated[
    str, typer.Argument(help="Bytes, such as 0x20; or a name: of the map, command, msix.control, express+0x10.")
]
WidthOption = Annotated[int | None, typer.Option(help="Bytes of each access: 1, 2, 4 or 8.", show_default="4")]
BackendOption = Annotated[
    str | None, typer.Option(help="Way to reach it: iommufd, type1v2, ...", autocompletion=complete_backend)
]
MapOption = Annotated[
    Path | None, typer.Option("--map", help="SystemRDL file: its names are those of this region.", dir_okay=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@dataclass(frozen=True, slots=True)
class Item:
    """One thing to read or write.

    Attributes:
        offset: bytes from the start of the region.
        width: bytes of its value.
        register: what a map says of it; None where only the offset is known.
        field: of the register, where one was named.
        named: it was asked for by a name.
    """

    space: RegisterSpace
    offset: int
    width: int
    register: Register | None = None
    field: FieldSpec | None = None
    named: bool = False

    @property
    def name(self) -> str | None:
        """Its name in the map."""
        if self.register is None:
            return None
        return self.register.path if self.field is None else f"{self.register.path}.{self.field.name}"

    def read(self) -> int:
        """Read it: one access, or those that make up its register."""
        value = self.space.read(self.offset, self.width) if self.register is None else self.register.read()
        return value if self.field is None else self.field.extract(value)

    def is_all_ones(self, value: int) -> bool:
        """What a bus answers where nobody does."""
        return self.field is None and value == (1 << 8 * self.width) - 1

    def describe(self, value: int) -> dict[str, Any]:
        """What ``--json`` shows of it."""
        specs = () if self.register is None or self.field is not None else self.register.spec.fields
        return {
            "offset": self.offset,
            "width": self.width,
            "name": self.name,
            "value": value,
            "hex": hexadecimal(value, self.width) if self.field is None else hex(value),
            "all_ones": self.is_all_ones(value),
            "fields": [
                {
                    "name": one.name,
                    "bits": one.bits,
                    "value": one.extract(value),
                    "words": one.words(one.extract(value)),
                    "text": one.text,
                }
                for one in specs
            ],
        }


@dataclass(frozen=True, slots=True)
class Place:
    """An open device, and one of its regions."""

    device: Device
    region: str
    space: RegisterSpace
    registers: Registers | None

    @property
    def config(self) -> ConfigSpace | None:
        """Configuration space, where that is the region."""
        return self.device.config if self.region == "config" else None

    def heading(self) -> dict[str, Any]:
        """How each answer of ``--json`` begins."""
        return {
            "format": 1,
            "target": self.device.name,
            "backend": self.device.backend,
            "region": self.region,
        }

    def locate(self, text: str, width: int | None = None) -> Item:
        """Find what a user named. Reads nothing of a BAR; of configuration space, its lists where a name needs them.

        Raises:
            RegisterNameError: no such name.
            AccessError: a width that a named register does not have.
        """
        offset = number(text)
        if offset is None and self.config is not None:
            offset = config_offset(self.config, text)
        if offset is not None:
            return Item(self.space, offset, _DEFAULT_WIDTH if width is None else width)
        register, field = self._named(text)
        if width not in (None, register.size):
            raise AccessError(
                f"it has {register.size} bytes, not {width}",
                object=register.path,
                hint=f"leave --width out, or give the offset: {register.offset:#x}",
            )
        return Item(self.space, register.offset, register.size, register, field, named=True)

    def locate_all(self, text: str, width: int | None = None) -> tuple[list[Item], list[str]]:
        """As :meth:`locate`, and for a group or an array all its registers; also what of them was left out, and why.

        Raises as :meth:`locate`.
        """
        found = None
        if self.registers is not None and number(text) is None:
            found = self.registers[text]
        elif self.config is not None and "." not in text and "+" not in text and number(text) is None:
            found = config_registers(self.config)[config_name(text)]
        if not isinstance(found, Registers | Array):
            return [self.locate(text, width)], []
        top = self.registers or config_registers(self.device.config)
        inside = [one for one in top.registers() if one.path.startswith((f"{found.path}.", f"{found.path}["))]
        notes = [f"{one.path} is left out: {one.spec.side_effect}" for one in inside if one.spec.side_effect]
        kept = [one for one in inside if one.spec.readable and not one.spec.side_effect]
        return [Item(self.space, one.offset, one.size, one, named=True) for one in kept], notes

    def _named(self, text: str) -> tuple[Register, FieldSpec | None]:
        if self.registers is not None:
            found = self.registers[text]
        elif self.config is not None:
            found = self._config_name(self.config, text)
        else:
            raise RegisterNameError(
                f"'{text}' is no number, and {self.region} has names only with a map",
                object=self.device.name,
                hint="give --map FILE.rdl, or an offset such as 0x20",
            )
        if isinstance(found, Field):
            return found.register, found.spec
        if not isinstance(found, Register):
            raise RegisterNameError(
                "it is more than one register", object=text, hint="'vfiopy dump' shows all of a group"
            )
        return found, None

    @staticmethod
    def _config_name(config: ConfigSpace, text: str) -> Register | Field:
        try:
            return config_register(config, text)
        except RegisterNameError:
            parent, dot, last = text.rpartition(".")
            try:
                register = config_register(config, parent) if dot else None
            except RegisterNameError:
                register = None
            if register is None:
                raise
        return register[last.lower()]

    def known(self, item: Item) -> Item:
        """The same with the register that the map has there, if it has one of this place and size."""
        if item.register is not None:
            return item
        registers = self.registers
        if registers is None and self.config is not None:
            registers = config_registers(self.config)
        if registers is not None:
            for one in registers.registers(item.offset, item.offset + item.width):
                if (one.offset, one.size) == (item.offset, item.width):
                    return Item(self.space, item.offset, item.width, one)
        return item

    def silence(self) -> tuple[bool, str]:
        """Say why a device may answer nothing but ones: whether that is certain, and why. Reads configuration space."""
        config = self.device.config
        try:
            if config.vendor == 0xFFFF:
                return True, "configuration space reads all ones too: the device is gone, or has no power"
            if self.region != "config" and not config.command & COMMAND_MEMORY:
                return True, "its memory decode is off; who opens it again, or sets command.memory, turns it on"
            for one in config.capabilities():
                if isinstance(one, PowerManagement) and one.state:
                    state = f"D{one.state}{'hot' if one.state == 3 else ''}"
                    return True, f"it is in {state}; who opens it again, or sets pm.control.power_state to D0, wakes it"
        except VfioError as error:
            return True, f"configuration space does not answer: {error.meaning}"
        return False, "in configuration space it answers, so this may be what the register holds"


@contextmanager
def opened(target: str, region: str, backend: str | None, map_file: Path | None = None) -> Iterator[Place]:
    """Open a target and one of its regions; nothing is read of the region, and the device is closed at the end."""
    if region.lower() not in REGIONS:
        raise typer.BadParameter(f"{region!r} is none of {', '.join(REGIONS)}", param_hint="REGION")
    name = region.lower()
    register_map = None if map_file is None else load(map_file)
    with vfiopy.open(target, backend=backend) as device:
        space = access_of(device.config if name == "config" else device.region(REGIONS[name]))
        place = Place(device, name, space, None if register_map is None else register_map.on(space))
        try:
            yield place
        except DeviceGoneError as error:
            certain, why = place.silence()
            if not certain:
                raise
            raise DeviceGoneError(f"{error.meaning}; {why}", object=error.object, hint=error.hint) from None
