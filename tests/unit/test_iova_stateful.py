"""Random sequences of operations on the native book and on its model; after each they must agree.

``VFIOPY_PROFILE=nightly`` runs twenty times as many.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from iova_kernel import FakeKernel, forget_kernel
from iova_model import CLOSING, RESERVED, TOP, UNKNOWN, Model, Refused
from iova_steps import NumberedSteps

from vfiopy import _native, errors
from vfiopy.iova import MAPPER_IOAS, MAPPER_TYPE1, IovaSpace

NIGHTLY = os.environ.get("VFIOPY_PROFILE") == "nightly"
PAGE = 4096
HERE = 0x7F00_0000_0000
MOST = 14
"""Mappings at a time: few, so that they meet."""

GEOMETRIES = [
    ([(0x1000, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)], 0x4020_1000, 0),
    ([(0, TOP)], 0x1000, 0),
    ([(0x1000, 0x2_4FFF), (0x2_8000, 0x3_FFFF)], 0x1_1000, 10),
    ([(0, 0x1_FFFF), (TOP - 0x1_FFFF, TOP)], 0x2_5000, 0),
    ([(0x4000, (1 << 39) - 1)], 0x20_1000, 0),
]
COARSE = ([(0x4000, (1 << 39) - 1)], 0x20_4000, 0)
"""Ranges, page sizes (small "big" pages let a short test use them), number of mappings."""

counts = st.integers(0, 15)
pages = st.integers(0, 0x48)
iovas = st.one_of(
    pages.map(lambda page: page * PAGE),
    pages.map(lambda page: TOP + 1 - (page + 1) * PAGE),
    st.sampled_from([0xFEDF_F000, 0xFEE0_0000, 0xFEF0_0000, (1 << 39) - PAGE, 1 << 39, 0x1001]),
)
errnos = st.sampled_from([errno.ENOMEM, errno.EBUSY, errno.EINVAL, errno.ENOENT, errno.EFAULT])


pytestmark = pytest.mark.timeout(900)


class Owner:
    """An owner of pins, once for the native book and once for the model, that answers unmap callbacks in its way."""

    def __init__(self, manner: str) -> None:
        self.manner = manner
        self.unpin: Callable[[int, int], None]
        self.pinned: list[tuple[int, int]] = []

    def __call__(self, iova: int, size: int) -> None:
        if self.manner == "keeps":
            return
        for held in list(self.pinned):
            if held[0] < iova + size and iova < held[0] + held[1]:
                self.pinned.remove(held)
                # Random unpins may have taken some of it before.
                with contextlib.suppress(Refused, errors.UnpinError, errors.NotMappedError):
                    self.unpin(*held)


class Book(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.model_kernel = FakeKernel(), FakeKernel()
        self.native = IovaSpace("native")
        self.steps = NumberedSteps(self.native)
        self.model = Model(self.model_kernel)
        self.tokens: list[int] = []
        self.owners: dict[int, tuple[Owner | None, Owner | None]] = {0: (None, None)}
        self.serial = 0

    def both(self, name: str, *arguments: object) -> Any:
        """Do the same on both sides; the outcome must be the same."""
        expected, wanted = _outcome(getattr(self.model, name), *arguments)
        native_name = {"remove_mapper": "remove_kernel_mapper"}.get(name, name)
        side = self.steps if hasattr(self.steps, name) else self.native
        result, raised = _outcome(getattr(side, native_name), *arguments)
        kind = wanted.kind if isinstance(wanted, Refused) else type(None)
        assert type(raised) is kind, f"{name}{arguments}: native {raised or result!r}, model {wanted or expected!r}"
        if isinstance(result, list):
            result = [_row(it) for it in result]
        assert result == expected, f"{name}{arguments}"
        return result if raised is None else kind

    def some(self, number: int) -> int:
        """An IOVA that means something: of a mapping if there is one."""
        if not self.model.mapped:
            return number * PAGE
        return self.model.mapped[number % len(self.model.mapped)].iova

    # --- geometry ------------------------------------------------------------------------------------------------

    @initialize(which=st.integers(0, len(GEOMETRIES) - 1), mappers=st.integers(0, 3))
    def start(self, which: int, mappers: int) -> None:
        self.both("set_usable", *GEOMETRIES[which])
        for number in range(mappers):
            self.add_mapper(number)
        for number in range(5):
            self.map_anywhere(number + 1, 3 * number, 7 * number)
        self.add_owner("releases")

    @rule(which=st.sampled_from([*GEOMETRIES, COARSE]))
    def set_usable(self, which: tuple[list[tuple[int, int]], int, int]) -> None:
        self.both("set_usable", *which)

    @precondition(lambda self: len(self.model.excluded) < 3)
    @rule(first=iovas, size=st.integers(1, 5))
    def exclude(self, first: int, size: int) -> None:
        self.both("exclude", first, min(first + size * PAGE - 1, TOP))

    @rule(index=counts, first=iovas)
    def include(self, index: int, first: int) -> None:
        if self.model.excluded:
            self.both("include", *self.model.excluded[index % len(self.model.excluded)])
        else:
            self.both("include", first, first)

    @rule(first=iovas, size=st.integers(0, 8))
    def set_transient(self, first: int, size: int) -> None:
        if size == 0:
            self.model.set_transient(None)
            self.native.set_transient()
            return
        window = (first, min(first + size * PAGE - 1, TOP))
        try:
            self.model.set_transient(window)
        except Refused:
            try:
                self.native.set_transient(*window)
            except errors.IovaRangeError:
                return
            raise AssertionError(window) from None
        self.native.set_transient(*window)

    # --- mapping -------------------------------------------------------------------------------------------------

    def request(self, size: int, where: int, iova: int, more: int) -> tuple[object, ...]:
        self.serial += 1
        kind, fd, offset = [(0, -1, 0), (0, -1, 0), (1, 9, PAGE * 4), (2, 8, 0), (3, -1, 0)][more % 5]
        limit = [TOP, TOP, 0xF_FFFF, TOP, 0x1_FFFF][more // 5 % 5]
        align = [0, 0, 0x4000, 0, 0x8000, 0, 0, 0x3000][more // 25 % 8]
        transient = more // 100 % 2 == 1
        prot = 3 if more % 3 else 1
        address = HERE + where * PAGE if kind != 2 else 0
        return (f"memory {self.serial}", address, size, prot, iova, limit, align, kind, fd, offset, transient)

    @precondition(lambda self: len(self.model.mapped) < MOST)
    @rule(size=st.sampled_from([1, 1, 2, 3, 4, 5, 8, 16, 17]), where=pages, more=st.integers(0, 199))
    def map_anywhere(self, size: int, where: int, more: int) -> None:
        self.both("map", *self.request(size * PAGE, where, -1, more))

    @precondition(lambda self: len(self.model.mapped) < MOST)
    @rule(size=st.integers(0, 6), iova=iovas, more=st.integers(0, 99), odd=st.integers(0, 20))
    def map_fixed(self, size: int, iova: int, more: int, odd: int) -> None:
        self.both("map", *self.request(size * PAGE + (odd == 0), size, iova, more))

    @precondition(lambda self: len(self.model.mapped) < MOST)
    @rule(size=st.integers(1, 4), iova=st.one_of(st.just(-1), iovas), more=st.integers(0, 9))
    def begin_map(self, size: int, iova: int, more: int) -> None:
        self.both("begin_map", *self.request(size * PAGE, size, iova, more))

    @precondition(lambda self: any(it.state == RESERVED for it in self.model.mapped))
    @rule(number=counts, commit=st.booleans())
    def end_map(self, number: int, commit: bool) -> None:
        begun = [it.iova for it in self.model.mapped if it.state == RESERVED]
        self.both("commit_map" if commit else "abort_map", begun[number % len(begun)])

    # --- unmapping -----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.model.mapped)
    @rule(number=counts, odd=st.integers(0, 8))
    def unmap(self, number: int, odd: int) -> None:
        self.both("unmap", self.some(number) + (PAGE if odd == 0 else 0))

    def bounds(self, number: int, first: int, size: int, exact: bool) -> tuple[int, int]:
        if exact and self.model.mapped:
            mapped = self.model.mapped
            last = mapped[min(number % len(mapped) + size % 3, len(mapped) - 1)].last
            return self.some(number), last
        return first, min(first + (size + 1) * PAGE - 1, TOP)

    @rule(number=counts, first=iovas, size=st.integers(0, 3), exact=st.booleans())
    def unmap_range(self, number: int, first: int, size: int, exact: bool) -> None:
        self.both("unmap_range", *self.bounds(number, first, size, exact))

    @precondition(lambda self: len(self.model.mapped) > 8)
    @rule()
    def unmap_all(self) -> None:
        self.both("unmap_range", 0, TOP)

    @precondition(lambda self: self.model.mapped)
    @rule(number=counts, first=iovas, size=counts, exact=st.sampled_from([True, True, False]))
    def begin_unmap(self, number: int, first: int, size: int, exact: bool) -> None:
        self.both("begin_unmap", *self.bounds(number, first, size, exact))

    @precondition(lambda self: self.model.begun)
    @rule(number=counts, finish=st.booleans())
    def end_unmap(self, number: int, finish: bool) -> None:
        self.both("finish_unmap" if finish else "abort_unmap", number % len(self.model.begun))

    @precondition(lambda self: self.serial % 8 == 0 or any(it.state == UNKNOWN for it in self.model.mapped))
    @rule()
    def resync(self) -> None:
        self.both("resync")

    # --- mappers and failures ------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.tokens) < 4)
    @rule(number=counts)
    def add_mapper(self, number: int) -> None:
        self.serial += 1
        ioas, fd = number % 2 == 0, 100 + self.serial
        kind = MAPPER_IOAS if ioas else MAPPER_TYPE1
        token = self.native.add_kernel_mapper(kind, fd, 1, ioctl=self.kernel.address)
        self.model.add_mapper(token, fd, ioas=ioas)
        self.tokens.append(token)

    @precondition(lambda self: self.tokens)
    @rule(number=counts, what=st.sampled_from(["replay", "replay", "drop", "remove_mapper"]))
    def change_mapper(self, number: int, what: str) -> None:
        token = self.tokens[number % len(self.tokens)]
        self.both(what, token)
        if what == "remove_mapper":
            self.tokens.remove(token)

    @precondition(lambda self: self.tokens)
    @rule(first=st.integers(1, 9), rest=st.booleans(), number=errnos)
    def next_calls_fail(self, first: int, rest: bool, number: int) -> None:
        for kernel in (self.kernel, self.model_kernel):
            kernel.fail(first, first + 40 if rest else first, number)

    @precondition(lambda self: self.kernel.fail_to > self.kernel.calls)
    @rule()
    def calls_work_again(self) -> None:
        for kernel in (self.kernel, self.model_kernel):
            kernel.fail(0, -1, 0)

    # --- pins ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.owners) < 5)
    @rule(manner=st.sampled_from(["releases", "keeps"]))
    def add_owner(self, manner: str) -> None:
        ours, theirs = Owner(manner), Owner(manner)
        owner = self.native.add_owner(f"{manner} {len(self.owners)}", ours)
        ours.unpin = lambda iova, size: self.native.unpin(iova, size, owner)
        theirs.unpin = lambda iova, size: self.model.unpin(iova, size, owner)
        self.model.owners[owner] = theirs
        self.owners[owner] = ours, theirs

    def owner_of(self, number: int) -> int:
        return list(self.owners)[number % len(self.owners)] if number < 15 else 77

    @precondition(lambda self: self.model.mapped)
    @rule(number=counts, first=st.integers(0, 6), size=st.integers(1, 6), prot=st.integers(1, 3), by=counts, odd=counts)
    def pin(self, number: int, first: int, size: int, prot: int, by: int, odd: int) -> None:
        owner = self.owner_of(by)
        iova, length = self.some(number) + max(first - 4, 0) * PAGE, size * PAGE if odd else size * PAGE - 100
        if iova + length > TOP:
            return
        if self.both("pin", iova, length, prot if odd % 2 else 1, owner, odd % 4 == 1) is None:
            for side in self.owners[owner]:
                if side is not None:
                    side.pinned.append((iova, length))

    @precondition(lambda self: any(it.held for it in self.model.mapped))
    @rule(number=counts, first=st.integers(0, 6), size=st.integers(1, 4), by=counts)
    def unpin_random(self, number: int, first: int, size: int, by: int) -> None:
        iova = self.some(number) + max(first - 4, 0) * PAGE
        if iova + size * PAGE <= TOP:
            self.both("unpin", iova, size * PAGE, self.owner_of(by))

    @precondition(lambda self: any(it.held for it in self.model.mapped))
    @rule(number=counts, by=counts)
    def unpin(self, number: int, by: int) -> None:
        owner = list(self.owners)[by % len(self.owners)]
        ours, theirs = self.owners[owner]
        if ours is not None and theirs is not None and ours.pinned:
            held = ours.pinned.pop(number % len(ours.pinned))
            theirs.pinned.remove(held)
            self.both("unpin", *held, owner)

    # --- looking -------------------------------------------------------------------------------------------------

    @rule(iova=iovas, number=counts, where=pages, size=st.integers(1, 9 * PAGE), prot=st.integers(1, 3))
    def look(self, iova: int, number: int, where: int, size: int, prot: int) -> None:
        for at in (iova, self.some(number)):
            rows = self.model.rows(at, at)
            found = self.native.find(at)
            assert (None if found is None else _row(found)) == (rows[0] if rows else None)
            assert (at in self.native) == bool(rows)
        last = min(iova + size - 1, TOP)
        assert [_row(it) for it in self.native.overlapping(iova, last)] == self.model.rows(iova, last)
        address = HERE + where * PAGE
        native = sorted(map(repr, (_row(it) for it in self.native.by_address(address, size))))
        assert native == sorted(map(repr, self.model.by_address(address, size)))
        at = self.some(number)
        if at + size <= TOP:
            self.both("check", at, size, prot)

    def teardown(self) -> None:
        forget_kernel(self.native)

    @invariant()
    def agree(self) -> None:
        self.native.verify()
        model = self.model
        assert [_row(it) for it in self.native.mappings()] == model.rows()
        assert self.native.free_ranges() == model.free_ranges()
        assert self.kernel.tables == self.model_kernel.tables
        assert self.kernel.calls == self.model_kernel.calls
        stats = _native.IovaSpace.stats(self.native)
        assert stats["mappings"] == len(model.mapped)
        assert stats["pins"] == sum(it.pins.total() for it in model.mapped)
        assert stats["pinned_pages"] == sum(len(it.pins) for it in model.mapped)
        held = sorted((owner, it.iova, pins) for it in model.mapped for owner, pins in it.held.items())
        holders = self.native.holders(0, TOP)
        assert sorted((owner, iova, pins) for _name, owner, pins, iova, _size in holders) == held
        assert not any(it.state == CLOSING for it in model.mapped)


def _outcome(call: Callable[..., Any], *arguments: object) -> tuple[Any, Exception | None]:
    try:
        return call(*arguments), None
    except (errors.VfiopyError, ValueError, Refused) as error:
        return None, error


def _row(it: Any) -> tuple[object, ...]:
    return (*it, it.fd, it.fd_offset, it.pins) if hasattr(it, "fd_offset") else it


Book.TestCase.settings = settings(
    max_examples=20_000 if NIGHTLY else 1_000,
    stateful_step_count=60 if NIGHTLY else 40,
    deadline=None,
    derandomize=not NIGHTLY,
    suppress_health_check=[HealthCheck.too_slow],
)
TestBook = Book.TestCase
