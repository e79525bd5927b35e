"""The other end of :mod:`vfiopy.trace.program`: runs a program and takes in the traces of its processes."""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vfiopy.trace.event import Event, from_json
from vfiopy.trace.program import OPTIONS, SOCKET, VARIABLE
from vfiopy.trace.recorder import Sink, header

__all__ = ["Collected", "collect"]

_PATIENCE = 1.0  # seconds of silence after which processes that outlive the program are left alone


class Collected:
    """What came of it.

    Attributes:
        status: exit status of the program; 128 and the signal's number where a signal ended it.
        events: how many were written.
        lost: how many were lost, as far as the processes could say.
        processes: how many opened a device.
        error: why the sink took no more, or None; what came from then on is counted as lost.
    """

    def __init__(self) -> None:
        self.status = 0
        self.events = 0
        self.lost = 0
        self.processes = 0
        self.error: OSError | None = None


class _Connection:
    """One process."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.pid = 0
        self.ended = False
        self._rest = b""
        self._last: Event | None = None

    def read(self) -> tuple[list[Event], int]:
        """Return the next events, and how many the process says it lost. Raises ``EOFError`` at the end."""
        data = self.channel.recv(1 << 18)
        if not data:
            raise EOFError
        *lines, self._rest = (self._rest + data).split(b"\n")
        events, lost = [], 0
        for line in lines:
            record: dict[str, Any] = json.loads(line)
            if record["kind"] == "begin":
                self.pid = record["pid"]
            elif record["kind"] == "end":
                self.ended, lost = True, record["lost"]
            else:
                self._last = from_json(record)
                events.append(self._last)
        return events, lost

    def cut_short(self, why: str) -> Event | None:
        """Return an event that says why the end is missing, or None where it is not."""
        if self.ended or self._last is None:
            return None
        facts = {"count": None, "reason": f"process {self.pid} {why}"}
        return self._last._replace(kind="lost", region=None, offset=None, width=None, value=None, facts=facts)


class _Collector:
    def __init__(self, sink: Sink, listener: socket.socket) -> None:
        self.result = Collected()
        self._sink = sink
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._connections: set[_Connection] = set()

    def run(self, program: subprocess.Popen[bytes]) -> None:
        """Take in events until the program and all traces have ended."""
        while program.poll() is None:
            self._step(0.05)
        last = time.monotonic()
        # what was written before the end is in the sockets; processes that live on are not waited for
        while self._step(0.05) or (self._connections and time.monotonic() - last < _PATIENCE):
            pass
        for connection in self._connections.copy():
            self._drop(connection, "goes on; what it does from here is not in the trace")
        status = program.returncode
        self.result.status = status if status >= 0 else 128 - status

    def _step(self, timeout: float) -> bool:
        ready = self._selector.select(timeout)
        for key, _ in ready:
            if key.fileobj is self._listener:
                connection = _Connection(self._listener.accept()[0])
                self._connections.add(connection)
                self._selector.register(connection.channel, selectors.EVENT_READ, connection)
                self.result.processes += 1
            else:
                self._take(key.data)
        return bool(ready)

    def _take(self, connection: _Connection) -> None:
        try:
            events, lost = connection.read()
        except (EOFError, ConnectionError):
            self._drop(connection, "ended without closing its trace; its last events may be missing")
            return
        except (ValueError, KeyError, TypeError, AttributeError):  # who knows the socket may misuse it
            self._drop(connection, "sent what is no trace; nothing more is taken from it")
            return
        self._write(events)
        self.result.lost += lost

    def _write(self, events: Sequence[Event]) -> None:
        if self.result.error is None:
            try:
                self._sink.write(events)
            except OSError as error:  # the program is not to fail because nobody can look: it goes on
                self.result.error = error
            else:
                self.result.events += len(events)
                return
        self.result.lost += len(events)

    def _drop(self, connection: _Connection, why: str) -> None:
        cut = connection.cut_short(why)
        if cut is not None:
            self._write([cut])
        self._selector.unregister(connection.channel)
        connection.channel.close()
        self._connections.discard(connection)

    def close(self) -> None:
        for connection in self._connections:
            connection.channel.close()
        self._selector.close()

    def end(self) -> None:
        try:
            self._sink.end(self.result.events, self.result.lost)
        except OSError as error:
            self.result.error = self.result.error or error


@contextmanager
def _signals_for(program: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let the program decide: Ctrl-C reaches it by itself, and who asks us to end asks the program."""

    def forward(number: int, _: object) -> None:
        program.send_signal(number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGHUP)}
    old[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def collect(
    command: Sequence[str], sink: Sink, *, options: dict[str, Any], stdout: IO[Any] | int | None = None
) -> Collected:
    """Run a command with its devices traced into a sink.

    Args:
        command: program and arguments.
        sink: where to.
        options: see :data:`vfiopy.trace.program.OPTIONS`.
        stdout: the program's standard output, as for ``subprocess``.

    Raises:
        OSError: the command cannot be run, or the sink cannot be begun. A sink that fails later is told in the result.
    """
    folder = Path(tempfile.mkdtemp(prefix="vfiopy-trace-"))  # mode 0700: nobody else connects
    path = folder / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    collector = _Collector(sink, listener)
    try:
        sink.begin({**header(), "program": list(command)})
        listener.bind(str(path))
        listener.listen()
        environment = {**os.environ, VARIABLE: f"{SOCKET}{path}", OPTIONS: json.dumps(options)}
        with subprocess.Popen(command, env=environment, stdout=stdout) as program, _signals_for(program):
            try:
                collector.run(program)
            except BaseException:
                program.terminate()
                raise
    finally:
        collector.close()
        listener.close()
        shutil.rmtree(folder)
        collector.end()
    return collector.result
