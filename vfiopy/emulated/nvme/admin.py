"""The admin commands (Base 2.0, 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from vfiopy.emulated.nvme.command import Command, RefusedError
from vfiopy.emulated.nvme.data import Data
from vfiopy.emulated.nvme.events import Events
from vfiopy.emulated.nvme.features import TIMESTAMP_SIZE, Features
from vfiopy.emulated.nvme.identify import Identify
from vfiopy.emulated.nvme.logs import Logs
from vfiopy.emulated.nvme.queues import Queues, SubmissionQueue
from vfiopy.emulated.nvme.shadow import ShadowDoorbells
from vfiopy.errors import NotMappedError
from vfiopy.nvme_spec.opcodes import ALL_NAMESPACES, AdminOpcode, Feature, LogPage
from vfiopy.nvme_spec.status import Code

__all__ = ["AdminCommands"]

_PAGES_OF_ALL: Final = (0, ALL_NAMESPACES)
_NSID, _LID, _OFFSET = 4, 40, 48  # bytes of the entry, for the error log
_RETAIN: Final = 1 << 15
_CAPABILITIES: Final = 3
_PADDED: Final = 4096


class AdminCommands:
    """Executes admin commands.

    Args:
        data: finds a command's data.
        queues, identify, features, logs, events, shadow: what the commands are about.
        drop: called with a submission queue that is deleted: its commands that are under way end.
        withdraw: Abort: called with (queue, command identifier); whether there was such a command.
        health_changed: called where a feature may have made a warning of the temperature.
    """

    def __init__(
        self,
        data: Data,
        queues: Queues,
        identify: Identify,
        features: Features,
        logs: Logs,
        events: Events,
        shadow: ShadowDoorbells,
        *,
        drop: Callable[[SubmissionQueue], None],
        withdraw: Callable[[int, int], bool],
        health_changed: Callable[[], None],
    ) -> None:
        self._data = data
        self._queues = queues
        self._identify_data = identify
        self._features = features
        self._logs = logs
        self._events = events
        self._shadow = shadow
        self._drop = drop
        self._withdraw = withdraw
        self._health_changed = health_changed
        self._handlers: dict[int, Callable[[Command], int | None]] = {
            AdminOpcode.DELETE_SQ: self._delete_sq,
            AdminOpcode.CREATE_SQ: self._create_sq,
            AdminOpcode.GET_LOG_PAGE: self._get_log_page,
            AdminOpcode.DELETE_CQ: self._delete_cq,
            AdminOpcode.CREATE_CQ: self._create_cq,
            AdminOpcode.IDENTIFY: self._identify,
            AdminOpcode.ABORT: self._abort,
            AdminOpcode.SET_FEATURES: self._set_features,
            AdminOpcode.GET_FEATURES: self._get_features,
            AdminOpcode.ASYNC_EVENT_REQUEST: self._request_event,
            AdminOpcode.DOORBELL_BUFFER_CONFIG: self._configure_doorbells,
        }

    def execute(self, command: Command) -> int | None:
        """Execute a command; return dword 0 of its completion, or None where it completes some other time.

        Raises:
            RefusedError: with the status.
            NotMappedError: the host has no memory where it says.
        """
        handler = self._handlers.get(command.opcode)
        if handler is None:
            raise RefusedError(Code.INVALID_OPCODE, 0)
        return handler(command)

    # --- queues --------------------------------------------------------------------------------------------------

    def _create_cq(self, command: Command) -> int:
        self._queues.create_cq(command, self._features.vectors)
        self._begin(command, self._queues.delete_cq, completion=True)
        return 0

    def _create_sq(self, command: Command) -> int:
        self._queues.create_sq(command)
        self._begin(command, self._queues.delete_sq, completion=False)
        return 0

    def _begin(self, command: Command, undo: Callable[[Command], object], *, completion: bool) -> None:
        try:
            self._shadow.begin(command.cdw10 & 0xFFFF, completion=completion)
        except (NotMappedError, RefusedError):
            undo(command)
            raise

    def _delete_sq(self, command: Command) -> int:
        self._drop(self._queues.delete_sq(command))
        return 0

    def _delete_cq(self, command: Command) -> int:
        self._queues.delete_cq(command)
        return 0

    def _configure_doorbells(self, command: Command) -> int:
        self._shadow.configure(command, self._queues)
        return 0

    def _abort(self, command: Command) -> int:
        """Bit 0 of the result: the command was not aborted (Base 2.0, 5.1)."""
        return int(not self._withdraw(command.cdw10 & 0xFFFF, command.cdw10 >> 16))

    def _request_event(self, command: Command) -> None:
        self._events.request(command.cid)

    # --- what it is and remembers --------------------------------------------------------------------------------

    def _identify(self, command: Command) -> int:
        self._data.store(command, self._identify_data.answer(command))
        return 0

    def _get_log_page(self, command: Command) -> int:
        number = command.cdw10 & 0xFF
        size = ((command.cdw10 >> 16 | (command.cdw11 & 0xFFFF) << 16) + 1) * 4
        offset = command.cdw12 | command.cdw13 << 32
        if self._data.limit and size > self._data.limit:
            raise RefusedError.field(_LID + 2)
        if number == LogPage.SMART and command.nsid not in _PAGES_OF_ALL:
            raise RefusedError(Code.INVALID_FIELD, _NSID)  # LPA bit 0: there is none for a namespace alone
        page = self._logs.page(number)
        if page is None:
            raise RefusedError(Code.INVALID_LOG_PAGE, _LID)
        if offset & 3 or offset > len(page):
            raise RefusedError.field(_OFFSET)
        size = min(size, max(len(page), _PADDED))  # 16 GiB can be asked for; beyond the page there is nothing defined
        self._data.store(command, page[offset : offset + size].ljust(size, b"\0"))
        if not command.cdw10 & _RETAIN:
            if number == LogPage.CHANGED_NAMESPACES:
                self._logs.changed.clear()
            self._events.page_read(number)
        return 0

    def _set_features(self, command: Command) -> int:
        result = self._features.set(command)
        if command.cdw10 & 0xFF == Feature.TIMESTAMP:
            self._features.set_timestamp(self._data.load(command, TIMESTAMP_SIZE))
        self._health_changed()
        return result

    def _get_features(self, command: Command) -> int:
        result = self._features.get(command)
        select = command.cdw10 >> 8 & 7
        if command.cdw10 & 0xFF == Feature.TIMESTAMP and select != _CAPABILITIES:
            self._data.store(command, self._features.timestamp(select))
        return result
