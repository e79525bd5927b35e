"""Devices that vfiopy serves on the host, for machines that have them as hardware."""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from .paths import TREE, LabError
from .process import dies_with_us

__all__ = ["Served", "Servers", "qemu_device"]

PATIENCE = 30.0  # seconds for a server to listen


@dataclasses.dataclass(frozen=True)
class Served:
    """A device, as ``vfiopy serve`` is told of it."""

    name: str
    """Its kind; names its socket too."""
    image: int = 0
    """Bytes of the disk image that it is given; 0 for none."""


def qemu_device(run: Path, name: str, **more: str) -> dict[str, object]:
    """QEMU's ``-device`` for a served device; ``more`` are further properties of it."""
    return {"driver": "vfio-user-pci", "socket": {"path": str(_socket(run, name)), "type": "unix"}, **more}


def _socket(run: Path, name: str) -> Path:
    return run / f"{name}.sock"


class Servers:
    """Emulated devices, each served by a process of its own, until the block ends.

    Args:
        devices: what is there.
        run: the folder for sockets and disk images.
        command: starts vfiopy's own command line.
    """

    def __init__(self, devices: Sequence[Served], run: Path, *, command: Sequence[str] = ()) -> None:
        python = TREE / ".venv" / "bin" / "python"
        if devices and not command and not python.exists():
            raise LabError(f"no {python}: run tools/test unit (or tools/demo) first, it sets it up")
        self._command = list(command) or [str(python), "-m", "vfiopy"]
        self._devices = {device.name: device for device in devices}
        self._run = run
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        """Serve a device of that name; the disk is as the last one left it.

        Raises:
            LabError: there is no such device, it runs, or it does not come up.
        """
        if name not in self._devices or name in self._running:
            raise LabError(f"{name} is served already, or is no device of this machine")
        path = _socket(self._run, name)
        path.unlink(missing_ok=True)  # of one that was killed; that there is one again says that it listens
        words = [*self._command, "serve", name, "--socket", str(path), *self._image(self._devices[name])]
        self._running[name] = process = subprocess.Popen(
            dies_with_us(words), cwd=TREE, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + PATIENCE
        while not path.exists():
            if process.poll() is not None or time.monotonic() > end:
                self.kill(name)
                raise LabError(f"'vfiopy serve {name}' does not come up")
            time.sleep(0.05)

    def _image(self, device: Served) -> list[str]:
        if not device.image:
            return []
        path = self._run / f"{device.name}-served.img"
        with path.open("ab") as handle:
            handle.truncate(device.image)
        return ["--image", str(path)]

    def kill(self, name: str) -> None:
        """End a server as a crash would: it has no time to say anything.

        Raises:
            LabError: it does not run.
        """
        process = self._running.pop(name, None)
        if process is None:
            raise LabError(f"{name} is not being served")
        process.kill()
        process.wait()

    def __enter__(self) -> Self:
        try:
            for name in self._devices:
                self.start(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()

