"""From a command that was fetched to its completion: now or later, as told, as injected, or aborted before."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Final

from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.events import Events
from vfiopy.emulated.nvme.injection import NvmeInjections, Rule
from vfiopy.emulated.nvme.logs import ErrorEntry, Logs
from vfiopy.emulated.nvme.queues import Queues, SubmissionQueue
from vfiopy.emulated.pci_device import PciDevice
from vfiopy.errors import NotMappedError
from vfiopy.nvme_spec.opcodes import AdminOpcode
from vfiopy.nvme_spec.status import Code

__all__ = ["Execution"]

_COMPLETION: Final = struct.Struct("<IIHHHH")
_MORE, _DNR = 1 << 14, 1 << 15
_FUSE: Final = 0x03
_NO_LOCATION: Final = 0xFFFF
_QUIET: Final = (Code.ABORT_REQUESTED, Code.ABORTED_SQ_DELETION)  # no errors of a command's own


class Execution:
    """Executes commands, and puts completions into the backlog of their queues.

    Args:
        device: its delays, and work later.
        inject: what goes wrong.
        queues: where commands are under way.
        logs, events: error log; requests that can be aborted.
        admin, io: execute a command; None is a command that completes some other time.
        settle: called with a queue whose commands have completed later.
        fail: a fatal error.
    """

    def __init__(
        self,
        device: PciDevice,
        inject: NvmeInjections,
        queues: Queues,
        logs: Logs,
        events: Events,
        *,
        admin: Callable[[Command], int | None],
        io: Callable[[Command], int],
        settle: Callable[[SubmissionQueue], None],
        fail: Callable[[str], None],
    ) -> None:
        self._device = device
        self._inject = inject
        self._queues = queues
        self._logs = logs
        self._events = events
        self._admin = admin
        self._io = io
        self._settle = settle
        self._fail = fail

    def begin(self, sq: SubmissionQueue, command: Command) -> None:
        """Execute a command, or have it executed when its time comes."""
        rule = self._inject.find(sq.number, command) if self._inject.rules else None
        if command.cid in sq.under_way:
            self._complete(sq, command, 0, RefusedError(Code.ID_CONFLICT, 2))
        elif not self._device.delay[1] and rule is None:
            self._execute(sq, command, None)
        elif rule is not None and rule.fatal:
            self._fail("injected")
        else:
            sq.under_way[command.cid] = command
            if rule is None or not rule.hang:
                delay = rule.delay if rule is not None else None
                self._device.later(partial(self._finish, sq, command, rule), delay=delay)

    def _finish(self, sq: SubmissionQueue, command: Command, rule: Rule | None) -> None:
        """Execute a command whose time has come, if nobody aborted it meanwhile."""
        if sq.under_way.get(command.cid) is command:
            del sq.under_way[command.cid]
            self._execute(sq, command, rule)
            self._settle(sq)

    def _execute(self, sq: SubmissionQueue, command: Command, rule: Rule | None) -> None:
        refusal = None
        result: int | None = 0
        try:
            if rule is not None and rule.status is not None:
                raise RefusedError(rule.status, lba=command.cdw10 | command.cdw11 << 32)
            if command.flags & _FUSE:
                raise RefusedError.field(1)
            result = self._io(command) if sq.number else self._admin(command)
        except RefusedError as refused:
            refusal = refused
        except NotMappedError:
            refusal = RefusedError(Code.DATA_TRANSFER_ERROR, retry=True)
        except Exception as error:  # a mistake of ours: the host gets an answer, and the other commands their turn
            self._device.record_error(f"{type(error).__name__} in command {command.opcode:#x}: {error}", error)
            refusal = RefusedError(Code.INTERNAL_ERROR)
        if rule is not None and rule.cid is not None:
            command = command._replace(cid=rule.cid)
        if result is not None and not (rule is not None and rule.drop):
            self._complete(sq, command, result, refusal)

    def _complete(
        self, sq: SubmissionQueue, command: Command, result: int, refusal: RefusedError | None = None
    ) -> None:
        status = 0
        if refusal is not None:
            status = refusal.code << 1 | (0 if refusal.retry else _DNR)
            if refusal.code not in _QUIET:
                status |= _MORE
                self._log_error(sq, command, status, refusal)
        sq.cq.backlog.append(_COMPLETION.pack(result, 0, sq.head, sq.number, command.cid, status))

    def complete_event(self, cid: int, result: int) -> bool:
        """End an Asynchronous Event Request; whether there is a queue to do so."""
        sq = self._queues.submissions.get(0)
        if sq is not None:
            sq.cq.backlog.append(_COMPLETION.pack(result, 0, sq.head, 0, cid, 0))
        return sq is not None

    def _log_error(self, sq: SubmissionQueue, command: Command, status: int, refusal: RefusedError) -> None:
        location = _NO_LOCATION if refusal.at is None else refusal.at
        if refusal.code >> 8 == 2 and refusal.code != Code.COMPARE_FAILURE:
            self._logs.media_errors += 1
        self._logs.record(ErrorEntry(sq.number, command.cid, status, location, refusal.lba, command.nsid))

    # --- commands that end before their time ---------------------------------------------------------------------

    def drop(self, sq: SubmissionQueue) -> None:
        """End the commands of a queue that is deleted (Base 2.0, 5.7)."""
        for command in list(sq.under_way.values()):
            self._complete(sq, command, 0, RefusedError(Code.ABORTED_SQ_DELETION))
        sq.under_way.clear()
        self._settle(sq)

    def withdraw(self, number: int, cid: int) -> bool:
        """Abort a command that is under way; whether it was (Base 2.0, 5.1)."""
        sq = self._queues.submissions.get(number)
        if sq is None:
            return False
        command = sq.under_way.pop(cid, None)
        if command is None:
            if number or not self._events.withdraw(cid):
                return False
            command = Command(AdminOpcode.ASYNC_EVENT_REQUEST, 0, cid, *(0,) * 11)
        self._complete(sq, command, 0, RefusedError(Code.ABORT_REQUESTED))
        self._settle(sq)
        return True
