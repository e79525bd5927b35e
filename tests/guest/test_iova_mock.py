"""Pins and unmap notification: the book against the kernel's own, iommufd's access objects from its selftest.

An access is what a driver inside the kernel has: it pins pages of an IOAS, is told before an area goes, and then lets
go of every pin there. An owner of the book with such a callback must meet with the same outcomes, step by step.

What differs on purpose, each with a test below:

1. Unmapping nothing: the kernel says ENOENT, the book 0 bytes, as type1 does.
2. A range that cuts a mapping: the kernel has unmapped what lies lower by then, the book has touched nothing.
3. Unpinning: the kernel wants exactly the range that was pinned, the book counts pages.
4. An owner that keeps its pins: the kernel tries 100 times, warns and leaves the area unusable (not tried here);
   the book raises PinnedError with the owner's name, and everything is as it was.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import random
import struct
from collections.abc import Iterator

import pytest
from ioctl_support import Memory
from test_ioctl_mock import ACCESS_PAGES, APERTURE, CREATE_ACCESS, Mock

from vfiopy import errors
from vfiopy.backend import Prot
from vfiopy.iova import MAPPER_IOAS, IovaSpace

PAGE = mmap.PAGESIZE
DESTROY_ACCESS_PAGES = 6
NEEDS_PIN_PAGES, WRITE = 1, 1
PAGES = 64
SEQUENCES = 200 if os.environ.get("VFIOPY_PROFILE") == "nightly" else 25
STEPS = 60

ERRNOS = {
    errors.OverlapError: errno.EEXIST,
    errors.NotMappedError: errno.ENOENT,
    errors.PermissionDeniedError: errno.EPERM,
}
"""What the kernel says where the book raises."""


class Access:
    """One access of the kernel and one owner of the book, with the same pins."""

    def __init__(self, pair: Pair, name: str) -> None:
        self.pair = pair
        answer = pair.mock.test(CREATE_ACCESS, pair.ioas, struct.pack("=II", 0, NEEDS_PIN_PAGES))
        self.fd: int = struct.unpack_from("=I", answer, 4)[0]
        self.owner = pair.book.add_owner(name, self.let_go)
        self.pins: list[tuple[int, int, int]] = []  # iova, size, the kernel's number of it
        self.told: list[tuple[int, int]] = []

    def let_go(self, iova: int, size: int) -> None:
        """What the kernel's access does when it is told."""
        self.told.append((iova, size))
        for pin in list(self.pins):
            if pin[0] < iova + size and iova < pin[0] + pin[1]:
                self.pins.remove(pin)
                self.pair.book.unpin(pin[0], pin[1], self.owner)

    def pin(self, iova: int, size: int, *, write: bool) -> int:
        """Pin on both sides; the errno of both."""
        payload = struct.pack("=II3Q", WRITE if write else 0, 0, iova, size, 0)
        kernel, number = 0, 0
        try:
            answer = self.pair.mock.test(ACCESS_PAGES, self.fd, payload)
            number = struct.unpack_from("=I", answer, 4 + 4)[0]
        except errors.VfioError as error:
            kernel = error.errno or 0
        book = _errno(self.pair.book.pin, iova, size, 2 if write else 1, self.owner)
        assert book == kernel, f"pin({iova:#x}, {size:#x}, write={write}): book {book}, kernel {kernel}"
        if not kernel:
            self.pins.append((iova, size, number))
        return kernel

    def unpin(self, index: int) -> None:
        """Take one pin back on both sides."""
        iova, size, number = self.pins.pop(index % len(self.pins))
        self.pair.mock.test(DESTROY_ACCESS_PAGES, self.fd, struct.pack("=I", number))
        self.pair.book.unpin(iova, size, self.owner)


class Pair:
    """An IOAS with accesses, and a book with owners (which maps into another IOAS)."""

    def __init__(self, mock: Mock, memory: Memory) -> None:
        self.mock, self.memory = mock, memory
        self.ioas = mock.ioas_alloc()
        self.book = IovaSpace("book")
        self.book.add_kernel_mapper(MAPPER_IOAS, mock.fileno(), mock.ioas_alloc())
        self.accesses = [Access(self, name) for name in ("first", "second")]

    def close(self) -> None:
        for access in self.accesses:
            os.close(access.fd)
            access.pins.clear()
        for _name, owner, _pins, iova, size in self.book.holders(0, (1 << 64) - 1):
            for page in range(iova, iova + size, PAGE):
                with contextlib.suppress(errors.UnpinError):
                    while True:
                        self.book.unpin(page, PAGE, owner)
        self.book.unmap_all()

    def map(self, iova: int, size: int, prot: Prot) -> int:
        """Map on both sides; the errno of both."""
        kernel = _errno(self._map_kernel, iova, size, prot)
        book = _errno(self.book.map, None, self.memory.address, size, int(prot), iova)
        assert book == kernel, f"map({iova:#x}, {size:#x}): book {book}, kernel {kernel}"
        return kernel

    def _map_kernel(self, iova: int, size: int, prot: Prot) -> None:
        self.mock.ioas_map(self.ioas, self.memory.address, size, prot, iova=iova)

    def unmap(self, iova: int, size: int) -> int:
        """Unmap on both sides where they are to agree; number of bytes."""
        kernel = self.mock.ioas_unmap(self.ioas, iova, size)
        book = self.book.unmap_range(iova, iova + size - 1)
        assert book == kernel
        return book


