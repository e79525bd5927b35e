"""What of this process the kernel counts as locked or pinned memory, and against which limit.

type1 charges each mapped page to the process that maps it (``VmLck`` in ``/proc/self/status``), once for each
IOVA that it is mapped at. iommufd charges each page once to the *user*, over all of their processes; what is
shown to the process is ``VmPin``, so that the charge can only be bounded from below. Both compare with
``RLIMIT_MEMLOCK``, and neither where the process has ``CAP_IPC_LOCK``.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import NamedTuple

__all__ = ["Charges", "charges", "describe_memlock"]

_KIB = 1024


class Charges(NamedTuple):
    """Bytes that the kernel holds against this process.

    Attributes:
        locked: ``VmLck``: what type1 charges, and ``mlock()``.
        pinned: ``VmPin``: what iommufd pins for this process; its user may have more in other processes.
        limit: ``RLIMIT_MEMLOCK``, the soft limit, or None for no limit.
        exempt: the process has ``CAP_IPC_LOCK``: the limit does not apply.
    """

    locked: int
    pinned: int
    limit: int | None
    exempt: bool


def charges() -> Charges:
    """Read what is charged to this process now. Costs a read of ``/proc/self/status``."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.split()
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capabilities = int(fields["CapEff"][0], 16)
    return Charges(
        locked=int(fields["VmLck"][0]) * _KIB,
        pinned=int(fields["VmPin"][0]) * _KIB,
        limit=None if soft == resource.RLIM_INFINITY else soft,
        exempt=bool(capabilities >> 14 & 1),  # CAP_IPC_LOCK, linux/capability.h
    )


def describe_memlock(asked: int) -> str:
    """Say how many bytes were asked for, what is charged, and what the limit is."""
    now = charges()
    limit = "no limit" if now.limit is None else f"{now.limit} bytes"
    text = (
        f"{asked} bytes asked for, {now.locked} locked and {now.pinned} pinned by this process, RLIMIT_MEMLOCK {limit}"
    )
    return text + (" (CAP_IPC_LOCK: not applied)" if now.exempt else "")
