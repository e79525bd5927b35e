"""The Advanced Error Reporting capability (PCI Express Base 6.0, 7.8.4)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag

from vfiopy.pci.fields import Body, ExtendedCapability, bits

__all__ = ["AdvancedErrorReporting", "CorrectableError", "UncorrectableError", "decode_aer"]


class UncorrectableError(IntFlag):
    """Bits of the uncorrectable error registers (7.8.4.2)."""

    DATA_LINK_PROTOCOL = 1 << 4
    SURPRISE_DOWN = 1 << 5
    POISONED_TLP = 1 << 12
    FLOW_CONTROL_PROTOCOL = 1 << 13
    COMPLETION_TIMEOUT = 1 << 14
    COMPLETER_ABORT = 1 << 15
    UNEXPECTED_COMPLETION = 1 << 16
    RECEIVER_OVERFLOW = 1 << 17
    MALFORMED_TLP = 1 << 18
    ECRC = 1 << 19
    UNSUPPORTED_REQUEST = 1 << 20
    ACS_VIOLATION = 1 << 21
    INTERNAL = 1 << 22
    MC_BLOCKED_TLP = 1 << 23
    ATOMIC_EGRESS_BLOCKED = 1 << 24
    TLP_PREFIX_BLOCKED = 1 << 25
    POISONED_EGRESS_BLOCKED = 1 << 26
    DMWR_EGRESS_BLOCKED = 1 << 27
    IDE_CHECK = 1 << 28
    MISROUTED_IDE = 1 << 29
    PCRC_CHECK = 1 << 30
    TRANSLATION_EGRESS_BLOCKED = 1 << 31


class CorrectableError(IntFlag):
    """Bits of the correctable error registers (7.8.4.5)."""

    RECEIVER = 1 << 0
    BAD_TLP = 1 << 6
    BAD_DLLP = 1 << 7
    REPLAY_NUMBER_ROLLOVER = 1 << 8
    REPLAY_TIMER_TIMEOUT = 1 << 12
    ADVISORY_NON_FATAL = 1 << 13
    INTERNAL = 1 << 14
    HEADER_LOG_OVERFLOW = 1 << 15


@dataclass(frozen=True, slots=True)
class AdvancedErrorReporting(ExtendedCapability):
    """Advanced error reporting.

    Attributes:
        uncorrectable: uncorrectable errors seen.
        uncorrectable_mask: those that are not reported.
        fatal: those that count as fatal.
        correctable: correctable errors seen.
        correctable_mask: those that are not reported.
        first_error: bit number of the uncorrectable error that the header log belongs to.
        ecrc_generation: end-to-end CRCs are sent.
        ecrc_check: end-to-end CRCs are checked.
        header_log: the header of the TLP that the first error was seen in, 16 bytes.
    """

    uncorrectable: UncorrectableError
    uncorrectable_mask: UncorrectableError
    fatal: UncorrectableError
    correctable: CorrectableError
    correctable_mask: CorrectableError
    first_error: int
    ecrc_generation: bool
    ecrc_check: bool
    header_log: bytes


def decode_aer(body: Body, id_: int, version: int, name: str) -> AdvancedErrorReporting:
    """Decode the capability that starts at ``body``."""
    control = body.u32(0x18)
    return AdvancedErrorReporting(
        id_,
        body.offset,
        version,
        name,
        uncorrectable=UncorrectableError(body.u32(0x04)),
        uncorrectable_mask=UncorrectableError(body.u32(0x08)),
        fatal=UncorrectableError(body.u32(0x0C)),
        correctable=CorrectableError(body.u32(0x10)),
        correctable_mask=CorrectableError(body.u32(0x14)),
        first_error=bits(control, 4, 0),
        ecrc_generation=bool(control & 1 << 6),
        ecrc_check=bool(control & 1 << 8),
        header_log=body.bytes(0x1C, 16),
    )
