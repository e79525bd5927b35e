"""What a controller is: chosen when it is made, and never changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from uuid import NAMESPACE_URL, UUID, uuid5

__all__ = ["Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a controller is.

    Attributes:
        serial, model, firmware: ASCII, at most 20, 40 and 8 characters.
        queues: I/O queue pairs, 1 to 1024.
        entries: of an I/O queue at most, 2 to 65536.
        messages: ``"msix"``, ``"msi"``, or None for INTx only.
        interrupt_pin: 1 to 4 for INTA to INTD, 0 for no INTx.
        mdts: a command moves at most ``4096 << mdts`` bytes; 0 for no limit.
        stride: CAP.DSTRD: doorbells are ``4 << stride`` bytes apart.
        memory_buffer: bytes of the controller memory buffer, a power of two, 4 KiB to 2 GiB; 0 for none.
        event_requests: asynchronous event requests that it keeps open, 1 to 16.
        most_namespaces: the highest namespace identifier (NN), 1 to 1024.
        ready_seconds: what CAP.TO promises: enabling and disabling take no longer.
    """

    serial: str
    model: str = "vfiopy emulated NVMe controller"
    firmware: str = "1.0"
    queues: int = 16
    entries: int = 1024
    messages: Literal["msix", "msi"] | None = "msix"
    interrupt_pin: int = 1
    mdts: int = 8
    stride: int = 0
    memory_buffer: int = 0
    event_requests: int = 4
    most_namespaces: int = 32
    ready_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name, value, least, most in (
            ("queues", self.queues, 1, 1024),
            ("entries", self.entries, 2, 65536),
            ("interrupt_pin", self.interrupt_pin, 0, 4),
            ("mdts", self.mdts, 0, 15),
            ("stride", self.stride, 0, 8),
            ("most_namespaces", self.most_namespaces, 1, 1024),
            ("event_requests", self.event_requests, 1, 16),
            ("ready_seconds", self.ready_seconds, 0.5, 127.5),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} is {least} to {most}, not {value}")
        for name, text, length in (
            ("serial", self.serial, 20),
            ("model", self.model, 40),
            ("firmware", self.firmware, 8),
        ):
            if not text.isascii() or not text.isprintable() or not 1 <= len(text) <= length:
                raise ValueError(f"{name} is 1 to {length} printable ASCII characters, not {text!r}")
        buffer = self.memory_buffer
        if buffer and (not 4096 <= buffer <= 1 << 31 or buffer & (buffer - 1)):
            raise ValueError(f"memory_buffer is a power of two from 4 KiB to 2 GiB, not {buffer}")
        if self.messages not in ("msix", "msi", None):
            raise ValueError(f"messages is 'msix', 'msi' or None, not {self.messages!r}")

    @property
    def vectors(self) -> int:
        """Message vectors: one for each queue, as far as the capability goes."""
        if self.messages == "msix":
            return self.queues + 1
        return min(32, 1 << self.queues.bit_length()) if self.messages else 0

    @property
    def uuid(self) -> UUID:
        """Of the subsystem."""
        return uuid5(NAMESPACE_URL, f"vfiopy:nvme:{self.serial}")

    def namespace_uuid(self, nsid: int) -> UUID:
        """Of a namespace: the same whenever a controller has the same serial number."""
        return uuid5(self.uuid, str(nsid))
