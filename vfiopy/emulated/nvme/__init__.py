"""An NVMe controller that is a Python object: ``vfiopy.open("emulated:nvme")``, ``vfiopy serve nvme --image disk.img``.

::

    from vfiopy.emulated.nvme import Namespace, Nvme

    disk = Nvme([Namespace.image("disk.img", size=1 << 30), Namespace.memory(64 << 20, block_size=4096)])
    with vfiopy.open(disk) as device:
        ...
    disk.close()

The rooms: ``device`` has the registers and the order of things, ``execution`` and ``injection`` what becomes of a
command; ``queues``, ``shadow``, ``memory``, ``data``, ``prp`` and ``sgl`` are how commands and their data travel,
``interrupts`` how the host hears of their end; ``admin`` with ``identify``, ``features``, ``logs``, ``events`` and
``health``, and ``io`` with ``namespace`` and ``backing``, are the commands; ``settings``, ``properties`` and
``function`` say what the controller is.
"""

from vfiopy.emulated.nvme.backing import Backing
from vfiopy.emulated.nvme.device import Nvme
from vfiopy.emulated.nvme.injection import NvmeInjections, Rule
from vfiopy.emulated.nvme.namespace import Namespace
from vfiopy.emulated.nvme.settings import Settings

__all__ = ["Backing", "Namespace", "Nvme", "NvmeInjections", "Rule", "Settings"]
