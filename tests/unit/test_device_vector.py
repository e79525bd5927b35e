"""Vectors: waiting with poll and asyncio, counting, closing."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import signal
import threading
import time
from pathlib import Path

import pytest

from vfiopy.device.vector import Vector
from vfiopy.errors import BusyError, ClosedError, ForkedError, VfioTimeoutError
from vfiopy.lives import drain_finalizers


@pytest.fixture
def vector():
    vector = Vector("edu MSI vector 0", 0, lambda number: fire(vector))
    yield vector
    vector.close()


def fire(vector: Vector, count: int = 1) -> None:
    os.eventfd_write(vector.fileno(), count)


def test_counts_what_came_and_takes_it(vector: Vector) -> None:
    assert vector.take() == 0
    fire(vector)
    fire(vector, 2)
    assert vector.wait(0) == 3
    assert vector.take() == 0
    assert vector.total == 3


def test_timeout_names_the_vector_and_the_usual_cause(vector: Vector) -> None:
    begin = time.monotonic()
    with pytest.raises(VfioTimeoutError, match=r"edu MSI vector 0: no interrupt within 0.02 s\n.*bus_master"):
        vector.wait(0.02)
    assert time.monotonic() - begin >= 0.02
    with pytest.raises(TimeoutError):
        vector.wait(0)


def test_wait_is_woken_from_another_thread(vector: Vector) -> None:
    timer = threading.Timer(0.02, fire, [vector])
    timer.start()
    assert vector.wait() == 1
    timer.join()


def test_keyboard_interrupt_gets_through_and_loses_no_event(vector: Vector) -> None:
    timer = threading.Timer(0.05, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vector.wait(5)
    timer.join()
    fire(vector)
    assert vector.wait(1) == 1


def test_fileno_works_with_select(vector: Vector) -> None:
    assert select.select([vector], [], [], 0)[0] == []
    fire(vector)
    assert select.select([vector], [], [], 1)[0] == [vector]


def test_asyncio_wait_needs_no_thread(vector: Vector) -> None:
    async def scenario() -> tuple[int, int]:
        threads = threading.active_count()
        asyncio.get_running_loop().call_later(0.01, fire, vector)
        count = await vector.wait_async(timeout=2)
        return count, threading.active_count() - threads

    assert asyncio.run(scenario()) == (1, 0)


def test_cancelled_wait_leaves_the_event(vector: Vector) -> None:
    async def scenario() -> int:
        waiting = asyncio.create_task(vector.wait_async())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        fire(vector)
        return await vector.wait_async(1)

    assert asyncio.run(scenario()) == 1


def test_cancelling_after_the_event_arrived_loses_nothing(vector: Vector) -> None:
    async def scenario() -> int:
        waiting = asyncio.create_task(vector.wait_async())
        await asyncio.sleep(0)
        fire(vector)
        loop = asyncio.get_running_loop()
        # Let the loop see the readable fd, then cancel before the task itself runs again.
        loop.call_soon(waiting.cancel)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return await vector.wait_async(1)

    assert asyncio.run(scenario()) == 1


def test_async_timeout_and_iteration(vector: Vector) -> None:
    async def scenario() -> list[int]:
        with pytest.raises(VfioTimeoutError):
            await vector.wait_async(timeout=0.01)
        fire(vector, 5)
        async for count in vector:
            return [count]
        return []

    assert asyncio.run(scenario()) == [5]


def test_software_trigger(vector: Vector) -> None:
    vector.trigger()
    assert vector.wait(1) == 1


def test_use_after_close(vector: Vector) -> None:
    vector.close()
    vector.close()
    for use in (vector.fileno, vector.take, vector.wait, vector.trigger):
        with pytest.raises(ClosedError, match="edu MSI vector 0 is closed"):
            use()


def test_wait_takes_seconds_and_nothing_else(vector: Vector) -> None:
    fire(vector)
    assert vector.wait(timeout=float("inf")) == 1
    fire(vector)
    assert vector.wait(1e300) == 1
    fire(vector)
    assert vector.wait(-1) == 1
    with pytest.raises(VfioTimeoutError, match="within -1 s"):
        vector.wait(-1)
    with pytest.raises(ValueError, match="nan"):
        vector.wait(float("nan"))
    for wrong in (lambda: vector.wait("1"), lambda: vector.wait(1, 2), lambda: vector.wait(seconds=1)):
        with pytest.raises(TypeError):
            wrong()


@pytest.mark.parametrize("timeout", [0.0001, 0.0015, 0.03])
def test_no_wait_gives_up_early(vector: Vector, timeout: float) -> None:
    begin = time.monotonic()
    with pytest.raises(VfioTimeoutError):
        vector.wait(timeout)
    assert time.monotonic() - begin >= timeout


def test_a_wait_goes_on_after_a_signal_that_has_a_handler(vector: Vector) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        timers = [
            threading.Timer(0.02, signal.pthread_kill, [threading.main_thread().ident, signal.SIGUSR1]),
            threading.Timer(0.06, fire, [vector]),
        ]
        for timer in timers:
            timer.start()
        assert vector.wait(5) == 1
        for timer in timers:
            timer.join()
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_every_event_is_seen_by_exactly_one_of_several_threads(vector: Vector) -> None:
    counts: list[int] = []

    def work() -> None:
        while True:
            count = vector.wait(5)
            counts.append(count & 0xFFFF)
            if count >= 0x1_0000:  # the end, handed on
                fire(vector, 0x1_0000)
                return

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        fire(vector)
    fire(vector, 0x1_0000)
    for thread in threads:
        thread.join()
    assert sum(counts) == 200


def test_a_forked_child_is_refused(vector: Vector) -> None:
    fire(vector)
    child = os.fork()
    if not child:
        status = 1
        try:
            refused = 0
            for use in (vector.take, vector.wait, vector.fileno):
                try:
                    use()
                except ForkedError:
                    refused += 1
            status = 0 if refused == 3 else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert vector.wait(1) == 1


def test_there_is_no_vector_without_an_fd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(initial: int, flags: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "eventfd", refuse)
    with pytest.raises(OSError, match="Too many open files"):
        Vector("edu MSI vector 0", 0, lambda number: None)
    gc.collect()
    assert drain_finalizers() == 0


# --- asyncio, where the loop keeps watching between waits ------------------------------------------------------------


@pytest.fixture
def private() -> Vector:
    """A vector whose fd nobody else has: the loop goes on watching it after a wait."""
    vector = Vector("edu MSI vector 1", 1, lambda number: None)
    yield vector
    vector.close()


def fire_privately(vector: Vector, count: int = 1) -> None:
    os.eventfd_write(vector.for_backend(), count)


def watched(loop: asyncio.AbstractEventLoop, vector: Vector) -> bool:
    """Whether the loop watches the vector; as a side effect it does not any more."""
    return loop.remove_reader(vector.for_backend())


def test_the_loop_is_told_once_for_many_waits(private: Vector, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> tuple[list[int], int]:
        loop = asyncio.get_running_loop()
        added = 0
        original = loop.add_reader

        def add_reader(*arguments: object) -> None:
            nonlocal added
            added += 1
            original(*arguments)

        monkeypatch.setattr(loop, "add_reader", add_reader)
        counts = []
        for number in range(1, 6):
            loop.call_later(0.001, fire_privately, private, number)
            counts.append(await private.wait_async(2))
        return counts, added

    assert asyncio.run(scenario()) == ([1, 2, 3, 4, 5], 1)
    assert private.total == 15


def test_a_loop_does_not_spin_on_events_that_nobody_waits_for(private: Vector) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.001, fire_privately, private)
        assert await private.wait_async(2) == 1
        fire_privately(private, 7)
        await asyncio.sleep(0.005)
        assert not watched(loop, private), "the loop looks at an event that it will not take"
        assert private.take() == 7, "it was left for who asks next"
        fire_privately(private, 2)
        assert await private.wait_async(1) == 2
        loop.call_later(0.001, fire_privately, private, 3)
        assert await private.wait_async(1) == 3

    asyncio.run(scenario())


@pytest.mark.parametrize("lent", [True, False])
def test_cancelling_at_any_moment_loses_no_event(private: Vector, lent: bool) -> None:
    async def scenario(turns: int) -> None:
        if lent:
            private.fileno()
        waiting = asyncio.create_task(private.wait_async())
        await asyncio.sleep(0)
        fire_privately(private)
        for _ in range(turns):
            await asyncio.sleep(0)
        done = waiting.done()
        waiting.cancel()
        if done:
            assert await waiting == 1
            return
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await private.wait_async(1) == 1
        assert private.take() == 0

    before = private.total
    for turns in range(5):
        asyncio.run(scenario(turns))
    assert private.total - before == 5


def test_a_coroutine_that_is_dropped_leaves_the_event(private: Vector) -> None:
    async def scenario() -> None:
        waiting = private.wait_async()
        waiting.send(None)
        fire_privately(private)
        waiting.close()
        assert await private.wait_async(1) == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("timeout", [0, 0.01])
def test_a_timeout_in_the_loop_leaves_nothing_behind(private: Vector, timeout: float) -> None:
    async def scenario() -> None:
        begin = time.monotonic()
        with pytest.raises(VfioTimeoutError, match=f"within {timeout} s"):
            await private.wait_async(timeout)
        assert time.monotonic() - begin >= timeout * 0.9  # loops round to the clock's resolution
        fire_privately(private)
        assert await private.wait_async(timeout) == 1

    asyncio.run(scenario())


def test_one_task_at_a_time(private: Vector) -> None:
    async def scenario() -> None:
        first = asyncio.create_task(private.wait_async())
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match=r"another task is waiting for this vector\n.*asyncio.Event"):
            await private.wait_async(1)
        fire_privately(private)
        assert await first == 1

    asyncio.run(scenario())


def test_closing_wakes_who_waits(private: Vector) -> None:
    async def scenario() -> None:
        waiting = asyncio.create_task(private.wait_async())
        await asyncio.sleep(0)
        private.close()
        with pytest.raises(ClosedError, match="edu MSI vector 1 was closed during the wait"):
            await waiting

    asyncio.run(scenario())


def test_closing_takes_the_fd_out_of_the_loop(private: Vector) -> None:
    """Or the next file with that number could not be watched."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.001, fire_privately, private)
        await private.wait_async(1)
        number = private.for_backend()
        private.close()
        reader, writer = os.pipe()
        assert number in (reader, writer)
        with Path(f"/proc/self/fd/{number}").open("rb", buffering=0):
            other = reader
            readable = loop.create_future()
            loop.add_reader(other, readable.set_result, None)
            os.write(writer, b"x")
            await asyncio.wait_for(readable, 1)
            loop.remove_reader(other)
        os.close(reader)
        os.close(writer)

    asyncio.run(scenario())


