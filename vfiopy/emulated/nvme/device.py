"""The NVMe controller as a PCI function: registers, doorbells, and the order in which things happen."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from vfiopy.emulated.config_space import Identity
from vfiopy.emulated.nvme.admin import AdminCommands
from vfiopy.emulated.nvme.command import ENTRY, Command, RefusedError
from vfiopy.emulated.nvme.data import Data
from vfiopy.emulated.nvme.events import Events
from vfiopy.emulated.nvme.features import Features
from vfiopy.emulated.nvme.function import BUFFER_BAR, bars_of, capabilities_of
from vfiopy.emulated.nvme.identify import Identify
from vfiopy.emulated.nvme.io import IoCommands
from vfiopy.emulated.nvme.logs import ErrorEntry, Logs
from vfiopy.emulated.nvme.memory import Memory
from vfiopy.emulated.nvme.namespace import Namespace
from vfiopy.emulated.nvme.properties import Properties
from vfiopy.emulated.nvme.queues import CompletionQueue, Queues, SubmissionQueue
from vfiopy.emulated.nvme.settings import Settings
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import NotMappedError
from vfiopy.nvme_spec import registers as reg
from vfiopy.nvme_spec.status import Code

__all__ = ["Nvme"]

_COMPLETION: Final = struct.Struct("<IIHHHH")
_BURST: Final = 8  # commands of one queue before the next one's turn: accesses to registers come in between, too
_MORE, _DNR = 1 << 14, 1 << 15
_NO_LOCATION: Final = 0xFFFF
_QUIET: Final = (Code.ABORT_REQUESTED, Code.ABORTED_SQ_DELETION)  # no errors of a command's own


class Nvme(PciDevice):
    """An NVMe controller: NVM Express Base Specification 2.0, NVM Command Set Specification 1.0.

    BAR 0 has the registers, BAR 2 the controller memory buffer where there is one, BAR 4 the MSI-X table.

    Args:
        namespaces: by identifier, or in order from 1 on; None for one of 64 MiB in memory. They are closed with the
            controller.
        serial: serial number, of which subsystem and namespaces have their identities; None for one made up.
        seed, manual: as for :class:`PciDevice`.
        delay: shortest and longest time in seconds that a command takes. Above 0, commands complete out of order.
        settings: what else there is to choose: see :class:`Settings`.

    Raises:
        ValueError: a setting out of its range, or a namespace identifier.
    """

    name = "nvme"
    identity = Identity(
        vendor=0x1234,
        device=0x4E56,
        class_code=0x010802,
        revision=1,
        subsystem_vendor=0x1AF4,
        subsystem=0x1100,
    )

    def __init__(
        self,
        namespaces: Mapping[int, Namespace] | Sequence[Namespace] | None = None,
        *,
        serial: str | None = None,
        seed: int = 0,
        delay: tuple[float, float] = (0.0, 0.0),
        manual: bool = False,
        **settings: Any,
    ) -> None:
        self.settings = chosen = Settings(secrets.token_hex(8).upper() if serial is None else serial, **settings)
        self.bars = bars_of(chosen)
        self.capabilities = capabilities_of(chosen)
        self.interrupt_pin = chosen.interrupt_pin
        super().__init__(seed=seed, delay=delay, manual=manual)
        self.namespaces = _numbered(namespaces, chosen)
        self.registers = Properties(chosen)
        self.queues = Queues(chosen.queues, chosen.entries)
        self.features = Features(chosen, self.queues)
        self.logs = Logs(self.features, chosen.firmware, self._all_read_only)
        self.events = Events(chosen.event_requests, self._complete_event)
        buffer = self.memories[BUFFER_BAR].view if chosen.memory_buffer else None
        self._memory = Memory(self, buffer)
        self._data = Data(self._memory, 4096 << chosen.mdts if chosen.mdts else 0)
        self._io = IoCommands(self._data, self.namespaces, self.features, self.logs, self.waiting)
        vendors = (self.identity.vendor, self.identity.subsystem_vendor)
        self._admin = AdminCommands(
            self._data,
            self.queues,
            Identify(chosen, vendors, self.namespaces),
            self.features,
            self.logs,
            self.events,
            drop=self._drop,
            withdraw=self._withdraw,
            health_changed=self._look_at_health,
        )
        self._scheduled = False
        self._shut = True

    # --- power and reset -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Power-on, or a function reset."""
        self._stop()
        self.registers.power_on()
        self._memory.place_buffer(None)

    def _stop(self) -> None:
        """Forget queues and commands, as each controller level reset does (Base 2.0, 3.7.2)."""
        self._scheduled = False
        self.queues.clear()
        self.events.reset()
        self.features.reset()
        self.deassert()

    def unplug(self) -> None:
        """Power off."""
        super().unplug()
        with self.lock:
            self._note_power_loss()

    def _note_power_loss(self) -> None:
        if not self._shut:
            self.logs.unsafe_shutdowns += 1
            self._shut = True

    def close(self) -> None:
        """Put everything on the disk and close the images. Idempotent; the controller is of no use afterwards."""
        for namespace in self.namespaces.values():
            try:
                namespace.sync()
            except (RefusedError, OSError) as error:
                self.record_error(f"{namespace.backing.name} could not be put on the disk: {error}", error)
            namespace.close()

    def _all_read_only(self) -> bool:
        return bool(self.namespaces) and all(one.read_only for one in self.namespaces.values())

    # --- registers -----------------------------------------------------------------------------------------------

    def read(self, bar: int, offset: int, width: int) -> int:
        """Read a register; doorbells, and what is none, read 0."""
        return 0 if bar else self.registers.read(offset, width)

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Write a register, of 64 bits also in halves; what is narrower than 32 bits does nothing (3.1)."""
        if bar or width < 4:
            return
        if offset >= reg.DOORBELLS:
            self._ring(offset - reg.DOORBELLS, value & 0xFFFF_FFFF)
            return
        self._write_word(offset, value & 0xFFFF_FFFF)
        if width == 8:
            self._write_word(offset + 4, value >> 32)

    def _write_word(self, offset: int, value: int) -> None:
        match offset:
            case reg.CC:
                self._configure(value)
            case reg.INTMS | reg.INTMC:
                self.registers.mask_interrupts(value, clear=offset == reg.INTMC)
                self._update_line()
                if offset == reg.INTMC:
                    self._send_held(value)
            case reg.AQA | reg.ASQ | reg.ACQ | 0x2C | 0x34:
                if self.registers.control & reg.CC_EN:
                    self.record_error(f"admin queue register {offset:#x} was written while the controller was enabled")
                self.registers.write(offset, value)
            case reg.CMBMSC | 0x54:
                self.registers.write_buffer_control(offset, value)
                self.registers.show_buffer_fits(self._memory.place_buffer(self.registers.buffer_base))

    def _configure(self, value: int) -> None:
        before = self.registers.control
        self.registers.write(reg.CC, value)
        if value & reg.CC_EN and not before & reg.CC_EN:
            self.later(self._enable)
        elif before & reg.CC_EN and not value & reg.CC_EN:
            # What is under way ends first: CSTS.RDY = 0 says that there is no DMA any more.
            self.drop_work()
            self._scheduled = False
            self.later(self._disable)
        if value & reg.CC_SHN_MASK and not before & reg.CC_SHN_MASK:
            self.registers.status = self.registers.status & ~reg.CSTS_SHST_MASK | reg.CSTS_SHST_BUSY
            self.later(self._shut_down)

    def _enable(self) -> None:
        registers = self.registers
        complaint = registers.complaint()
        if complaint:
            self._fail(complaint)
            return
        self._stop()
        self.queues.page = self._data.page = registers.page
        self.queues.make_admin(registers.wide(reg.ASQ), registers.wide(reg.ACQ), registers.words.get(reg.AQA, 0))
        if self._shut:
            self.logs.power_cycles += 1
        self._shut = False
        registers.status = reg.CSTS_RDY

    def _disable(self) -> None:
        self._stop()
        self.registers.controller_reset()

    def _shut_down(self) -> None:
        """Put caches on the disk (Base 2.0, 3.6.1)."""
        with self.waiting():
            for namespace in self.namespaces.values():
                namespace.sync()
        self._shut = True
        self.registers.status = self.registers.status & ~reg.CSTS_SHST_MASK | reg.CSTS_SHST_DONE

    def _fail(self, reason: str) -> None:
        """Report a fatal error, and do nothing more until a reset (CSTS.CFS, 3.1.3.6)."""
        self.record_error(f"controller fatal status: {reason}")
        self.registers.status |= reg.CSTS_CFS

    @property
    def _works(self) -> bool:
        return self.registers.status & (reg.CSTS_RDY | reg.CSTS_CFS) == reg.CSTS_RDY

    # --- doorbells -----------------------------------------------------------------------------------------------

    def _ring(self, offset: int, value: int) -> None:
        if not self._works or not self.registers.control & reg.CC_EN:
            self.record_error(f"doorbell {offset:#x} was written while the controller was not ready")
            return
        index, rest = divmod(offset, 4 << self.settings.stride)
        number, is_head = divmod(index, 2)
        sq = self.queues.submissions.get(number) if not is_head else None
        cq = self.queues.completions.get(number) if is_head else None
        if rest or (sq is None and cq is None):
            self.record_error(f"doorbell {offset:#x} was written, and there is no such queue")
            self.events.invalid_doorbell(value=False)
        elif sq is not None and value < sq.entries and 0 < (value - sq.tail) % sq.entries < sq.entries - sq.pending:
            sq.tail = value
            self._schedule()
        elif cq is not None and value < cq.entries and 0 < (value - cq.head) % cq.entries <= _taken_at_most(cq):
            cq.head = value
            if cq.backlog:
                self._schedule()
            self._update_line()
        else:
            self.record_error(f"{value} was written to doorbell {offset:#x}, which is out of place")
            self.events.invalid_doorbell(value=True)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.later(self._serve, delay=0)

    # --- work ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Take a few commands of each queue, then let registers be accessed before the next few."""
        self._scheduled = False
        try:
            for cq in list(self.queues.completions.values()):
                if cq.backlog:
                    self._post(cq)
            more = False
            for sq in list(self.queues.submissions.values()):
                if sq.head != sq.tail and self._works:
                    more |= self._serve_queue(sq)
        except (NotMappedError, RefusedError) as error:
            self._fail(f"a queue is out of reach: {error}")
            return
        if more and self._works:
            self._schedule()

    def _serve_queue(self, sq: SubmissionQueue) -> bool:
        """Fetch and execute; whether there is more to do."""
        cq = sq.cq
        if len(cq.backlog) >= cq.entries:
            return False  # the host's turn: it takes completions and rings
        entries = sq.peek(self._memory, _BURST)
        for start in range(0, len(entries), ENTRY.size):
            command = Command._make(ENTRY.unpack_from(entries, start))
            sq.head = (sq.head + 1) % sq.entries
            self._begin(sq, command)
            if not self._works or self.queues.submissions.get(sq.number) is not sq:
                break
        self._post(cq)
        return sq.head != sq.tail

    def _begin(self, sq: SubmissionQueue, command: Command) -> None:
        if not self.delay[1]:
            self._execute(sq, command)
        elif command.cid in sq.under_way:
            self._complete(sq, command, 0, RefusedError(Code.ID_CONFLICT, 2))
        else:
            sq.under_way[command.cid] = command
            self.later(partial(self._finish, sq, command))

    def _finish(self, sq: SubmissionQueue, command: Command) -> None:
        """Execute a command whose time has come, if nobody aborted it meanwhile."""
        if sq.under_way.get(command.cid) is not command or not self._works:
            return
        del sq.under_way[command.cid]
        try:
            self._execute(sq, command)
            self._post(sq.cq)
        except (NotMappedError, RefusedError) as error:
            self._fail(f"a queue is out of reach: {error}")

    def _execute(self, sq: SubmissionQueue, command: Command) -> None:
        refusal = None
        result: int | None = 0
        try:
            if command.flags & 3:
                raise RefusedError.field(1)  # fused commands
            result = self._io.execute(command) if sq.number else self._execute_admin(command)
        except RefusedError as refused:
            refusal = refused
        except NotMappedError:
            refusal = RefusedError(Code.DATA_TRANSFER_ERROR, retry=True)
        if result is not None:
            self._complete(sq, command, result, refusal)

    def _execute_admin(self, command: Command) -> int | None:
        self.features.vectors = self._vectors()
        self.queues.entry_sizes_set = self.registers.entry_sizes_set
        return self._admin.execute(command)

    # --- completions ---------------------------------------------------------------------------------------------

    def _complete(
        self, sq: SubmissionQueue, command: Command, result: int, refusal: RefusedError | None = None
    ) -> None:
        """Put a completion into its queue's backlog."""
        status = 0
        if refusal is not None:
            status = refusal.code << 1 | (0 if refusal.retry else _DNR)
            if refusal.code not in _QUIET:
                status |= _MORE
                self._log_error(sq, command, status, refusal)
        sq.cq.backlog.append(_COMPLETION.pack(result, 0, sq.head, sq.number, command.cid, status))

    def _log_error(self, sq: SubmissionQueue, command: Command, status: int, refusal: RefusedError) -> None:
        location = _NO_LOCATION if refusal.at is None else refusal.at
        if refusal.code >> 8 == 2:
            self.logs.media_errors += 1
        self.logs.record(ErrorEntry(sq.number, command.cid, status, location, refusal.lba, command.nsid))

    def _complete_event(self, cid: int, result: int) -> None:
        sq = self.queues.submissions.get(0)
        if sq is not None:
            sq.cq.backlog.append(_COMPLETION.pack(result, 0, sq.head, 0, cid, 0))
            self._schedule()

    def _post(self, cq: CompletionQueue) -> None:
        """Write what is in a backlog, and interrupt."""
        if not cq.backlog or not cq.post(self._memory) or cq.vector is None:
            return
        if self.config.msix_enabled or not self.registers.interrupt_mask >> cq.vector & 1:
            self.interrupt(cq.vector)

    def _update_line(self) -> None:
        """Drive INTx, which is a level: asserted while a queue has entries that the host has not taken.

        PCIe Transport 1.0, 3.5.1.
        """
        if self._host is None or self.config.msix_enabled or self.config.msi_enabled:
            return
        mask = self.registers.interrupt_mask
        if any(
            cq.head != cq.tail and cq.vector is not None and not mask >> cq.vector & 1
            for cq in self.queues.completions.values()
        ):
            self.interrupt()
        else:
            self.deassert()

    def _send_held(self, bits: int) -> None:
        """Send the MSI messages that INTMS held back."""
        if self.config.msi_enabled:
            for cq in self.queues.completions.values():
                if cq.vector is not None and cq.head != cq.tail and bits >> cq.vector & 1:
                    self.interrupt(cq.vector)

    def _vectors(self) -> int:
        """How many interrupts a completion queue can choose from."""
        messages = self.config.msix_enabled or self.config.msi_enabled
        return self.settings.vectors if messages else 1

    # --- commands that end before their time ---------------------------------------------------------------------

    def _drop(self, sq: SubmissionQueue) -> None:
        """End the commands of a queue that is deleted (Base 2.0, 5.7)."""
        for command in list(sq.under_way.values()):
            self._complete(sq, command, 0, RefusedError(Code.ABORTED_SQ_DELETION))
        sq.under_way.clear()
        self._post(sq.cq)

    def _withdraw(self, number: int, cid: int) -> bool:
        """Abort a command that is under way."""
        sq = self.queues.submissions.get(number)
        if sq is None:
            return False
        command = sq.under_way.pop(cid, None)
        if command is None:
            if number or not self.events.withdraw(cid):
                return False
            command = Command(0x0C, 0, cid, *(0,) * 11)
        self._complete(sq, command, 0, RefusedError(Code.ABORT_REQUESTED))
        self._post(sq.cq)
        return True

    def _look_at_health(self) -> None:
        """Tell of a critical warning, if the host wants to know."""


def _taken_at_most(cq: CompletionQueue) -> int:
    """How many entries the host can have taken since it last said so."""
    return (cq.tail - cq.head) % cq.entries


def _numbered(
    namespaces: Mapping[int, Namespace] | Sequence[Namespace] | None, settings: Settings
) -> dict[int, Namespace]:
    if namespaces is None:
        found = {1: Namespace.memory()}
    elif isinstance(namespaces, Mapping):
        found = dict(sorted(namespaces.items()))
    else:
        found = dict(enumerate(namespaces, 1))
    for nsid, namespace in found.items():
        if not 1 <= nsid <= settings.namespaces:
            raise ValueError(f"namespaces have identifiers 1 to {settings.namespaces}, not {nsid}")
        if namespace.uuid is None:
            namespace.uuid = settings.namespace_uuid(nsid)
    return found
