"""What each errno means for each call, and what to do about it: pure data.

One row is (name of the exception class in :mod:`vfiopy.errors`, meaning, hint). A meaning goes on after
``"object: call: "``; a hint tells the reader what to do and may be empty. Rows were read from, and where they
can be produced in a guest checked against, the kernel's sources (Linux 7.2, 7.3).

Calls have the names of their ioctls. Other calls are ``"open ..."``, ``"mmap ..."``, ``"pread ..."``.
"""

from __future__ import annotations

from typing import Final

from vfiopy.errno_table.device import DEVICE, FEATURES
from vfiopy.errno_table.generic import FAMILIES, GENERIC
from vfiopy.errno_table.group import CONTAINER, GROUP
from vfiopy.errno_table.iommufd import IOMMUFD
from vfiopy.errno_table.meaning import Meaning
from vfiopy.errno_table.other import OTHER
from vfiopy.errno_table.vfio_user import VFIO_USER

__all__ = ["TABLE", "Meaning", "look_up"]

TABLE: Final[dict[str, dict[int, Meaning]]] = {
    **CONTAINER,
    **GROUP,
    **DEVICE,
    **FEATURES,
    **IOMMUFD,
    **OTHER,
    **VFIO_USER,
}
"""call → errno → row, for the calls that give an errno a meaning of their own."""


def look_up(number: int, call: str) -> Meaning | None:
    """Find the row for an errno of a call, of its family of calls, or of any call; None if there is none."""
    families = (rows for prefix, rows in FAMILIES if call.startswith(prefix))
    for rows in (TABLE.get(call, {}), *families, GENERIC):
        if number in rows:
            return rows[number]
    return None
