"""Physical Region Pages: how a command says where its data lies (NVM Express Base Specification 2.0, 4.1.1).

The first PRP may start inside a page; every other names a whole page. Two of them fit into a command; more go into a
list, and a list of more than one page ends each of its pages but the last with a pointer to the next. A DMA buffer is
contiguous in IOVA space, however its memory lies, so its PRPs are an arithmetic progression.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vfiopy.drivers.nvme.errors import TransferSizeError
from vfiopy.errors import AlignmentError

__all__ = ["ENTRY", "fill_prps", "list_pages"]

ENTRY = 8


def list_pages(size: int, page: int) -> int:
    """Return how many list pages a transfer of ``size`` bytes may need, wherever in a page it starts."""
    # The worst start leaves 4 bytes, one dword, in the first page.
    beyond_first = -(-(size - 4) // page)
    if beyond_first <= 1:
        return 0
    per_page = page // ENTRY
    return max(1, -(-(beyond_first - 1) // (per_page - 1)))


def fill_prps(iova: int, size: int, page: int, table: NDArray[np.uint64] | None, table_iova: int) -> tuple[int, int]:
    """Describe ``size`` bytes at ``iova``.

    Args:
        iova: first byte, a multiple of 4.
        size: bytes, more than 0.
        page: the controller's memory page size (CC.MPS), bytes.
        table: memory for the list, page-aligned and contiguous in IOVA space; None where none can be needed.
        table_iova: where the controller sees it.

    Returns:
        PRP1 and PRP2 of the command.

    Raises:
        AlignmentError: ``iova`` is not a multiple of 4.
        TransferSizeError: the table is too small.
    """
    if iova % 4:
        raise AlignmentError(
            f"data at IOVA {iova:#x} is not aligned to 4 bytes", hint="slice the buffer at a multiple of 4 bytes"
        )
    first = page - iova % page
    if size <= first:
        return iova, 0
    second = iova + first
    count = -(-(size - first) // page)
    if count == 1:
        return iova, second
    if table is None or list_pages(size, page) * (page // ENTRY) > table.size:
        raise TransferSizeError(f"{size} bytes need a longer PRP list than there is room for")
    _fill_list(table, table_iova, second, count, page)
    return iova, table_iova


def _fill_list(table: NDArray[np.uint64], table_iova: int, first: int, count: int, page: int) -> None:
    per_page = page // ENTRY
    entries: NDArray[Any] = np.arange(count, dtype=np.uint64) * np.uint64(page) + np.uint64(first)
    begin = done = 0
    while count - done > per_page:
        table[begin : begin + per_page - 1] = entries[done : done + per_page - 1]
        done += per_page - 1
        begin += per_page
        table[begin - 1] = table_iova + begin * ENTRY
    table[begin : begin + count - done] = entries[done:]
