"""The controller's registers: offsets, fields, and how a capability register reads.

Source: NVM Express Base Specification 2.0, 3.1.3 (Controller Properties); doorbells: NVM Express over PCIe Transport
Specification 1.0, 3.1.2. Offsets are bytes from the start of BAR 0.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ACQ",
    "AQA",
    "ASQ",
    "CAP",
    "CC",
    "CC_EN",
    "CC_SHN_MASK",
    "CC_SHN_NORMAL",
    "CMBLOC",
    "CMBMSC",
    "CMBSTS",
    "CMBSZ",
    "CRTO",
    "CSTS",
    "CSTS_CFS",
    "CSTS_RDY",
    "CSTS_SHST_BUSY",
    "CSTS_SHST_DONE",
    "CSTS_SHST_MASK",
    "CSTS_SHST_NONE",
    "DOORBELLS",
    "INTMC",
    "INTMS",
    "VS",
    "Capabilities",
    "configuration",
    "doorbell",
    "ready_timeout",
    "version_text",
]

CAP = 0x00  # 64 bits: 3.1.3.1
VS = 0x08  # 3.1.3.2
INTMS = 0x0C  # 3.1.3.3
INTMC = 0x10  # 3.1.3.4
CC = 0x14  # 3.1.3.5
CSTS = 0x1C  # 3.1.3.6
AQA = 0x24  # 3.1.3.8
ASQ = 0x28  # 64 bits: 3.1.3.9
ACQ = 0x30  # 64 bits: 3.1.3.10
CMBLOC = 0x38  # 3.1.3.11
CMBSZ = 0x3C  # 3.1.3.12
CMBMSC = 0x50  # 64 bits: 3.1.3.16
CMBSTS = 0x58  # 3.1.3.17
CRTO = 0x68  # Controller Ready Timeouts, since 2.0; only where CAP.CRMS is not 0
DOORBELLS = 0x1000

CC_EN = 1 << 0
CC_SHN_NORMAL = 1 << 14
CC_SHN_MASK = 3 << 14
_CC_CSS_SHIFT = 4
_CC_MPS_SHIFT = 7
_CC_IOSQES = 6 << 16  # 2**6 bytes per submission queue entry: the only size that there is
_CC_IOCQES = 4 << 20  # 2**4 bytes per completion queue entry

CSTS_RDY = 1 << 0
CSTS_CFS = 1 << 1
CSTS_SHST_MASK = 3 << 2
CSTS_SHST_NONE = 0 << 2
CSTS_SHST_BUSY = 1 << 2
CSTS_SHST_DONE = 2 << 2

# CAP.CSS and CC.CSS (3.1.3.1 and 3.1.3.5): which command sets a controller has, and which one it is told to use
_CAP_CSS_NVM = 1 << 0
_CAP_CSS_IOCS = 1 << 6
_CC_CSS_NVM = 0
_CC_CSS_IOCS = 6
_CC_CSS_ADMIN_ONLY = 7

_READY_UNIT = 0.5  # CAP.TO and CRTO count in 500 ms


def _bits(value: int, low: int, count: int) -> int:
    return value >> low & (1 << count) - 1


@dataclass(frozen=True, slots=True)
class Capabilities:
    """CAP, decoded (Base 2.0, 3.1.3.1).

    Attributes:
        raw: the register.
        queue_entries: most entries of an I/O queue (CAP.MQES + 1).
        contiguous_queues: queues must be contiguous (CAP.CQR). Ours always are.
        ready_timeout: seconds that enabling or disabling may take (CAP.TO).
        doorbell_stride: bytes from one doorbell to the next (CAP.DSTRD).
        subsystem_reset: the whole subsystem can be reset (CAP.NSSRS).
        command_sets: CAP.CSS as it is.
        page_min: smallest memory page, bytes (CAP.MPSMIN).
        page_max: largest memory page, bytes (CAP.MPSMAX).
        memory_buffer: there is a controller memory buffer (CAP.CMBS).
        persistent_region: there is a persistent memory region (CAP.PMRS).
        ready_modes: CAP.CRMS as it is; not 0 where CRTO exists.
    """

    raw: int
    queue_entries: int
    contiguous_queues: bool
    ready_timeout: float
    doorbell_stride: int
    subsystem_reset: bool
    command_sets: int
    page_min: int
    page_max: int
    memory_buffer: bool
    persistent_region: bool
    ready_modes: int

    @classmethod
    def decode(cls, raw: int) -> Capabilities:
        """Decode the 64 bits of CAP."""
        return cls(
            raw=raw,
            queue_entries=_bits(raw, 0, 16) + 1,
            contiguous_queues=bool(_bits(raw, 16, 1)),
            ready_timeout=_bits(raw, 24, 8) * _READY_UNIT,
            doorbell_stride=4 << _bits(raw, 32, 4),
            subsystem_reset=bool(_bits(raw, 36, 1)),
            command_sets=_bits(raw, 37, 8),
            page_min=1 << 12 + _bits(raw, 48, 4),
            page_max=1 << 12 + _bits(raw, 52, 4),
            persistent_region=bool(_bits(raw, 56, 1)),
            memory_buffer=bool(_bits(raw, 57, 1)),
            ready_modes=_bits(raw, 59, 2),
        )

    @property
    def has_nvm_commands(self) -> bool:
        """Whether the NVM command set (read, write, flush) can be enabled."""
        return bool(self.command_sets & (_CAP_CSS_NVM | _CAP_CSS_IOCS))


def ready_timeout(capabilities: Capabilities, crto: int) -> float:
    """Return how many seconds a change of CC.EN may take: CAP.TO, or CRTO.CRWMT where the controller has it."""
    if not capabilities.ready_modes:
        return max(capabilities.ready_timeout, _READY_UNIT)
    return max(capabilities.ready_timeout, _bits(crto, 0, 16) * _READY_UNIT, _READY_UNIT)


def configuration(capabilities: Capabilities, page_size: int) -> int:
    """Return CC with EN clear: command set, memory page size, entry sizes, round-robin arbitration."""
    if capabilities.command_sets & _CAP_CSS_NVM:
        command_set = _CC_CSS_NVM
    elif capabilities.command_sets & _CAP_CSS_IOCS:
        command_set = _CC_CSS_IOCS
    else:
        command_set = _CC_CSS_ADMIN_ONLY
    page = page_size.bit_length() - 1 - 12
    return command_set << _CC_CSS_SHIFT | page << _CC_MPS_SHIFT | _CC_IOSQES | _CC_IOCQES


def doorbell(queue: int, stride: int, *, completion: bool) -> int:
    """Return the offset of a queue's doorbell: submission tail, or completion head."""
    return DOORBELLS + (2 * queue + completion) * stride


def version_text(version: int) -> str:
    """Return ``"1.4"`` or ``"1.2.1"`` for what VS or the identify data hold (Base 2.0, 3.1.3.2)."""
    major, minor, tertiary = version >> 16, version >> 8 & 0xFF, version & 0xFF
    return f"{major}.{minor}.{tertiary}" if tertiary else f"{major}.{minor}"
