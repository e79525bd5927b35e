"""Saying what is going on, and the error that ends a set-up."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["TREE", "SetupError", "run", "say", "step"]

TREE = Path(__file__).resolve().parents[2]


class SetupError(Exception):
    """The set-up cannot go on; the message says what is missing and what to do."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"==> {text}", flush=True)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step and say how long it took."""
    say(title)
    started = time.monotonic()
    yield
    say(f"{title}: done in {time.monotonic() - started:.1f} s")


def run(
    command: Sequence[str | Path],
    what: str,
    *,
    folder: Path = TREE,
    environment: dict[str, str] | None = None,
) -> str:
    """Run a command quietly; returns its output, shows it if the command fails.

    Raises :class:`SetupError` naming ``what`` could not be done.
    """
    result = subprocess.run(
        [str(word) for word in command],
        check=False,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if result.returncode:
        raise SetupError(f"{what} failed:\n{result.stdout}")
    return result.stdout
