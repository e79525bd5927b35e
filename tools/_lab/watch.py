"""Follows a running guest: streams its output, notices the end, cuts a hang off."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import selectors
import socket
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Iterator

from .console import Console

__all__ = ["BOOT_FAILED", "HUNG", "KERNEL_COMPLAINED", "Outcome", "Watch"]

# Exit codes of the lab itself; timeout(1) uses 124 and 125 in the same sense.
KERNEL_COMPLAINED = 121
HUNG = 124
BOOT_FAILED = 125

BOOT_SECONDS = 120.0
STACKS_SECONDS = 5.0
ESCAPE = b"\x1d"  # Ctrl-]
QEMU = "qemu"
MOST_SAID = 4096  # bytes


@dataclasses.dataclass
class Outcome:
    """How a job ended."""

    status: int | None = None
    """The command's own exit status; None if it did not get that far."""
    problem: str = ""
    """Why the guest was cut off or ended by itself; empty if all went its way."""
    booted: bool = False
    boot_seconds: float = 0.0
    seconds: float = 0.0
    complaints: list[str] = dataclasses.field(default_factory=list)
    tail: list[str] = dataclasses.field(default_factory=list)

    @property
    def code(self) -> int:
        """Exit code for the whole run: the command's, unless the guest or its kernel failed."""
        if self.status:
            return self.status
        if self.complaints:
            return KERNEL_COMPLAINED
        if self.status is None:
            return HUNG if self.booted else BOOT_FAILED
        return 0


class _HangupError(Exception):
    """The user asked to end (signal or escape key)."""


@contextlib.contextmanager
def _raw_terminal() -> Iterator[bool]:
    """Standard input in raw mode; yields whether it is a terminal at all."""
    if not sys.stdin or not sys.stdin.isatty():
        yield False
        return
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        yield True
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


class Watch:
    """One guest under observation."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        ends: dict[str, socket.socket],
        console: Console,
        *,
        slowness: int = 1,
        stacks_seconds: float = STACKS_SECONDS,
    ) -> None:
        """``ends`` are our sides of the guest's ports by name; time limits are stretched by ``slowness``.

        A guest that is cut off has ``stacks_seconds`` to say what it is stuck in.
        """
        self._process = process
        self._ends = ends
        self._console = console
        self._slowness = slowness
        self._stacks_seconds = stacks_seconds
        self._outcome = Outcome()
        self._ctl = b""
        self._said = b""
        self._selector = selectors.DefaultSelector()

    def follow(self, timeout: float, idle: float) -> Outcome:
        """Stream until the job ends, the guest dies, or nothing was heard for ``idle`` seconds."""
        with self._selector:
            for name, end in self._ends.items():
                end.setblocking(False)
                self._selector.register(end, selectors.EVENT_READ, name)
            if self._process.stdout is not None:  # a QEMU that finds this pipe full stops its guest
                self._selector.register(self._process.stdout, selectors.EVENT_READ, QEMU)
            if "tty" not in self._ends:
                self._loop(timeout, idle, raw=False)
            else:
                with _raw_terminal() as raw, contextlib.suppress(_HangupError):
                    if sys.stdin and not sys.stdin.closed:
                        # a plain file cannot be waited for, and says nothing new
                        with contextlib.suppress(PermissionError, ValueError):
                            self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, "stdin")
                    self._loop(float("inf"), float("inf"), raw=raw)
        return self._outcome

    def _loop(self, timeout: float, idle: float, *, raw: bool) -> None:
        outcome = self._outcome
        started = heard = time.monotonic()
        while outcome.status is None:
            events = self._selector.select(1.0)
            now = time.monotonic()
            for key, _ in events:
                if self._receive(key.data, raw=raw) and key.data not in ("console", QEMU):
                    heard = now
            if outcome.booted and not outcome.boot_seconds:
                outcome.boot_seconds, started, heard = now - started, now, now
            if outcome.status is None and self._process.poll() is not None:
                self._drain(0.2)
                if outcome.status is None:
                    when = "during" if outcome.booted else "before"
                    self._end(f"the guest ended by itself {when} the job")
                break
            limit = timeout * self._slowness if outcome.booted else BOOT_SECONDS * self._slowness
            if now - started > limit:
                self._cut_off(f"{'the job' if outcome.booted else 'the boot'} took longer than {limit:.0f} s")
                break
            if outcome.booted and now - heard > idle * self._slowness:
                self._cut_off(f"no output for {idle * self._slowness:.0f} s")
                break
        outcome.seconds = time.monotonic() - started
        self._drain(2.0)

    def _receive(self, name: str, *, raw: bool = False) -> bool:
        """Handle what one port has; False at its end or if there was nothing."""
        if name == "stdin":
            return self._type(raw=raw)
        if name == QEMU:
            return self._listen()
        try:
            data = self._ends[name].recv(65536)
        except (BlockingIOError, ConnectionResetError):
            return False
        if not data:
            self._selector.unregister(self._ends[name])
            return False
        if name == "console":
            self._console.feed(data)
        elif name == "ctl":
            self._control(data)
        elif name in ("out", "tty"):
            _write(1, data)
        elif name == "err":
            _write(2, data)
        return True

    def _listen(self) -> bool:
        """Take what QEMU itself says, which may be very much, and keep the end of it."""
        assert self._process.stdout is not None
        data = os.read(self._process.stdout.fileno(), 65536)
        if not data:
            self._selector.unregister(self._process.stdout)
        self._said = (self._said + data)[-MOST_SAID:]
        return bool(data)

    def _type(self, *, raw: bool) -> bool:
        """Pass on what the user types."""
        data = os.read(sys.stdin.fileno(), 4096)
        if raw and ESCAPE in data:
            self._outcome.status = 0
            raise _HangupError
        if not data:
            self._selector.unregister(sys.stdin.fileno())
            data = b"\x04"
        tty_end = self._ends["tty"]
        tty_end.setblocking(True)
        tty_end.sendall(data)
        tty_end.setblocking(False)
        return True

    def _control(self, data: bytes) -> None:
        *lines, self._ctl = (self._ctl + data).split(b"\n")
        for line in lines:
            word, _, rest = line.decode().partition(" ")
            if word == "start":
                self._outcome.booted = True
            elif word == "exit":
                self._outcome.status = int(rest)

    def _drain(self, seconds: float) -> None:
        """Take in what is still under way."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            names = [key.data for key, _ in self._selector.select(0.05) if key.data != "stdin"]
            if sum(self._receive(name) for name in names) == 0:
                break

    def _cut_off(self, why: str) -> None:
        """Ask the guest's kernel what it is stuck in, then give up on it."""
        with contextlib.suppress(OSError):
            for key in b"lw":  # backtraces of all CPUs, then of blocked tasks
                self._ends["monitor"].send(b"chardev-send-break console\n")
                self._drain(0.3)
                self._ends["console"].send(bytes([key]))
                until = time.monotonic() + self._stacks_seconds / 2
                while time.monotonic() < until:
                    self._drain(0.2)
                    time.sleep(0.05)
        self._end(why)

    def _end(self, why: str) -> None:
        self._outcome.problem = why
        self._process.kill()
        self._drain(0.3)
        lines = self._said.decode(errors="replace").splitlines()
        said = [line for line in lines if line.strip() and ": warning: " not in line]
        if said:
            self._outcome.problem += f"; QEMU said: {'; '.join(said)}"
        self._outcome.tail = list(self._console.tail)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
