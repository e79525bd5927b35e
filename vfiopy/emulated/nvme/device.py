"""The NVMe controller as a PCI function: registers, doorbells, and the order in which things happen."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

from vfiopy.emulated.config_space import Identity
from vfiopy.emulated.nvme.admin import AdminCommands
from vfiopy.emulated.nvme.command import ENTRY, Command, RefusedError
from vfiopy.emulated.nvme.data import Data
from vfiopy.emulated.nvme.events import Events
from vfiopy.emulated.nvme.execution import Execution
from vfiopy.emulated.nvme.features import Features
from vfiopy.emulated.nvme.function import BUFFER_BAR, bars_of, capabilities_of
from vfiopy.emulated.nvme.health import Health
from vfiopy.emulated.nvme.identify import Identify
from vfiopy.emulated.nvme.injection import NvmeInjections
from vfiopy.emulated.nvme.interrupts import Interrupts
from vfiopy.emulated.nvme.io import IoCommands
from vfiopy.emulated.nvme.logs import Logs
from vfiopy.emulated.nvme.memory import Memory
from vfiopy.emulated.nvme.namespace import Namespace, numbered
from vfiopy.emulated.nvme.properties import Properties
from vfiopy.emulated.nvme.queues import CompletionQueue, Queues, SubmissionQueue
from vfiopy.emulated.nvme.settings import Settings
from vfiopy.emulated.nvme.sgl import SUPPORT
from vfiopy.emulated.nvme.shadow import OACS, ShadowDoorbells
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import NotMappedError
from vfiopy.nvme_spec import registers as reg

__all__ = ["Nvme"]

_BURST: Final = 8  # commands of one queue before the next one's turn: accesses to registers come in between, too
_NAMESPACE_NOTICES: Final = 1 << 8


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

    Attributes:
        namespaces: the active ones, by identifier.
        inject: what is to go wrong: counters, and rules about commands: see :class:`NvmeInjections`.
        logs: counters and health; change them with :meth:`set_health`.

    Raises:
        ValueError: a setting out of its range, or a namespace identifier.
    """

    inject: NvmeInjections
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
        self.inject = NvmeInjections()
        self.namespaces = numbered(namespaces, chosen)
        self.registers = Properties(chosen)
        self.queues = Queues(chosen.queues, chosen.entries)
        self.features = Features(chosen, self.queues, self.namespaces)
        self.logs = Logs(self.features, chosen.firmware, self._all_read_only)
        self.events = Events(chosen.event_requests, self._complete_event)
        self._health = Health(self.logs, self.features, self.events)
        self._interrupts = Interrupts(self, chosen.vectors, self.registers, self.queues, self.features)
        self._memory = Memory(self, self.memories[BUFFER_BAR].view if chosen.memory_buffer else None)
        self._shadow = ShadowDoorbells(self._memory, 4 << chosen.stride)
        limit = 4096 << chosen.mdts if chosen.mdts else 0
        self._admin_data = Data(self._memory, limit, sgls=False)
        self._io_data = Data(self._memory, limit, sgls=True)
        self._io = IoCommands(self._io_data, self.namespaces, self.features, self.logs, self.waiting)
        self._execution = Execution(
            self,
            self.inject,
            self.queues,
            self.logs,
            self.events,
            admin=self._execute_admin,
            io=self._io.execute,
            settle=self._settle,
            fail=self.fail,
        )
        vendors = (self.identity.vendor, self.identity.subsystem_vendor)
        self._admin = AdminCommands(
            self._admin_data,
            self.queues,
            Identify(chosen, vendors, self.namespaces, sgls=SUPPORT, oacs=OACS),
            self.features,
            self.logs,
            self.events,
            self._shadow,
            drop=self._execution.drop,
            withdraw=self._execution.withdraw,
            health_changed=self._health.look,
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
        self._interrupts.reset()
        self._shadow.reset()
        self._health.reset()

    def unplug(self) -> None:
        """Power off."""
        super().unplug()
        with self.lock:
            if not self._shut:
                self.logs.unsafe_shutdowns += 1
                self._shut = True

    def close(self) -> None:
        """Put everything on the disk and close the images. Idempotent; the controller is of no use afterwards."""
        for namespace in list(self.namespaces.values()):
            if namespace.backing.closed:
                continue
            try:
                namespace.sync()
            except (RefusedError, OSError) as error:
                self.record_error(f"{namespace.backing.name} could not be put on the disk: {error}", error)
            namespace.close()

    # --- what happens to it by itself ----------------------------------------------------------------------------

    def set_health(
        self,
        *,
        temperature: int | None = None,
        spare: int | None = None,
        used: int | None = None,
        reliability_degraded: bool | None = None,
    ) -> None:
        """Change what the SMART log says, and tell the host if it wants to know (Asynchronous Event Configuration).

        Args:
            temperature: composite, kelvin.
            spare, used: percent; below 10 spare is a warning.
            reliability_degraded: bit 2 of the critical warning.

        Raises:
            ValueError: what the log has no room for.
        """
        with self.lock:
            self._health.change(temperature, spare, used, reliability_degraded)

    def set_namespace(self, nsid: int, namespace: Namespace | None) -> None:
        """Add or replace a namespace, or take it away with None: the old one is the caller's to close.

        Raises:
            ValueError: no identifier of this controller's, or nothing there to take away.
        """
        with self.lock:
            if namespace is not None:
                self.namespaces.update(numbered({nsid: namespace}, self.settings))
            elif self.namespaces.pop(nsid, None) is None:
                raise ValueError(f"there is no namespace {nsid} to take away")
            if nsid not in self.logs.changed:
                self.logs.changed.append(nsid)
            if self.features.event_mask & _NAMESPACE_NOTICES:
                self.events.namespace_changed()

    def _all_read_only(self) -> bool:
        return bool(self.namespaces) and all(one.read_only for one in self.namespaces.values())

    # --- registers -----------------------------------------------------------------------------------------------

    def read(self, bar: int, offset: int, width: int) -> int:
        """Read a register; doorbells, and what is none, read 0."""
        return 0 if bar else self.registers.read(offset, width)

    def write(self, bar: int, offset: int, width: int, value: int) -> None:
        """Write a register, of 64 bits also in halves; what is narrower than 32 bits does nothing (3.1)."""
        if bar or width < 4:
            self.record_error(f"{width} bytes were written at {offset:#x} of BAR {bar}, where nothing takes them")
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
                self._interrupts.write_mask(value, clear=offset == reg.INTMC)
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
        if not registers.control & reg.CC_EN:
            return  # set again before a reset was done, which has cleared it: RDY and EN must not part
        complaint = registers.complaint()
        if complaint:
            self.fail(complaint)
            return
        self._stop()
        self.queues.page = self._admin_data.page = self._io_data.page = registers.page
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
            for namespace in list(self.namespaces.values()):
                with suppress(RefusedError):  # a shutdown has no status to say so
                    namespace.sync()
        self._shut = True
        self.registers.status = self.registers.status & ~reg.CSTS_SHST_MASK | reg.CSTS_SHST_DONE

    def fail(self, reason: str) -> None:
        """Report a fatal error, and do nothing more until a reset (CSTS.CFS, 3.1.3.6)."""
        with self.lock:
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
        queue = (self.queues.completions if is_head else self.queues.submissions).get(number)
        if rest or queue is None:
            self.record_error(f"doorbell {offset:#x} was written, and there is no such queue")
            self.events.invalid_doorbell(value=False)
        elif value < queue.entries and self._shadow.on and number:
            self._schedule()  # the shadow may be ahead of the register, and says it all
        elif not queue.take(value):
            self.record_error(f"{value} was written to doorbell {offset:#x}, which is out of place")
            self.events.invalid_doorbell(value=True)
        elif not is_head:
            self._schedule()
        else:
            self._interrupts.update_line()
            if self.queues.completions[number].stalls:
                self._schedule()

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
                self._post(cq)
            more = False
            for sq in list(self.queues.submissions.values()):
                if self.queues.submissions.get(sq.number) is not sq:
                    continue  # deleted just now
                if self._works and not self._shadow.look(sq):
                    self.events.invalid_doorbell(value=True)
                if sq.head != sq.tail and self._works:
                    more |= self._serve_queue(sq)
            self._update_line()
        except (NotMappedError, RefusedError) as error:
            self.fail(f"a queue is out of reach: {error}")
            return
        if more and self._works:
            self._schedule()

    def _update_line(self) -> None:
        """Drive INTx, also where the host says in memory what it has taken."""
        if not self._interrupts.by_message:
            for cq in list(self.queues.completions.values()):
                while cq.vector is not None and self._shadow.watch(cq):
                    pass  # it takes more just now; at most all that there is
        self._interrupts.update_line()

    def _serve_queue(self, sq: SubmissionQueue) -> bool:
        """Fetch and execute; whether there is more to do."""
        if sq.cq.full:
            sq.cq.stalls = True
            return False  # the host's turn: it takes completions and rings
        entries = sq.peek(self._memory, _BURST)
        for start in range(0, len(entries), ENTRY.size):
            sq.head = (sq.head + 1) % sq.entries
            self._execution.begin(sq, Command._make(ENTRY.unpack_from(entries, start)))
            if not self._works or self.queues.submissions.get(sq.number) is not sq:
                break
        self._post(sq.cq)
        return sq.head != sq.tail or (self.queues.submissions.get(sq.number) is sq and self._shadow.rest(sq))

    def _execute_admin(self, command: Command) -> int | None:
        self.features.vectors = self._interrupts.vectors
        self.queues.entry_sizes_set = self.registers.entry_sizes_set
        return self._admin.execute(command)

    # --- completions ---------------------------------------------------------------------------------------------

    def _complete_event(self, cid: int, result: int) -> None:
        if self._execution.complete_event(cid, result):
            self._schedule()

    def _settle(self, sq: SubmissionQueue) -> None:
        """Commands of a queue have completed by themselves."""
        if self._works:
            try:
                self._post(sq.cq)
                self._update_line()
            except (NotMappedError, RefusedError) as error:
                self.fail(f"a queue is out of reach: {error}")

    def _post(self, cq: CompletionQueue) -> None:
        """Write what is in a backlog, and interrupt."""
        if not cq.backlog:
            return
        if cq.room < len(cq.backlog):
            self._shadow.look_at(cq)
        posted = cq.post(self._memory)
        while cq.backlog and self._shadow.watch(cq):
            posted += cq.post(self._memory)
        cq.stalls = bool(cq.backlog)
        if posted:
            self._interrupts.raise_for(cq, posted)
