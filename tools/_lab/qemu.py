"""A QEMU that is new enough: the system's, or one unpacked below the cache and run through its own loader."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from pathlib import Path

from .apt import Package, archives, upstream
from .paths import LabError, cache, finished_folder, is_finished, locked, say

__all__ = ["Qemu", "ensure_qemu"]

MINIMUM = (11, 0)  # the first with iommu-testdev
PROGRAM = "qemu-system-x86_64"
NEEDED_DEVICES = ("edu", "igb", "iommu-testdev", "intel-iommu")


@dataclasses.dataclass(frozen=True)
class Qemu:
    """How to start QEMU."""

    command: tuple[str, ...]
    version: tuple[int, ...]


@functools.cache
def _version(command: tuple[str, ...]) -> tuple[int, ...]:
    """Version that the program reports; empty if it does not run or lacks a device the lab needs."""
    try:
        text, devices = (
            subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=30).stdout
            for arguments in (["--version"], ["-device", "help"])
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", text)
    if match is None or any(f'name "{name}"' not in devices for name in NEEDED_DEVICES):
        return ()
    return tuple(int(part) for part in match.groups() if part)


def _unpacked_command(root: Path) -> tuple[str, ...]:
    """Command line for a QEMU whose packages were unpacked in ``root``."""
    usr = root / "usr"
    return (
        str(usr / "lib64/ld-linux-x86-64.so.2"),
        "--library-path",
        str(usr / "lib/x86_64-linux-gnu"),
        str(usr / "bin" / PROGRAM),
        *("-L", str(usr / "share/qemu"), "-L", str(usr / "share/seabios")),
    )


def _unpack(package: Package, root: Path) -> None:
    """Download the package with all it needs and unpack it into ``root``."""
    say(f"downloading QEMU {package.version} from {package.archive.suites[-1]} (about 40 MB)")
    files = package.archive.download_closure(package)
    # Merged /usr, as in the archive's own base system: some packages still carry /lib and /lib64.
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / name).mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(f"usr/{name}")
    say(f"unpacking {len(files)} packages")
    for file in files:
        # tar keeps the links above; dpkg-deb -x would replace them
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as reader:
            command = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)]
            done = subprocess.run(command, check=False, stdin=reader.stdout, capture_output=True, text=True)
        if done.returncode or reader.returncode:
            raise LabError(f"cannot unpack {file.name}: {done.stderr}")
        file.unlink()


def _newest_unpacked() -> Qemu | None:
    folders = [folder for folder in cache("qemu").glob("[0-9]*") if is_finished(folder)]
    for folder in sorted(folders, key=lambda folder: upstream(folder.name), reverse=True):
        command = _unpacked_command(folder)
        if version := _version(command):
            return Qemu(command, version)
    return None


def ensure_qemu() -> Qemu:
    """The system's QEMU if it is new enough, else an unpacked one, fetched if need be."""
    system = shutil.which(PROGRAM)
    if system and _version((system,)) >= MINIMUM:
        return Qemu((system,), _version((system,)))
    if known := _newest_unpacked():
        return known
    with locked("qemu"):
        if known := _newest_unpacked():
            return known
        for archive in archives():
            package = next(iter(archive.find("qemu-system-x86")), None)
            if package is None or upstream(package.version) < MINIMUM:
                continue
            folder = cache("qemu", package.version.split(":")[-1])
            with finished_folder(folder) as root:
                _unpack(package, root)
                if not _version(_unpacked_command(root)):
                    raise LabError(f"the QEMU unpacked from {package.archive.suites[-1]} does not run")
            return Qemu(_unpacked_command(folder), _version(_unpacked_command(folder)))
    raise LabError(f"no suite of the mirror has QEMU {MINIMUM[0]}.{MINIMUM[1]} or newer: install one by hand")
