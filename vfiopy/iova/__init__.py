"""The IOVA space: interval tree, allocator, pins with counts and unmap notification, in C (``native/iova``).

The names here are the typed face of it. ``vfiopy.dma`` is what most programs use.
"""

from vfiopy._native import (
    KIND_FILE,
    KIND_HOST,
    KIND_MMIO,
    KIND_REMOTE,
    MAPPER_IOAS,
    MAPPER_TYPE1,
    STATE_CLOSING,
    STATE_LIVE,
    STATE_UNKNOWN,
    STATE_UNMAPPING,
    IovaClosing,
    IovaMapping,
    IovaReservation,
    IovaUnmapping,
)
from vfiopy.iova.accounting import Charges, charges
from vfiopy.iova.closing import Leak, leaked_memory
from vfiopy.iova.picture import Stretch, stretches
from vfiopy.iova.space import IovaSpace

__all__ = [
    "KIND_FILE",
    "KIND_HOST",
    "KIND_MMIO",
    "KIND_REMOTE",
    "MAPPER_IOAS",
    "MAPPER_TYPE1",
    "STATE_CLOSING",
    "STATE_LIVE",
    "STATE_UNKNOWN",
    "STATE_UNMAPPING",
    "Charges",
    "IovaClosing",
    "IovaMapping",
    "IovaReservation",
    "IovaSpace",
    "IovaUnmapping",
    "Leak",
    "Stretch",
    "charges",
    "leaked_memory",
    "stretches",
]
