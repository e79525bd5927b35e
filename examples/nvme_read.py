#!/usr/bin/env python3
"""Drive an NVMe controller from Python: read what the kernel's own driver wrote, check every byte, write and read back.

    sudo python examples/nvme_read.py 0000:00:06.0
    python examples/nvme_read.py emulated:nvme           # no hardware, no root: or vfio-user:PATH

In four steps: the kernel's nvme driver writes a pattern to the disk; the function is handed to vfio-pci; this script
resets the controller, makes its queues, reads the pattern and writes one of its own; the function goes back, and the
kernel reads that. THE DISK IS OVERWRITTEN from --offset on. A disk that is in use or not blank is refused.

The steps can be run one by one: --only prepare, --only run, --only verify. Of a controller that is software the kernel
knows nothing: there is one step, in which this script's driver writes and reads.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import vfiopy
from vfiopy.drivers import nvme

NVME_CLASS = 0x010802
BLANK_BYTES = 1 << 20
PIECE = 256 << 10
Bytes = NDArray[np.uint8]


class StopError(Exception):
    """It cannot go on: what was asked for would harm something, or a byte is wrong."""


def pattern(seed: int, whose: str, size: int) -> bytes:
    """Bytes that nobody else writes by chance, the same for the same seed."""
    return hashlib.shake_128(f"vfiopy {whose} {seed}".encode()).digest(size)


# --- through the kernel's driver ---------------------------------------------------------------------------------


def kernel_disk(address: str, timeout: float = 30.0) -> Path:
    """Find the block device of namespace 1 of a controller that the kernel drives; its driver may have just come."""
    folder = Path("/sys/bus/pci/devices") / address / "nvme"
    deadline = time.monotonic() + timeout
    while True:
        for nsid in sorted(folder.glob("nvme*/nvme*n*/nsid")):
            if nsid.read_text().strip() == "1":
                # with multipath the controller shows nvme0c1n1, a path to the disk nvme0n1
                subsystem, _, namespace = nsid.parent.name.partition("c")
                disk = Path("/dev") / (f"{subsystem}n{namespace.partition('n')[2]}" if namespace else subsystem)
                if disk.exists():
                    return disk
        if time.monotonic() > deadline:
            raise StopError(f"{address} has no namespace 1 in the kernel's hands; is its driver nvme?")
        time.sleep(0.05)


def open_disk(disk: Path, flags: int, *, force: bool) -> int:
    """Open a disk that nobody uses: the kernel refuses O_EXCL for one that is mounted, swap, or part of something."""
    try:
        return os.open(disk, flags | os.O_CLOEXEC | (0 if force else os.O_EXCL))
    except OSError as error:
        why = f"{disk} cannot be opened: {error.strerror}; --force opens a disk that is in use"
        raise StopError(why) from error


def check_blank(fd: int, disk: Path, ours: list[tuple[int, bytes]]) -> None:
    """Refuse a disk with partitions, or with anything but zeroes and our own patterns where it would be overwritten."""
    if list(Path("/sys/class/block").glob(f"{disk.name}p*")):
        raise StopError(f"{disk} has partitions; --force overwrites it all the same")
    if any(os.pread(fd, BLANK_BYTES, 0)):
        raise StopError(f"{disk} is not blank: its first MiB holds data; --force overwrites it all the same")
    for offset, data in ours:
        found = os.pread(fd, len(data), offset)
        if any(found) and found != data:
            raise StopError(f"{disk} is not blank at byte {offset}; --force overwrites it all the same")


def prepare(arguments: argparse.Namespace) -> None:
    """Write the kernel's pattern through the kernel's own driver."""
    disk = kernel_disk(arguments.address)
    theirs, ours = patterns(arguments)
    fd = open_disk(disk, os.O_RDWR, force=arguments.force)
    try:
        if not arguments.force:
            check_blank(fd, disk, [theirs, ours])
        confirm(arguments, disk)
        offset, data = theirs
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    print(f"prepare  the kernel wrote {len(data) >> 10} KiB to {disk} at byte {offset}")


def verify(arguments: argparse.Namespace) -> None:
    """Read through the kernel's own driver what this script's driver wrote."""
    disk = kernel_disk(arguments.address)
    fd = open_disk(disk, os.O_RDONLY, force=arguments.force)
    try:
        for whose, (offset, data) in zip(("its own", "our"), patterns(arguments), strict=True):
            compare(np.frombuffer(os.pread(fd, len(data), offset), np.uint8), data, f"the kernel read {whose} pattern")
    finally:
        os.close(fd)


def confirm(arguments: argparse.Namespace, disk: Path) -> None:
    """Ask before anything is overwritten."""
    if arguments.yes:
        return
    if not sys.stdin.isatty():
        raise StopError(f"{disk} would be overwritten; say --yes")
    if input(f"overwrite {disk} from byte {arguments.offset} on? [y/N] ").strip().lower() not in ("y", "yes"):
        raise StopError("nothing was done")


# --- through this script's driver --------------------------------------------------------------------------------


def is_software(address: str) -> bool:
    """Whether the controller is a Python object or behind a socket: no function that the kernel has."""
    return address.startswith(("emulated:", "vfio-user:"))


@contextmanager
def opened(arguments: argparse.Namespace) -> Iterator[vfiopy.Device]:
    """Hand the function to vfio-pci where it is one, open it, and hand it back."""
    if is_software(arguments.address):
        with vfiopy.open(arguments.address) as device:
            yield device
    else:
        with (
            vfiopy.bind(arguments.address, force=arguments.force),
            vfiopy.open(arguments.address, backend=arguments.backend) as device,
        ):
            yield device


def run(arguments: argparse.Namespace) -> None:
    """Drive the controller: read what the kernel wrote, and write."""
    with (
        opened(arguments) as device,
        nvme.Controller(device, interrupts=arguments.interrupts) as controller,
    ):
        info = controller.info
        print(f"run      {info.model} {info.serial}, NVMe {info.version}, by {device.backend}, {controller.interrupts}")
        disk = controller.namespace(1)
        print(f"         namespace 1: {disk.blocks} blocks of {disk.block_size} bytes; a command moves "
              f"{controller.max_transfer >> 10} KiB at most")  # fmt: skip
        theirs, ours = patterns(arguments)
        if not is_software(arguments.address):
            compare(read(device, disk, *extent(disk, theirs)), theirs[1], "we read the kernel's pattern")
        # Bus-addressable memory: the controller reads and writes it by itself, nothing is copied.
        with device.dma.allocate(len(ours[1])) as buffer:
            buffer[:] = np.frombuffer(ours[1], np.uint8)
            disk.write(ours[0] // disk.block_size, buffer)
            disk.flush()
        compare(read(device, disk, *extent(disk, ours)), ours[1], "we read back our pattern")


def extent(disk: nvme.Namespace, what: tuple[int, bytes]) -> tuple[int, int]:
    """First block and number of blocks of a pattern."""
    offset, data = what
    if offset % disk.block_size or len(data) % disk.block_size or offset + len(data) > disk.info.size:
        raise StopError(f"{len(data)} bytes at byte {offset} are not whole blocks of {disk.block_size} on the disk")
    return offset // disk.block_size, len(data) // disk.block_size


def read(device: vfiopy.Device, disk: nvme.Namespace, lba: int, count: int) -> Bytes:
    """Read blocks piece by piece through one small buffer, as a script would that has little memory."""
    pieces = []
    with device.dma.allocate(PIECE) as buffer:
        step = PIECE // disk.block_size
        for first in range(lba, lba + count, step):
            blocks = min(step, lba + count - first)
            part = buffer[: blocks * disk.block_size]
            disk.read(first, into=part)
            pieces.append(np.array(part, subok=False))
    return np.concatenate(pieces)


def compare(found: Bytes, expected: bytes, what: str) -> None:
    """Check every byte, and say where the first wrong one is."""
    wrong = np.flatnonzero(found != np.frombuffer(expected, np.uint8))
    if wrong.size:
        raise StopError(f"{what}: {wrong.size} of {len(expected)} bytes are wrong, the first at {wrong[0]:#x}")
    print(f"ok       {what}: {len(expected) >> 10} KiB, every byte")


# --- the command line --------------------------------------------------------------------------------------------


def patterns(arguments: argparse.Namespace) -> tuple[tuple[int, bytes], tuple[int, bytes]]:
    """What the kernel writes and what we write, each as (byte offset, data): one behind the other."""
    size = arguments.kib << 10
    return (
        (arguments.offset, pattern(arguments.seed, "kernel", size)),
        (arguments.offset + size, pattern(arguments.seed, "driver", size)),
    )


def parse(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("address", metavar="BDF", help="the controller, 0000:00:06.0 or emulated:nvme for instance")
    parser.add_argument("--only", choices=("prepare", "run", "verify"), help="one step; default: all three")
    parser.add_argument("--seed", type=int, default=1, help="of the patterns (default: %(default)s)")
    parser.add_argument("--kib", type=int, default=1024, help="size of each pattern in KiB (default: %(default)s)")
    parser.add_argument("--offset", type=int, default=BLANK_BYTES, help="first byte (default: %(default)s)")
    parser.add_argument("--backend", help="iommufd, type1v2, ... (default: the best that there is)")
    parser.add_argument(
        "--interrupts", choices=("msix", "msi", "intx", "polling"), help="default: the best that there is"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask before overwriting a blank disk")
    parser.add_argument("--force", action="store_true", help="overwrite a disk that holds data or is in use")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run the steps."""
    arguments = parse(words)
    try:
        if is_software(arguments.address):
            if arguments.only not in (None, "run"):
                raise StopError(f"the kernel does not drive {arguments.address}: there is --only run")
            run(arguments)
            return 0
        function = vfiopy.function(arguments.address)
        if function.class_code != NVME_CLASS:
            raise StopError(f"{arguments.address} is not an NVMe controller, its class is {function.class_code:06x}")
        for name, step in (("prepare", prepare), ("run", run), ("verify", verify)):
            if arguments.only in (None, name):
                step(arguments)
    except (StopError, vfiopy.VfiopyError) as error:
        print(f"nvme_read: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
