"""Emulated devices from open to close: reset, power cycles, what is left behind, rules for device code."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from emulated_support import (
    BUS_MASTER,
    COMMAND,
    MEMORY,
    Everything,
    enable_irq,
    eventfd,
    read32,
    read_config,
    set_command,
    write32,
    write_config,
)

from vfiopy.backend import IrqIndex
from vfiopy.emulated import Edu, EmulatedDeviceIo, PciDevice, connect
from vfiopy.errors import (
    BusyError,
    ClosedError,
    ForkedError,
    NotSupportedError,
    StateError,
)
from vfiopy.lives import drain_finalizers


@pytest.fixture
def device() -> Everything:
    return Everything(manual=True)


@pytest.fixture
def io(device: Everything) -> Iterator[EmulatedDeviceIo]:
    io, _ = connect(device)
    with io:
        yield io


@pytest.fixture
def edu() -> Iterator[EmulatedDeviceIo]:
    io, _ = connect("edu")
    with io:
        yield io


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# --- reset, features, lives --------------------------------------------------------------------------------------


def test_edu_has_no_function_reset(edu: EmulatedDeviceIo) -> None:
    with pytest.raises(NotSupportedError, match="no function reset") as caught:
        edu.reset()
    assert caught.value.errno == errno.EINVAL


def test_reset_drops_work_and_keeps_configuration(io: EmulatedDeviceIo, device: Everything) -> None:
    ran: list[int] = []
    device.later(lambda: ran.append(1))
    set_command(io, on=BUS_MASTER)
    io.reset()
    assert device.resets == 2  # the first was power-on
    assert not device.step()
    assert ran == []
    assert read_config(io, COMMAND, 2) & (BUS_MASTER | MEMORY) == BUS_MASTER | MEMORY


def test_reset_through_configuration_space(io: EmulatedDeviceIo, device: Everything) -> None:
    found = device.config.find(Everything.capabilities[3].__class__)
    assert found is not None
    control = found[1] + 8
    write_config(io, control, 2, read_config(io, control, 2) | 1 << 15)
    assert device.resets == 2


def test_features_do_not_exist(edu: EmulatedDeviceIo) -> None:
    with pytest.raises(NotSupportedError, match="feature 11") as caught:
        edu.feature(11, 1 << 16, b"")
    assert caught.value.errno == errno.ENOTTY


def test_one_device_is_open_once_at_a_time() -> None:
    device = Edu()
    first, _ = connect(device)
    with pytest.raises(BusyError, match="open already"):
        connect(device)
    first.close()
    again, _ = connect(device)
    again.close()


def test_closing_is_a_power_cycle() -> None:
    device = Edu(manual=True)
    io, _ = connect(device)
    write32(io, 0x04, 5)
    write32(io, 0x08, 5)
    set_command(io, on=BUS_MASTER)
    io.close()
    io, _ = connect(device)
    with io:
        assert [read32(io, offset) for offset in (0x04, 0x08, 0x20)] == [0, 0, 0]
        assert not device.step()
        assert not read_config(io, COMMAND, 2) & BUS_MASTER


def test_use_after_close_says_so() -> None:
    io, _ = connect("edu")
    io.close()
    io.close()
    uses: list[Any] = [
        lambda: io.read(0, 0, 4),
        lambda: io.write(0, 4, bytes(4)),
        lambda: io.read(7, 0, 4),
        io.info,
        io.reset,
        lambda: io.region_info(0),
        lambda: io.irq_info(0),
        lambda: io.map_region(0, 0, 4096),
        lambda: enable_irq(io, IrqIndex.MSI, 0),
        lambda: io.feature(0, 0, b""),
    ]
    for use in uses:
        with pytest.raises(ClosedError, match="emulated:edu is closed"):
            use()


def test_nothing_is_left_behind() -> None:
    gc.collect()
    fds, threads = open_fds(), threading.active_count()
    for _ in range(20):
        io, mapper = connect(Edu(delay=(0.0, 0.001)))
        with eventfd() as fd:
            enable_irq(io, IrqIndex.MSI, fd)
            write32(io, 0x20, 0x80)
            write32(io, 0x08, 5)  # still at work when it closes, or not
            io.close()
            mapper.close()
    io, mapper = connect(Everything())
    io.map_region(2, 0, 0x1000).close()
    io.close()
    mapper.close()
    del io, mapper
    gc.collect()
    assert (open_fds(), threading.active_count()) == (fds, threads)


def test_a_dropped_device_is_closed_by_the_next_operation() -> None:
    threads = threading.active_count()
    io, _ = connect(Edu(delay=(0.0, 0.0)))
    write32(io, 0x08, 5)
    while read32(io, 0x20):
        pass
    device = weakref.ref(io.device)
    del io, _
    gc.collect()
    with pytest.warns(ResourceWarning, match="emulated:edu was never closed"):
        drain_finalizers()
    gc.collect()
    assert device() is None
    assert threading.active_count() == threads


def test_a_dropped_device_takes_its_windows_along() -> None:
    io, _ = connect(Everything())
    window = io.map_region(2, 0, 0x1000)
    del io, _
    gc.collect()
    with pytest.warns(ResourceWarning, match="never closed"):
        drain_finalizers()
    assert not window


# --- rules for device code ---------------------------------------------------------------------------------------


class Careless(Everything):
    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        if offset == 0:
            self.dma_read(0x1000, 4)
        else:
            self.later(lambda: [][value])


def test_a_register_handler_cannot_do_dma() -> None:
    io, _ = connect(Careless(manual=True))
    with io, pytest.raises(StateError, match="later"):
        write32(io, 0, 1)


def test_code_that_fails_is_on_record_and_does_not_end_the_device() -> None:
    device = Careless(delay=(0.0, 0.0))
    io, _ = connect(device)
    with io:
        write32(io, 4, 7)
        write32(io, 4, 8)
        while len(device.errors) < 2:
            pass
        assert isinstance(device.errors[0].exception, IndexError)
        assert "IndexError" in device.errors[0].text


def test_in_manual_mode_it_is_raised_too() -> None:
    device = Careless(manual=True)
    io, _ = connect(device)
    with io:
        write32(io, 4, 7)
        with pytest.raises(IndexError):
            device.step()
        assert len(device.errors) == 1


def test_records_do_not_grow_for_ever() -> None:
    device = Everything()
    for number in range(1500):
        device.record_error(str(number))
    assert len(device.errors) == 1000
    assert device.errors[-1].text == "1499"


def test_a_device_that_is_not_open_has_no_host() -> None:
    with pytest.raises(StateError, match=r"vfiopy\.open"):
        _ = PciDevice.host.fget(Everything())  # type: ignore[attr-defined]


def test_delay_has_to_make_sense() -> None:
    with pytest.raises(ValueError, match="shortest and the longest"):
        Edu(delay=(0.2, 0.1))


def test_a_forked_child_cannot_use_it(edu: EmulatedDeviceIo) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            try:
                read32(edu, 0)
            except ForkedError:
                edu.close()  # does nothing there
                status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert read32(edu, 0) == 0x010000ED
