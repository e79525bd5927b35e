"""Waiting for a register: values, timeouts, intervals, signals, other threads."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Literal

import pytest
from region_support import PAGE, WIDTHS, Bar, Registers, run_python

from vfiopy.errors import AccessError, AddressRangeError, ClosedError, VfioError, VfioTimeoutError
from vfiopy.mmio import Region


@pytest.fixture
def bar() -> Iterator[Bar]:
    bar = Bar()
    yield bar
    bar.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_returns_the_whole_register(bar: Bar, width: int, byteorder: str) -> None:
    region = bar.region(byteorder=byteorder)
    value = int.from_bytes(bytes(range(0x81, 0x81 + width)), "little")
    top = 0x80 << 8 * (width - 1)
    getattr(region, f"write{8 * width}")(16, value | top)
    poll = getattr(region, f"poll{8 * width}")
    assert poll(16, top, top, 0) == value | top
    assert poll(offset=16, mask=0, value=0, timeout=None) == value | top


def set_later(bar: Bar, offset: int, data: bytes, delay: float) -> threading.Timer:
    def change() -> None:
        bar.content[offset : offset + len(data)] = data

    timer = threading.Timer(delay, change)
    timer.start()
    return timer


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("interval", [0.0, 0.001, 0.02])
@pytest.mark.parametrize("timeout", [20.0, None, float("inf")])
def test_waits_for_a_change_while_others_run(bar: Bar, byteorder: str, interval: float, timeout: float | None) -> None:
    region = bar.region(byteorder=byteorder)
    start = time.monotonic()
    timer = set_later(bar, 8, (0x40).to_bytes(4, byteorder), 0.03)
    assert region.poll32(8, 0x40, 0x40, timeout, interval) == 0x40
    assert 0.02 < time.monotonic() - start < 15
    timer.join()


@pytest.mark.parametrize("interval", [0.0, 0.005, 10.0])
def test_a_timeout_tells_what_it_saw(bar: Bar, interval: float) -> None:
    region = bar.region("0000:00:05.0 BAR0")
    region.write32(0x1C, 0x80000002)
    start = time.monotonic()
    with pytest.raises(VfioTimeoutError) as caught:
        region.poll32(0x1C, 1, 1, timeout=0.05, interval=interval)
    assert 0.05 <= time.monotonic() - start < 15
    assert caught.value.value == 0x80000002
    assert isinstance(caught.value, TimeoutError)
    assert str(caught.value) == (
        "0000:00:05.0 BAR0: (register & 0x1) == 0x1 at offset 0x1c, 32 bits, was not seen within 0.05 s; "
        "it last read 0x80000002"
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_all_ones_get_a_hint(bar: Bar, width: int) -> None:
    bar.content[:8] = b"\xff" * 8
    with pytest.raises(VfioTimeoutError, match="all ones is also what a device answers that is gone or asleep"):
        getattr(bar.region(), f"poll{8 * width}")(0, 1, 0, 0.0)


def test_reads_no_more_often_than_asked() -> None:
    slow = Registers()
    region = Region("emulated", 64, slow=slow)
    with pytest.raises(VfioTimeoutError):
        region.poll32(0, 1, 1, timeout=0.1, interval=0.03)
    assert 2 <= len(slow.log) <= 5  # fewer than 5 on a machine that is busy

    mapped = Bar()
    region = mapped.region()
    times: list[float] = []
    try:
        region.set_trace(lambda operation, *_: times.append(time.monotonic()) if operation == "read" else None)
        with pytest.raises(VfioTimeoutError):
            region.poll32(0, 1, 1, timeout=0.1, interval=0.03)
    finally:
        mapped.close()
    # The last read comes at the deadline, whatever the interval.
    assert all(later - earlier > 0.025 for earlier, later in pairwise(times[:-1]))


@pytest.mark.parametrize("interval", [0.0, 0.002])
def test_the_slow_path_lets_other_threads_run(interval: float) -> None:
    slow = Registers()
    region = Region("emulated", 64, slow=slow)
    timer = threading.Timer(0.03, slow.values.__setitem__, [4, 1])
    timer.start()
    assert region.poll32(4, 1, 1, 20.0, interval) == 1
    timer.join()


def test_the_state_may_change_meanwhile(bar: Bar) -> None:
    slow = Registers()
    slow.values[8] = 0x11
    region = bar.region(slow=slow)
    timer = threading.Timer(0.03, region.set_state, ["slow"])
    timer.start()
    assert region.poll32(8, 0x10, 0x10, 20.0) == 0x11
    timer.join()
    assert slow.log == [("read", 8, 4)]


def test_bad_arguments(bar: Bar) -> None:
    region = bar.region()
    with pytest.raises(AccessError, match="value 2 has bits outside of mask 1: it can never be seen"):
        region.poll32(0, 1, 2, 1.0)
    with pytest.raises(AccessError, match="does not fit into 8 unsigned bits"):
        region.poll8(0, 0x100, 0, 1.0)
    with pytest.raises(AccessError, match="timeout must be 0 or more seconds, not -1"):
        region.poll32(0, 1, 0, -1)
    with pytest.raises(AccessError, match="interval must be 0 or more seconds, not nan"):
        region.poll32(0, 1, 0, 1, float("nan"))
    with pytest.raises(TypeError):
        region.poll32(0, 1, 0, "soon")
    with pytest.raises(TypeError):
        region.poll32(0, 1, 0)
    with pytest.raises(AddressRangeError):
        region.poll32(bar.size, 1, 0, 1.0)
    with pytest.raises(AccessError, match="not naturally aligned"):
        region.poll32(PAGE + 2, 1, 0, 1.0)
    with pytest.raises(AccessError, match="write-only"):
        bar.region(readable=False).poll32(0, 1, 0, 1.0)


@pytest.mark.parametrize("kind", ["mapped", "slow", "traced"])
@pytest.mark.parametrize("interval", [0.0, 3600.0])
def test_ctrl_c_gets_through(kind: str, interval: float) -> None:
    result = run_python(
        f"""
        import os, signal, threading, time
        from region_support import Bar, Registers
        bar = Bar()
        region = bar.region(slow=Registers())
        if {kind!r} == "slow": region.set_state("slow")
        if {kind!r} == "traced": region.set_trace(lambda *_: None)
        # SIGALRM of the whole process, as a terminal's SIGINT is
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        start = time.monotonic()
        try:
            region.poll32(0, 1, 1, 3600.0, {interval})
        except KeyboardInterrupt:
            print("interrupted", time.monotonic() - start < 30)
        region.close()
        print(region.state)
        """
    )
    assert result.stdout == "interrupted True\nclosed\n", result.stderr


def test_a_signal_handler_may_close_the_region(bar: Bar) -> None:
    region = bar.region()
    earlier = signal.signal(signal.SIGALRM, lambda *_: region.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        with pytest.raises(ClosedError):
            region.poll32(0, 1, 1, 30.0)
    finally:
        signal.signal(signal.SIGALRM, earlier)


def test_a_signal_that_is_handled_does_not_end_the_wait(bar: Bar) -> None:
    region = bar.region()
    count: list[int] = []
    earlier = signal.signal(signal.SIGALRM, lambda *_: count.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        timer = set_later(bar, 0, b"\1", 0.1)
        assert region.poll8(0, 1, 1, 30.0, 0.5) == 1
        timer.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
    assert count


@pytest.mark.parametrize("state", ["slow", "gone"])
def test_set_state_waits_for_accesses_without_the_gil(bar: Bar, state: Literal["slow", "gone"]) -> None:
    """What follows may be a reset. A poll that sleeps looks at the state every 20 ms: tries have to wait."""
    region = bar.region()
    waited = []

    def poll() -> None:
        with suppress(VfioError):
            region.poll32(0, 1, 1, timeout=30.0, interval=10.0)

    for _ in range(10):
        thread = threading.Thread(target=poll)
        thread.start()
        time.sleep(0.025)
        start = time.monotonic()
        region.set_state(state, "reset")
        waited.append(time.monotonic() - start)
        region.set_state("gone")
        thread.join()
        region.set_state("open")
    assert sum(seconds > 0.001 for seconds in waited) >= 3
