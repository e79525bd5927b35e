"""The edu device: every register, at the seam."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
from emulated_support import (
    BUS_MASTER,
    disable_irq,
    enable_irq,
    eventfd,
    read32,
    set_command,
    taken,
    wait_for,
    write32,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vfiopy.backend import IrqAction, IrqIndex
from vfiopy.emulated import Edu, EmulatedDeviceIo, connect

ID, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, RAISE, ACK = 0x00, 0x04, 0x08, 0x20, 0x24, 0x60, 0x64
SOURCE, DESTINATION, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98


@pytest.fixture
def device() -> Edu:
    return Edu(manual=True)


@pytest.fixture
def io(device: Edu) -> Iterator[EmulatedDeviceIo]:
    io, _ = connect(device)
    with io:
        set_command(io, on=BUS_MASTER)
        yield io


def test_identification(io: EmulatedDeviceIo) -> None:
    assert read32(io, ID) == 0x010000ED
    write32(io, ID, 0)
    assert read32(io, ID) == 0x010000ED


@settings(deadline=None)
@given(st.integers(0, 0xFFFF_FFFF))
def test_liveness_inverts(value: int) -> None:
    io, _ = connect(Edu(manual=True))
    with io:
        write32(io, LIVENESS, value)
        assert read32(io, LIVENESS) == value ^ 0xFFFF_FFFF


# --- factorial ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2, 5, 12, 13, 20, 33, 34, 35, 1000, 0xFFFF_FFFF])
def test_factorial_modulo_2_to_32(io: EmulatedDeviceIo, device: Edu, number: int) -> None:
    write32(io, FACTORIAL, number)
    assert device.step()
    # from 34 on there are 32 factors of two
    expected = math.factorial(number) & 0xFFFF_FFFF if number < 100 else 0
    assert read32(io, FACTORIAL) == expected


def test_factorial_completes_later(io: EmulatedDeviceIo, device: Edu) -> None:
    write32(io, FACTORIAL, 5)
    assert read32(io, STATUS) == 1
    assert read32(io, FACTORIAL) == 5  # not yet
    write32(io, FACTORIAL, 6)  # ignored while it computes
    device.step()
    assert read32(io, STATUS) == 0
    assert read32(io, FACTORIAL) == 120
    assert not device.step()


def test_factorial_by_itself() -> None:
    io, _ = connect(Edu(delay=(0.01, 0.02)))
    with io:
        begin = time.monotonic()
        write32(io, FACTORIAL, 10)
        assert read32(io, STATUS) & 1
        wait_for(lambda: not read32(io, STATUS) & 1)
        assert time.monotonic() - begin >= 0.01
        assert read32(io, FACTORIAL) == math.factorial(10)


def test_only_the_interrupt_bit_of_status_can_be_written(io: EmulatedDeviceIo, device: Edu) -> None:
    write32(io, STATUS, 0xFFFF_FFFF)
    assert read32(io, STATUS) == 0x80
    write32(io, FACTORIAL, 3)
    write32(io, STATUS, 0)
    assert read32(io, STATUS) == 0x01
    device.step()
    assert read32(io, IRQ_STATUS) == 0


def test_work_that_is_lost_leaves_it_computing(io: EmulatedDeviceIo, device: Edu) -> None:
    device.inject.lost_work = 1
    write32(io, FACTORIAL, 3)
    assert not device.step()
    assert read32(io, STATUS) == 1


# --- interrupts --------------------------------------------------------------------------------------------------


def test_factorial_interrupt_by_msi(io: EmulatedDeviceIo, device: Edu) -> None:
    with eventfd() as fd:
        enable_irq(io, IrqIndex.MSI, fd)
        write32(io, STATUS, 0x80)
        write32(io, FACTORIAL, 4)
        assert taken(fd) == 0
        device.step()
        assert taken(fd) == 1
        assert read32(io, IRQ_STATUS) == 1
        write32(io, ACK, 1)
        assert read32(io, IRQ_STATUS) == 0
        disable_irq(io, IrqIndex.MSI)


def test_raise_and_acknowledge(io: EmulatedDeviceIo) -> None:
    with eventfd() as fd:
        enable_irq(io, IrqIndex.MSI, fd)
        write32(io, RAISE, 0x40)
        write32(io, RAISE, 0x02)
        assert taken(fd) == 2  # a message each
        assert read32(io, IRQ_STATUS) == 0x42
        write32(io, ACK, 0x02)
        assert read32(io, IRQ_STATUS) == 0x40
        write32(io, RAISE, 0)  # with bits set, raising nothing sends again
        assert taken(fd) == 1
        write32(io, ACK, 0xFFFF_FFFF)
        write32(io, RAISE, 0)
        assert taken(fd) == 0


def test_intx_stays_up_until_everything_is_acknowledged(io: EmulatedDeviceIo) -> None:
    with eventfd() as fd:
        enable_irq(io, IrqIndex.INTX, fd)
        write32(io, RAISE, 0x3)
        assert taken(fd) == 1
        write32(io, ACK, 0x1)
        io.set_irqs(IrqIndex.INTX, IrqAction.UNMASK, 0, 1)
        assert taken(fd) == 1
        write32(io, ACK, 0x2)
        io.set_irqs(IrqIndex.INTX, IrqAction.UNMASK, 0, 1)
        assert taken(fd) == 0


# --- widths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [ID, LIVENESS, STATUS, SOURCE, COMMAND, 0x40])
@pytest.mark.parametrize("width", [1, 2])
def test_narrow_accesses_do_nothing(io: EmulatedDeviceIo, offset: int, width: int) -> None:
    before = read32(io, offset)
    io.write(0, offset, b"\xff" * width)
    assert read32(io, offset) == before
    assert io.read(0, offset, width) == bytes(width)


def test_wide_accesses_are_for_the_dma_registers(io: EmulatedDeviceIo) -> None:
    assert io.read(0, ID, 8) == b"\xff" * 8
    io.write(0, LIVENESS - 4, bytes(8))
    assert read32(io, LIVENESS) == 0
    io.write(0, SOURCE, (0x1_2345_6789_ABCD).to_bytes(8, "little"))
    assert io.read(0, SOURCE, 8) == (0x1_2345_6789_ABCD).to_bytes(8, "little")
    assert read32(io, SOURCE) == 0x6789_ABCD
    write32(io, SOURCE, 0x55)  # 4 bytes replace all 8
    assert io.read(0, SOURCE, 8) == (0x55).to_bytes(8, "little")


@pytest.mark.parametrize("offset", [0x0C, 0x28, 0x60, 0x64, 0x7C, 0x84, 0xA0, 0x4_0000, 0xF_FFFC])
def test_what_is_no_register_reads_as_ones(io: EmulatedDeviceIo, offset: int) -> None:
    if offset not in (RAISE, ACK):
        write32(io, offset, 0)
    assert read32(io, offset) == 0xFFFF_FFFF


def test_dma_command_without_start_is_ignored(io: EmulatedDeviceIo, device: Edu) -> None:
    write32(io, COMMAND, 6)
    assert read32(io, COMMAND) == 0
    assert not device.step()


def test_dma_registers_are_locked_while_it_runs(io: EmulatedDeviceIo, device: Edu) -> None:
    write32(io, DESTINATION, 0x4_0000)
    write32(io, COUNT, 0)
    write32(io, COMMAND, 1)
    assert read32(io, COMMAND) == 1
    for offset in (SOURCE, DESTINATION, COUNT, COMMAND):
        write32(io, offset, 7)
    assert [read32(io, offset) for offset in (SOURCE, DESTINATION, COUNT, COMMAND)] == [0, 0x4_0000, 0, 1]
    device.step()
    assert read32(io, COMMAND) == 0


# --- determinism -------------------------------------------------------------------------------------------------


def delays(seed: int) -> list[float]:
    device = Edu(seed=seed, manual=True)
    io, _ = connect(device)
    found = []
    with io:
        for number in range(5):
            write32(io, FACTORIAL, number)
            before = device.engine._now
            device.step()
            found.append(device.engine._now - before)
    return found


def test_the_same_seed_gives_the_same_delays() -> None:
    assert delays(1) == delays(1)
    assert delays(1) != delays(2)
    assert all(0.0002 <= delay <= 0.0020001 for delay in delays(3))
    assert len(set(delays(3))) == 5
