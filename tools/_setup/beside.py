"""Commands that run while others do."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .report import TREE, say

__all__ = ["Beside"]


class Beside:
    """A command in the background. Its output goes to a file, and is shown when somebody waits for its end."""

    def __init__(self, command: Sequence[str | Path], log: Path, environment: Mapping[str, str] = os.environ) -> None:
        """Start it."""
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        self._started = time.time()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                cwd=TREE,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self._process.poll() is not None

    @property
    def succeeded(self) -> bool:
        """Whether it is over and went well."""
        return self._process.poll() == 0

    @property
    def seconds(self) -> float:
        """How long it ran, or was last heard of."""
        return max(0.0, self._log.stat().st_mtime - self._started)

    def follow(self) -> int:
        """Show what it printed and prints, until it ends; returns its exit status."""
        shown = 0
        while True:
            ended = self.ended
            with self._log.open("rb") as file:
                file.seek(shown)
                text = file.read()
            if text:
                print(text.decode(errors="replace"), end="", flush=True)
                shown += len(text)
            if ended:
                return self._process.returncode
            time.sleep(1.0)

    def stop(self) -> None:
        """End it, if it still runs."""
        if not self.ended:
            say(f"stopping {' '.join(str(word) for word in self._process.args)}")  # type: ignore[union-attr]
            self._process.terminate()
            self._process.wait()
