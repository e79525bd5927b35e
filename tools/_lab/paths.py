"""Where the lab keeps things, and how two runs keep out of each other's way."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["TREE", "LabError", "cache", "finished_folder", "is_finished", "locked", "place", "say", "scratch"]

TREE = Path(__file__).resolve().parents[2]
"""The working tree this file belongs to."""

COMPLETE = ".complete"


class LabError(Exception):
    """The lab cannot go on; the message says what is missing and what to do."""


def say(text: str) -> None:
    """Tell the user what is going on (standard error, so that a command's own output stays clean)."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def cache(*parts: str) -> Path:
    """Path below the per-machine cache, ``${XDG_CACHE_HOME:-~/.cache}/vfiopy``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base, "vfiopy", *parts)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock file ``name``; says so when it has to wait for another run."""
    folder = cache()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            started = time.monotonic()
            say(f"another run holds {name}.lock; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
            say(f"got {name}.lock after {time.monotonic() - started:.0f} s")
        yield


def _try_lock(handle: TextIO) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def place(count: int) -> Iterator[None]:
    """Hold one of ``count`` places on this machine; waits while all are taken.

    More emulated guests than processors only make each other miss their time limits.
    """
    cache().mkdir(parents=True, exist_ok=True)
    said = False
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(cache(f"place-{number}.lock").open("w")) for number in range(count)]
        while not any(_try_lock(handle) for handle in handles):
            if not said:
                say(f"{count} guests are running already; waiting for one to end")
                said = True
            time.sleep(0.5)
        yield


def is_finished(folder: Path) -> bool:
    """Whether ``finished_folder`` once completed ``folder``."""
    return (folder / COMPLETE).is_file()


@contextlib.contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A new folder below the cache that is gone afterwards; if we are killed, the next one removes it."""
    parent = cache("scratch")
    parent.mkdir(parents=True, exist_ok=True)
    with locked("scratch"):
        for old in parent.iterdir():
            with contextlib.suppress(OSError), (old / "alive").open("r") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))
        alive = (folder / "alive").open("w")
        fcntl.flock(alive, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        alive.close()


@contextlib.contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """Fill a new folder next to ``target``; it takes that name only if the block succeeds.

    A build that was interrupted is therefore never taken for a result.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{target.name}-", dir=target.parent))
    try:
        yield partial
        (partial / COMPLETE).touch()
        partial.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
