"""The hub that says when a device's memory goes away, and the writes to configuration space that make it go."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vfiopy import uapi
from vfiopy.backend import RegionInfo
from vfiopy.errors import VfioError
from vfiopy.kernel.memory_watch import KernelMemoryWatch
from vfiopy.pci.memory_watch import MemoryWatch
from vfiopy.signals import Cause, MemorySignals, taking

POWER, EXPRESS, ADVANCED = 0x40, 0x60, 0x50


class Listener:
    def __init__(self, signals: MemorySignals | None = None) -> None:
        self.log: list[object] = []
        self.locked: list[bool] = []
        self.signals = signals
        if signals is not None:
            signals.listen(self)

    def going(self, cause: Cause) -> bool:
        self.log.append(("going", cause))
        return True

    def stayed(self) -> None:
        self.log.append("stayed")

    def gone(self, cause: Cause) -> None:
        self.log.append(("gone", cause))
        if self.signals is not None:
            look = threading.Thread(target=self._look, args=(self.signals.lock,))
            look.start()
            look.join()

    def _look(self, lock: Any) -> None:
        free = lock.acquire(timeout=0.5)
        self.locked.append(not free)
        if free:
            lock.release()

    def doubtful(self) -> None:
        self.log.append("doubtful")


def refuse(number: int) -> None:
    raise VfioError("no", errno=number)


def test_listeners_know_before_and_act_after_without_a_lock() -> None:
    signals = MemorySignals("device")
    listener = Listener(signals)
    with signals.taking(Cause.DECODE):
        assert listener.log == [("going", Cause.DECODE)]
        assert signals.absent is None
    assert listener.log == [("going", Cause.DECODE), ("gone", Cause.DECODE)]
    assert listener.locked == [False]
    assert signals.absent is Cause.DECODE
    signals.returned(Cause.DECODE)
    assert signals.absent is None


def test_an_operation_that_did_nothing_takes_nothing() -> None:
    signals = MemorySignals("device")
    listener = Listener(signals)
    with pytest.raises(VfioError), signals.taking(Cause.LOW_POWER, untouched=(errno.EINVAL,)):
        refuse(errno.EINVAL)
    assert listener.log == [("going", Cause.LOW_POWER), "stayed"]
    assert signals.absent is None
    with pytest.raises(VfioError), signals.taking(Cause.LOW_POWER, untouched=(errno.EINVAL,)):
        refuse(errno.EIO)
    assert listener.log[2:] == [("going", Cause.LOW_POWER), ("gone", Cause.LOW_POWER)]
    assert signals.absent is Cause.LOW_POWER
    with pytest.raises(KeyboardInterrupt), signals.taking(Cause.RESET):
        raise KeyboardInterrupt
    assert listener.log[4:] == [("going", Cause.RESET), ("gone", Cause.RESET)]


def test_a_listener_is_not_kept_alive() -> None:
    signals = MemorySignals("device")
    log = Listener(signals).log
    signals.took(Cause.RESET)
    assert log == []


def test_a_bus_reset_takes_all_and_tells_after_all_locks_are_free() -> None:
    pair = [MemorySignals("b"), MemorySignals("a")]
    listeners = [Listener(signals) for signals in pair]
    with taking([(signals, Cause.HOT_RESET) for signals in pair]):
        pass
    for listener in listeners:
        assert listener.log == [("going", Cause.HOT_RESET), ("gone", Cause.HOT_RESET)]
        assert listener.locked == [False]
    assert [signals.absent for signals in pair] == [None, None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_listener_that_fails_does_not_silence_the_others() -> None:
    signals = MemorySignals("device")
    one, two = Listener(signals), Listener(signals)

    def fail(cause: Cause) -> None:
        raise RuntimeError(cause)

    one.gone = fail  # type: ignore[method-assign]
    signals.took(Cause.RESET)
    assert ("gone", Cause.RESET) in two.log


def test_the_last_user_closes_the_device() -> None:
    name = "0000:00:1f.7"
    signals = MemorySignals.opened(name)
    assert MemorySignals.opened(name) is signals
    with signals.closing():
        pass
    assert not signals.over
    assert MemorySignals.known(name) is signals
    with signals.closing():
        again = MemorySignals.opened(name)  # by another thread, while the kernel closes it
    assert signals.over
    assert again is not signals  # the next opening is another life
    assert not again.over
    assert MemorySignals.known(name) is again
    with again.closing():
        pass
    assert MemorySignals.known(name) is None


# --- configuration space ----------------------------------------------------------------------------------------


def config(*, flr: bool = True) -> bytes:
    """A header and three capabilities: power management, advanced features, PCI Express."""
    space = bytearray(256)
    space[0:4] = b"\x34\x12\xe8\x11"
    space[6] = 0x10
    space[0x34] = POWER
    space[POWER : POWER + 2] = bytes([0x01, ADVANCED])
    space[ADVANCED : ADVANCED + 4] = bytes([0x13, EXPRESS, 6, 3 if flr else 0])
    space[EXPRESS : EXPRESS + 2] = bytes([0x10, 0])
    space[EXPRESS + 7] = 0x10 if flr else 0  # DEVCAP bit 28
    return bytes(space)


@pytest.fixture
def write() -> Callable[..., list[object]]:
    signals = MemorySignals("device")
    watch = MemoryWatch(signals)
    listener = Listener(signals)

    def write(offset: int, data: bytes, space: bytes | None = None) -> list[object]:
        listener.log.clear()
        content = config() if space is None else space
        with watch.writing(offset, data, lambda at, size: content[at : at + size]):
            pass
        signals.returned(Cause.DECODE)
        return [entry[1] for entry in listener.log if isinstance(entry, tuple) and entry[0] == "gone"]

    return write


def test_the_memory_bit(write: Callable[..., list[object]]) -> None:
    assert write(4, b"\x00\x00") == [Cause.DECODE]
    assert write(4, b"\x04\x00") == [Cause.DECODE]  # bus mastering does not count
    assert write(4, b"\x02\x00") == []
    assert write(5, b"\x00") == []
    assert write(0, bytes(16)) == [Cause.DECODE]
    assert write(3, b"\xff\x02") == []
    assert write(8, bytes(64)) == []


def test_a_virtual_function_has_no_memory_bit() -> None:
    signals = MemorySignals("device")
    listener = Listener(signals)
    signals.took(Cause.POWER)
    listener.log.clear()
    asked: list[bool] = []
    watch = MemoryWatch(signals, lambda: not asked.append(True))
    for _ in range(2):
        with watch.writing(4, b"\x00\x00", lambda at, size: config()[at : at + size]):
            pass
    assert ("gone", Cause.DECODE_TOUCHED) in listener.log  # imports are dead,
    assert signals.absent is Cause.POWER  # but what is away is so for another reason
    assert len(asked) == 1


def test_power_and_resets(write: Callable[..., list[object]]) -> None:
    assert write(POWER + 4, b"\x03\x00") == [Cause.POWER]
    assert write(POWER + 4, b"\x00\x00") == []
    assert write(POWER + 4, b"\x02\x00") == []  # D2: vfio-pci leaves imports alone
    assert write(POWER + 5, b"\x03") == []
    assert write(EXPRESS + 8, b"\x00\x80") == [Cause.RESET]
    assert write(EXPRESS + 9, b"\x80") == [Cause.RESET]
    assert write(EXPRESS + 8, b"\xff\x7f") == []
    assert write(ADVANCED + 4, b"\x01") == [Cause.RESET]
    assert write(ADVANCED + 4, b"\x02") == []


def test_two_threads_that_write_the_command_register() -> None:
    signals = MemorySignals("device")
    watch = MemoryWatch(signals)

    def switch(value: int) -> Any:
        return watch.writing(4, bytes([value, 0]), lambda at, size: config()[at : at + size])

    def switch_off() -> None:
        with switch(0):
            pass

    other = threading.Thread(target=switch_off)
    with switch(2):  # on; the other thread's write comes after this one
        other.start()
        other.join(0.2)
    other.join()
    assert signals.absent is Cause.DECODE


class Fd:
    """What a hot reset takes along."""

    def __init__(self, *along: str) -> None:
        self._along = list(along)

    def reset_along(self) -> list[str]:
        return self._along

    def pread(self, offset: int, size: int, detail: str = "") -> bytes:
        raise NotImplementedError

    def get_region_info(self, index: int) -> RegionInfo:
        raise NotImplementedError


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EBUSY])
def test_a_refused_bus_reset_may_have_taken_some_of_several(number: int) -> None:
    signals = MemorySignals("0000:01:00.0")
    listener = Listener(signals)
    watch = KernelMemoryWatch(signals)
    with pytest.raises(VfioError), watch.hot_resetting(Fd("0000:01:00.0")):
        refuse(number)
    assert listener.log[1:] == ["stayed"]
    listener.log.clear()
    with pytest.raises(VfioError), watch.hot_resetting(Fd("0000:01:00.0", "0000:01:00.1")):
        refuse(number)
    assert listener.log[1:] == [("gone", Cause.HOT_RESET)]


def test_low_power_in_two_threads() -> None:
    signals = MemorySignals("device")
    watch = KernelMemoryWatch(signals)
    operation = uapi.VFIO_DEVICE_FEATURE_SET

    def enter() -> None:
        with watch.using_feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_ENTRY, operation):
            pass

    other = threading.Thread(target=enter)
    with watch.using_feature(uapi.VFIO_DEVICE_FEATURE_LOW_POWER_EXIT, operation):
        other.start()
        other.join(0.2)
    other.join()
    assert signals.absent is Cause.LOW_POWER


def test_a_function_without_resets(write: Callable[..., list[object]]) -> None:
    plain = config(flr=False)
    assert write(EXPRESS + 8, b"\x00\x80", plain) == []
    assert write(ADVANCED + 4, b"\x01", plain) == []
