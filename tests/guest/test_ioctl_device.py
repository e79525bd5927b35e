"""Device ioctls against the real kernel: regions, interrupts, resets, ioeventfds."""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from ioctl_support import PAGE, bound, linux, opened, wait_for
from modes import E1000E, EDU, IGB, MODES, NVME

from vfiopy import kernel, pci
from vfiopy.backend import IrqAction, IrqFlag, IrqIndex, RegionFlag, RegionIndex
from vfiopy.errors import (
    AccessError,
    AddressRangeError,
    DeviceGoneError,
    NotSupportedError,
    NotViableError,
    OverlapError,
    VfioError,
    WrongFdError,
)
from vfiopy.kernel import KernelDeviceIo

Bdf = Callable[..., str]
CONFIG = RegionIndex.CONFIG
COMMAND = 4
MEMORY, MASTER = 2, 4
RAISE, ACK = 0x60, 0x64  # edu's interrupt registers (QEMU docs/specs/edu.rst)


@pytest.fixture(params=["type1v2", "iommufd"])
def io(request: pytest.FixtureRequest, bdf: Bdf) -> Iterator[KernelDeviceIo]:
    """edu, opened over both roads."""
    address = bdf(EDU)
    with bound(address), opened(address, request.param) as (io, _):
        yield io


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def signals(fd: int, seconds: float = 5.0) -> int:
    """How often an eventfd has been signalled; waits for the first."""
    if not select.select([fd], [], [], seconds)[0]:
        return 0
    return os.eventfd_read(fd)


def command(io: KernelDeviceIo, *, set_bits: int = 0, clear: int = 0) -> None:
    value = int.from_bytes(io.read(CONFIG, COMMAND, 2), "little")
    io.write(CONFIG, COMMAND, ((value | set_bits) & ~clear).to_bytes(2, "little"))


# --- regions ----------------------------------------------------------------------------------------------------


def test_info(io: KernelDeviceIo) -> None:
    info = io.info()
    assert (info.num_regions, info.num_irqs, info.can_reset, info.is_pci) == (9, 5, False, True)
    bar = io.region_info(0)
    assert bar.flags == RegionFlag.READ | RegionFlag.WRITE | RegionFlag.MMAP
    assert not bar.msix_mappable
    assert io.region_info(CONFIG).size == 256
    assert io.region_info(RegionIndex.VGA).size == 0  # the kernel says EINVAL
    for index in (9, 40, 0xFFFFFFFF):
        with pytest.raises(AddressRangeError, match=f"region {index}"):
            io.region_info(index)


def test_interrupt_info(io: KernelDeviceIo) -> None:
    intx = io.irq_info(IrqIndex.INTX)
    assert intx.count == 1
    assert intx.flags == IrqFlag.EVENTFD | IrqFlag.MASKABLE | IrqFlag.AUTOMASKED
    assert io.irq_info(IrqIndex.MSI).count == 1
    assert io.irq_info(IrqIndex.MSIX).count == 0
    # edu is not PCI Express: up to Linux 7.2 the kernel says EINVAL
    assert io.irq_info(IrqIndex.ERR).count == (1 if linux() >= (7, 3) else 0)
    assert io.irq_info(IrqIndex.REQ).count == 1
    with pytest.raises(AddressRangeError, match="irq index 5"):
        io.irq_info(5)


def test_msix_of_a_mappable_bar(bdf: Bdf) -> None:
    address = bdf(NVME)
    with bound(address), opened(address) as (io, _):
        assert io.region_info(0).msix_mappable
        assert io.irq_info(IrqIndex.MSIX).count > 1


def test_memory_decode_off(io: KernelDeviceIo) -> None:
    assert io.read(0, 0, 4) == bytes.fromhex("ed000001")
    command(io, clear=MEMORY)
    with pytest.raises(DeviceGoneError, match=r"memory decode off.*BAR 0, offset 0x0, 4 bytes"):
        io.read(0, 0, 4)
    with pytest.raises(DeviceGoneError, match="memory decode off") as caught:
        io.write(0, 4, bytes(4))
    assert "PCI_COMMAND" in caught.value.hint
    command(io, set_bits=MEMORY)
    assert io.read(0, 0, 4) == bytes.fromhex("ed000001")


