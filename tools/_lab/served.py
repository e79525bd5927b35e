"""Devices that vfiopy serves on the host, for machines that have them as hardware."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from .paths import TREE, LabError
from .process import dies_with_us

__all__ = ["serving", "socket_path"]

PATIENCE = 30.0  # seconds for a server to listen


def socket_path(run: Path, device: str) -> Path:
    """Where the server of a device listens."""
    return run / f"{device}.sock"


@contextlib.contextmanager
def serving(devices: Sequence[str], run: Path) -> Iterator[None]:
    """Serve emulated devices, each in a process of its own, until the block ends."""
    python = TREE / ".venv" / "bin" / "python"
    if devices and not python.exists():
        raise LabError(f"no {python}: run tools/test unit (or tools/demo) first, it sets the virtual environment up")
    with contextlib.ExitStack() as stack:
        for device in devices:
            stack.enter_context(_server(python, device, socket_path(run, device)))
        yield


@contextlib.contextmanager
def _server(python: Path, device: str, path: Path) -> Iterator[None]:
    command = [str(python), "-m", "vfiopy", "serve", device, "--socket", str(path)]
    process = subprocess.Popen(
        dies_with_us(command), cwd=TREE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        end = time.monotonic() + PATIENCE
        while not path.exists():
            if process.poll() is not None or time.monotonic() > end:
                raise LabError(f"'vfiopy serve {device}' does not come up")
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
