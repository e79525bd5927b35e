"""One range of IOVAs and the memory behind it.

:class:`Mapping` is native (``native/ext/dma_mapping.c``): one is made and used up for every map and unmap.
"""

from vfiopy._native import Mapping

__all__ = ["Mapping"]