def test_bus_master_is_off_at_open(io: KernelDeviceIo) -> None:
    value = int.from_bytes(io.read(CONFIG, COMMAND, 2), "little")
    assert value & (MEMORY | MASTER) == MEMORY


def test_reads_past_the_end(io: KernelDeviceIo) -> None:
    with pytest.raises(AddressRangeError, match=r"BAR 0.*outside of its 0x100000 bytes"):
        io.read(0, 0x100000, 1)
    # What our own check refuses the kernel refuses too.
    info = io.region_info(0)
    with pytest.raises(AddressRangeError, match="ends before this offset"):
        io.calls.pread(info.offset + info.size, 4)
    with pytest.raises(AddressRangeError):
        io.calls.pwrite(info.offset + info.size, bytes(4))


def test_what_cannot_be_mapped(io: KernelDeviceIo) -> None:
    with pytest.raises(NotSupportedError, match="config space cannot be mapped"):
        io.map_region(CONFIG, 0, PAGE)
    info = io.region_info(0)
    for offset, size in ((io.region_info(CONFIG).offset, PAGE), (info.offset, 2 * info.size), (1 << 40, PAGE)):
        with pytest.raises(NotSupportedError, match="cannot be mapped"):
            io.calls.map(offset, size, 3, 0)


def test_a_mapped_bar_is_aligned_for_huge_pages(io: KernelDeviceIo) -> None:
    with io.map_region(0, 0, 1 << 20) as window:
        assert window.address % (1 << 20) == 0
    with io.map_region(0, PAGE, PAGE) as window:
        assert window.size == PAGE


def test_io_ports_are_read_and_written_but_not_mapped(bdf: Bdf) -> None:
    address = bdf(E1000E)
    with bound(address), opened(address) as (io, _):
        ports = next(i for i in range(6) if io.region_info(i).size and RegionFlag.MMAP not in io.region_info(i).flags)
        command(io, set_bits=1)
        io.write(ports, 0, (8).to_bytes(4, "little"))  # IOADDR: the status register
        assert int.from_bytes(io.read(ports, 4, 4), "little") == int.from_bytes(io.read(0, 8, 4), "little")
        with pytest.raises(NotSupportedError, match=f"BAR {ports} cannot be mapped"):
            io.map_region(ports, 0, PAGE)


# --- interrupts -------------------------------------------------------------------------------------------------


def test_msi_from_the_device_and_by_software(io: KernelDeviceIo) -> None:
    with eventfd() as fd:
        io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 1, fds=[fd])
        io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 1)
        assert signals(fd) == 1
        io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 1, bools=[True])
        assert signals(fd) == 1
        command(io, set_bits=MASTER)
        io.write(0, RAISE, (1).to_bytes(4, "little"))
        assert signals(fd) == 1
        io.write(0, ACK, (1).to_bytes(4, "little"))
        io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 1, fds=[-1])
        io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 0)
        assert signals(fd, 0.05) == 0


def test_intx_masks_itself_until_unmasked(io: KernelDeviceIo) -> None:
    with eventfd() as fd:
        io.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 1, fds=[fd])
        io.write(0, RAISE, (1).to_bytes(4, "little"))
        assert signals(fd) == 1
        assert signals(fd, 0.1) == 0  # still asserted, but masked
        io.set_irqs(IrqIndex.INTX, IrqAction.UNMASK, 0, 1)
        assert signals(fd) == 1
        io.write(0, ACK, (1).to_bytes(4, "little"))
        io.set_irqs(IrqIndex.INTX, IrqAction.UNMASK, 0, 1)
        assert signals(fd, 0.1) == 0
        io.set_irqs(IrqIndex.INTX, IrqAction.MASK, 0, 1)
        io.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 0)


def test_unmask_by_eventfd(io: KernelDeviceIo) -> None:
    with eventfd() as fd, eventfd() as unmask:
        io.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 1, fds=[fd])
        io.set_irqs(IrqIndex.INTX, IrqAction.UNMASK, 0, 1, fds=[unmask])
        io.write(0, RAISE, (1).to_bytes(4, "little"))
        assert signals(fd) == 1
        os.eventfd_write(unmask, 1)
        assert signals(fd) == 1
        io.write(0, ACK, (1).to_bytes(4, "little"))
        with pytest.raises(NotSupportedError, match="does not have this action"):
            io.set_irqs(IrqIndex.INTX, IrqAction.MASK, 0, 1, fds=[unmask])
        io.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 0)


