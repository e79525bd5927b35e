"""The base class of PCI devices that are written in Python."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from random import Random
from typing import ClassVar

from vfiopy.backend import Doorbell, Host, IrqIndex, Prot
from vfiopy.emulated.bar_memory import BarMemory
from vfiopy.emulated.capabilities import CapabilityDeclaration
from vfiopy.emulated.config_space import Bar, ConfigSpace, Identity
from vfiopy.emulated.engine import Engine, Work
from vfiopy.emulated.records import DeviceError, Fault, Injections
from vfiopy.errors import BusyError, NotMappedError, NotSupportedError, StateError

__all__ = ["PciDevice"]

_LOG = logging.getLogger(__name__)
_MOST_RECORDS = 1000  # a driver in a loop must not eat the memory


class _ResetMeanwhile(BaseException):
    """Ends work of a device that was reset while the work waited. No error: ``except Exception`` must not catch it."""


class PciDevice:
    """A PCI function that is a Python object.

    A subclass declares what the function is made of (class attributes below) and implements :meth:`read` and
    :meth:`write` for its registers and :meth:`reset`. What takes a real device time belongs into :meth:`later`; DMA
    (:meth:`dma_read`, :meth:`dma_write`, :meth:`dma`) can be done from there only: a register access returns before
    the work that it starts is done.

    The same object serves ``vfiopy.open(device)`` in this process and, behind another
    :class:`~vfiopy.backend.Host`, other ways to reach it.

    Threads: handlers, work and reset run one at a time, under ``device.lock``. The engine's thread does the work.
    Where a user of the device has its memory in another process and does not share it (vfio-user without fds), DMA
    waits for that process, and gives the lock up meanwhile: handlers and resets may then run in the middle of it.

    Args:
        seed: of ``device.random``, which the delays come from: the same seed and the same accesses give the same
            delays.
        delay: shortest and longest time in seconds that :meth:`later` waits.
        manual: nothing happens by itself; :meth:`step` does the next piece of work.

    Attributes:
        config: configuration space.
        faults: DMA that did not happen, oldest first; the last 1000 are kept.
        errors: what the driver or the device's code did wrong, likewise.
        inject: counters of things that are to go wrong.
    """

    name: ClassVar[str] = "device"
    identity: ClassVar[Identity]
    # of the class, or set by a constructor before this class's own runs
    bars: Mapping[int, Bar] = {}
    capabilities: Sequence[CapabilityDeclaration] = ()
    interrupt_pin: int = 0
    doorbells: ClassVar[Mapping[int, Sequence[Doorbell]]] = {}

    def __init__(self, *, seed: int = 0, delay: tuple[float, float] = (0.0002, 0.002), manual: bool = False) -> None:
        if not 0 <= delay[0] <= delay[1]:
            raise ValueError(f"delay is the shortest and the longest time in seconds, not {delay}")
        self.config = ConfigSpace(self.identity, self.bars, self.capabilities, self.interrupt_pin)
        self.lock = threading.RLock()
        self.random = Random(seed)
        self.delay = delay
        self.engine = Engine(f"emulated:{self.name}", self._do, manual=manual)
        self.faults: list[Fault] = []
        self.errors: list[DeviceError] = []
        self.inject = Injections()
        self.memories = {index: BarMemory(bar.size) for index, bar in self.bars.items() if bar.shared}
        self._host: Host | None = None
        self._busy_thread = 0  # the thread that runs a register handler
        self._work_thread = 0  # the thread that does work, with the lock
        self._life = 0  # counts resets
        self.config.on_function_reset = self.function_reset

    # --- what a subclass implements ------------------------------------------------------------------------------

    def read(self, bar: int, offset: int, width: int) -> int:  # noqa: ARG002
        """Read a register: one access of ``width`` bytes at an aligned offset. Return its value, little-endian."""
        return (1 << 8 * width) - 1

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Write a register: one access of ``width`` bytes at an aligned offset."""

    def reset(self) -> None:
        """Put the registers into the state that power-on leaves: called at each opening, and for a function reset."""

    def save(self) -> bytes:
        """Return what :meth:`load` needs to go on elsewhere: registers, and what work is pending.

        A device that implements both can be migrated. Configuration space and shared BARs are saved for it. Called
        under the lock, while no work runs.
        """
        raise NotSupportedError(f"{self.name} cannot save itself")

    def load(self, data: bytes) -> None:
        """Go on where :meth:`save` left off; hand pending work to :meth:`later` again.

        Raises:
            ValueError: the data are not this device's; raise it before anything is changed.
        """
        raise NotSupportedError(f"{self.name} cannot load {len(data)} bytes")

    # --- what a subclass uses ------------------------------------------------------------------------------------

    @property
    def host(self) -> Host:
        """The machine that the device sits in.

        Raises:
            StateError: nobody has opened the device.
        """
        if self._host is None:
            raise StateError(f"{self.name} is not plugged in; open it with vfiopy.open(device)")
        return self._host

    def later(self, work: Work, *, delay: float | None = None) -> None:
        """Do ``work`` after ``delay`` seconds; None takes a random one from the device's own range."""
        wait = self.random.uniform(*self.delay) if delay is None else delay
        if self.inject.take("lost_work"):
            return
        life = self._life

        def unless_reset() -> None:
            # the engine may have taken it off its list just before a reset emptied that
            if self._life == life:
                work()

        self.engine.schedule(wait, unless_reset)

    def drop_work(self) -> None:
        """Forget all work that has not begun; work that has and waits for memory ends there, without an error."""
        self._life += 1
        self.engine.cancel()

    def dma(self, iova: int, size: int, prot: Prot) -> AbstractContextManager[list[memoryview]]:
        """Pin a range for the length of a ``with`` block and yield views of it, in order.

        Raises:
            NotMappedError: it is not mapped with this protection, or bus mastering is off; ``faults`` has it.
            StateError: called from a register handler.
        """
        self._check_dma(iova, size, Prot.WRITE in prot)
        return self.host.access(iova, size, prot)

    def dma_read(self, iova: int, size: int) -> bytes:
        """Read memory; raises as :meth:`dma` does."""
        self._check_dma(iova, size, False)
        return self.host.read(iova, size)

    def dma_write(self, iova: int, data: bytes) -> None:
        """Write memory, all of it or, on a fault, nothing; raises as :meth:`dma` does."""
        self._check_dma(iova, len(data), True)
        self.host.write(iova, data)

    def _check_dma(self, iova: int, size: int, write: bool) -> None:
        if self._busy_thread == threading.get_ident():
            raise StateError(f"{self.name} does DMA from a register handler; hand it to later()")
        if not self.config.bus_master:
            reason = "bus mastering is off"
        elif self.inject.take("dma_faults"):
            reason = "injected"
        else:
            return
        self.record_fault(Fault(iova, size, write, reason))
        raise NotMappedError(f"DMA of {size:#x} bytes at IOVA {iova:#x} got no answer: {reason}", object=self.name)

    def interrupt(self, vector: int = 0) -> None:
        """Send an interrupt: a message where MSI-X or MSI is enabled, else INTx is asserted until :meth:`deassert`."""
        if self._host is None:
            return
        if self.config.msix_enabled:
            index = IrqIndex.MSIX
        elif self.config.msi_enabled:
            index = IrqIndex.MSI
        else:
            if self.config.interrupt_pin and not self.inject.take("lost_interrupts"):
                self.config.show_intx(True)
                self._host.trigger(IrqIndex.INTX)
            return
        if not self.config.bus_master:
            self.record_fault(
                Fault(self.config.message_address(), 4, True, "bus mastering is off: the message was not sent")
            )
        elif not self.inject.take("lost_interrupts"):
            self._host.trigger(index, vector)

    def deassert(self) -> None:
        """Take INTx back."""
        self.config.show_intx(False)
        if self._host is not None:
            self._host.deassert()

    def record_fault(self, fault: Fault) -> None:
        """Remember a DMA that did not happen."""
        self.faults.append(fault)
        del self.faults[:-_MOST_RECORDS]

    def record_error(self, text: str, exception: BaseException | None = None) -> None:
        """Remember what a driver, or the device itself, did wrong; logged too."""
        _LOG.warning("%s: %s", self.name, text, exc_info=exception)
        self.errors.append(DeviceError(text, exception))
        del self.errors[:-_MOST_RECORDS]

    # --- what a host uses ----------------------------------------------------------------------------------------

    def handle_read(self, bar: int, offset: int, width: int) -> int:
        """Do one register read under the device's lock; the result fits into ``width`` bytes."""
        with self.lock:
            self._busy_thread = threading.get_ident()
            try:
                return self.read(bar, offset, width) & ((1 << 8 * width) - 1)
            finally:
                self._busy_thread = 0

    def handle_write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Do one register write under the device's lock."""
        with self.lock:
            self._busy_thread = threading.get_ident()
            try:
                self.write(bar, offset, width, value)
            finally:
                self._busy_thread = 0

    @property
    def migratable(self) -> bool:
        """It implements :meth:`save` and :meth:`load`."""
        return type(self).save is not PciDevice.save and type(self).load is not PciDevice.load

    @property
    def has_function_reset(self) -> bool:
        """The function can be reset by itself (FLR)."""
        return self.config.has_function_reset

    def function_reset(self) -> None:
        """Reset the function: pending work is dropped, registers go back. Configuration space is the caller's."""
        with self.lock:
            self.drop_work()
            self.deassert()
            self.reset()

    def plug(self, host: Host) -> None:
        """Put the device into a machine and switch it on.

        Raises:
            BusyError: it sits in one.
        """
        with self.lock:
            if self._host is not None:
                raise BusyError(
                    "it is open already",
                    object=self.name,
                    hint="close the other one, or make a second device",
                )
            self._host = host
            try:
                self.reset()
            except BaseException:
                self._host = None
                raise

    def unplug(self) -> None:
        """Take it out: work is dropped, its thread ends, configuration space is as after power-on. Idempotent."""
        self.engine.close()  # without the lock, which the work that is running may hold
        with self.lock:
            if self._host is None:
                return
            self.deassert()
            self._life += 1
            self._host = None
            self.config.reset()

    def step(self) -> bool:
        """In manual mode: do the next piece of work, as if its time had come; return whether there was one."""
        return self.engine.step()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For a host: give the lock up while work waits for memory that somebody else has to be asked for.

        Handlers and resets may run meanwhile. Work of a device that was reset ends here.
        """
        if self._work_thread != threading.get_ident():
            yield
            return
        life = self._life
        self._work_thread = 0
        self.lock.release()
        try:
            yield
        finally:
            self.lock.acquire()
            self._work_thread = threading.get_ident()
        if self._life != life:
            raise _ResetMeanwhile

    def _do(self, work: Work) -> None:
        with self.lock:
            self._work_thread = threading.get_ident()
            try:
                work()
            except _ResetMeanwhile:
                pass
            except Exception as error:
                self.record_error(f"{type(error).__name__} in the device's work: {error}", error)
                if self.engine.manual:
                    raise
            finally:
                self._work_thread = 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.identity.vendor:04x}:{self.identity.device:04x}>"
