"""Features: what Set Features and Get Features do (Base 2.0, 5.15 and 5.27).

Saved values outlive resets, and end with the device object.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.queues import Queues
from vfiopy.emulated.nvme.settings import Settings
from vfiopy.nvme_spec.opcodes import ALL_NAMESPACES, Feature
from vfiopy.nvme_spec.status import Code

__all__ = ["TIMESTAMP_SIZE", "Features"]

TIMESTAMP_SIZE: Final = 8
WARNING_TEMPERATURE: Final = 343  # kelvin
CRITICAL_TEMPERATURE: Final = 373
_CURRENT, _DEFAULT, _SAVED, _CAPABILITIES = range(4)
_NSID, _FID, _DATA = 4, 40, 44  # bytes of the entry, for the error log


@dataclass(frozen=True, slots=True)
class _Kind:
    """How a feature can be used.

    Attributes:
        default: its value, dword 11.
        mask: bits that may be set.
        saveable: as "supported capabilities" says; all can be changed.
        per_namespace: it has a value for each namespace.
    """

    default: int
    mask: int
    saveable: bool = True
    per_namespace: bool = False


_KINDS: Final = {
    Feature.ARBITRATION: _Kind(0x07, 0xFFFFFF07),
    Feature.POWER_MANAGEMENT: _Kind(0, 0xFF),
    Feature.TEMPERATURE_THRESHOLD: _Kind(0, 0x003FFFFF),
    Feature.ERROR_RECOVERY: _Kind(0, 0xFFFF, per_namespace=True),
    Feature.VOLATILE_WRITE_CACHE: _Kind(1, 1),
    Feature.NUMBER_OF_QUEUES: _Kind(0, 0xFFFFFFFF, saveable=False),
    Feature.INTERRUPT_COALESCING: _Kind(0, 0xFFFF),
    Feature.INTERRUPT_VECTOR: _Kind(0, 0x1FFFF),
    Feature.WRITE_ATOMICITY: _Kind(0, 1),
    Feature.ASYNC_EVENTS: _Kind(0, 0x11F),
    Feature.TIMESTAMP: _Kind(0, 0, saveable=False),
    Feature.COMMAND_SET_PROFILE: _Kind(0, 0x1FF, saveable=False),
}
_SINGLE_SUB: Final = 0
_CHANGEABLE: Final = 1 << 2
_UNDER: Final = 1 << 20  # THSEL: the threshold below which it is too cold


class Features:
    """The features of a controller, and their values.

    Args:
        settings: of the controller.
        queues: whether there are any decides what may be set.
        namespaces: the active ones: some features have a value for each.
    """

    def __init__(self, settings: Settings, queues: Queues, namespaces: Collection[int]) -> None:
        self._settings = settings
        self._queues = queues
        self._namespaces = namespaces
        self._saved: dict[tuple[int, int], int] = {}
        self._values: dict[tuple[int, int], int] = {}
        self.vectors = 1
        self.reset()

    def reset(self) -> None:
        """What a controller reset leaves: saved values, defaults else."""
        self._values = dict(self._saved)
        self._timestamp = (0, time.monotonic(), False)

    @staticmethod
    def known() -> dict[int, bool]:
        """Which features there are, and whether they are of a namespace."""
        return {int(feature): kind.per_namespace for feature, kind in _KINDS.items()}

    # --- for the rest of the controller --------------------------------------------------------------------------

    @property
    def write_cache(self) -> bool:
        """The volatile write cache is on."""
        return bool(self._value(Feature.VOLATILE_WRITE_CACHE))

    @property
    def event_mask(self) -> int:
        """Asynchronous Event Configuration: which health warnings and notices are wanted."""
        return self._value(Feature.ASYNC_EVENTS)

    def threshold(self, *, under: bool = False) -> int:
        """Return a temperature threshold of the composite temperature, kelvin."""
        return self._value(Feature.TEMPERATURE_THRESHOLD, _UNDER if under else 0)

    def coalescing(self, vector: int) -> tuple[int, float]:
        """Return how many completions of a vector may wait for one interrupt, and for how many seconds."""
        value = self._value(Feature.INTERRUPT_COALESCING)
        if not value or self._value(Feature.INTERRUPT_VECTOR, vector) >> 16 & 1:
            return 0, 0.0
        return value & 0xFF, (value >> 8) * 100e-6

    def _value(self, feature: int, sub: int = _SINGLE_SUB) -> int:
        return self._values.get((feature, sub), self._default(feature, sub))

    def _default(self, feature: int, sub: int) -> int:
        if feature == Feature.TEMPERATURE_THRESHOLD:
            return 0 if sub & _UNDER else WARNING_TEMPERATURE
        if feature == Feature.NUMBER_OF_QUEUES:
            return (self._settings.queues - 1) * 0x10001
        if feature == Feature.INTERRUPT_VECTOR:
            return sub
        return _KINDS[Feature(feature)].default

    # --- the commands --------------------------------------------------------------------------------------------

    def get(self, command: Command) -> int:
        """Get Features; the data of those that have data are asked for separately."""
        feature, select = command.cdw10 & 0xFF, command.cdw10 >> 8 & 7
        kind = self._kind(feature)
        if select > _CAPABILITIES:
            raise RefusedError.field(_FID + 1)
        if select == _CAPABILITIES:
            return kind.saveable | kind.per_namespace << 1 | _CHANGEABLE
        sub = self._sub(feature, command)
        if select == _DEFAULT:
            return self._default(feature, sub)
        if select == _SAVED:
            return self._saved.get((feature, sub), self._default(feature, sub))
        return self._value(feature, sub)

    def set(self, command: Command) -> int:
        """Set Features; returns dword 0 of the completion."""
        feature, save, value = command.cdw10 & 0xFF, bool(command.cdw10 >> 31), command.cdw11
        kind = self._kind(feature)
        if save and not kind.saveable:
            raise RefusedError(Code.FEATURE_NOT_SAVEABLE, _FID)
        if value & ~kind.mask and feature != Feature.NUMBER_OF_QUEUES:
            raise RefusedError.field(_DATA)
        if command.nsid in self._namespaces and not kind.per_namespace:
            raise RefusedError(Code.FEATURE_NOT_OF_NAMESPACE, _NSID)
        every = kind.per_namespace and command.nsid == ALL_NAMESPACES
        subs = tuple(self._namespaces) if every else (self._sub(feature, command),)
        self._check(feature, value)
        if feature == Feature.NUMBER_OF_QUEUES:
            return self._value(feature)
        if feature == Feature.TEMPERATURE_THRESHOLD:
            value &= 0xFFFF
        for sub in subs:
            self._values[feature, sub] = value
            if save:
                self._saved[feature, sub] = value
        return 0

    @staticmethod
    def _kind(feature: int) -> _Kind:
        try:
            return _KINDS[Feature(feature)]
        except (ValueError, KeyError):
            raise RefusedError.field(_FID) from None

    def _sub(self, feature: int, command: Command) -> int:
        """Which of a feature's values is meant."""
        if feature == Feature.TEMPERATURE_THRESHOLD:
            sensor, kind = command.cdw11 >> 16 & 0xF, command.cdw11 >> 20 & 3
            if kind > 1 or sensor not in (0, 0xF):  # there are no other sensors than the composite
                raise RefusedError.field(_DATA + 2)
            return _UNDER if kind else 0
        if _KINDS[Feature(feature)].per_namespace:
            if command.nsid not in self._namespaces:
                raise RefusedError(Code.INVALID_NAMESPACE, _NSID)
            return command.nsid
        if feature == Feature.INTERRUPT_VECTOR:
            vector = command.cdw11 & 0xFFFF
            if vector >= self.vectors:
                raise RefusedError.field(_DATA)
            return vector
        return _SINGLE_SUB

    def _check(self, feature: int, value: int) -> None:
        match feature:
            case Feature.NUMBER_OF_QUEUES:
                if self._queues.has_io:
                    raise RefusedError(Code.COMMAND_SEQUENCE_ERROR)
                if value & 0xFFFF == 0xFFFF or value >> 16 == 0xFFFF:
                    raise RefusedError.field(_DATA)
            case Feature.POWER_MANAGEMENT:
                if value & 0x1F:  # there is power state 0 only
                    raise RefusedError.field(_DATA)
            case Feature.COMMAND_SET_PROFILE:
                if value & 0x1FF:
                    raise RefusedError(Code.COMMAND_SET_REJECTED, _DATA)

    # --- the timestamp (5.27.1.9) ----------------------------------------------------------------------------------

    def set_timestamp(self, data: bytes) -> None:
        """Set the clock: milliseconds since 1970 in 6 bytes."""
        self._timestamp = (int.from_bytes(data[:6], "little"), time.monotonic(), True)

    def timestamp(self, select: int) -> bytes:
        """Return the clock as Get Features has it: milliseconds, and who set it last."""
        base, since, by_host = (0, 0.0, False) if select != _CURRENT else self._timestamp
        now = base + int((time.monotonic() - since) * 1000) if select == _CURRENT else 0
        return (now & (1 << 48) - 1).to_bytes(6, "little") + bytes((by_host << 1, 0))