def test_interrupt_refusals(io: KernelDeviceIo) -> None:
    msi = IrqIndex.MSI
    with eventfd() as fd:
        for index, start, fds in ((msi, 0, [fd, fd]), (msi, 1, [fd]), (IrqIndex.MSIX, 0, [fd]), (7, 0, [fd])):
            with pytest.raises(AddressRangeError, match=f"irq index {int(index)}, vectors {start} to"):
                io.set_irqs(index, IrqAction.TRIGGER, start, len(fds), fds=fds)
        with pytest.raises(AddressRangeError):  # nothing is set up yet
            io.set_irqs(msi, IrqAction.TRIGGER, 0, 1)
        with pytest.raises(WrongFdError, match="one of the eventfds is not open"):
            io.set_irqs(msi, IrqAction.TRIGGER, 0, 1, fds=[4000])
        with open(os.devnull, "rb") as null, pytest.raises(AddressRangeError, match="not an eventfd"):  # noqa: PTH123
            io.set_irqs(msi, IrqAction.TRIGGER, 0, 1, fds=[null.fileno()])
        io.set_irqs(msi, IrqAction.TRIGGER, 0, 1, fds=[fd])
        with pytest.raises(NotSupportedError, match="cannot be masked here"):
            io.set_irqs(msi, IrqAction.MASK, 0, 1)
        with pytest.raises(AddressRangeError, match="another kind of interrupt is enabled"):
            io.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 1, fds=[fd])
        io.set_irqs(msi, IrqAction.TRIGGER, 0, 0)
        io.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 1, fds=[fd])
        io.set_irqs(IrqIndex.INTX, IrqAction.TRIGGER, 0, 0)


def test_request_interrupt(io: KernelDeviceIo) -> None:
    with eventfd() as fd:
        io.set_irqs(IrqIndex.REQ, IrqAction.TRIGGER, 0, 1, fds=[fd])
        io.set_irqs(IrqIndex.REQ, IrqAction.TRIGGER, 0, 1)
        assert signals(fd) == 1
        io.set_irqs(IrqIndex.REQ, IrqAction.TRIGGER, 0, 1, fds=[-1])


def test_msix_vectors_and_error_interrupt(bdf: Bdf) -> None:
    address = bdf(IGB)
    with bound(address), opened(address) as (io, _), ExitStack() as stack:
        count = io.irq_info(IrqIndex.MSIX).count
        assert count == 10
        fds = [stack.enter_context(eventfd()) for _ in range(count)]
        io.set_irqs(IrqIndex.MSIX, IrqAction.TRIGGER, 0, count, fds=fds)
        for number, fd in enumerate(fds):
            io.set_irqs(IrqIndex.MSIX, IrqAction.TRIGGER, number, 1)
            assert [signals(other, 0) for other in fds if other is not fd] == [0] * (count - 1)
            assert signals(fd) == 1
        with stack.enter_context(ExitStack()), eventfd() as other:
            io.set_irqs(IrqIndex.MSIX, IrqAction.TRIGGER, 3, 1, fds=[other])
            io.set_irqs(IrqIndex.MSIX, IrqAction.TRIGGER, 3, 1)
            assert (signals(other), signals(fds[3], 0)) == (1, 0)
            io.set_irqs(IrqIndex.MSIX, IrqAction.TRIGGER, 3, 1, fds=[-1])
        with pytest.raises(AddressRangeError, match="vectors 9 to 10"):
            io.set_irqs(IrqIndex.MSIX, IrqAction.TRIGGER, 9, 2, fds=fds[:2])
        io.set_irqs(IrqIndex.MSIX, IrqAction.TRIGGER, 0, 0)
        # PCI Express: it has an error interrupt
        assert io.irq_info(IrqIndex.ERR).count == 1
        io.set_irqs(IrqIndex.ERR, IrqAction.TRIGGER, 0, 1, fds=fds[:1])
        io.set_irqs(IrqIndex.ERR, IrqAction.TRIGGER, 0, 1)
        assert signals(fds[0]) == 1
        io.set_irqs(IrqIndex.ERR, IrqAction.TRIGGER, 0, 1, fds=[-1])


# --- ioeventfd --------------------------------------------------------------------------------------------------


