"""The emulated edu against the one that QEMU emulates behind vfio-pci: the same calls at the seam, the same answers."""

from __future__ import annotations

import errno
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
from modes import EDU

import vfiopy
from vfiopy import emulated, kernel
from vfiopy.backend import DeviceIo, IrqAction, IrqIndex, RegionFlag
from vfiopy.errors import VfioError

Lookup = Callable[..., str]
MASK, UNMASK, TRIGGER = IrqAction
INTX, MSI, MSIX, ERR, REQ = IrqIndex
CONFIG = 7


@contextmanager
def real(address: str) -> Iterator[DeviceIo]:
    with vfiopy.bind(address):
        io, mapper = kernel.connect(address)
        try:
            yield io
        finally:
            io.close()
            mapper.close()


@contextmanager
def software() -> Iterator[DeviceIo]:
    io, mapper = emulated.connect("edu")
    try:
        yield io
    finally:
        io.close()
        mapper.close()


@pytest.fixture
def answers(bdf: Lookup) -> Callable[[Callable[[DeviceIo], Any]], tuple[Any, Any]]:
    """Ask both devices the same; return what each says."""

    def ask(question: Callable[[DeviceIo], Any]) -> tuple[Any, Any]:
        with real(bdf(EDU)) as io:
            theirs = question(io)
        with software() as io:
            ours = question(io)
        return theirs, ours

    return ask


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the errno that it raises."""
    try:
        return call()
    except VfioError as error:
        return errno.errorcode[error.errno or 0]


def word(io: DeviceIo, offset: int, size: int = 2) -> int:
    return int.from_bytes(io.read(CONFIG, offset, size), "little")


def set_word(io: DeviceIo, offset: int, value: int, size: int = 2) -> None:
    io.write(CONFIG, offset, value.to_bytes(size, "little"))


def test_info(answers: Any) -> None:
    def ask(io: DeviceIo) -> Any:
        info = io.info()
        regions = [io.region_info(index) for index in range(9)]
        irqs = [io.irq_info(index) for index in range(5)]
        return (
            (info.num_regions, info.num_irqs, info.can_reset),
            # only a BAR of real registers can be mapped
            [(region.size, region.flags & ~RegionFlag.MMAP) for region in regions],
            [(irq.count, irq.flags) for irq in irqs],
            outcome(lambda: io.region_info(9)),
            outcome(lambda: io.irq_info(5)),
            outcome(io.reset),
        )

    theirs, ours = answers(ask)
    assert ours == theirs


def test_configuration_space(answers: Any) -> None:
    def ask(io: DeviceIo) -> Any:
        before = io.read(CONFIG, 0, 0x50)
        written = {}
        for offset in (0x00, *range(0x08, 0x50, 4)):
            # the kernel keeps the low bits of MSI's address, QEMU the bytes behind its data register
            mask = {0x44: 0xFFFF_FFFC, 0x4C: 0xFFFF}.get(offset, 0xFFFF_FFFF)
            for value in (0xFFFF_FFFF, 0):
                set_word(io, offset, value, 4)
                written[hex(offset), value] = hex(word(io, offset, 4) & mask)
        # what firmware leaves in the command, cache line, BAR and interrupt line registers is not the device's doing
        header = before[:4] + before[6:0x0C] + before[0x0D:0x10] + before[0x14:0x3C]
        return header.hex(), written, before[0x3D:].hex()

    theirs, ours = answers(ask)
    assert ours == theirs


def test_command(answers: Any) -> None:
    def ask(io: DeviceIo) -> Any:
        first = word(io, 4)
        found = []
        for value in (0xFFFF, 0, 0x0002, 0x0006, 0x0402):
            set_word(io, 4, value)
            found.append(hex(word(io, 4)))
        return hex(first & 0x0406), found

    theirs, ours = answers(ask)
    assert ours == theirs


def test_registers(answers: Any) -> None:
    def ask(io: DeviceIo) -> Any:
        def read(offset: int, size: int = 4) -> str:
            return io.read(0, offset, size).hex()

        def write(offset: int, value: int, size: int = 4) -> None:
            io.write(0, offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))

        def factorial(number: int) -> str:
            write(0x08, number)
            deadline = time.monotonic() + 10
            while io.read(0, 0x20, 4)[0] & 1:
                assert time.monotonic() < deadline
            return read(0x08)

        # a real device keeps what its last user left
        factorial(0)
        for offset, size in ((0x04, 4), (0x20, 4), (0x80, 8), (0x88, 8), (0x90, 8)):
            write(offset, 0, size)
        write(0x64, -1)
        found: list[Any] = []
        # 0x98 is not among them: of the last command all but the start bit stays
        for offset in (0x00, 0x04, 0x08, 0x0C, 0x20, 0x24, 0x60, 0x64, 0x80, 0x84, 0x88, 0x90, 0xA0, 0x40000):
            found.append((hex(offset), [read(offset, size) for size in (1, 2, 4)]))
            if not offset % 8:
                found.append(read(offset, 8))
        write(0x04, 0x12345678)
        found.append(read(0x04))
        for size in (1, 2):
            write(0x04, 0, size)
            found.append(read(0x04))
        write(0x00, 0, 8)
        found.append(read(0x04))
        for number in (0, 1, 12, 13, 33, 34, 100):
            found.append(factorial(number))
        write(0x20, -1)
        found.append(read(0x20))
        write(0x20, 0)
        write(0x60, 0x42)
        found.append((read(0x24), hex(word(io, 6))))
        write(0x64, 0x02)
        found.append((read(0x24), hex(word(io, 6))))
        write(0x64, 0x40)
        found.append((read(0x24), hex(word(io, 6))))
        for size in (8, 4):
            write(0x80, 0x123456789ABCD, size)
            found.append((read(0x80), read(0x80, 8)))
        before = read(0x98, 8)
        write(0x98, 6, 8)
        found.append(read(0x98, 8) == before)
        # unaligned and odd sizes are cut the same way
        found += [read(2, 4), read(1, 7), read(0x7C, 12), read(0xFFFFC, 4)]
        for span in ((0xFFFFC, 8), (1 << 20, 1), (0, 0)):
            found.append(outcome(lambda span=span: io.read(0, *span)))
        return found

    theirs, ours = answers(ask)
    assert ours == theirs


def test_decode_off(answers: Any) -> None:
    def ask(io: DeviceIo) -> Any:
        set_word(io, 4, 0)
        found = [outcome(lambda: io.read(0, 0, 4)), outcome(lambda: io.write(0, 4, bytes(4)))]
        set_word(io, 4, 2)
        return found, io.read(0, 0, 4)

    theirs, ours = answers(ask)
    assert ours == theirs


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    with ExitStack() as stack:
        fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(count)]
        for fd in fds:
            stack.callback(os.close, fd)
        yield fds


def test_set_irqs_refusals(answers: Any) -> None:
    """Every index, action, start, count and kind of data, with nothing, INTx and MSI enabled."""

    def ask(io: DeviceIo) -> Any:
        found = {}
        with eventfds(2) as (mine, other):
            for enabled in (None, INTX, MSI):
                for index in range(6):
                    for action in (MASK, UNMASK, TRIGGER):
                        for start, count in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2)):
                            for data in ("none", "bool", "fd", "take", "bad", "pipe"):
                                if (index, action) == (INTX, UNMASK) and data not in ("none", "bool"):
                                    continue  # unmask by eventfd: documented as missing
                                key = (enabled, index, action.name, start, count, data)
                                found[key] = refusal(io, key, mine, other)
        return found

    def refusal(io: DeviceIo, key: tuple[Any, ...], mine: int, other: int) -> Any:
        enabled, index, action, start, count, data = key
        if enabled is not None:
            io.set_irqs(enabled, TRIGGER, 0, 1, fds=[mine])
        arguments: dict[str, Any] = {}
        if data == "bool":
            arguments["bools"] = [True] * count
        elif data != "none":
            value = {"fd": other, "take": -1, "bad": 10000, "pipe": 0}[data]
            arguments["fds"] = [value] * count
        try:
            return outcome(lambda: io.set_irqs(index, IrqAction[action], start, count, **arguments))
        finally:
            for either in (INTX, MSI, REQ):
                outcome(lambda either=either: io.set_irqs(either, TRIGGER, 0, 0))

    theirs, ours = answers(ask)
    assert {key: (theirs[key], ours[key]) for key in theirs if theirs[key] != ours[key]} == {}


def test_interrupts(answers: Any) -> None:
    def ask(io: DeviceIo) -> Any:
        found: list[Any] = []

        def look(fd: int) -> None:
            # an interrupt that comes, comes at once; what does not come is waited for in vain
            ready = select.select([fd], [], [], 0.3)[0]
            found.append(os.eventfd_read(fd) if ready else 0)

        def write(offset: int, value: int) -> None:
            io.write(0, offset, value.to_bytes(4, "little"))

        with eventfds(2) as (intx, msi):
            io.set_irqs(INTX, TRIGGER, 0, 1, fds=[intx])
            write(0x60, 1)
            look(intx)
            io.set_irqs(INTX, UNMASK, 0, 1)
            look(intx)  # still asserted
            write(0x64, 1)
            io.set_irqs(INTX, UNMASK, 0, 1)
            look(intx)
            io.set_irqs(INTX, MASK, 0, 1)
            write(0x60, 1)
            look(intx)
            io.set_irqs(INTX, UNMASK, 0, 1)
            look(intx)
            write(0x64, 1)
            io.set_irqs(INTX, UNMASK, 0, 1)
            set_word(io, 4, word(io, 4) | 1 << 10)
            write(0x60, 1)
            look(intx)
            set_word(io, 4, word(io, 4) & ~(1 << 10))
            look(intx)
            io.set_irqs(INTX, TRIGGER, 0, 1)
            look(intx)
            # Not asked: a line that is up when INTx is enabled. QEMU's I/O APIC forgets a level that rose while its
            # pin was set to edges, so that nothing comes in the lab.
            write(0x64, 1)
            io.set_irqs(INTX, TRIGGER, 0, 0)

            io.set_irqs(MSI, TRIGGER, 0, 1, fds=[msi])
            found.append(word(io, 0x42) & 1)
            set_word(io, 4, word(io, 4) & ~4)
            write(0x60, 1)
            look(msi)  # no bus mastering, no message
            set_word(io, 4, word(io, 4) | 4)
            write(0x60, 2)
            look(msi)
            io.set_irqs(MSI, TRIGGER, 0, 1)
            look(msi)
            write(0x64, 3)
            io.write(CONFIG, 0x42, b"\xff")
            found.append(hex(word(io, 0x42)))
            io.set_irqs(MSI, TRIGGER, 0, 0)
            found.append(word(io, 0x42) & 1)
            write(0x64, 0xFFFFFFFF)
        return found

    theirs, ours = answers(ask)
    assert ours == theirs