def test_one_loop_after_another(private: Vector) -> None:
    async def scenario() -> int:
        asyncio.get_running_loop().call_later(0.001, fire_privately, private)
        return await private.wait_async(1)

    assert [asyncio.run(scenario()) for _ in range(3)] == [1, 1, 1]
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    assert first.run_until_complete(scenario_in(first, private)) == 1
    assert second.run_until_complete(scenario_in(second, private)) == 1
    assert not watched(first, private)
    assert first.run_until_complete(scenario_in(first, private)) == 1
    for loop in (first, second):
        loop.close()


async def scenario_in(loop: asyncio.AbstractEventLoop, vector: Vector) -> int:
    loop.call_later(0.001, fire_privately, vector)
    return await vector.wait_async(1)


def test_somebody_elses_reader_does_not_break_the_next_wait(private: Vector) -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        assert await scenario_in(loop, private) == 1
        seen = asyncio.Event()
        fd = private.fileno()
        loop.add_reader(fd, seen.set)
        fire_privately(private)
        await asyncio.wait_for(seen.wait(), 1)
        loop.remove_reader(fd)
        assert private.take() == 1
        assert await scenario_in(loop, private) == 1
        loop.add_reader(fd, seen.set)  # again, without asking for the fd again
        loop.remove_reader(fd)
        assert await scenario_in(loop, private) == 1

    asyncio.run(scenario())


