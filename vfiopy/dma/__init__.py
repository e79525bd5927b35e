"""Memory that devices reach: address spaces, mappings, buffers."""

from vfiopy.dma.buffer import HUGE_1G, HUGE_2M, DmaArray, allocate_pages
from vfiopy.dma.mapping import Mapping
from vfiopy.dma.memory import file_memory, memory_of
from vfiopy.dma.space import AddressSpace

__all__ = [
    "HUGE_1G",
    "HUGE_2M",
    "AddressSpace",
    "DmaArray",
    "Mapping",
    "allocate_pages",
    "file_memory",
    "memory_of",
]
