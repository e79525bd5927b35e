"""A real function behind a vfio-user server: its client, in another address space, drives it through the socket."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from modes import EDU

import vfiopy
from vfiopy.drivers.edu import BUFFER_SIZE, EduDriver


@pytest.mark.parametrize("mode", ["iommufd", "type1v2"])
def test_a_real_device_is_exported(mode: str, bdf: Callable[..., str], tmp_path: Path) -> None:
    address = bdf(EDU)
    path = tmp_path / "edu.sock"
    with vfiopy.bind(address), vfiopy.serve(address, path, backend=mode) as server:
        server.start()
        for _ in range(2):  # what the first client leaves does not disturb the second
            with vfiopy.open(f"vfio-user:{path}") as device:
                device.bus_master = True
                edu = EduDriver(device)
                assert edu.version == (1, 0)
                for kind in ("msi", "intx"):
                    edu.enable_interrupts(kind)
                    assert edu.factorial(10) == 3628800
                edu.disable_interrupts()
                with device.dma.allocate(4 * BUFFER_SIZE) as buffer:
                    buffer[:BUFFER_SIZE] = np.arange(BUFFER_SIZE) % 251
                    edu.load(buffer.iova, BUFFER_SIZE)
                    edu.store(buffer.iova + 2 * BUFFER_SIZE, BUFFER_SIZE)
                    assert np.array_equal(buffer[:BUFFER_SIZE], buffer[2 * BUFFER_SIZE : 3 * BUFFER_SIZE])
                with pytest.raises(vfiopy.IovaRangeError):  # memory that nobody shares cannot be mapped for hardware
                    device.space.map(vfiopy.dma.allocate_pages(BUFFER_SIZE))
