"""Log pages (Base 2.0, 5.16): what the controller remembers, and what it says about itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from vfiopy.emulated.nvme.features import Features
from vfiopy.nvme_spec.opcodes import AdminOpcode, IoOpcode, LogPage
from vfiopy.nvme_spec.structures import ERROR_LOG_ENTRY, SMART_LOG

__all__ = ["ERROR_ENTRIES", "ErrorEntry", "Logs"]

ERROR_ENTRIES: Final = 64
_MOST_CHANGED: Final = 1024
_SUPPORTED = 1 << 0  # CSUPP, LSUPP, FSUPP alike
_CHANGES_BLOCKS = 1 << 1  # LBCC
_SCOPE_NAMESPACE = 1 << 20
_SCOPE_CONTROLLER = 1 << 21


@dataclass(frozen=True, slots=True)
class ErrorEntry:
    """An entry of the error log; ``status`` is the completion's status field with the phase tag's place."""

    sqid: int
    cid: int
    status: int
    location: int
    lba: int
    nsid: int


class Logs:
    """Counters and lists behind the log pages.

    Args:
        features: temperature thresholds decide about warnings.
        firmware: revision of the only slot.
        read_only: tells whether all media are read-only.

    Attributes:
        temperature: composite, kelvin.
        spare, used: percent that are left of spare blocks, and that are used of the media's life.
        reliability_degraded: bit 2 of the critical warning.
        changed: namespaces whose attributes have changed since the list was read.
    """

    def __init__(self, features: Features, firmware: str, read_only: Callable[[], bool]) -> None:
        self._features = features
        self._firmware = firmware
        self._read_only = read_only
        self._errors: deque[tuple[int, ErrorEntry]] = deque(maxlen=ERROR_ENTRIES)
        self._since = time.monotonic()
        self.error_count = 0
        self.temperature = 310
        self.spare = 100
        self.used = 0
        self.reliability_degraded = False
        self.media_errors = 0
        self.power_cycles = 0
        self.unsafe_shutdowns = 0
        self.bytes_read = self.bytes_written = 0
        self.reads = self.writes = 0
        self.changed: list[int] = []
        self._pages: dict[int, Callable[[], bytes]] = {
            LogPage.SUPPORTED: self._supported,
            LogPage.ERRORS: self._error_page,
            LogPage.SMART: self._smart,
            LogPage.FIRMWARE: self._firmware_slots,
            LogPage.CHANGED_NAMESPACES: self._changed_list,
            LogPage.COMMAND_EFFECTS: self._effects,
            LogPage.FEATURE_EFFECTS: self._feature_effects,
        }

    def record(self, entry: ErrorEntry) -> None:
        """Add to the error log."""
        self.error_count += 1
        self._errors.appendleft((self.error_count, entry))

    def page(self, number: int) -> bytes | None:
        """Return a log page, or None where there is none of this number."""
        make = self._pages.get(number)
        return make() if make is not None else None

    @property
    def critical_warning(self) -> int:
        """The critical warning byte of the SMART log (Base 2.0, figure 207)."""
        warm = self.temperature >= self._features.threshold()
        cold = self.temperature <= self._features.threshold(under=True)
        return (self.spare < 10) | (warm or cold) << 1 | self.reliability_degraded << 2 | self._read_only() << 3

    # --- the pages -----------------------------------------------------------------------------------------------

    def _supported(self) -> bytes:
        return _bitmap(dict.fromkeys(self._pages, _SUPPORTED))

    def _error_page(self) -> bytes:
        table = np.zeros(ERROR_ENTRIES, ERROR_LOG_ENTRY)
        for row, (count, entry) in zip(table, self._errors, strict=False):
            row["error_count"] = count
            row["sqid"], row["cid"], row["status"] = entry.sqid, entry.cid, entry.status
            row["parameter_location"], row["lba"], row["nsid"] = entry.location, entry.lba, entry.nsid
        return table.tobytes()

    def _smart(self) -> bytes:
        record = np.zeros(1, SMART_LOG)
        record["critical_warning"] = self.critical_warning
        record["composite_temperature"] = self.temperature
        record["available_spare"], record["available_spare_threshold"] = self.spare, 10
        record["percentage_used"] = self.used
        hours = int(time.monotonic() - self._since) // 3600
        for name, value in (
            ("data_units_read", -(-self.bytes_read // 512_000)),
            ("data_units_written", -(-self.bytes_written // 512_000)),
            ("host_read_commands", self.reads),
            ("host_write_commands", self.writes),
            ("power_cycles", self.power_cycles),
            ("power_on_hours", hours),
            ("unsafe_shutdowns", self.unsafe_shutdowns),
            ("media_errors", self.media_errors),
            ("error_log_entries", self.error_count),
        ):
            record[name] = value.to_bytes(16, "little")
        return record.tobytes()

    def _firmware_slots(self) -> bytes:
        return bytes((1,)).ljust(8, b"\0") + self._firmware.encode().ljust(8).ljust(504, b"\0")

    def _changed_list(self) -> bytes:
        if len(self.changed) > _MOST_CHANGED:
            return b"\xff" * 4 + bytes(4092)
        return np.array(sorted(self.changed), "<u4").tobytes().ljust(4096, b"\0")

    def _effects(self) -> bytes:
        writers = {IoOpcode.WRITE, IoOpcode.WRITE_ZEROES, IoOpcode.DATASET_MANAGEMENT}
        admin = _bitmap({int(opcode): _SUPPORTED for opcode in AdminOpcode})
        io = _bitmap({int(one): _SUPPORTED | (_CHANGES_BLOCKS if one in writers else 0) for one in IoOpcode})
        return (admin + io).ljust(4096, b"\0")

    def _feature_effects(self) -> bytes:
        return _bitmap(
            {
                feature: _SUPPORTED | (_SCOPE_NAMESPACE if of_namespace else _SCOPE_CONTROLLER)
                for feature, of_namespace in self._features.known().items()
            }
        )

    # --- counting ------------------------------------------------------------------------------------------------

    def count_read(self, size: int) -> None:
        """A command has read ``size`` bytes of a namespace."""
        self.reads += 1
        self.bytes_read += size

    def count_write(self, size: int) -> None:
        """A command has written ``size`` bytes of a namespace."""
        self.writes += 1
        self.bytes_written += size


def _bitmap(values: dict[int, int] | dict[LogPage, int]) -> bytes:
    """256 dwords, by index."""
    words = np.zeros(256, "<u4")
    pairs: Iterable[tuple[int, int]] = values.items()
    for index, value in pairs:
        words[index] = value
    return words.tobytes()
