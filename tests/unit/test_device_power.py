"""Registers of a function that sleeps, or that is being reset: no access reads 0xff there, and they come back."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from emulated_support import Everything

from vfiopy import AddressSpace, Device, DeviceGoneError, emulated, vfio_user

POWER = 0x44  # PMCSR: PowerManagement is the first capability
D0, D3HOT = 0, 3
REGISTERS, SHARED = 0, 2


class SlowToReset(Everything):
    """Says when it is in the middle of a reset, and waits there."""

    def __init__(self) -> None:
        super().__init__()
        self.resetting = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()

    def reset(self) -> None:
        super().reset()
        self.resetting.set()
        assert self.go_on.wait(10)


@pytest.fixture
def model() -> SlowToReset:
    return SlowToReset()


@pytest.fixture(params=["emulated", "vfio-user"])
def device(request: pytest.FixtureRequest, model: SlowToReset, tmp_path: Path) -> Iterator[Device]:
    with ExitStack() as stack:
        io, mapper = emulated.connect(model)
        if request.param == "vfio-user":
            stack.enter_context(vfio_user.Server(io, mapper, tmp_path / "socket")).start()
            io, mapper = vfio_user.connect(tmp_path / "socket")
        yield stack.enter_context(Device(io, mapper, AddressSpace(), owns_space=True))


def set_power(device: Device, state: int) -> None:
    device.config.write16(POWER, state)


def test_no_register_answers_in_d3hot(device: Device) -> None:
    registers, shared = device.bars[REGISTERS], device.bars[SHARED]
    shared.write32(0x100, 0x12345678)
    set_power(device, D3HOT)
    for region in (registers, shared):
        for use in (
            lambda: region.read32(0x100),  # noqa: B023
            lambda: region.write32(0x100, 1),  # noqa: B023
            lambda: region.read_block(0x100, 4),  # noqa: B023
            lambda: region.poll32(0x100, 1, 1, 0.01),  # noqa: B023
        ):
            with pytest.raises(DeviceGoneError):
                use()
    set_power(device, D0)
    assert registers.read32(0x100) == 0x55667788
    assert shared.read32(0x100) == 0x12345678


def test_registers_during_a_reset(device: Device, model: SlowToReset) -> None:
    """Who reads meanwhile waits for its end, or hears that the device is away."""
    model.go_on.clear()
    model.resetting.clear()
    resetting = threading.Thread(target=device.reset)
    resetting.start()
    assert model.resetting.wait(10)
    answers: list[object] = []

    def read() -> None:
        try:
            answers.append(device.bars[REGISTERS].read32(0x100))
        except DeviceGoneError as error:
            answers.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    reading.join(0.05)
    early = list(answers)
    model.go_on.set()
    for thread in (resetting, reading):
        thread.join(10)
    assert all(isinstance(answer, DeviceGoneError) for answer in early)
    assert len(answers) == 1
    assert isinstance(answers[0], DeviceGoneError) or answers[0] == 0x55667788
    assert device.bars[REGISTERS].read32(0x100) == 0x55667788
    assert device.memory_enabled
