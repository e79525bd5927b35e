"""SIGBUS under an access: an exception for ours, the earlier handler for everybody else's."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from region_support import PAGE, WIDTHS, Bar, run_python

from vfiopy import mmio
from vfiopy._shim import lib
from vfiopy.errors import DeviceGoneError
from vfiopy.mmio import Region


@pytest.fixture
def bar() -> Iterator[Bar]:
    bar = Bar()
    yield bar
    bar.close()


@pytest.mark.parametrize("suffix", ["", "_relaxed"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("byteorder", ["little", "big"])
def test_every_accessor_survives(bar: Bar, width: int, suffix: str, byteorder: str) -> None:
    region = bar.region(byteorder=byteorder)
    read, write = (getattr(region, f"{verb}{8 * width}{suffix}") for verb in ("read", "write"))
    assert read(8) == 0
    bar.vanish()
    before = mmio.fault_count()
    size = f"{width} byte{'s' * (width > 1)}"
    with pytest.raises(DeviceGoneError, match=rf"test BAR0: read of {size} at offset 0x8: nothing is behind the"):
        read(8)
    with pytest.raises(DeviceGoneError, match=rf"write of {size} at offset 0x8: .*\(SIGBUS\)\n  hint: check that"):
        write(8, 1)
    assert mmio.fault_count() == before + 2
    bar.come_back()
    assert read(8) == 0
    write(8, 0x5A)
    assert read(8) == 0x5A
    assert mmio.fault_count() == before + 2


CALLS: dict[str, Callable[[Region, int], object]] = {
    "read_block": lambda region, width: region.read_block(0, 2 * PAGE // width, width),
    "read_fifo": lambda region, width: region.read_fifo(PAGE, 50, width),
    "write_block": lambda region, width: region.write_block(0, bytes(2 * PAGE), width),
    "write_fifo": lambda region, width: region.write_fifo(PAGE, bytes(50 * width), width),
    "poll": lambda region, width: getattr(region, f"poll{8 * width}")(PAGE, 1, 1, 1.0),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CALLS)
def test_runs_and_polls_survive(bar: Bar, name: str, width: int) -> None:
    region = bar.region()
    bar.content[:PAGE] = b"\xa5" * PAGE
    os.ftruncate(bar.fd, PAGE)
    with pytest.raises(DeviceGoneError) as caught:
        CALLS[name](region, width)
    if name.endswith("block"):
        expected = f"after {PAGE // width} of {2 * PAGE // width} elements"
        assert expected in str(caught.value)
        assert f"at offset {PAGE:#x}" in str(caught.value)
    if name.endswith("fifo"):
        assert "after 0 of 50 elements" in str(caught.value)
    assert region.state == "open"
    assert region.read32(0) == (0 if name == "write_block" else 0xA5A5A5A5)


def test_a_poll_that_waits_survives_the_device_going_away(bar: Bar) -> None:
    region = bar.region()
    timer = threading.Timer(0.05, bar.vanish)
    timer.start()
    with pytest.raises(DeviceGoneError, match="nothing is behind the mapping"):
        region.poll32(0, 1, 1, timeout=30.0)
    timer.join()


@pytest.mark.parametrize("width", WIDTHS)
def test_accessors_of_the_shim_answer_all_ones(bar: Bar, width: int) -> None:
    assert lib.vfiopy_fault_install() == 0
    bits = 8 * width
    for suffix in ("", "_relaxed"):
        read = getattr(lib, f"vfiopy_mmio_read{bits}{suffix}")
        write = getattr(lib, f"vfiopy_mmio_write{bits}{suffix}")
        write(bar.address + 8, 0x5A)
        assert read(bar.address + 8) == 0x5A
        before = lib.vfiopy_fault_count()
        bar.vanish()
        assert read(bar.address + 8) == 2**bits - 1
        write(bar.address + 8, 1)
        assert lib.vfiopy_fault_count() == before + 2
        bar.come_back()
        assert read(bar.address + 8) == 0
    # Both handlers are in the chain now: Region's accessors must not have suffered.
    region = bar.region()
    bar.vanish()
    with pytest.raises(DeviceGoneError):
        region.read32(0)
    assert lib.vfiopy_mmio_read32(bar.address) == 0xFFFFFFFF


SETUP = """
import ctypes, faulthandler, os, signal, sys
from region_support import Bar
from vfiopy import mmio
from vfiopy._shim import lib
from vfiopy.errors import DeviceGoneError

def touch_without_protection(address):
    ctypes.c_uint32.from_address(address).value

def fixed_up(bar, region):
    bar.vanish()
    try:
        region.read32(0)
    except DeviceGoneError:
        print("exception", flush=True)
    else:
        raise SystemExit("no exception")
