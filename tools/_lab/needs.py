"""What must be installed on the host: looked for by what it brings, named as Debian's packages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

__all__ = ["GUEST", "KERNEL", "missing"]

# What building a kernel needs: the program, file (/...) or header (<...>), and the package that brings it.
KERNEL = {
    "make": "make",
    "gcc": "gcc",
    "<stdlib.h>": "libc6-dev",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "perl": "perl",
    "xz": "xz-utils",
    "bzip2": "bzip2",
    "<libelf.h>": "libelf-dev",
    "<openssl/ssl.h>": "libssl-dev",
}

# What the guest's tests run: it has the host's programs.
GUEST = {
    "sfdisk": "fdisk",
    "mkfs.ext4": "e2fsprogs",
    "lspci": "pciutils",
}
# Debian's users have no sbin in their PATH.
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _there(thing: str) -> bool:
    if thing.startswith("/"):
        return Path(thing).exists()
    if not thing.startswith("<"):
        return shutil.which(thing, path=_PATH) is not None
    folders = [Path("/usr/include"), Path("/usr/local/include"), *Path("/usr/include").glob("*-linux-gnu")]
    return any((folder / thing.strip("<>")).exists() for folder in folders)


def missing(*needs: dict[str, str]) -> list[str]:
    """Packages for everything in ``needs`` that is not there."""
    return sorted({package for need in needs for thing, package in need.items() if not _there(thing)})
