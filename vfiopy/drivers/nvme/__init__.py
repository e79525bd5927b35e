"""An NVMe driver, written to the NVM Express Base Specification 2.0 and the NVM Command Set Specification 1.0.

::

    import vfiopy
    from vfiopy.drivers import nvme

    with vfiopy.open("0000:00:05.0") as device, nvme.Controller(device) as controller:
        disk = controller.namespace(1)
        first = disk.read(0, 8)                  # an array of bytes
        buffer = device.dma.allocate(1 << 20)    # or without a copy
        disk.read(0, into=buffer)

The rooms: ``controller`` brings it up, ``admin`` and ``namespace`` are its commands, ``queue`` and ``rings`` how they
travel, ``signals`` how the host hears of their end; ``commands`` and ``prp`` say it in the specification's words,
whose tables are in ``vfiopy.nvme_spec``.
"""

from vfiopy.drivers.nvme.admin import Admin
from vfiopy.drivers.nvme.commands import Command
from vfiopy.drivers.nvme.controller import Controller
from vfiopy.drivers.nvme.errors import (
    CommandAbortedError,
    ControllerFailedError,
    NvmeError,
    NvmeTimeoutError,
    QueueFullError,
    TransferSizeError,
)
from vfiopy.drivers.nvme.events import AsyncEvent
from vfiopy.drivers.nvme.identify import ControllerInfo, NamespaceInfo
from vfiopy.drivers.nvme.namespace import Namespace
from vfiopy.drivers.nvme.queue import QueuePair
from vfiopy.drivers.nvme.request import Request
from vfiopy.nvme_spec.opcodes import AdminOpcode, Cns, Feature, IoOpcode, LogPage
from vfiopy.nvme_spec.registers import Capabilities
from vfiopy.nvme_spec.status import Status

__all__ = [
    "Admin",
    "AdminOpcode",
    "AsyncEvent",
    "Capabilities",
    "Cns",
    "Command",
    "CommandAbortedError",
    "Controller",
    "ControllerFailedError",
    "ControllerInfo",
    "Feature",
    "IoOpcode",
    "LogPage",
    "Namespace",
    "NamespaceInfo",
    "NvmeError",
    "NvmeTimeoutError",
    "QueueFullError",
    "QueuePair",
    "Request",
    "Status",
    "TransferSizeError",
]
