"""VFIO's interrupt model over emulated devices, errors as the kernel's."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from emulated_support import (
    BUS_MASTER,
    INTX_DISABLE,
    Everything,
    disable_irq,
    enable_irq,
    eventfd,
    read_config,
    set_command,
    taken,
    write_config,
)
from ways import WAYS, reach

from vfiopy.backend import DeviceIo, IrqAction, IrqFlag, IrqIndex
from vfiopy.emulated import connect
from vfiopy.errors import AddressRangeError, NotSupportedError, VfioError

INTX, MSI, MSIX, ERR, REQ = IrqIndex
MASK, UNMASK, TRIGGER = IrqAction
MSI_CONTROL, MSIX_CONTROL = 0x4A, 0x62


@pytest.fixture
def device() -> Everything:
    return Everything(manual=True)


@pytest.fixture(params=WAYS)
def io(device: Everything, request: pytest.FixtureRequest) -> Iterator[DeviceIo]:
    with reach(device, request.param) as io:
        yield io


@pytest.fixture
def fds() -> Iterator[list[int]]:
    with ExitStack() as stack:
        yield [stack.enter_context(eventfd()) for _ in range(8)]


def expect(number: int, *, kind: type[VfioError] = VfioError) -> pytest.RaisesExc[VfioError]:
    return pytest.raises(kind, check=lambda error: error.errno == number)


# --- what there is -----------------------------------------------------------------------------------------------


def test_info_is_that_of_vfio_pci(io: DeviceIo) -> None:
    infos = [io.irq_info(index) for index in range(5)]
    assert [info.count for info in infos] == [1, 4, 8, 1, 1]
    assert [info.flags for info in infos] == [
        IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED,
        IrqFlag.EVENTFD | IrqFlag.NORESIZE,
        IrqFlag.EVENTFD,
        IrqFlag.EVENTFD | IrqFlag.NORESIZE,
        IrqFlag.EVENTFD | IrqFlag.NORESIZE,
    ]
    with pytest.raises(AddressRangeError, match="no interrupt index 5"):
        io.irq_info(5)


def test_info_of_edu() -> None:
    io, _ = connect("edu")
    with io:
        assert [io.irq_info(index).count for index in range(5)] == [1, 1, 0, 1, 1]
        assert io.irq_info(MSIX).flags == IrqFlag.EVENTFD | IrqFlag.NORESIZE  # as the kernel has it, even so


# --- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "control", "enable"), [(MSI, MSI_CONTROL, 1), (MSIX, MSIX_CONTROL, 1 << 15)])
def test_messages_signal_their_vectors(
    io: DeviceIo, device: Everything, fds: list[int], index: IrqIndex, control: int, enable: int
) -> None:
    set_command(io, on=BUS_MASTER)
    enable_irq(io, index, *fds[:3])
    assert device.config.read16(control) & enable
    device.interrupt(1)
    device.interrupt(1)
    device.interrupt(2)
    device.interrupt(3)  # not enabled
    assert [taken(fd) for fd in fds[:3]] == [0, 2, 1]
    disable_irq(io, index)
    assert not device.config.read16(control) & enable
    device.interrupt(1)
    assert taken(fds[1]) == 0


def test_eventfds_are_duplicated(io: DeviceIo, device: Everything) -> None:
    set_command(io, on=BUS_MASTER)
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    kept = os.dup(fd)
    enable_irq(io, MSI, fd)
    os.close(fd)
    device.interrupt()
    assert taken(kept) == 1
    os.close(kept)


def test_a_message_is_dma_and_needs_bus_mastering(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    enable_irq(io, MSI, fds[0])
    write_config(io, 0x4C, 4, 0xFEE0_1004)
    device.interrupt()
    assert taken(fds[0]) == 0
    assert device.faults[0].iova == 0xFEE0_1004
    assert "bus mastering is off" in device.faults[0].reason


def test_one_vector_is_replaced_or_taken_away(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    set_command(io, on=BUS_MASTER)
    enable_irq(io, MSIX, *fds[:2])
    io.set_irqs(MSIX, TRIGGER, 1, 1, fds=[fds[2]])
    io.set_irqs(MSIX, TRIGGER, 0, 1, fds=[-1])
    for vector in range(2):
        device.interrupt(vector)
    assert [taken(fd) for fd in fds[:3]] == [0, 0, 1]


def test_msix_grows_and_msi_does_not(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    set_command(io, on=BUS_MASTER)
    enable_irq(io, MSIX, fds[0])
    io.set_irqs(MSIX, TRIGGER, 5, 1, fds=[fds[1]])
    device.interrupt(5)
    assert taken(fds[1]) == 1
    disable_irq(io, MSIX)
    enable_irq(io, MSI, *fds[:2])
    with pytest.raises(VfioError, match=r"cannot grow|VFIO_USER_SET_IRQS") as caught:
        io.set_irqs(MSI, TRIGGER, 2, 1, fds=[fds[2]])
    assert caught.value.errno == errno.EINVAL


def test_software_trigger(io: DeviceIo, fds: list[int]) -> None:
    enable_irq(io, MSIX, *fds[:4])
    io.set_irqs(MSIX, TRIGGER, 1, 2)
    io.set_irqs(MSIX, TRIGGER, 0, 4, bools=[True, False, False, True])
    assert [taken(fd) for fd in fds[:4]] == [1, 1, 1, 1]


def test_lost_interrupts(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    set_command(io, on=BUS_MASTER)
    enable_irq(io, MSI, fds[0])
    device.inject.lost_interrupts = 1
    device.interrupt()
    assert taken(fds[0]) == 0
    device.interrupt()
    assert taken(fds[0]) == 1


def test_software_cannot_enable_messages_behind_vfio(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    before = read_config(io, MSIX_CONTROL, 2)
    write_config(io, MSI_CONTROL, 2, 0xFFFF)
    write_config(io, MSIX_CONTROL, 2, 0xFFFF)
    assert not read_config(io, MSI_CONTROL, 2) & 0x71
    assert read_config(io, MSIX_CONTROL, 2) == before
    assert not device.config.msi_enabled
    enable_irq(io, MSI, *fds[:2])
    assert device.config.msi_enabled
    assert not read_config(io, MSI_CONTROL, 2) & 1  # VFIO's copy does not follow
    write_config(io, MSI_CONTROL, 1, 0xFF)  # once it is set up, software may: here 2 vectors, so 2**1
    assert read_config(io, MSI_CONTROL, 2) & 0x71 == 0x11
    write_config(io, MSI_CONTROL, 1, 0)
    assert not device.config.msi_enabled
    write_config(io, MSI_CONTROL - 2, 4, 0xFFFF_FFFF)  # a wide write
    assert device.config.msi_enabled


# --- INTx --------------------------------------------------------------------------------------------------------


def test_intx_masks_itself_and_comes_again_while_asserted(
    io: DeviceIo, device: Everything, fds: list[int]
) -> None:
    enable_irq(io, INTX, fds[0])
    device.interrupt()
    device.interrupt()
    assert taken(fds[0]) == 1
    assert read_config(io, 0x06, 2) & 1 << 3
    io.set_irqs(INTX, UNMASK, 0, 1)
    assert taken(fds[0]) == 1  # the line is still up
    device.deassert()
    assert not read_config(io, 0x06, 2) & 1 << 3
    io.set_irqs(INTX, UNMASK, 0, 1)
    assert taken(fds[0]) == 0
    device.interrupt()
    assert taken(fds[0]) == 1


def test_intx_mask_holds_it_back(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    enable_irq(io, INTX, fds[0])
    io.set_irqs(INTX, MASK, 0, 1)
    device.interrupt()
    io.set_irqs(INTX, UNMASK, 0, 1, bools=[False])
    assert taken(fds[0]) == 0
    io.set_irqs(INTX, UNMASK, 0, 1, bools=[True])
    assert taken(fds[0]) == 1


def test_intx_that_went_away_while_masked_is_not_signalled(
    io: DeviceIo, device: Everything, fds: list[int]
) -> None:
    enable_irq(io, INTX, fds[0])
    io.set_irqs(INTX, MASK, 0, 1)
    device.interrupt()
    device.deassert()
    io.set_irqs(INTX, UNMASK, 0, 1)
    assert taken(fds[0]) == 0


def test_intx_disable_bit(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    enable_irq(io, INTX, fds[0])
    set_command(io, on=INTX_DISABLE)
    device.interrupt()
    assert taken(fds[0]) == 0
    assert read_config(io, 0x06, 2) & 1 << 3  # status shows it all the same
    set_command(io, off=INTX_DISABLE)
    assert taken(fds[0]) == 1


def test_intx_that_is_up_already_is_seen_when_enabled(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    device.interrupt()
    enable_irq(io, INTX, fds[0])
    assert taken(fds[0]) == 1


def test_intx_needs_no_bus_mastering_and_messages_do_not_use_it(
    io: DeviceIo, device: Everything, fds: list[int]
) -> None:
    set_command(io, on=BUS_MASTER)
    enable_irq(io, MSI, fds[0])
    device.interrupt()
    disable_irq(io, MSI)
    enable_irq(io, INTX, fds[1])
    assert (taken(fds[0]), taken(fds[1])) == (1, 0)
    set_command(io, off=BUS_MASTER)
    device.interrupt()
    assert taken(fds[1]) == 1


def test_messages_take_the_pin_back(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    device.interrupt()
    enable_irq(io, MSI, fds[0])
    assert not read_config(io, 0x06, 2) & 1 << 3
    disable_irq(io, MSI)
    enable_irq(io, INTX, fds[0])
    assert taken(fds[0]) == 0


def test_intx_software_trigger_leaves_the_mask(io: DeviceIo, fds: list[int]) -> None:
    enable_irq(io, INTX, fds[0])
    io.set_irqs(INTX, TRIGGER, 0, 1)
    io.set_irqs(INTX, TRIGGER, 0, 1)
    assert taken(fds[0]) == 2


# --- VFIO's own ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [ERR, REQ])
def test_own_signals_live_beside_the_others(io: DeviceIo, fds: list[int], index: IrqIndex) -> None:
    enable_irq(io, MSI, fds[0])
    enable_irq(io, index, fds[1])
    io.set_irqs(index, TRIGGER, 0, 1)
    assert taken(fds[1]) == 1
    io.set_irqs(index, TRIGGER, 0, 1, bools=[False])
    assert taken(fds[1]) == 0
    disable_irq(io, index)
    with expect(errno.EINVAL):
        io.set_irqs(index, TRIGGER, 0, 1)
    enable_irq(io, index, fds[1])
    enable_irq(io, index, -1)
    with expect(errno.EINVAL):
        disable_irq(io, index)
    io.set_irqs(index, TRIGGER, 0, 1, bools=[True])  # nobody listens: nothing happens
    with expect(errno.EINVAL):
        io.set_irqs(index, TRIGGER, 0, 0, bools=[])


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "start", "count"),
    [
        (MSI, 4, 1),
        (MSI, 3, 2),
        (MSI, 0, 5),
        (MSIX, 8, 0),
        (INTX, 1, 1),
        (INTX, 0, 2),
        (MSI, -1, 1),
        (5, 0, 0),
    ],
)
def test_ranges(io: DeviceIo, index: int, start: int, count: int) -> None:
    with expect(errno.EINVAL, kind=AddressRangeError):
        io.set_irqs(index, TRIGGER, start, count)


def test_an_index_without_vectors_cannot_even_be_disabled() -> None:
    io, _ = connect("edu")
    with io, expect(errno.EINVAL, kind=AddressRangeError):
        disable_irq(io, MSIX)


def test_one_kind_at_a_time(io: DeviceIo, fds: list[int]) -> None:
    enable_irq(io, MSI, fds[0])
    for index in (INTX, MSIX):
        with pytest.raises(VfioError, match=r"a function uses one kind|VFIO_USER_SET_IRQS") as caught:
            enable_irq(io, index, fds[1])
        assert caught.value.errno == errno.EINVAL
    disable_irq(io, MSI)
    enable_irq(io, MSIX, fds[1])


@pytest.mark.parametrize("index", [INTX, MSI, MSIX])
def test_what_is_not_enabled_cannot_be_triggered_or_disabled(io: DeviceIo, index: IrqIndex) -> None:
    for count in (0, 1):
        with expect(errno.EINVAL):
            io.set_irqs(index, TRIGGER, 0, count)


@pytest.mark.parametrize("action", [MASK, UNMASK])
def test_only_intx_can_be_masked(io: DeviceIo, fds: list[int], action: IrqAction) -> None:
    enable_irq(io, MSI, fds[0])
    for index in (MSI, MSIX, ERR, REQ):
        with expect(errno.ENOTTY, kind=NotSupportedError):
            io.set_irqs(index, action, 0, 1)
    with expect(errno.EINVAL):
        io.set_irqs(INTX, action, 0, 1)
    disable_irq(io, MSI)
    enable_irq(io, INTX, fds[0])
    with expect(errno.ENOTTY, kind=NotSupportedError):
        io.set_irqs(INTX, action, 0, 1, fds=[fds[1]])
    with expect(errno.EINVAL):
        io.set_irqs(INTX, action, 0, 0)


def test_data_has_to_fit(io: DeviceIo, fds: list[int]) -> None:
    with expect(errno.EINVAL):
        io.set_irqs(MSI, TRIGGER, 0, 2, fds=fds[:1])
    with expect(errno.EINVAL):
        io.set_irqs(MSI, TRIGGER, 0, 1, fds=fds[:1], bools=[True])
    with expect(errno.EINVAL):
        io.set_irqs(MSI, MASK | UNMASK, 0, 1)
    with expect(errno.ERANGE):
        io.set_irqs(MSI, TRIGGER, 0, 0, fds=[])
    enable_irq(io, MSI, fds[0])
    io.set_irqs(MSI, TRIGGER, 0, 0, fds=[])
    disable_irq(io, MSI)
    with expect(errno.EINVAL):
        io.set_irqs(INTX, TRIGGER, 0, 0, fds=[])


def test_bad_fds_leave_everything_as_it_was(io: DeviceIo, device: Everything, fds: list[int]) -> None:
    set_command(io, on=BUS_MASTER)
    enable_irq(io, MSIX, *fds[:2])
    gc.collect()  # what earlier tests left must not go in between
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208  the names are what is compared
    reader, writer = os.pipe()
    with pytest.raises(VfioError, match="not an eventfd") as caught:
        enable_irq(io, MSIX, fds[2], reader)
    assert caught.value.errno == errno.EINVAL
    os.close(reader)
    os.close(writer)
    with expect(errno.EBADF):
        enable_irq(io, MSIX, fds[2], reader)
    with expect(errno.EBADF):
        enable_irq(io, MSIX, fds[2], -2)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    device.interrupt(0)
    device.interrupt(1)
    assert [taken(fd) for fd in fds[:3]] == [1, 1, 0]


def test_a_first_enable_that_fails_enables_nothing(io: DeviceIo, fds: list[int]) -> None:
    with expect(errno.EBADF):
        enable_irq(io, MSI, fds[0], 12345)
    assert not read_config(io, MSI_CONTROL, 2) & 1
    enable_irq(io, INTX, fds[0])


def test_close_disables(device: Everything, fds: list[int]) -> None:
    io, _ = connect(device)
    enable_irq(io, MSI, fds[0])
    enable_irq(io, REQ, fds[1])
    io.close()
    assert not device.config.msi_enabled
    device.interrupt()
    assert taken(fds[0]) == 0
