"""PCI addresses: domain, bus, device and function, as lspci and the kernel write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from vfiopy.errors import PciAddressError

__all__ = ["PciAddress"]

_FULL = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})\.([0-9a-f])", re.IGNORECASE)
_NO_FUNCTION = re.compile(r"(?:[0-9a-f]{4,8}:)?[0-9a-f]{1,2}:[0-9a-f]{1,2}", re.IGNORECASE)
_IDS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{4}", re.IGNORECASE)


@dataclass(frozen=True, order=True, slots=True)
class PciAddress:
    """Where a PCI function sits. Immutable, hashable, ordered as lspci orders.

    Attributes:
        domain: segment group, 0 on most machines; up to 32 bits (linux/pci.h keeps an int; VMD uses 0x10000
            and up).
        bus: 0 to 0xff.
        device: 0 to 0x1f.
        function: 0 to 7. An ARI function above 7 shows here as the kernel shows it: device and function of
            its 8-bit number (PCI Express Base 6.0, 6.13).
    """

    domain: int
    bus: int
    device: int
    function: int

    def __post_init__(self) -> None:
        for name, value, most in (
            ("domain", self.domain, 0xFFFF_FFFF),
            ("bus", self.bus, 0xFF),
            ("device", self.device, 0x1F),
            ("function", self.function, 7),
        ):
            if not 0 <= value <= most:
                raise PciAddressError(
                    f"{name} number {value:#x} is out of range",
                    object=f"PCI address {self}",
                    hint=f"the highest {name} number is {most:#x}; all numbers of an address are hexadecimal",
                )

    @classmethod
    def parse(cls, text: str | PciAddress) -> PciAddress:
        """Read ``"0000:00:05.0"`` or ``"00:05.0"`` (domain 0); an address is returned as it is.

        Raises:
            PciAddressError: a ``ValueError`` that says what is wrong with the text.
        """
        if isinstance(text, PciAddress):
            return text
        word = text.strip()
        match = _FULL.fullmatch(word)
        if match is None:
            raise PciAddressError("not a PCI address", object=repr(text), hint=_advice(word))
        domain, bus, device, function = match.groups()
        return cls(int(domain or "0", 16), int(bus, 16), int(device, 16), int(function, 16))

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function:x}"

    @property
    def slot(self) -> str:
        """The address without its function: ``"0000:00:05"``."""
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}"

    @property
    def requester_id(self) -> int:
        """Bus, device and function in 16 bits, as in a TLP's requester ID (PCI Express Base 6.0, 2.2.6.2)."""
        return self.bus << 8 | self.device << 3 | self.function


def _advice(word: str) -> str:
    if _IDS.fullmatch(word):
        vendor, device = word.split(":")
        return f"this looks like vendor:device; find(vendor=0x{vendor}, device=0x{device}) finds by those"
    if _NO_FUNCTION.fullmatch(word):
        return f"the function number is missing: {word}.0 is the first one"
    return "write domain:bus:device.function in hexadecimal, such as 0000:00:05.0, or 00:05.0 in domain 0"
