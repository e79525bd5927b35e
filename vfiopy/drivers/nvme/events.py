"""Asynchronous events, decoded (NVM Express Base Specification 2.0, 5.2)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AsyncEvent"]

_TYPES = {0: "error", 1: "health", 2: "notice", 3: "immediate", 6: "I/O command set", 7: "vendor"}
_INFORMATION = {
    (0, 0): "write to an invalid doorbell register",
    (0, 1): "invalid value written to a doorbell",
    (0, 2): "diagnostic failure",
    (0, 3): "persistent internal error",
    (0, 4): "transient internal error",
    (0, 5): "firmware image load error",
    (1, 0): "NVM subsystem reliability degraded",
    (1, 1): "temperature threshold crossed",
    (1, 2): "spare below threshold",
    (2, 0): "namespace attribute changed",
    (2, 1): "firmware activation starting",
    (2, 2): "telemetry log changed",
    (2, 3): "asymmetric namespace access changed",
}


@dataclass(frozen=True, slots=True)
class AsyncEvent:
    """What happened.

    Attributes:
        type: 0 error, 1 health, 2 notice, 3 immediate, 6 I/O command set, 7 vendor.
        information: which of that type.
        log_page: the log page that has details; reading it lets the next such event come.
    """

    type: int
    information: int
    log_page: int

    @classmethod
    def decode(cls, dw0: int) -> AsyncEvent:
        """Decode dword 0 of the completion."""
        return cls(type=dw0 & 7, information=dw0 >> 8 & 0xFF, log_page=dw0 >> 16 & 0xFF)

    def __str__(self) -> str:
        """Type and meaning in words."""
        kind = _TYPES.get(self.type, f"type {self.type}")
        return f"{kind}: {_INFORMATION.get((self.type, self.information), f'information {self.information:02X}h')}"
