from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiopy.errors import PciAddressError
from vfiopy.pci.address import PciAddress


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("0000:00:05.0", (0, 0, 5, 0)),
        ("00:05.0", (0, 0, 5, 0)),
        ("0001:FF:1f.7", (1, 0xFF, 0x1F, 7)),
        ("10000:e1:00.3", (0x10000, 0xE1, 0, 3)),
        (" 3:2.1\n", (0, 3, 2, 1)),
    ],
)
def test_texts_that_people_write(text: str, parts: tuple[int, int, int, int]) -> None:
    assert PciAddress.parse(text) == PciAddress(*parts)


addresses = st.builds(
    PciAddress, st.integers(0, 0xFFFF_FFFF), st.integers(0, 255), st.integers(0, 31), st.integers(0, 7)
)


@given(addresses)
def test_text_form_reads_back(address: PciAddress) -> None:
    assert PciAddress.parse(str(address)) == address
    assert PciAddress.parse(address) is address
    assert pickle.loads(pickle.dumps(address)) == address
    assert str(address) == f"{address.slot}.{address.function}"


@given(addresses, addresses)
def test_order_is_by_number(left: PciAddress, right: PciAddress) -> None:
    def numbers(one: PciAddress) -> tuple[int, int]:
        return one.domain, one.requester_id

    assert (left < right) == (numbers(left) < numbers(right))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("00:05", ("not a PCI address", "function number is missing", "00:05.0")),
        ("0000:00:05", ("function number is missing", "0000:00:05.0")),
        ("1b36:0010", ("vendor:device", "find(vendor=0x1b36, device=0x0010)")),
        ("nvme0", ("not a PCI address", "0000:00:05.0")),
        ("", ("''", "not a PCI address")),
        ("0000:00:20.0", ("device number 0x20 is out of range", "0x1f")),
        ("0000:00:05.8", ("function number 0x8", "hexadecimal")),
        ("0000:00:05.00", ("not a PCI address",)),
        ("0000:000:05.0", ("not a PCI address",)),
    ],
)
def test_what_is_wrong_is_said(text: str, words: tuple[str, ...]) -> None:
    with pytest.raises(PciAddressError) as caught:
        PciAddress.parse(text)
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)
