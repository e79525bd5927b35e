"""Tracing a whole program from outside: ``VFIOPY_TRACE`` in its environment, which ``vfiopy.open()`` looks at.

``vfiopy trace`` sets it to a socket of its own, so that formatting and writing are not the program's work, and what was
handed over survives the program. Set to a path by hand, a process writes JSON lines there; where a file is already,
which may be another process's, it takes a name of its own.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import threading
import warnings
from pathlib import Path
from typing import Any

from vfiopy.device import Device
from vfiopy.errors import VfioError
from vfiopy.trace.places import Selection
from vfiopy.trace.recorder import Recorder, Sink
from vfiopy.trace.sinks import JsonLines
from vfiopy.trace.watch import DeviceWatch

__all__ = ["OPTIONS", "SOCKET", "VARIABLE", "trace_opened"]

VARIABLE = "VFIOPY_TRACE"
OPTIONS = "VFIOPY_TRACE_OPTIONS"
"""JSON: the arguments ``only``, ``contents`` and ``sync`` of :func:`vfiopy.tracing`, and names of ``devices``."""
SOCKET = "unix:"


class _Program:
    """The trace of this process, made when its first device is opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = 0
        self._recorder: Recorder | None = None
        self._watches: list[DeviceWatch] = []

    def add(self, device: Device, target: str, options: dict[str, Any]) -> None:
        names = options.get("devices") or [device.name]
        if device.name not in names:
            return
        with self._lock:
            if self._pid != os.getpid():  # a forked child has a trace of its own
                self._pid, self._recorder, self._watches = os.getpid(), None, []
            if self._recorder is None:
                self._recorder = Recorder(_sink(target), sync=bool(options.get("sync")))
                atexit.register(self.close, self._recorder)
            selection = Selection(options.get("only", ()))
            contents = bool(options.get("contents"))
            self._watches.append(DeviceWatch(device, self._recorder, selection, contents=contents))

    def close(self, recorder: Recorder) -> None:
        for watch in self._watches:
            watch.stop()
        try:
            recorder.close()
        except VfioError as error:
            warnings.warn(f"{error.meaning}", RuntimeWarning, stacklevel=1)


class _SocketSink(JsonLines):
    def __init__(self, path: str) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
            super().__init__(connection.makefile("w", encoding="utf-8"))
        finally:
            connection.close()  # the file keeps it open
        self._owned = True


_program = _Program()


class _FileSink(JsonLines):
    """A new file: ``trace.jsonl``, or ``trace.PID.jsonl`` where there is a file already."""

    def __init__(self, target: str) -> None:
        path = Path(target)
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            file = path.with_name(f"{path.stem}.{os.getpid()}{path.suffix}").open("x", encoding="utf-8")
        super().__init__(file)
        self._owned = True


def _sink(target: str) -> Sink:
    return _SocketSink(target.removeprefix(SOCKET)) if target.startswith(SOCKET) else _FileSink(target)


def trace_opened(device: Device) -> None:
    """Trace a device that was just opened, as the environment asks for.

    What goes wrong is a warning: a program does not fail because nobody could look.
    """
    target = os.environ.get(VARIABLE)
    if not target:
        return
    try:
        _program.add(device, target, json.loads(os.environ.get(OPTIONS, "{}")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{device.name} is not traced, {VARIABLE}={target}: {error}", RuntimeWarning, stacklevel=4)