def test_a_loop_keeps_no_vector_alive() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        vector = Vector("dropped", 0, lambda number: None)
        assert await scenario_in(loop, vector) == 1
        fd = os.dup(vector.for_backend())
        del vector
        gc.collect()
        os.eventfd_write(fd, 1)
        await asyncio.sleep(0.005)
        with pytest.warns(ResourceWarning, match="dropped was never closed"):
            drain_finalizers()
        os.close(fd)

    asyncio.run(scenario())


def test_threads_and_a_loop_share_a_vector(private: Vector) -> None:
    taken: list[int] = []

    def work() -> None:
        while not taken or taken[-1] < 0x1_0000:
            taken.append(private.wait(5))

    async def scenario() -> int:
        total = 0
        while total < 50:
            try:
                total += await private.wait_async(0.005)
            except VfioTimeoutError:
                fire_privately(private)
                total += 1
        return total

    thread = threading.Thread(target=work)
    thread.start()
    asyncio.run(scenario())
    fire_privately(private, 0x1_0000)
    thread.join()
    assert private.take() == 0



def test_closing_wakes_threads_that_wait() -> None:
    """Two threads asleep for ever hear of the end, and the fd is not closed under them."""
    vector = Vector("edu MSI vector 0", 0, lambda number: None)
    heard: list[str] = []

    def wait() -> None:
        with pytest.raises(ClosedError, match="edu MSI vector 0 is closed") as caught:
            vector.wait()
        heard.append(str(caught.value))

    threads = [threading.Thread(target=wait, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    fd = vector.fileno()
    vector.close()
    for thread in threads:
        thread.join(2)
    assert len(heard) == 2
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
