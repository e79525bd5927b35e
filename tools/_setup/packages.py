"""System packages: installed when root on a system with apt, else named."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path

from tools._lab.needs import GUEST, KERNEL
from tools._lab.needs import missing as missing_packages

from .report import SetupError, run, say

__all__ = ["BUILD", "CROSS", "GUEST", "KERNEL", "NATIVE", "ensure_packages"]

# For each purpose: the program, file or header that must be there, and the Debian package that brings it.
BUILD = {"cc": "gcc", "<stdlib.h>": "libc6-dev"}
NATIVE = {"make": "make"}
CROSS = {
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu",
    "/usr/aarch64-linux-gnu/include/stdlib.h": "libc6-dev-arm64-cross",
    "qemu-aarch64": "qemu-user",
}


def ensure_packages(*needs: dict[str, str]) -> None:
    """See to it that everything in ``needs`` is there.

    Raises :class:`SetupError` with the exact list if it is not and cannot be installed from here.
    """
    if platform.machine() != "x86_64":
        needs = tuple(need for need in needs if need is not CROSS)
    missing = missing_packages(*needs)
    if not missing:
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise SetupError(
            f"these packages are missing (Debian's names): {' '.join(missing)}\n"
            f"remedy: sudo apt-get install --no-install-recommends {' '.join(missing)}"
        )
    say(f"installing {' '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with tempfile.TemporaryDirectory() as folder:  # apt must not read its terminal or the tree
        run(["apt-get", "-q", "update"], "apt-get update", environment=environment, folder=Path(folder))
        command = ["apt-get", "-q", "-y", "--no-install-recommends", "install", *missing]
        run(command, "apt-get install", environment=environment, folder=Path(folder))
    if still := missing_packages(*needs):
        raise SetupError(f"installed, but still not found: {' '.join(still)}")