def _errno(call: object, *arguments: object) -> int:
    try:
        call(*arguments)  # type: ignore[operator]
    except errors.VfioError as error:
        return ERRNOS.get(type(error), error.errno or -1)
    return 0


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Mock.open("/dev/iommu") as mock, Memory(PAGES * PAGE) as memory:
        pair = Pair(mock, memory)
        yield pair
        pair.close()


def _step(pair: Pair, choose: random.Random) -> str:
    page = APERTURE + choose.randrange(PAGES) * PAGE
    size = choose.randint(1, 6) * PAGE
    what = choose.choice(["map", "map", "pin", "pin", "pin", "unpin", "unmap", "unmap many"])
    mappings = pair.book.mappings()
    access = choose.choice(pair.accesses)
    if what == "map":
        return f"map {pair.map(page, size, choose.choice([Prot.READ, Prot.WRITE, Prot.RW, Prot.RW]))}"
    if what == "pin":
        if mappings and choose.random() < 0.9:
            it = choose.choice(mappings)
            page = it.iova + choose.randrange(it.size // PAGE) * PAGE
        return f"pin {access.pin(page, size, write=choose.random() < 0.4)}"
    if what == "unpin" and access.pins:
        access.unpin(choose.randrange(100))
        return what
    if what == "unmap" and mappings:
        it = choose.choice(mappings)
        assert pair.unmap(it.iova, it.size) == it.size
        return what
    if what == "unmap many" and mappings:
        # Whole mappings and the holes between them: the first two differences are left out.
        start = choose.randrange(len(mappings))
        end = mappings[min(start + choose.randint(1, 3), len(mappings) - 1)]
        pair.unmap(mappings[start].iova, end.iova + end.size - mappings[start].iova)
        return what
    return "nothing"


def test_random_pins_and_unmaps_have_the_same_outcome() -> None:
    seen: set[str] = set()
    for seed in range(SEQUENCES):
        choose = random.Random(seed)
        with Mock.open("/dev/iommu") as mock, Memory(PAGES * PAGE) as memory:
            pair = Pair(mock, memory)
            for _ in range(STEPS):
                seen.add(_step(pair, choose))
            pair.book.verify()
            assert pair.book.stats()["pins"] == sum(size // PAGE for it in pair.accesses for _, size, _ in it.pins)
            pair.close()
    mapped = {"map 0", f"map {errno.EEXIST}", "unmap", "unmap many"}
    pinned = {"pin 0", f"pin {errno.ENOENT}", f"pin {errno.EPERM}", "unpin"}
    assert mapped | pinned <= seen


def test_owners_are_told_once_and_the_unmap_gets_through(pair: Pair) -> None:
    assert pair.map(APERTURE, 8 * PAGE, Prot.RW) == 0
    for access in pair.accesses:
        assert access.pin(APERTURE + PAGE, 2 * PAGE, write=True) == 0
        assert access.pin(APERTURE + 2 * PAGE, PAGE, write=False) == 0
    assert pair.unmap(APERTURE, 8 * PAGE) == 8 * PAGE
    assert [access.told for access in pair.accesses] == [[(APERTURE, 8 * PAGE)]] * 2
    assert [access.pins for access in pair.accesses] == [[], []]


def test_difference_1_unmapping_nothing(pair: Pair) -> None:
    with pytest.raises(errors.NotMappedError):
        pair.mock.ioas_unmap(pair.ioas, APERTURE, PAGE)
    assert pair.book.unmap_range(APERTURE, APERTURE + PAGE - 1) == 0


def test_difference_2_a_range_that_cuts(pair: Pair) -> None:
    for index in range(3):
        assert pair.map(APERTURE + 2 * index * PAGE, 2 * PAGE, Prot.RW) == 0
    with pytest.raises(errors.NotMappedError):
        pair.mock.ioas_unmap(pair.ioas, APERTURE, 5 * PAGE)
    with pytest.raises(errors.NotMappedError, match="cuts the mapping"):
        pair.book.unmap_range(APERTURE, APERTURE + 5 * PAGE - 1)
    # The book has all three; the kernel has lost the two lower ones.
    assert len(pair.book) == 3
    assert pair.mock.ioas_unmap(pair.ioas, 0, (1 << 64) - 1) == 2 * PAGE


def test_difference_3_unpinning_a_part(pair: Pair) -> None:
    assert pair.map(APERTURE, 4 * PAGE, Prot.RW) == 0
    access = pair.accesses[0]
    assert access.pin(APERTURE, 4 * PAGE, write=False) == 0
    pair.book.unpin(APERTURE, PAGE, access.owner)
    pair.book.unpin(APERTURE + PAGE, 3 * PAGE, access.owner)
    access.pins.clear()
    assert pair.unmap(APERTURE, 4 * PAGE) == 4 * PAGE  # the kernel's access lets go of its pin


def test_difference_4_an_owner_that_keeps_its_pins(pair: Pair) -> None:
    assert pair.map(APERTURE, 4 * PAGE, Prot.RW) == 0
    stubborn = pair.book.add_owner("stubborn")
    pair.book.pin(APERTURE, PAGE, 1, stubborn)
    with pytest.raises(errors.PinnedError, match="stubborn"):
        pair.book.unmap(APERTURE)
    pair.book.unpin(APERTURE, PAGE, stubborn)
    assert pair.unmap(APERTURE, 4 * PAGE) == 4 * PAGE
