"""Ctrl-C at every place in turn, so that no boundary between two bytecodes is left out."""

from __future__ import annotations

import dis
from types import FrameType
from typing import Any

__all__ = ["Interrupt"]

CHECKS = {"CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD", "RESUME"}
"""Instructions that end with a look for signals."""


class Interrupt:
    """Raises KeyboardInterrupt where a signal could: at the n-th place in these files that looks for one.

    For ``sys.settrace()``, which the caller undoes.
    """

    def __init__(self, at: int, *files: str) -> None:
        self.at = at
        self.places = 0
        self._files = files
        self._last: dict[FrameType, str] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in self._files:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before = self._last.get(frame)
            self._last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before in CHECKS:
                self.places += 1
                if self.places == self.at:
                    raise KeyboardInterrupt
        return self

    def forget(self) -> None:
        """Let the frames go, and what they hold."""
        self._last.clear()