"""


def test_a_foreign_fault_ends_the_process_as_before() -> None:
    result = run_python(
        SETUP + "bar = Bar(); region = bar.region(); fixed_up(bar, region); touch_without_protection(bar.address)"
    )
    assert result.stdout == "exception\n"
    assert result.returncode == -signal.SIGBUS


def test_a_foreign_fault_goes_to_the_earlier_handler() -> None:
    result = run_python(
        SETUP
        + "faulthandler.enable(); bar = Bar(); region = bar.region(); fixed_up(bar, region)\n"
        + "touch_without_protection(bar.address)"
    )
    assert result.stdout == "exception\n"
    assert result.stderr.count("Fatal Python error: Bus error") == 1
    assert "touch_without_protection" in result.stderr
    assert result.returncode == -signal.SIGBUS


def test_put_back_above_a_handler_that_came_later() -> None:
    result = run_python(
        SETUP
        + """
bar = Bar(); region = bar.region()
assert mmio.fault_handler_installed()
faulthandler.enable()
assert not mmio.fault_handler_installed()
mmio.install_fault_handler()
assert mmio.fault_handler_installed()
fixed_up(bar, region)
touch_without_protection(bar.address)
"""
    )
    assert result.stdout == "exception\n"
    assert result.stderr.count("Fatal Python error: Bus error") == 1
    assert result.returncode == -signal.SIGBUS


@pytest.mark.parametrize(
    "call",
    [
        "bar.region()",
        "region.poll32(0, 0, 0, 1.0)",
        "region.read_block(0, 64)",
        "region.write_fifo(0, bytes(256))",
    ],
)
def test_who_puts_it_back(call: str) -> None:
    result = run_python(
        SETUP
        + f"bar = Bar(); region = bar.region(); faulthandler.enable(); {call}\n"
        + "print(mmio.fault_handler_installed())"
    )
    assert result.stdout == "True\n", result.stderr


def test_a_circle_of_handlers_ends() -> None:
    """The shim's handler passes signals on to Region's, which is then put on top again."""
    result = run_python(
        SETUP
        + """
bar = Bar(); region = bar.region()
assert lib.vfiopy_fault_install() == 0
mmio.install_fault_handler()
assert lib.vfiopy_fault_install() == 0
mmio.install_fault_handler()
fixed_up(bar, region)
assert lib.vfiopy_mmio_read32(bar.address) == 0xFFFFFFFF
touch_without_protection(bar.address)
"""
    )
    assert result.stdout == "exception\n"
    assert result.returncode == -signal.SIGBUS


def test_a_python_handler_sees_a_signal_that_was_sent() -> None:
    result = run_python(
        SETUP
        + """
signal.signal(signal.SIGBUS, lambda number, frame: print("handled", flush=True))
bar = Bar(); region = bar.region()
os.kill(os.getpid(), signal.SIGBUS)
signal.raise_signal(signal.SIGBUS)
fixed_up(bar, region)
"""
    )
    assert result.stdout == "handled\nhandled\nexception\n", result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize(("action", "code"), [("SIG_IGN", 0), ("SIG_DFL", -signal.SIGBUS)])
def test_a_signal_that_was_sent_gets_the_earlier_action(action: str, code: int) -> None:
    result = run_python(
        SETUP
        + f"signal.signal(signal.SIGBUS, signal.{action})\n"
        + "bar = Bar(); region = bar.region(); os.kill(os.getpid(), signal.SIGBUS); fixed_up(bar, region)"
    )
    assert result.returncode == code, result.stderr
    assert result.stdout == ("exception\n" if code == 0 else "")


def test_an_ignored_fault_still_ends_the_process() -> None:
    result = run_python(
        SETUP
        + "signal.signal(signal.SIGBUS, signal.SIG_IGN)\n"
        + "bar = Bar(); region = bar.region(); bar.vanish(); touch_without_protection(bar.address)"
    )
    assert result.returncode == -signal.SIGBUS


def test_nothing_is_installed_by_importing_or_by_unmapped_regions() -> None:
    result = run_python(
        """
        from region_support import Registers
        from vfiopy import mmio
        region = mmio.Region("config", 256, slow=Registers())
        region.read32(0), region.read_block(0, 64), region.poll32(0, 1, 0, 1.0)
        print(mmio.fault_handler_installed(), mmio.fault_count())
        """
    )
    assert result.stdout == "False 0\n", result.stderr


def test_many_threads_fault_at_once(bar: Bar) -> None:
    region = bar.region()
    bar.vanish()

    def fault(_: int) -> bool:
        with pytest.raises(DeviceGoneError):
            region.read_block(0, 100)
        with pytest.raises(DeviceGoneError):
            region.write8(5, 1)
        return True

    before = mmio.fault_count()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(fault, range(400)))
    assert mmio.fault_count() == before + 800
