"""How the controller feels, and when the host is told (Base 2.0, 5.2 and 5.16.1.3)."""

from __future__ import annotations

from vfiopy.emulated.nvme.events import Events
from vfiopy.emulated.nvme.features import Features
from vfiopy.emulated.nvme.logs import Logs

__all__ = ["Health"]


class Health:
    """Watches the critical warning of the SMART log.

    Args:
        logs: has it.
        features: what the host wants to be told of.
        events: tell it.
    """

    def __init__(self, logs: Logs, features: Features, events: Events) -> None:
        self._logs = logs
        self._features = features
        self._events = events
        self._told = 0

    def reset(self) -> None:
        """Forget what the host was told, as a controller reset does."""
        self._told = 0

    def change(
        self, temperature: int | None, spare: int | None, used: int | None, reliability_degraded: bool | None
    ) -> None:
        """Set what is not None: see :meth:`Nvme.set_health`."""
        for name, value, most in (("temperature", temperature, 0xFFFF), ("spare", spare, 100), ("used", used, 255)):
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{name} is 0 to {most}, not {value}")
        logs = self._logs
        logs.temperature = logs.temperature if temperature is None else temperature
        logs.spare = logs.spare if spare is None else spare
        logs.used = logs.used if used is None else used
        if reliability_degraded is not None:
            logs.reliability_degraded = reliability_degraded
        self.look()

    def look(self) -> None:
        """Tell of what is new."""
        found = self._logs.critical_warning & self._features.event_mask & 0xFF
        self._events.health(found & ~self._told)
        self._told = found
