"""IovaClosing when calls come from where they should not: callbacks inside a call, several threads, the wrong order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from iova_kernel import FakeKernel

from vfiopy import errors
from vfiopy.iova import MAPPER_TYPE1, STATE_LIVE, IovaSpace

PAGE = 4096
HERE = 0x7F00_0000_0000


@pytest.fixture
def space() -> IovaSpace:
    book = IovaSpace("test")
    book.set_usable([(0x1000, (1 << 39) - 1)], 0x1000)
    book.map("a", HERE, 4 * PAGE, 3, iova=0x10000)
    return book


def test_ready_is_refused_inside_a_callback_and_the_outer_call_goes_on(space: IovaSpace) -> None:
    refusals: list[errors.StateError] = []

    def let_go(iova: int, size: int) -> None:
        space.unpin(iova, PAGE, owner)
        for call in (closing.ready, closing.finish, closing.raise_pinned):
            with pytest.raises(errors.StateError, match="another call of this unmap is under way") as info:
                call()
            refusals.append(info.value)

    owner = space.add_owner("nic", let_go)
    space.pin(0x10000, PAGE, 1, owner)
    closing = space.closing(0x10000, 0x13FFF)
    assert closing.ready()
    assert len(refusals) == 3
    assert closing.finish() == 4 * PAGE
    space.verify()


def test_a_callback_may_give_up(space: IovaSpace) -> None:
    told: list[str] = []

    def give_up(iova: int, size: int) -> None:
        told.append("nic")
        closing.give_up()

    owner = space.add_owner("nic", give_up)
    space.pin(0x10000, PAGE, 1, owner)
    closing = space.closing(0x10000, 0x13FFF)
    with pytest.raises(errors.StateError, match="this unmap is over"):
        closing.ready()
    assert told == ["nic"]
    with pytest.raises(errors.StateError, match="this unmap is over"):
        closing.fileno()
    assert [it.state for it in space.mappings()] == [STATE_LIVE]
    space.pin(0x10000, PAGE, 1, owner)
    space.verify()


def test_raise_pinned_after_ready_changes_nothing(space: IovaSpace) -> None:
    closing = space.closing(0x10000, 0x13FFF)
    assert closing.ready()
    with pytest.raises(errors.StateError, match="no pin is in the way"):
        closing.raise_pinned()
    assert closing.ready()
    closing.give_up()
    assert [it.state for it in space.mappings()] == [STATE_LIVE]
    assert space.unmap(0x10000) == 4 * PAGE


def test_a_pin_that_goes_before_its_owner_is_named(space: IovaSpace) -> None:
    space.pin(0x10000, PAGE, 1)
    closing = space.closing(0x10000, 0x13FFF)
    assert not closing.ready()
    space.unpin(0x10000, PAGE)
    with pytest.raises(errors.PinnedError, match="the last pin has just gone; try again"):
        closing.raise_pinned()
    assert space.unmap(0x10000) == 4 * PAGE


class SlowKernel(FakeKernel):
    """Unmaps only once it is let."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inside = threading.Event()
        self.go_on = threading.Event()

    def unmap(self, fd: int, iova: int, size: int, *, ioas: bool) -> tuple[int, int]:
        self.inside.set()
        assert self.go_on.wait(10)
        return super().unmap(fd, iova, size, ioas=ioas)


def test_one_thread_finishes_and_nobody_comes_in_between() -> None:
    kernel = SlowKernel()
    space = IovaSpace("test")
    space.add_kernel_mapper(MAPPER_TYPE1, 3, ioctl=kernel.address)
    for index in range(4):
        space.map(index, HERE, PAGE, 3, iova=0x10000 + index * PAGE)
    closing = space.closing(0x10000, 0x13FFF)
    assert closing.ready()
    answers: list[object] = []

    def run(call: Callable[[], object]) -> None:
        try:
            answers.append(call())
        except errors.StateError as error:
            answers.append(str(error))

    first = threading.Thread(target=run, args=(closing.finish,))
    first.start()
    assert kernel.inside.wait(10)
    for call in (closing.finish, closing.ready, closing.raise_pinned):
        run(call)
    closing.give_up()  # too late, and no harm
    kernel.go_on.set()
    first.join()
    assert len(answers) == 4
    assert answers[-1] == 4 * PAGE
    assert all("under way" in str(answer) for answer in answers[:-1])
    assert len(space) == 0
    assert kernel.tables[3] == {}
    space.verify()


def test_a_closing_that_only_waits_unmaps_nothing(space: IovaSpace) -> None:
    before = space.mappings()
    space.set_stepwise(True)
    closing = space.closing(0, (1 << 64) - 1, True)
    assert closing.ready()
    with pytest.raises(errors.StateError, match=r"give_up\(\), then begin_unmap\(\)"):
        closing.finish()
    closing.give_up()
    assert space.mappings() == before
    with pytest.raises(TypeError, match="takes 2 arguments"):
        space.closing(0, 1, True, 4)  # type: ignore[call-arg]
