"""PRP lists: whatever the size and the start, the pages that they name are the buffer, in order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiopy.drivers.nvme import TransferSizeError
from vfiopy.drivers.nvme.prp import ENTRY, fill_prps, list_pages
from vfiopy.errors import AlignmentError

TABLE_IOVA = 0x7000_0000


def walk(prp1: int, prp2: int, size: int, page: int, table: np.ndarray) -> list[tuple[int, int]]:
    """What a controller makes of it (NVM Express Base 2.0, 4.1.1): pieces of (iova, bytes)."""
    pieces = [(prp1, min(size, page - prp1 % page))]
    left = size - pieces[0][1]
    if not left:
        assert prp2 == 0
        return pieces
    if left <= page:
        assert prp2 % page == 0
        return [*pieces, (prp2, left)]
    at = prp2
    while left:
        last_in_page = at % page == page - ENTRY
        index, rest = divmod(at - TABLE_IOVA, ENTRY)
        assert not rest
        value = int(table[index])
        if last_in_page and left > page:
            assert value % page == 0
            at = value
            continue
        assert value % page == 0
        pieces.append((value, min(left, page)))
        left -= pieces[-1][1]
        at += ENTRY
    return pieces


@given(
    page_shift=st.sampled_from([12, 13, 16]),
    start=st.integers(0, 1 << 14).map(lambda n: 0x1_0000_0000 + 4 * n),
    dwords=st.one_of(st.integers(1, 4096), st.integers(1, 3 << 20)),
)
def test_the_pages_are_the_buffer(page_shift: int, start: int, dwords: int) -> None:
    page, size = 1 << page_shift, 4 * dwords
    entries = list_pages(size, page) * (page // ENTRY)
    table = np.full(entries + 1, 0xDEAD, np.uint64)
    prp1, prp2 = fill_prps(start, size, page, table[:entries] if entries else None, TABLE_IOVA)
    pieces = walk(prp1, prp2, size, page, table)
    at = start
    for iova, length in pieces:
        assert iova == at
        at += length
    assert at == start + size
    assert table[entries] == 0xDEAD, "the list is longer than list_pages() says"


@pytest.mark.parametrize(
    ("size", "pages"),
    [
        (4, 0),
        (4096, 0),
        (4100, 0),  # the worst start leaves 4 bytes in the first page: two pages in all
        (4104, 1),
        (8192, 1),
        (512 * 4096, 1),
        (512 * 4096 + 4, 1),
        (512 * 4096 + 8, 2),
        (1023 * 4096, 2),
        (1023 * 4096 + 8, 3),
    ],
)
def test_list_pages_at_its_edges(size: int, pages: int) -> None:
    assert list_pages(size, 4096) == pages


@given(offset=st.integers(0, 1023).map(lambda n: 4 * n), pages=st.integers(1, 1600))
def test_list_pages_is_enough_and_not_too_much(offset: int, pages: int) -> None:
    size = pages * 4096
    beyond = -(-(size - (4096 - offset)) // 4096)
    entries = 0 if beyond <= 1 else beyond
    used = 0
    while entries > 512:
        used, entries = used + 1, entries - 511
    used += bool(entries)
    assert used <= list_pages(size, 4096) <= used + 1


def test_one_page_needs_one_prp() -> None:
    assert fill_prps(0x5000, 4096, 4096, None, 0) == (0x5000, 0)
    assert fill_prps(0x5FFC, 4, 4096, None, 0) == (0x5FFC, 0)


def test_two_pages_need_no_list() -> None:
    assert fill_prps(0x5800, 4096, 4096, None, 0) == (0x5800, 0x6000)
    assert fill_prps(0x5000, 8192, 4096, None, 0) == (0x5000, 0x6000)


def test_misaligned_data_is_refused() -> None:
    with pytest.raises(AlignmentError, match="not aligned to 4 bytes\n  hint: slice the buffer at a multiple of 4"):
        fill_prps(0x5002, 512, 4096, None, 0)


def test_a_list_without_room_is_refused() -> None:
    with pytest.raises(TransferSizeError, match="longer PRP list than there is room for"):
        fill_prps(0x5000, 3 * 4096, 4096, None, 0)
    with pytest.raises(TransferSizeError):
        fill_prps(0x5000, 600 * 4096, 4096, np.zeros(512, np.uint64), TABLE_IOVA)
