"""Child processes that do not outlive the lab, and signals that unwind it."""

from __future__ import annotations

import contextlib
import shutil
import signal
from collections.abc import Iterator, Sequence

__all__ = ["dies_with_us", "signals_unwind"]


def dies_with_us(command: Sequence[str]) -> list[str]:
    """The command, to be killed by the kernel when this process dies, however that happens."""
    setpriv = shutil.which("setpriv")  # util-linux; without it only an unclean death of the lab leaves a child
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else list(command)


@contextlib.contextmanager
def signals_unwind() -> Iterator[None]:
    """SIGTERM and SIGHUP raise like Ctrl-C, so that guests are killed and half-made files removed."""

    def unwind(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, unwind) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
