"""The numbers of commands, and of what some of them ask for.

Sources: NVM Express Base Specification 2.0, 5 (admin commands), 7 (I/O commands); NVM Command Set Specification 1.0,
3.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

__all__ = ["ALL_NAMESPACES", "AdminOpcode", "Cns", "Feature", "IoOpcode", "LogPage"]

ALL_NAMESPACES: Final = 0xFFFF_FFFF
"""The namespace identifier that means every one (Base 2.0, 3.2.1.2)."""


class AdminOpcode(IntEnum):
    """Admin commands (Base 2.0, figure 138)."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    DOORBELL_BUFFER_CONFIG = 0x7C


class IoOpcode(IntEnum):
    """I/O commands of the NVM command set (NVM 1.0, 3)."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C


class Cns(IntEnum):
    """What Identify is asked for (Base 2.0, 5.17)."""

    NAMESPACE = 0x00
    CONTROLLER = 0x01
    ACTIVE_NAMESPACES = 0x02
    NAMESPACE_DESCRIPTORS = 0x03
    NAMESPACE_OF_SET = 0x05
    CONTROLLER_OF_SET = 0x06
    ACTIVE_NAMESPACES_OF_SET = 0x07
    NAMESPACE_OF_ANY_SET = 0x08
    ALLOCATED_NAMESPACES = 0x10
    ALLOCATED_NAMESPACE = 0x11
    CONTROLLERS_OF_NAMESPACE = 0x12
    CONTROLLERS = 0x13
    COMMAND_SETS = 0x1C


class Feature(IntEnum):
    """Feature identifiers (Base 2.0, 5.27.1)."""

    ARBITRATION = 0x01
    POWER_MANAGEMENT = 0x02
    TEMPERATURE_THRESHOLD = 0x04
    ERROR_RECOVERY = 0x05
    VOLATILE_WRITE_CACHE = 0x06
    NUMBER_OF_QUEUES = 0x07
    INTERRUPT_COALESCING = 0x08
    INTERRUPT_VECTOR = 0x09
    WRITE_ATOMICITY = 0x0A
    ASYNC_EVENTS = 0x0B
    TIMESTAMP = 0x0E
    COMMAND_SET_PROFILE = 0x19


class LogPage(IntEnum):
    """Log page identifiers (Base 2.0, 5.16)."""

    SUPPORTED = 0x00
    ERRORS = 0x01
    SMART = 0x02
    FIRMWARE = 0x03
    CHANGED_NAMESPACES = 0x04
    COMMAND_EFFECTS = 0x05
    FEATURE_EFFECTS = 0x12
