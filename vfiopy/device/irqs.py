"""A device's interrupts: INTx, MSI, MSI-X, and the two that VFIO itself sends."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress

from vfiopy.backend import DeviceIo, IrqAction, IrqFlag, IrqIndex, IrqInfo
from vfiopy.device.vector import Vector
from vfiopy.errors import AddressRangeError, BusyError, NotSupportedError, StateError, VfioError
from vfiopy.observing import Observer, told

__all__ = ["Interrupt", "Irqs"]

_NAMES = {
    IrqIndex.INTX: "INTx",
    IrqIndex.MSI: "MSI",
    IrqIndex.MSIX: "MSI-X",
    IrqIndex.ERR: "error interrupt",
    IrqIndex.REQ: "device request",
}
# Only one of these can be enabled at a time (vfio-pci, and PCI Express Base 6.0, 6.1.4).
_EXCLUSIVE = (IrqIndex.INTX, IrqIndex.MSI, IrqIndex.MSIX)


class Interrupt:
    """One kind of interrupt of a device: ``device.irqs.msix``.

    Threads: enable and disable from one thread at a time; vectors say for themselves.
    """

    def __init__(self, io: DeviceIo, index: IrqIndex, siblings: Irqs) -> None:
        self._io = io
        self._siblings = siblings
        self.index = index
        self.name = f"{io.name} {_NAMES[index]}"
        self._vectors: list[Vector] = []

    @property
    def info(self) -> IrqInfo:
        """What the backend says of it."""
        return self._io.irq_info(self.index)

    @property
    def count(self) -> int:
        """Number of vectors that the device has of this kind; 0 where it has none."""
        return self.info.count

    @property
    def enabled(self) -> bool:
        """Whether it is enabled."""
        return bool(self._vectors)

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """The vectors, in order; empty while disabled."""
        return tuple(self._vectors)

    def enable(self, count: int = 1) -> tuple[Vector, ...]:
        """Enable vectors 0 to ``count - 1``, each with an eventfd of its own.

        Raises:
            NotSupportedError: the device has no interrupt of this kind.
            AddressRangeError: it has fewer vectors.
            BusyError: this or another kind is enabled already.
        """
        available = self.count
        if not available:
            present = [
                _NAMES[other] for other in IrqIndex if self._io.irq_info(other).count and other in _EXCLUSIVE
            ]
            raise NotSupportedError(
                f"the device has no {_NAMES[self.index]}",
                object=self._io.name,
                hint=f"it has {', '.join(present)}" if present else "it has no interrupts at all",
            )
        if not 1 <= count <= available:
            raise AddressRangeError(
                f"{count} vectors are asked for, it has {available}",
                object=self.name,
                hint=f"ask for 1 to {available}",
            )
        self._refuse_if_enabled()
        vectors: list[Vector] = []
        try:
            for number in range(count):
                vectors.append(Vector(f"{self.name} vector {number}", number, self._trigger))
            self._watch(vectors)
            with self._told("enable", count=count):
                self._io.set_irqs(
                    self.index, IrqAction.TRIGGER, 0, count, fds=[vector.for_backend() for vector in vectors]
                )
                # The kernel has it: from here on disable() is what ends it.
                self._vectors = vectors
        except BaseException as error:
            if not isinstance(error, VfioError):
                self._disable_if_enabled()  # interrupted: who knows what the backend has done
            self._vectors = []
            for vector in vectors:
                vector.close()
            raise
        return tuple(vectors)

    def _told(self, operation: str, **facts: object) -> AbstractContextManager[object]:
        return told(self._siblings.observer, "irq", operation=operation, interrupt=_WORDS[self.index], **facts)

    def _watch(self, vectors: Iterable[Vector]) -> None:
        observer = self._siblings.observer
        for vector in vectors:
            vector.observe(None if observer is None else observer.vector_made(_WORDS[self.index], vector.number))

    def watch_vectors(self) -> None:
        """Have the vectors that are enabled report to who observes now."""
        self._watch(self._vectors)

    def _refuse_if_enabled(self) -> None:
        if self._vectors:
            raise BusyError(
                f"{len(self._vectors)} vectors are enabled already",
                object=self.name,
                hint="disable() first; the number of vectors cannot grow while it is enabled",
            )
        if self.index in _EXCLUSIVE:
            for other in self._siblings.all():
                if other.index in _EXCLUSIVE and other.enabled:
                    raise BusyError(
                        f"{_NAMES[other.index]} is enabled, and a function uses one kind at a time",
                        object=self.name,
                        hint=f"call {_ATTRIBUTES[other.index]}.disable() first",
                    )

    def replace(self, number: int) -> Vector:
        """Give one vector a new eventfd, leaving the others alone; the old one is closed."""
        old = self._vector(number)
        new = Vector(f"{self.name} vector {number}", number, self._trigger)
        try:
            self._watch([new])
            with self._told("replace", vector=number):
                self._io.set_irqs(self.index, IrqAction.TRIGGER, number, 1, fds=[new.for_backend()])
                self._vectors[number] = new
        except BaseException as error:
            self._vectors[number] = old
            if not isinstance(error, VfioError):  # interrupted: who knows which of the two the backend has
                self._io.set_irqs(self.index, IrqAction.TRIGGER, number, 1, fds=[old.for_backend()])
            new.close()
            raise
        old.close()
        return new

    def disable(self) -> None:
        """Disable all vectors and close their eventfds. Idempotent."""
        if not self._vectors:
            return
        with self._told("disable"):
            self._disable_if_enabled()
        self._close_vectors()

    def _disable_if_enabled(self) -> None:
        try:
            self._io.set_irqs(self.index, IrqAction.TRIGGER, 0, 0)
        except VfioError as error:
            # EINVAL: it is not enabled, because disabling was interrupted or went past this object.
            if error.errno != errno.EINVAL:
                raise

    def _close_vectors(self) -> None:
        for vector in self._vectors:
            vector.close()
        self._vectors = []

    def abandon(self) -> None:
        """Disable, where the device still answers, and close the eventfds: it is about to be let go anyhow."""
        with suppress(VfioError):
            self.disable()
        self._close_vectors()

    def mask(self, number: int = 0) -> None:
        """Mask a vector: it stays pending until it is unmasked. Only INTx can be masked this way."""
        self._mask(IrqAction.MASK, number)

    def unmask(self, number: int = 0) -> None:
        """Unmask a vector. INTx masks itself with each interrupt and has to be unmasked after the device was served."""
        self._mask(IrqAction.UNMASK, number)

    def _mask(self, action: IrqAction, number: int) -> None:
        self._vector(number)
        if IrqFlag.MASKABLE not in self.info.flags:
            raise NotSupportedError(
                f"{_NAMES[self.index]} cannot be masked through VFIO",
                object=self.name,
                hint="use the device's own mask register",
            )
        with self._told("mask" if action is IrqAction.MASK else "unmask", vector=number):
            self._io.set_irqs(self.index, action, number, 1)

    def _vector(self, number: int) -> Vector:
        if not self._vectors:
            raise StateError(f"{self.name} is not enabled; call enable() first")
        if not 0 <= number < len(self._vectors):
            raise AddressRangeError(
                f"there is no vector {number}; 0 to {len(self._vectors) - 1} are enabled", object=self.name
            )
        return self._vectors[number]

    def _trigger(self, number: int) -> None:
        with self._told("trigger", vector=number):
            self._io.set_irqs(self.index, IrqAction.TRIGGER, number, 1)

    def __getitem__(self, number: int) -> Vector:
        return self._vector(number)

    def __repr__(self) -> str:
        return f"<Interrupt {self.name}: {len(self._vectors)} of {self.count} vectors enabled>"


_WORDS = {
    IrqIndex.INTX: "intx",
    IrqIndex.MSI: "msi",
    IrqIndex.MSIX: "msix",
    IrqIndex.ERR: "error",
    IrqIndex.REQ: "request",
}
_ATTRIBUTES = {
    IrqIndex.INTX: "irqs.intx",
    IrqIndex.MSI: "irqs.msi",
    IrqIndex.MSIX: "irqs.msix",
    IrqIndex.ERR: "irqs.error",
    IrqIndex.REQ: "irqs.request",
}


class Irqs:
    """All interrupts of one device.

    Attributes:
        intx: the legacy interrupt; one vector, level-triggered, masks itself.
        msi: message signalled interrupts.
        msix: MSI-X.
        error: AER errors of the device, as vfio-pci reports them.
        request: the kernel asks for the device back (unbind, hot-unplug); close it soon.
        observer: who is told of what is done with them, or None; see :meth:`observe`.
    """

    def __init__(self, io: DeviceIo) -> None:
        self.observer: Observer | None = None
        self.intx = Interrupt(io, IrqIndex.INTX, self)
        self.msi = Interrupt(io, IrqIndex.MSI, self)
        self.msix = Interrupt(io, IrqIndex.MSIX, self)
        self.error = Interrupt(io, IrqIndex.ERR, self)
        self.request = Interrupt(io, IrqIndex.REQ, self)

    def all(self) -> tuple[Interrupt, ...]:
        """Return every kind, present or not."""
        return (self.intx, self.msi, self.msix, self.error, self.request)

    def observe(self, observer: Observer | None) -> None:
        """Have an observer told of what is done with interrupts, and of each that is taken."""
        self.observer = observer
        for interrupt in self.all():
            interrupt.watch_vectors()

    def disable_all(self) -> None:
        """Disable whatever is enabled."""
        for interrupt in self.all():
            interrupt.disable()

    def abandon(self) -> None:
        """Disable whatever is enabled and close its eventfds, whether or not the device still answers."""
        for interrupt in self.all():
            interrupt.abandon()
