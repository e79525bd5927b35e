"""Helpers of the tests of emulated devices."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from vfiopy.backend import Area, DeviceIo, IrqAction, IrqIndex
from vfiopy.emulated import Bar, Identity, Msi, MsiX, PciDevice, PciExpress, PowerManagement

COMMAND = 0x04
MEMORY, BUS_MASTER, INTX_DISABLE = 1 << 1, 1 << 2, 1 << 10


class Everything(PciDevice):
    """A PCI Express function with a register BAR, a shared BAR with an MSI-X table, and all capabilities."""

    name = "everything"
    identity = Identity(0x1B36, 0x00FE, 0x080000)
    bars = {  # noqa: RUF012
        0: Bar(0x1000),
        2: Bar(0x4000, shared=True, address64=True, prefetchable=True),
    }
    capabilities = (
        PowerManagement(),
        Msi(vectors=4, per_vector_mask=True),
        MsiX(vectors=8, table_bar=2, table_offset=0x2000, pba_bar=2, pba_offset=0x3000),
        PciExpress(function_reset=True),
    )
    interrupt_pin = 1

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accesses: list[tuple[object, ...]] = []
        self.resets = 0

    def read(self, bar: int, offset: int, width: int) -> int:
        self.accesses.append(("read", bar, offset, width))
        return 0x1122334455667788

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        self.accesses.append(("write", bar, offset, width, value))

    def reset(self) -> None:
        self.resets += 1


class Patchwork(PciDevice):
    """A function whose BAR 2 is memory in two places and registers around them."""

    name = "patchwork"
    identity = Identity(0x1B36, 0x00FD, 0x080000)
    bars = {  # noqa: RUF012
        0: Bar(0x1000),
        2: Bar(0x8000, shared=True, areas=(Area(0x1000, 0x2000), Area(0x6000, 0x1000))),
    }

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accesses: list[tuple[object, ...]] = []

    def read(self, bar: int, offset: int, width: int) -> int:
        self.accesses.append(("read", bar, offset, width))
        return 0x1234

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        self.accesses.append(("write", bar, offset, width, value))


@contextmanager
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def taken(fd: int, timeout: float = 0.0) -> int:
    """The eventfd's count, which is then 0; waits for the first event."""
    if not select.select([fd], [], [], timeout)[0]:
        return 0
    return os.eventfd_read(fd)


def read32(io: DeviceIo, offset: int, bar: int = 0) -> int:
    return int.from_bytes(io.read(bar, offset, 4), "little")


def write32(io: DeviceIo, offset: int, value: int, bar: int = 0) -> None:
    io.write(bar, offset, value.to_bytes(4, "little"))


def read_config(io: DeviceIo, offset: int, size: int) -> int:
    return int.from_bytes(io.read(7, offset, size), "little")


def write_config(io: DeviceIo, offset: int, size: int, value: int) -> None:
    io.write(7, offset, value.to_bytes(size, "little"))


def set_command(io: DeviceIo, *, on: int = 0, off: int = 0) -> None:
    write_config(io, COMMAND, 2, read_config(io, COMMAND, 2) & ~off | on)


def enable_irq(io: DeviceIo, index: IrqIndex, *fds: int) -> None:
    io.set_irqs(index, IrqAction.TRIGGER, 0, len(fds), fds=fds)


def disable_irq(io: DeviceIo, index: IrqIndex) -> None:
    io.set_irqs(index, IrqAction.TRIGGER, 0, 0)


def wait_for(condition: Callable[[], object], timeout: float = 5.0) -> None:
    """Poll a condition that a device's thread makes true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the device did not do it in time"
        time.sleep(0.0005)