def test_ioeventfd_writes_a_register(io: KernelDeviceIo) -> None:
    bar = io.region_info(0).offset
    liveness = 4  # edu answers with the complement of what is written
    with eventfd() as fd:
        io.calls.ioeventfd(bar + liveness, 0x12345678, 4, fd)
        os.eventfd_write(fd, 1)
        expected = (0x12345678 ^ 0xFFFFFFFF).to_bytes(4, "little")
        assert wait_for(lambda: io.read(0, liveness, 4) == expected)
        with pytest.raises(OverlapError, match="same register and value"):
            io.calls.ioeventfd(bar + liveness, 0x12345678, 4, fd)
        io.calls.ioeventfd(bar + liveness, 0x12345678, 4, -1)
        with pytest.raises(VfioError, match="no such ioeventfd to remove"):
            io.calls.ioeventfd(bar + liveness, 0x12345678, 4, -1)
        for offset, width in ((bar + 8, 3), (io.region_info(CONFIG).offset, 4), (bar + (1 << 20), 4)):
            with pytest.raises(AccessError, match="ioeventfds are for registers in a BAR"):
                io.calls.ioeventfd(offset, 0, width, fd)


# --- resets -----------------------------------------------------------------------------------------------------


def test_function_reset(bdf: Bdf) -> None:
    address = bdf(NVME)
    with bound(address), opened(address) as (io, _):
        assert io.info().can_reset
        configuration = 0x14  # CC of an NVMe controller
        io.write(0, configuration, (0x460000).to_bytes(4, "little"))
        assert io.read(0, configuration, 4) != bytes(4)
        io.reset()
        assert io.read(0, configuration, 4) == bytes(4)


def test_no_function_reset(io: KernelDeviceIo) -> None:
    with pytest.raises(NotSupportedError, match="the device has no function reset") as caught:
        io.reset()
    assert "hot reset" in caught.value.hint


def test_no_hot_reset_on_a_root_bus(io: KernelDeviceIo) -> None:
    with pytest.raises(NotSupportedError, match="sits on a root bus"):
        kernel.hot_reset_info(io)


@pytest.fixture
def behind(bdfs: Callable[[str], list[str]]) -> tuple[str, str]:
    """Two functions behind one bridge: edu and pci-testdev."""
    edu = next(one for one in bdfs(EDU) if len(pci.function(one).group_members()) > 1)
    members = [str(one.address) for one in pci.function(edu).group_members() if not one.is_bridge]
    assert len(members) == 2
    return edu, next(one for one in members if one != edu)


@pytest.mark.parametrize("mode", MODES)
def test_hot_reset_of_all_that_is_behind_a_bridge(mode: str, behind: tuple[str, str]) -> None:
    first, second = behind
    with (
        bound(first, second),
        opened(first, mode) as (io, mapper),
        opened(second, mode, mappers=[mapper]) as (other, _),
    ):
        info = kernel.hot_reset_info(io)
        assert info.by_device_id is (mode == "iommufd")
        assert {one.address for one in info.devices} == {first, second}
        # pci-testdev shows the header of the test that was chosen last, and nothing after a reset.
        other.write(0, 0, b"\0")
        assert other.read(0, 1, 1) != b"\0"
        kernel.hot_reset(io, [other])
        assert other.read(0, 1, 1) == b"\0"


@pytest.mark.parametrize("mode", ["type1v2", "iommufd"])
def test_hot_reset_names_a_sibling_that_is_in_other_hands(mode: str, behind: tuple[str, str]) -> None:
    first, second = behind
    with bound(first), bound(second, to="pci-stub"), opened(first, mode) as (io, _):
        if mode == "iommufd":
            with pytest.raises(NotViableError, match=rf"not open here: {second} \(pci-stub\)"):
                kernel.hot_reset(io)
            with pytest.raises(NotViableError, match="not all devices that the reset would hit"):
                io.calls.pci_hot_reset()
        else:
            with pytest.raises(NotViableError, match="not all devices that the reset would hit"):
                kernel.hot_reset(io)


def test_hot_reset_forms_do_not_mix(behind: tuple[str, str]) -> None:
    first, second = behind
    with (
        bound(first, second),
        opened(first, "type1v2") as (io, _),
        pytest.raises(NotViableError, match="not all devices"),
    ):
        io.calls.pci_hot_reset()  # the form for a cdev
