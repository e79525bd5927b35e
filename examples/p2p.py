#!/usr/bin/env python3
"""Have an NVMe controller read its disk straight into another device's memory, and write from it: peer to peer.

    sudo python examples/p2p.py 0000:00:06.0 0000:00:07.0

The first function is the controller, the second a device with a large memory BAR: ivshmem, a GPU, an NVMe controller
with a controller memory buffer. No byte passes through the host's memory on the way. The contents are compared byte for
byte through the BAR and through an ordinary read. THE DISK IS OVERWRITTEN from --offset on; blocks that are not blank
are refused. Both devices have to be behind an IOMMU; Linux 6.19 or later.
"""

from __future__ import annotations

import argparse
import hashlib
import mmap
import sys

import numpy as np
from numpy.typing import NDArray

import vfiopy
from vfiopy.backend import RegionFlag
from vfiopy.drivers import nvme

Bytes = NDArray[np.uint8]
PAGE = mmap.PAGESIZE


class StopError(Exception):
    """It cannot go on: what was asked for would harm something, or a byte is wrong."""


def pattern(name: str, size: int) -> Bytes:
    """Bytes that nobody else writes by chance."""
    return np.frombuffer(hashlib.shake_128(f"vfiopy p2p {name}".encode()).digest(size), np.uint8)


def choose_bar(device: vfiopy.Device) -> int:
    """The largest BAR that can be mapped."""
    sizes = {n: device.bars.info(n).size for n in range(6) if RegionFlag.MMAP in device.bars.info(n).flags}
    if not sizes:
        raise StopError(f"{device.name} has no memory BAR that can be mapped")
    return max(sizes, key=lambda number: sizes[number])


def compare(found: Bytes, expected: Bytes, what: str) -> None:
    """Check every byte, and say where the first wrong one is."""
    wrong = np.flatnonzero(np.asarray(found) != expected)
    if wrong.size:
        raise StopError(f"{what}: {wrong.size} of {expected.size} bytes are wrong, the first at {wrong[0]:#x}")
    print(f"ok       {what}: {expected.size >> 10} KiB, every byte")


def run(arguments: argparse.Namespace) -> None:
    """Both ways, with both devices in this process."""
    with (
        vfiopy.bind(arguments.controller),
        vfiopy.bind(arguments.target),
        vfiopy.open(arguments.target) as target,
        vfiopy.open(arguments.controller, backend="iommufd") as device,
        nvme.Controller(device) as controller,
    ):
        bar = target.bars[choose_bar(target) if arguments.bar is None else arguments.bar]
        size = min(arguments.kib << 10, bar.size) & -PAGE
        if not size:
            raise StopError(f"{bar.name} has {bar.size} bytes, less than a page")
        disk = controller.namespace(1)
        first, blocks = arguments.offset // disk.block_size, size // disk.block_size
        print(f"run      {controller.info.model} with {disk.blocks} blocks of {disk.block_size} bytes; {bar!r}")
        check_blank(disk, first, blocks, force=arguments.force)
        with device.space.peer(bar, size=size) as peer, device.dma.allocate(size) as host:
            for path in peer.paths:
                print(f"         {path}")
            memory = peer.array()
            # 1. Disk to BAR: what is on the disk got there by an ordinary write.
            host[:] = pattern("disk", size)
            disk.write(first, host)
            memory[:] = 0
            disk.read(first, into=memory)
            compare(memory, pattern("disk", size), "disk to BAR")
            # 2. BAR to disk, and back by an ordinary read.
            memory[:] = pattern("BAR", size)
            disk.write(first, memory)
            disk.flush()
            host[:] = 0
            disk.read(first, into=host)
            compare(host, pattern("BAR", size), "BAR to disk")
            # 3. The target takes its memory away: the mapping is dead, says so, and comes back.
            target.memory_enabled = False
            target.memory_enabled = True
            try:
                disk.read(first, into=memory)
            except vfiopy.RevokedError as error:
                print(f"ok       a dead mapping is refused: {error.meaning}")
            else:
                raise StopError("the dead mapping was used")
            peer.remap()
            memory[:] = 0
            disk.read(first, into=memory)
            compare(memory, pattern("BAR", size), "disk to BAR again, after the target took its memory away")
            del memory
            host[:] = 0
            disk.write(first, host)


def check_blank(disk: nvme.Namespace, first: int, blocks: int, *, force: bool) -> None:
    """Refuse to overwrite what is not ours."""
    found = disk.read(first, blocks)
    ours = [np.zeros_like(found), pattern("disk", found.size), pattern("BAR", found.size)]
    if not force and not any(np.array_equal(found, one) for one in ours):
        raise StopError(f"the disk is not blank from block {first} on; --force overwrites it all the same")


def parse(words: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("controller", metavar="NVME", help="the controller, 0000:00:06.0 for instance")
    parser.add_argument("target", metavar="TARGET", help="the device whose BAR is the target")
    parser.add_argument("--bar", type=int, help="which BAR (default: the largest that can be mapped)")
    parser.add_argument("--kib", type=int, default=1024, help="how much, KiB (default: %(default)s)")
    parser.add_argument("--offset", type=int, default=4 << 20, help="first byte on the disk (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="overwrite blocks that hold data")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Run it."""
    try:
        run(parse(words))
    except (StopError, vfiopy.VfiopyError) as error:
        # Where a wrong byte ended it, the array that held it still looks at the device, which then does not close.
        reason = error.__context__ if isinstance(error.__context__, StopError) else error
        print(f"p2p: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
