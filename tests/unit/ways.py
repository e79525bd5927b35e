"""The ways to reach a device that is a Python object: in the same process, and through a socket with a server."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import vfiopy
from vfiopy import emulated, vfio_user
from vfiopy.backend import DeviceIo
from vfiopy.emulated import PciDevice

WAYS = ("emulated", "vfio-user")


@contextmanager
def served(device: PciDevice) -> Iterator[Path]:
    """A server in a thread; yields its socket's path."""
    with tempfile.TemporaryDirectory(prefix="vfiopy-") as folder:
        path = Path(folder, "device.sock")
        with vfio_user.Server(*emulated.connect(device), path) as server:
            server.start()
            yield path


@contextmanager
def reach(device: PciDevice, way: str) -> Iterator[DeviceIo]:
    """The device at the seam."""
    if way == "emulated":
        with emulated.connect(device)[0] as io:
            yield io
    else:
        with served(device) as path, vfio_user.connect(path)[0] as far:
            yield far


@contextmanager
def opened(device: PciDevice, way: str) -> Iterator[vfiopy.Device]:
    """The device as a user has it."""
    if way == "emulated":
        with vfiopy.open(device) as one:
            yield one
    else:
        with served(device) as path, vfiopy.open(f"vfio-user:{path}") as one:
            yield one
