"""Work that devices do later."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from vfiopy.emulated.engine import Engine
from vfiopy.errors import StateError


def run(work: Callable[[], None]) -> None:
    work()


def threads_called(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


def test_work_is_done_in_order_of_time_then_of_asking() -> None:
    engine = Engine("t-order", run, manual=True)
    done: list[str] = []
    engine.schedule(2.0, lambda: done.append("late"))
    engine.schedule(1.0, lambda: done.append("a"))
    engine.schedule(1.0, lambda: done.append("b"))
    assert done == []
    assert engine.pending == 3
    assert [engine.step() for _ in range(4)] == [True, True, True, False]
    assert done == ["a", "b", "late"]


def test_manual_clock_goes_with_the_steps() -> None:
    engine = Engine("t-clock", run, manual=True)
    done: list[str] = []
    engine.schedule(1.0, lambda: engine.schedule(1.0, lambda: done.append("second")))
    engine.schedule(1.5, lambda: done.append("first"))
    while engine.step():
        pass
    assert done == ["first", "second"]


def test_thread_works_by_itself_and_ends() -> None:
    engine = Engine("t-thread", run)
    assert threads_called("t-thread") == 0
    done: list[float] = []
    finished = threading.Event()
    begin = time.monotonic()

    def work() -> None:
        done.append(time.monotonic() - begin)
        finished.set()

    engine.schedule(0.02, work)
    assert threads_called("t-thread") == 1
    assert finished.wait(5)
    assert done[0] >= 0.02
    engine.close()
    engine.close()
    assert threads_called("t-thread") == 0


def test_earlier_work_overtakes_a_sleeping_thread() -> None:
    engine = Engine("t-overtake", run)
    finished = threading.Event()
    engine.schedule(60, lambda: None)
    engine.schedule(0, finished.set)
    assert finished.wait(5)
    assert engine.pending == 1
    engine.close()


def test_close_forgets_work_and_it_can_be_used_again() -> None:
    engine = Engine("t-again", run)
    lost, found = threading.Event(), threading.Event()
    engine.schedule(0.05, lost.set)
    engine.close()
    engine.schedule(0.06, found.set)
    assert found.wait(5)
    assert not lost.is_set()
    engine.close()


def test_close_from_the_work_itself() -> None:
    engine = Engine("t-self", run)
    engine.schedule(0, engine.close)
    end = time.monotonic() + 5
    while threads_called("t-self"):
        assert time.monotonic() < end
        time.sleep(0.001)


def test_idle_thread_does_not_run() -> None:
    engine = Engine("t-idle", run)
    ran = threading.Event()
    engine.schedule(0, ran.set)
    assert ran.wait(5)
    before = time.process_time()
    time.sleep(0.1)
    assert time.process_time() - before < 0.05  # a busy loop would need twice that
    engine.close()


def test_step_is_for_manual_engines() -> None:
    with pytest.raises(StateError, match="manual=True"):
        Engine("t-step", run).step()


def test_cancel_counts() -> None:
    engine = Engine("t-cancel", run, manual=True)
    engine.schedule(0, lambda: None)
    engine.schedule(0, lambda: None)
    assert engine.cancel() == 2
    assert not engine.step()
