#!/usr/bin/env python3
"""Drive QEMU's edu device: liveness, a factorial with an interrupt, DMA both ways.

    python examples/edu.py emulated:edu         # anywhere, no privileges
    python examples/edu.py 0000:00:04.0         # a function that is bound to vfio-pci, as in the lab's guest

The same code drives both.
"""

from __future__ import annotations

import argparse
import math
import sys
import time

import numpy as np

import vfiopy
from vfiopy.drivers.edu import BUFFER_SIZE, EduDriver


def show(what: str, ok: bool, detail: str) -> bool:
    """Print one line of the report; return ``ok``."""
    print(f"  {'ok' if ok else 'FAILED':<8}{what:<12}{detail}")
    return ok


def check_liveness(edu: EduDriver) -> bool:
    """The device answers each value with its inverse."""
    values = (0, 1, 0x1234_5678, 0xFFFF_FFFF)
    answers = [edu.invert(value) for value in values]
    expected = [value ^ 0xFFFF_FFFF for value in values]
    return show("liveness", answers == expected, f"0x12345678 -> {answers[2]:#010x}")


def check_factorial(edu: EduDriver, number: int, how: str) -> bool:
    """The device computes a factorial and says when it is done."""
    begin = time.perf_counter()
    result = edu.factorial(number)
    took = (time.perf_counter() - begin) * 1e3
    expected = math.factorial(number) % 2**32
    return show("factorial", result == expected, f"{number}! = {result} by {how}, {took:.1f} ms")


def check_raise(edu: EduDriver) -> bool:
    """An interrupt that the driver asks for arrives, with its bits."""
    edu.raise_interrupt(0x42)
    status = edu.wait_interrupt()
    return show("interrupt", status == 0x42, f"raised 0x42, got {status:#x}")


def check_dma(edu: EduDriver, how: str) -> bool:
    """Memory → device → other memory, and nothing but what was asked for changes."""
    size = BUFFER_SIZE // 2
    dma = edu.device.dma
    with dma.allocate(size) as source, dma.allocate(2 * size) as target:
        source[:] = np.random.default_rng().integers(0, 256, size, dtype="u1")
        target[:] = 0xEE
        begin = time.perf_counter()
        edu.load(source.iova, size)
        edu.store(target.iova + size // 2, size)
        took = (time.perf_counter() - begin) * 1e3
        same = np.array_equal(source, target[size // 2 : size // 2 + size])
        clean = bool((target[: size // 2] == 0xEE).all() and (target[size // 2 + size :] == 0xEE).all())
        where = f"{source.iova:#x} -> device -> {target.iova + size // 2:#x}"
        return show("DMA", same and clean, f"{size} bytes {where} by {how}, {took:.1f} ms")


def main() -> int:
    """Run all checks; return the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="emulated:edu, or the PCI address of an edu bound to vfio-pci")
    parser.add_argument("--backend", help="iommufd, type1v2, ...; the best one by default")
    options = parser.parse_args()

    with vfiopy.open(options.target, backend=options.backend) as device:
        edu = EduDriver(device)
        major, minor = edu.version
        print(f"{device.name}: edu {major}.{minor}, reached through {device.backend}")
        device.bus_master = True  # for MSI and DMA; open() never does that by itself
        results = [check_liveness(edu), check_factorial(edu, 12, "polling"), check_dma(edu, "polling")]
        for kind in ("msi", "intx"):
            edu.enable_interrupts(kind)
            name = {"msi": "MSI", "intx": "INTx"}[kind]
            results += [check_factorial(edu, 10, name), check_raise(edu), check_dma(edu, name)]
            edu.disable_interrupts()

    failed = results.count(False)
    print(f"{len(results) - failed} of {len(results)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except vfiopy.VfiopyError as error:
        sys.exit(f"error: {error}")
