#!/usr/bin/env python3
"""Name a device's registers: a SystemRDL file read by vfiopy, and a package that PeakRDL-python makes of it.

    python examples/registers.py emulated:edu         # anywhere, no privileges
    python examples/registers.py 0000:00:04.0         # an edu that is bound to vfio-pci, as in the lab's guest

It takes pip install 'vfiopy[rdl]' peakrdl-python. The generated package goes into a temporary folder.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import vfiopy
from vfiopy import registers

RDL = Path(__file__).with_name("edu.rdl")


def factorial_by_names(device: vfiopy.Device, number: int) -> int:
    """vfiopy's own map: nothing to generate. A name reads nothing before read() is called."""
    edu = registers.load(RDL).on(device.bars[0])
    print(edu.identification, "reads", edu.identification.decode(edu.identification.read()))
    edu.status.irq_when_done.write(0)  # one read, one write; the other fields stay as they are
    edu.factorial.write(number)
    while edu.status.computing.read():
        time.sleep(0.001)
    return int(edu.factorial.read())


def factorial_by_package(device: vfiopy.Device, number: int, package: Any) -> int:
    """The same with what PeakRDL-python generated, unchanged: it calls back for each access."""
    edu = package.reg_model.RegModel(
        callbacks=registers.peakrdl_callbacks(device.bars[0], package.lib.NormalCallbackSet)
    )
    edu.factorial.value.write(number)
    while edu.status.computing.read():
        time.sleep(0.001)
    return int(edu.factorial.value.read())


def generate(folder: str) -> Any:
    """Make a package of the map and import it."""
    from peakrdl_python import PythonExporter  # noqa: PLC0415  only this part of the example needs it
    from systemrdl import RDLCompiler  # noqa: PLC0415

    compiler = RDLCompiler()
    compiler.compile_file(str(RDL))
    PythonExporter().export(compiler.elaborate().top, folder, skip_test_case_generation=True)
    sys.path.insert(0, folder)
    try:
        return type("package", (), {name: import_module(f"edu.{name}") for name in ("lib", "reg_model")})
    finally:
        sys.path.remove(folder)


def main() -> int:
    """Compute a factorial in both ways; return the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="emulated:edu, or the PCI address of an edu bound to vfio-pci")
    options = parser.parse_args()
    with vfiopy.open(options.target) as device, tempfile.TemporaryDirectory() as folder:
        answers = [factorial_by_names(device, 10), factorial_by_package(device, 12, generate(folder))]
    print(f"10! = {answers[0]} by names, 12! = {answers[1]} by the generated package")
    return 0 if answers == [3628800, 479001600] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except vfiopy.VfiopyError as error:
        sys.exit(f"error: {error}")
