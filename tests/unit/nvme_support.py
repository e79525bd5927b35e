"""Our NVMe driver on the emulated NVMe controller, in the same process and through a socket."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from ways import opened

from vfiopy.drivers import nvme
from vfiopy.emulated import Nvme
from vfiopy.nvme_spec.status import Code


def noise(size: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bytes that nobody else writes by chance."""
    return np.frombuffer(hashlib.shake_128(seed.to_bytes(4, "little")).digest(size), np.uint8)


@contextmanager
def driven(
    target: Nvme | None = None, way: str = "emulated", *, clean: bool = True, **options: Any
) -> Iterator[tuple[Nvme, nvme.Controller]]:
    """Open and drive a controller; in the end it has nothing to complain about, unless ``clean`` is false."""
    disk = target if target is not None else Nvme()
    options.setdefault("timeout", 5.0)
    with opened(disk, way) as device, nvme.Controller(device, **options) as controller:
        yield disk, controller
    if clean:
        assert not disk.errors
        assert not disk.faults
    if target is None:
        disk.close()


def refused(controller: nvme.Controller, command: nvme.Command, data: Any = None, *, io: bool = False) -> int:
    """The status that a command ends with: its type and code as in :class:`Code`."""
    queue = controller.queues[0] if io else controller.admin.queue
    with pytest.raises(nvme.NvmeError) as caught:
        queue.execute(command, data)
    status = caught.value.status
    return Code(status.sct << 8 | status.sc)
