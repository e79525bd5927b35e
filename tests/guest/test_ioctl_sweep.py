"""Fail each system call on the way to an open device, on the real kernel, and show that nothing is left behind.

The failing call is not made: the kernel's state is that of a call that was refused. The fixture ``nothing_left_behind``
counts file descriptors, pinned memory and bindings after each test; that the device opens again shows the rest.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest
from ioctl_support import PAGE, Memory, opened
from modes import MODES

from vfiopy import kernel
from vfiopy.backend import HostMemory, IrqAction, IrqIndex, Prot
from vfiopy.errors import VfioError
from vfiopy.kernel.ioctl._call import KernelSyscalls, replaced

FALLIBLE = ("open", "duplicate", "ioctl", "ioctl_fd", "ioctl_value", "mmap", "pread", "pwrite")


class Failing(KernelSyscalls):
    """The kernel's calls, except that number ``fail_at`` fails without being made."""

    def __init__(self, fail_at: int, code: int = errno.EIO) -> None:
        self.fail_at = fail_at
        self.code = code
        self.calls = 0
        self.failed = ""

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in FALLIBLE:
            return method

        def call(*arguments: Any) -> int:
            self.calls += 1
            if self.calls == self.fail_at:
                self.failed = name
                return -self.code
            return int(method(*arguments))

        return call


def use(address: str, mode: str, memory: Memory) -> None:
    """Everything that a driver does on its way: open, look, enable its interrupt, map a BAR, map memory, and back."""
    io, mapper = kernel.connect(address, backend=mode)
    try:
        io.info()
        assert io.irq_info(IrqIndex.MSI).count == 1
        fd = os.eventfd(0)
        try:
            io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 1, fds=[fd])
            io.set_irqs(IrqIndex.MSI, IrqAction.TRIGGER, 0, 0)
        finally:
            os.close(fd)
        window = io.map_region(0, 0, io.region_info(0).size)
        try:
            mapper.traits()
            mapper.ranges()
            mapper.map(0x100000, HostMemory(memory.address, memory.size, True, memory), Prot.RW)
            mapper.unmap(0x100000, memory.size)
        finally:
            window.close()
    finally:
        again(io.close)
        again(mapper.close)


def again(close: Callable[[], None]) -> None:
    """An object whose close() was refused is still open and can be closed again."""
    try:
        close()
    except VfioError:
        close()


@pytest.mark.parametrize("mode", MODES)
def test_no_failing_system_call_leaves_anything(mode: str, edu: str) -> None:
    with Memory(4 * PAGE) as memory:
        number = 0
        while True:
            number += 1
            calls = Failing(number)
            with replaced(calls):
                try:
                    use(edu, mode, memory)
                except VfioError as error:
                    message = str(error)
                    assert calls.failed
                    assert edu in message or "/dev/" in message or "IOAS" in message
                else:
                    if not calls.failed:
                        break
        assert number > 10
        with opened(edu, mode) as (io, mapper):
            assert io.read(0, 0, 4) == bytes.fromhex("ed000001")
            mapper.map(0x100000, HostMemory(memory.address, memory.size, True, memory), Prot.RW)
            assert mapper.unmap(0x100000, memory.size) == memory.size
