"""On a free-threaded interpreter no module of vfiopy switches the GIL back on."""

from __future__ import annotations

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
import vfiopy

def walk(package):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name in {"vfiopy.__main__", "vfiopy.pytest_plugin"} or module.name.startswith("vfiopy.cli"):
            continue  # a program; what needs an extra
        importlib.import_module(module.name)

walk(vfiopy)
assert {"vfiopy._native", "vfiopy._shim"} <= set(sys.modules), sorted(sys.modules)
sys.exit(sys._is_gil_enabled())
"""


def test_the_gil_stays_off() -> None:
    # In a process of its own, because a package of the test runner might have switched it on.
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "importing vfiopy switched the GIL on"
