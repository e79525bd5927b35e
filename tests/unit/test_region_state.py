"""States of a Region, holds and buffers, and how it ends."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
from region_support import PAGE, Bar, Registers

from vfiopy.errors import (
    AccessError,
    AddressRangeError,
    BusyError,
    ClosedError,
    DeviceGoneError,
    ForkedError,
)
from vfiopy.mmio import Region, numpy_view

USES: dict[str, Callable[[Region], object]] = {
    **{f"read{bits}": lambda region, bits=bits: getattr(region, f"read{bits}")(0) for bits in (8, 16, 32, 64)},
    **{
        f"write{bits}_relaxed": lambda region, bits=bits: getattr(region, f"write{bits}_relaxed")(0, 1)
        for bits in (8, 16, 32, 64)
    },
    "poll32": lambda region: region.poll32(0, 1, 1, 0.0),
    "read_fifo": lambda region: region.read_fifo(0, 4),
    "write_fifo": lambda region: region.write_fifo(0, bytes(4)),
    "read_block": lambda region: region.read_block(0, 4),
    "write_block": lambda region: region.write_block(0, bytes(4)),
    "hold": lambda region: region.hold(),
    "memoryview": memoryview,
    "numpy_view": numpy_view,
}


@pytest.fixture
def bar() -> Iterator[Bar]:
    bar = Bar()
    yield bar
    gc.collect()
    bar.close()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use_after_close(bar: Bar, use: Callable[[Region], object]) -> None:
    region = bar.region()
    assert region
    region.close()
    region.close()
    assert not region
    assert region.state == "closed"
    with pytest.raises(ClosedError, match="test BAR0 is closed"):
        use(region)
    assert repr(region).endswith("closed>")


def test_closed_is_for_good(bar: Bar) -> None:
    region = bar.region()
    region.close()
    with pytest.raises(ClosedError):
        region.set_state("open")
    with pytest.raises(ClosedError), region:
        pass
    with pytest.raises(ClosedError):
        region.read32(0)
    assert region.state == "closed"


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_gone_says_why_and_may_come_back(bar: Bar, use: Callable[[Region], object]) -> None:
    region = bar.region()
    bar.content[0] = 1
    region.set_state("gone", "the function is in D3hot; set_power_state('D0')")
    assert (region.state, region.reason) == ("gone", "the function is in D3hot; set_power_state('D0')")
    with pytest.raises(DeviceGoneError, match=r"does not answer: the function is in D3hot; set_power_state\('D0'\)"):
        use(region)
    region.set_state("gone")
    assert region.reason is None
    with pytest.raises(DeviceGoneError, match="the device does not answer"):
        use(region)
    region.set_state("open")
    assert region.state == "open"
    use(region)


def test_slow_leaves_the_mapping_alone(bar: Bar) -> None:
    slow = Registers()
    region = bar.region(slow=slow)
    slow.values[8] = 0x77
    region.set_state("slow")
    assert region.state == "slow"
    assert region.read32(8) == 0x77
    region.write32(12, 5)
    assert region.read_block(8, 2) == b"\x77\0\0\0\5\0\0\0"
    region.write_block(0, b"abcdefgh", width=2)
    assert region.poll32(8, 0xFF, 0x77, 0.0) == 0x77
    assert slow.values[6] == int.from_bytes(b"gh", "little")
    assert bar.content[:16] == bytes(16)
    for use in ("hold", "memoryview"):
        with pytest.raises(AccessError, match="the mapping may not be touched now"):
            USES[use](region)
    region.set_state("open")
    assert region.read32(8) == 0


def test_slow_without_a_slow_path(bar: Bar) -> None:
    region = bar.region()
    region.set_state("slow")
    with pytest.raises(AccessError, match="the mapping may not be touched now and there is no other way"):
        region.read32(0)


def test_unknown_states(bar: Bar) -> None:
    region = bar.region()
    for wrong in ("closed", "traced", "half-open"):
        with pytest.raises(AccessError, match=f"state '{wrong}' is none of 'open', 'slow' and 'gone'"):
            region.set_state(wrong)
    with pytest.raises(TypeError):
        region.set_state("gone", 5)
    assert region.state == "open"


class TestTrace:
    def test_it_sees_every_access(self, bar: Bar) -> None:
        region = bar.region(byteorder="big")
        log: list[tuple[object, ...]] = []
        region.set_trace(lambda *access: log.append(access))
        assert region.state == "traced"
        region.write32(0, 0x11223344)
        assert region.read16_relaxed(0) == 0x1122
        assert region.read_block(0, 2, width=2) == b"\x11\x22\x33\x44"
        region.write_fifo(8, b"\1\2", width=1)
        region.poll8(8, 0xFF, 2, 1.0)
        region.set_trace(None)
        assert region.state == "open"
        region.read32(0)
        assert log == [
            ("write", 0, 4, 0x11223344),
            ("read", 0, 2, 0x1122),
            ("read", 0, 2, 0x1122),
            ("read", 2, 2, 0x3344),
            ("write", 8, 1, 1),
            ("write", 8, 1, 2),
            ("poll", 8, 1, (0xFF, 2)),
            ("read", 8, 1, 2),
        ]

    def test_a_write_is_reported_before_and_a_read_after(self, bar: Bar) -> None:
        region = bar.region()
        seen: list[bytes] = []
        region.set_trace(lambda *_: seen.append(bar.content[0:1]))
        region.write8(0, 7)
        region.read8(0)
        assert seen == [b"\0", b"\7"]

    def test_it_may_refuse_a_write(self, bar: Bar) -> None:
        region = bar.region()

        def guard(operation: str, offset: int, width: int, value: int) -> None:
            raise PermissionError(operation)

        region.set_trace(guard)
        with pytest.raises(PermissionError, match="write"):
            region.write32(0, 5)
        assert bar.content[:4] == bytes(4)

    def test_it_may_close_the_region(self, bar: Bar) -> None:
        region = bar.region()
        region.set_trace(lambda *_: region.close())
        with pytest.raises(ClosedError):
            region.write32(0, 5)
        assert bar.content[:4] == bytes(4)

    def test_it_works_on_the_slow_path_and_while_slow(self, bar: Bar) -> None:
        slow = Registers()
        region = bar.region(slow=slow)
        log: list[tuple[object, ...]] = []
        region.set_trace(lambda *access: log.append(access))
        region.set_state("slow")
        region.write32(0, 3)
        region.set_state("open")
        assert region.state == "traced"
        region.write32(0, 4)
        assert log == [("write", 0, 4, 3), ("write", 0, 4, 4)]
        assert slow.log == [("write", 0, 4, 3)]

    def test_only_callables(self, bar: Bar) -> None:
        with pytest.raises(TypeError):
            bar.region().set_trace(5)

    def test_it_hears_of_what_fails(self, bar: Bar) -> None:
        class Broken(Registers):
            def read(self, offset: int, width: int) -> int:
                raise OSError("nobody there")

        region = bar.region(slow=Broken())
        log: list[tuple[object, ...]] = []
        region.set_trace(lambda *access: log.append(access))
        with pytest.raises(AddressRangeError) as outside:
            region.read32(bar.size)
        with pytest.raises(AccessError) as misaligned:
            region.write16(1, 5)
        region.set_state("slow")
        with pytest.raises(OSError, match="nobody there") as slow:
            region.read8(4)
        region.set_state("gone")
        with pytest.raises(DeviceGoneError) as gone:
            region.write64(8, 5)
        region.close()
        with pytest.raises(ClosedError) as closed:
            region.read8(0)
        assert log == [
            ("read", bar.size, 4, outside.value),
            ("write", 1, 2, misaligned.value),
            ("read", 4, 1, slow.value),
            ("write", 8, 8, gone.value),
            ("read", 0, 1, closed.value),
        ]

    def test_it_hears_of_a_bus_error(self, bar: Bar) -> None:
        region = bar.region()
        log: list[tuple[object, ...]] = []
        region.set_trace(lambda *access: log.append(access))
        bar.vanish()
        with pytest.raises(DeviceGoneError) as gone:
            region.write32(0, 7)
        assert log == [("write", 0, 4, 7), ("write", 0, 4, gone.value)]

    def test_what_it_raises_about_a_failure_wins(self, bar: Bar) -> None:
        region = bar.region()

        def fail(*_: object) -> None:
            raise PermissionError("trace")

        region.set_trace(fail)
        with pytest.raises(PermissionError, match="trace"):
            region.read32(bar.size)

    def test_a_forked_child_does_not_report(self, bar: Bar) -> None:
        region = bar.region()
        region.set_trace(lambda *_: os._exit(3))
        pid = os.fork()
        if not pid:
            try:
                region.read32(0)
            except ForkedError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    def test_it_hears_of_holds(self, bar: Bar) -> None:
        region = bar.region()
        log: list[tuple[object, ...]] = []
        region.set_trace(lambda *access: log.append(access))
        with region.hold(8, 16, label="doorbell"):
            pass
        assert log == [("hold", 8, 16, "doorbell")]

        def refuse(*_: object) -> None:
            raise PermissionError("no addresses")

        region.set_trace(refuse)
        with pytest.raises(PermissionError, match="no addresses"):
            region.hold()
        assert region.holds == ()


class TestHold:
    def test_close_is_refused_and_names_the_holders(self, bar: Bar) -> None:
        region = bar.region()
        first = region.hold(label="rx ring kernel")
        second = region.hold(PAGE, 16, label="doorbell")
        assert (first.address, first.offset, first.length) == (bar.address, 0, bar.size)
        assert (second.address, second.offset, second.length) == (bar.address + PAGE, PAGE, 16)
        assert region.holds == ("rx ring kernel", "doorbell")
        assert second.region is region
        with pytest.raises(BusyError, match="in use by 2: 'rx ring kernel', 'doorbell'"):
            region.close()
        region.write32(0, 1)
        first.release()
        first.release()
        assert not first
        with pytest.raises(BusyError, match="in use by 1: 'doorbell'"):
            region.close()
        del second
        assert region.holds == ()
        region.close()

    def test_after_release_the_address_is_gone(self, bar: Bar) -> None:
        region = bar.region()
        with region.hold(label="mine") as hold:
            assert hold
            assert repr(hold) == f"<Hold 'mine' at 0x0+{bar.size:#x}>"
        for use in (lambda: hold.address, lambda: hold.region, lambda: memoryview(hold), hold.__enter__):
            with pytest.raises(ClosedError, match="hold 'mine' was released"):
                use()
        assert repr(hold) == "<Hold 'mine' (released)>"

    def test_only_within_one_window(self, bar: Bar) -> None:
        region = Region("BAR0", 3 * PAGE, [(0, bar.address, PAGE), (2 * PAGE, bar.address + 2 * PAGE, PAGE)])
        assert region.hold().length == PAGE
        hold = region.hold(2 * PAGE + 8)
        assert (hold.address, hold.length) == (bar.address + 2 * PAGE + 8, PAGE - 8)
        for offset, length in ((PAGE, 4), (PAGE - 4, 8), (0, 3 * PAGE)):
            with pytest.raises(AccessError, match="the range is not mapped in one piece"):
                region.hold(offset, length)
        with pytest.raises(AddressRangeError):
            region.hold(0, 4 * PAGE)
        with pytest.raises(AddressRangeError):
            region.hold(3 * PAGE)
        with pytest.raises(AddressRangeError, match="0 bytes"):
            region.hold(0, 0)
        del hold

    def test_it_cannot_be_made_by_hand(self, bar: Bar) -> None:
        with pytest.raises(TypeError):
            type(bar.region().hold())()

    def test_an_error_in_a_with_block_releases(self, bar: Bar) -> None:
        region = bar.region()
        with pytest.raises(ZeroDivisionError), region.hold():
            raise ZeroDivisionError
        region.close()


class TestBuffers:
    def test_close_is_refused_under_live_views(self, bar: Bar) -> None:
        region = bar.region()
        array = numpy_view(region, 8, 4, "<u4")
        array[1] = 0xAABBCCDD
        assert region.read32(12) == 0xAABBCCDD
        inner = array[2:]
        view = memoryview(region)
        view[0] = 9
        assert region.read8(0) == 9
        with pytest.raises(BusyError, match=r"in use by 2: 'numpy view of uint32 at 0x8', 'buffer'"):
            region.close()
        view.release()
        del array
        with pytest.raises(BusyError, match="in use by 1: 'numpy view of uint32"):
            region.close()
        assert inner.tolist() == [0, 0]
        del inner
        region.close()

    def test_a_hold_with_views_cannot_be_released(self, bar: Bar) -> None:
        region = bar.region()
        hold = region.hold(label="frames")
        view = memoryview(hold)
        with pytest.raises(BusyError, match="frames: a hold with 1 live buffer cannot be released\n  hint: delete"):
            hold.release()
        view.release()
        hold.release()
        region.close()

    def test_whole_and_parts(self, bar: Bar) -> None:
        region = bar.region()
        assert numpy_view(region).shape == (bar.size,)
        assert numpy_view(region, 8, dtype="u8").shape == (bar.size // 8 - 1,)
        pair = np.dtype([("a", "<u2"), ("b", "<u4")])
        assert numpy_view(region, 0, 5, pair)["b"].shape == (5,)
        with pytest.raises(AddressRangeError):
            numpy_view(region, bar.size - 4, 2, "u4")
        with pytest.raises(AddressRangeError):
            numpy_view(region, 0, 0)

    def test_permissions(self, bar: Bar) -> None:
        read_only = bar.region(writable=False)
        assert memoryview(read_only).readonly
        assert not numpy_view(read_only, 0, 4).flags.writeable
        write_only = bar.region(readable=False)
        with pytest.raises(BufferError, match="write-only"):
            memoryview(write_only)
        with pytest.raises(BufferError):
            numpy_view(write_only)
        assert write_only.holds == ()

    def test_a_region_with_holes_has_no_buffer_but_its_parts_do(self, bar: Bar) -> None:
        region = Region("BAR0", 2 * PAGE, [(PAGE, bar.address + PAGE, PAGE)], slow=Registers())
        with pytest.raises(BufferError, match=r"not mapped in one piece: take a buffer of a part with Region\.hold"):
            memoryview(region)
        assert numpy_view(region, PAGE, dtype="u4").shape == (PAGE // 4,)
        with pytest.raises(AccessError):
            numpy_view(region, PAGE - 4, 2, "u4")

    def test_an_array_outlives_the_name_of_its_region(self, bar: Bar) -> None:
        region = bar.region()
        dead = weakref.ref(region)
        array = numpy_view(region, 0, 4)
        del region
        gc.collect()
        array[0] = 3
        assert bar.content[0] == 3
        assert dead() is not None
        del array
        gc.collect()
        assert dead() is None


def test_cycles_are_collected(bar: Bar) -> None:
    class Slow(Registers):
        region: Region

    slow = Slow()
    region = bar.region(slow=slow)
    slow.region = region
    region.set_trace(partial(print, region))
    hold = region.hold()
    dead = [weakref.ref(region), weakref.ref(hold)]
    del region, slow, hold
    gc.collect()
    assert [reference() for reference in dead] == [None, None]


def test_close_waits_for_accesses_without_the_gil(bar: Bar) -> None:
    """The owner unmaps right after close(): a poll in another thread must have left by then."""
    region = bar.region()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            region.poll32(0, 1, 1, timeout=30.0)
        except BaseException as error:
            caught.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.03)
    start = time.monotonic()
    region.close()
    assert time.monotonic() - start < 15
    for thread in threads:
        thread.join()
    assert [type(error) for error in caught] == [ClosedError] * 3


def test_gone_ends_a_poll_in_another_thread(bar: Bar) -> None:
    region = bar.region()
    timer = threading.Timer(0.03, region.set_state, ["gone", "reset"])
    timer.start()
    with pytest.raises(DeviceGoneError, match="reset"):
        region.poll32(0, 1, 1, timeout=30.0, interval=5.0)
    timer.join()


def test_a_forked_child_may_not_touch_the_device(bar: Bar) -> None:
    region = bar.region()
    hold = region.hold()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        report = []
        for use in (*USES.values(), lambda _: hold.address):
            try:
                use(region)
            except ForkedError as error:
                report.append("spawn" in str(error))
            except BaseException as error:
                report.append(repr(error))  # type: ignore[arg-type]
        report.append(region.state == "forked")
        region.close()  # does nothing, even under a hold
        os.write(writer, repr(set(report)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "{True}"
    assert os.waitpid(child, 0)[1] == 0
    assert region.state == "open"
    assert region.read32(0) == 0
    hold.release()
    region.close()


def test_threads_race_with_close_and_unmap() -> None:
    """What an owner does, while others use the region in every way: an access after the unmapping would be a crash."""
    uses: list[Callable[[Region], object]] = [
        lambda region: region.read32(8),
        lambda region: region.write64(16, 5),
        lambda region: region.read_block(0, 64),
        lambda region: region.write_fifo(0, bytes(400)),
        lambda region: region.poll32(4, 0, 0, 1.0),
        lambda region: region.hold().release(),
        lambda region: memoryview(region).release(),
        lambda region: region.set_state("open"),
    ]
    unexpected: list[BaseException] = []

    def use(region: Region, seed: int) -> None:
        try:
            while True:
                seed = seed * 1103515245 + 12345 & 0x7FFFFFFF
                uses[seed >> 16 & 7](region)
        except ClosedError:
            pass
        except BaseException as error:
            unexpected.append(error)

    for turn in range(25):
        bar = Bar()
        region = bar.region()
        threads = [threading.Thread(target=use, args=(region, seed)) for seed in range(turn, turn + 3)]
        for thread in threads:
            thread.start()
        time.sleep(0.001)
        while region:
            with suppress(BusyError):
                region.close()
        bar.close()
        for thread in threads:
            thread.join()
    assert unexpected == []
