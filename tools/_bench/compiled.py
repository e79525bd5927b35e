"""The C that benchmarks are measured against: compiled when it is needed, with the system's compiler."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .registry import Unavailable

__all__ = ["build"]

HERE = Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "native"


@cache
def build(name: str) -> ctypes.CDLL:
    """Compile ``tools/_bench/c/NAME.c`` with -O2 and load it; its files are gone when this returns.

    Raises:
        Unavailable: there is no C compiler.
    """
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler.split()[0]) is None:
        raise Unavailable(f"there is no C compiler {compiler!r} for what vfiopy is compared with; set CC")
    with tempfile.TemporaryDirectory(prefix="vfiopy-bench-") as folder:
        library = Path(folder, f"{name}.so")
        flags = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", f"-I{NATIVE}"]
        subprocess.run([*compiler.split(), *flags, "-o", str(library), str(HERE / "c" / f"{name}.c")], check=True)
        return ctypes.CDLL(str(library))
