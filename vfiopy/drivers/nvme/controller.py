"""An NVMe controller: from an open device to I/O queues, and back."""

from __future__ import annotations

from contextlib import suppress
from typing import NoReturn

from vfiopy.device import Device, Interrupt
from vfiopy.dma.memory import PAGE_SIZE
from vfiopy.drivers.nvme.admin import Admin
from vfiopy.drivers.nvme.errors import CommandAbortedError, ControllerFailedError, NvmeTimeoutError
from vfiopy.drivers.nvme.identify import ControllerInfo
from vfiopy.drivers.nvme.lifecycle import Lifecycle
from vfiopy.drivers.nvme.namespace import Namespace
from vfiopy.drivers.nvme.queue import QueuePair
from vfiopy.drivers.nvme.request import Request
from vfiopy.drivers.nvme.signals import InterruptKind, Signal, enable_signals
from vfiopy.errors import NotSupportedError, StateError, VfioError
from vfiopy.lives import Resource
from vfiopy.nvme_spec import registers as reg

__all__ = ["Controller"]

_ADMIN_DEPTH = 32
_NVME_CLASS = 0x010802
_DEFAULT_SHUTDOWN = 5.0
MAX_TRANSFER = 2 << 20


class Controller(Resource):
    """An NVMe controller, reset and brought up.

    It switches bus mastering on, because nothing works without it, and off again at the end. Closing deletes the I/O
    queues, shuts the controller down as the specification asks, disables it, and gives the memory back; the device
    stays open and is the caller's.

    When a command times out, or the controller breaks the protocol, it is disabled: no DMA is under way then, and
    everything that was is abandoned with an error. :meth:`reset` brings it back; queues and namespaces stay valid.

    Threads: bring-up, reset and close from one thread; queue pairs say for themselves.

    Args:
        device: an open NVMe function, on any backend.
        queues: how many I/O queue pairs to create; 0 for none.
        depth: entries of each I/O queue, at least 2; the controller may allow fewer.
        interrupts: ``"msix"``, ``"msi"``, ``"intx"`` or ``"polling"``; None for the best that there is.
        timeout: seconds that a command may take, where a wait does not say.
        max_transfer: most bytes that one command moves; the controller may allow fewer (MDTS).

    Attributes:
        device: the function.
        name: what it was opened as.
        timeout: see above; may be changed.
        capabilities: the CAP register, decoded.
        info: what Identify Controller says.
        admin: admin commands.
        interrupts: the kind in use.

    Raises:
        NotSupportedError: the function is not an NVMe controller, or needs what this driver does not do.
        VfioTimeoutError, ControllerFailedError: it does not come up.
    """

    def __init__(
        self,
        device: Device,
        *,
        queues: int = 1,
        depth: int = 64,
        interrupts: InterruptKind | None = None,
        timeout: float = 30.0,
        max_transfer: int = MAX_TRANSFER,
    ) -> None:
        self.device = device
        self.name = device.name
        self.timeout = timeout
        self._queues: list[QueuePair] = []
        self._failure: str | None = None
        self._interrupt: Interrupt | None = None
        self._admin_queue: QueuePair | None = None
        self._admin: Admin | None = None
        self._lifecycle: Lifecycle | None = None
        super().__init__(f"NVMe controller {device.name}")
        try:
            self._start(queues, depth, interrupts, max_transfer)
        except BaseException as error:
            self.fail(f"it did not come up: {error}")
            self._tear_down()
            self._open = False
            raise

    # --- bring-up ------------------------------------------------------------------------------------------------

    def _start(self, queues: int, depth: int, interrupts: InterruptKind | None, max_transfer: int) -> None:
        code = self.device.config.class_code
        if code != _NVME_CLASS:
            raise NotSupportedError(
                f"its class code is {code:06x}, an NVMe controller has {_NVME_CLASS:06x}", object=self.name
            )
        self._registers = self.device.bars[0]
        lifecycle = self._lifecycle = Lifecycle(self._registers, self.name)
        self.capabilities = lifecycle.capabilities
        self._page = max(PAGE_SIZE, self.capabilities.page_min)
        if self._page > self.capabilities.page_max:
            raise NotSupportedError(
                f"its largest memory page is {self.capabilities.page_max} bytes, this machine's {PAGE_SIZE}",
                object=self.name,
            )
        if queues and not self.capabilities.has_nvm_commands:
            raise NotSupportedError(
                "it has no I/O command set", object=self.name, hint="open it with queues=0 for admin commands"
            )
        lifecycle.disable()
        self.interrupts, self._signals, self._interrupt = enable_signals(self.device, interrupts, 1 + queues)
        self._depth = max(2, min(depth, self.capabilities.queue_entries))
        self._max_transfer = max_transfer
        self._admin_queue = self._make_queue(0, _ADMIN_DEPTH, self._signals[0])
        self._admin = Admin(self._admin_queue, self.device.dma, self._page)
        self._enable(lifecycle)
        self._allowed = self.admin.request_queues(queues) if queues else 0
        for _ in range(min(queues, self._allowed)):
            self.create_queue()

    def _make_queue(self, number: int, depth: int, signal: Signal) -> QueuePair:
        stride = self.capabilities.doorbell_stride
        return QueuePair(
            self,
            number,
            depth,
            memory=self.device.dma,
            registers=self._registers,
            doorbells=(
                reg.doorbell(number, stride, completion=False),
                reg.doorbell(number, stride, completion=True),
            ),
            signal=signal,
            page=self._page,
            max_transfer=self._max_transfer,
            name=f"{self.name} I/O queue {number}" if number else f"{self.name} admin queue",
        )

    def _enable(self, lifecycle: Lifecycle) -> None:
        """Bring a disabled controller up to where admin commands work."""
        queue = self.admin.queue
        queue.clear()
        # Only now: before, the controller might have remembered where another driver's memory was.
        self.device.bus_master = True
        lifecycle.enable(self._page, queue.depth, queue.submission_iova, queue.completion_iova)
        self._failure = None
        self.info: ControllerInfo = self.admin.identify_controller()
        if self.info.transfer_pages:
            limit = self.info.transfer_pages * self.capabilities.page_min
            self._max_transfer = min(self._max_transfer, limit)
            for each in (queue, *self._queues):
                each.max_transfer = self._max_transfer

    # --- what it has ---------------------------------------------------------------------------------------------

    @property
    def admin(self) -> Admin:
        """Admin commands."""
        self.check_open()
        if self._admin is None:
            raise StateError(f"{self._label} did not come up")
        return self._admin

    @property
    def queues(self) -> tuple[QueuePair, ...]:
        """The I/O queue pairs; as many as were asked for, or as the controller allows."""
        return tuple(self._queues)

    @property
    def max_transfer(self) -> int:
        """Most bytes that one command moves."""
        return self._max_transfer

    @property
    def failure(self) -> str | None:
        """Why the controller was disabled, or None while it works."""
        return self._failure

    def namespaces(self) -> list[Namespace]:
        """Return all active namespaces."""
        return [self.namespace(nsid) for nsid in self.admin.active_namespaces()]

    def namespace(self, nsid: int = 1) -> Namespace:
        """Return a namespace.

        Raises:
            NvmeError: there is no such namespace.
            NotSupportedError: it exists but is not active.
        """
        info = self.admin.identify_namespace(nsid)
        if not info.blocks:
            raise NotSupportedError(
                f"namespace {nsid} is not active",
                object=self.name,
                hint="admin.active_namespaces() lists those that are",
            )
        return Namespace(self, info, self.device.dma)

    # --- queues --------------------------------------------------------------------------------------------------

    def create_queue(self, depth: int | None = None) -> QueuePair:
        """Create another I/O queue pair.

        Each has an interrupt vector of its own for as long as there are enough; vector 0 is the admin queue's.

        Args:
            depth: entries; None for what the controller was opened with.

        Raises:
            NotSupportedError: there are as many as the controller allows.
        """
        self.check_running()
        taken = {queue.number for queue in self._queues}
        number = next((number for number in range(1, self._allowed + 1) if number not in taken), None)
        if number is None:
            raise NotSupportedError(
                f"the controller allows {self._allowed} I/O queue pairs",
                object=self.name,
                hint="delete one first",
            )
        entries = self._depth if depth is None else max(2, min(depth, self.capabilities.queue_entries))
        queue = self._make_queue(number, entries, self._signal(number))
        try:
            self.admin.create_queue(queue)
        except BaseException:
            self._discard(queue)
            raise
        self._queues.append(queue)
        self._queues.sort(key=lambda each: each.number)
        return queue

    def _signal(self, number: int) -> Signal:
        if len(self._signals) == 1:
            return self._signals[0]
        return self._signals[1 + (number - 1) % (len(self._signals) - 1)]

    def _discard(self, queue: QueuePair) -> None:
        """Free a queue pair whose creation failed, or was interrupted when nobody knows how far it got."""
        if self._failure is None:
            # An error says that the controller does not know it, or was disabled just now: it does not use the memory.
            with suppress(VfioError):
                self.admin.delete_queue(queue)
        queue.close()

    def delete_queue(self, queue: QueuePair) -> None:
        """Delete an I/O queue pair; commands that are under way are abandoned."""
        self.check_running()
        self.admin.delete_queue(queue)
        self._queues.remove(queue)
        queue.abandon(CommandAbortedError("the command was under way when the queue was deleted", object=queue.name))
        queue.close()

    # --- failing -------------------------------------------------------------------------------------------------

    def check_running(self) -> None:
        """Raise unless commands can be submitted.

        Raises:
            ClosedError, ForkedError: see :class:`vfiopy.lives.Resource`.
            ControllerFailedError: it was disabled after a failure.
        """
        self.check_open()
        if self._failure is not None:
            raise ControllerFailedError(
                f"the controller was disabled: {self._failure}", object=self.name, hint="reset() brings it back"
            )

    def timed_out(self, request: Request, timeout: float) -> NoReturn:
        """A command took too long: called by its queue."""
        what = f"{request.command.name} was not completed within {timeout} s"
        error = NvmeTimeoutError(
            f"it was not completed within {timeout} s; the controller {self._look()}",
            object=request.queue.name,
            call=request.command.name,
            hint="the controller was disabled, so that it cannot write the buffer any more; reset() brings it back",
        )
        self.fail(what)
        request.error = error
        raise error

    def _look(self) -> str:
        if self._lifecycle is None:
            return "was never looked at"
        try:
            status = self._lifecycle.status()
        except VfioError as error:
            return f"does not answer ({error.meaning})"
        if status & reg.CSTS_CFS:
            return f"reports a fatal error (CSTS {status:#x})"
        return f"says that it is {'ready' if status & reg.CSTS_RDY else 'not ready'} (CSTS {status:#x})"

    def fail(self, reason: str) -> None:
        """Disable the controller and abandon everything that is under way. Does not raise."""
        if self._failure is None:
            self._stop(reason)

    def _stop(self, reason: str) -> None:
        self._failure = reason
        try:
            if self._lifecycle is not None:
                self._lifecycle.disable()
        except VfioError:
            # It does not obey: without bus mastering it cannot reach memory either.
            self.device.quiesce()
        self._abandon(reason)

    def _abandon(self, reason: str) -> None:
        queues = list(self._queues)
        if self._admin_queue is not None:
            queues.append(self._admin_queue)
        for queue in queues:
            queue.abandon(
                CommandAbortedError(f"the command was under way when {reason}", object=queue.name)
            )

    # --- reset and end -------------------------------------------------------------------------------------------

    def reset(self, *, function: bool = False) -> None:
        """Reset the controller and bring it up again, with the same I/O queue pairs.

        Commands that are under way are abandoned with CommandAbortedError.

        Args:
            function: reset the PCI function first, for a controller that does not obey.

        Raises:
            VfioTimeoutError, ControllerFailedError: it does not come up; it is disabled then.
            NotSupportedError: ``function`` is asked for and the function has no reset.
        """
        self.check_open()
        lifecycle = self._lifecycle
        if lifecycle is None:
            raise StateError(f"{self._label} did not come up")
        if function and not self.device.can_reset:
            raise NotSupportedError("the device has no function reset", object=self.name, hint="reset() without it")
        self._stop("the controller was reset")
        try:
            if function:
                self.device.reset()
            lifecycle.refresh()
            lifecycle.disable()
            self._enable(lifecycle)
            if self._queues:
                self.admin.request_queues(self._allowed)
            for queue in self._queues:
                queue.clear()
                self.admin.create_queue(queue)
        except BaseException as error:
            self._stop(f"a reset did not succeed: {error}")
            raise

    def _shut_down(self, lifecycle: Lifecycle) -> None:
        """End as the specification asks: I/O queues first, then the announcement, then disable."""
        if self._failure is None:
            for queue in self._queues:
                self.admin.delete_queue(queue)
            lifecycle.shut_down(max(self.info.shutdown_seconds, _DEFAULT_SHUTDOWN))
        lifecycle.disable()

    def _tear_down(self) -> None:
        """Give everything back, whatever state the controller is in."""
        if self.device:
            # Whatever happened before: no DMA after this line.
            self.device.quiesce()
            if self._interrupt is not None:
                self._interrupt.disable()
        self._interrupt = None
        self._abandon("the controller was closed")
        queues, self._queues = self._queues, []
        if self._admin_queue is not None:
            queues.append(self._admin_queue)
            self._admin_queue = None
        for queue in queues:
            queue.close()
        if self._admin is not None:
            self._admin.close()

    def _release(self) -> None:
        try:
            # A device that was closed first has stopped, and has taken its interrupts along.
            if self.device and self._lifecycle is not None:
                self._shut_down(self._lifecycle)
        finally:
            self._tear_down()

    def close(self) -> None:
        """Shut down and give everything back; the device stays open. Idempotent.

        Raises:
            VfioError: the controller did not shut down as it should; everything was given back all the same.
        """
        try:
            super().close()
        finally:
            self._open = False
