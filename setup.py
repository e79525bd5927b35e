"""Extension modules; everything declarative is in pyproject.toml."""

import os
import shlex
import subprocess
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup

# A free-threaded interpreter has no limited API before 3.15: it gets a build of its own.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-fvisibility=hidden"]
# The layers of native/ are files of their own, and most of their functions are small: a call costs as much as its work.
ACROSS_FILES = ["-O2", "-flto=auto"]


def _compiles(flags: list[str]) -> bool:
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text("int probe(void) { return 0; }\n")
        command = [*shlex.split(compiler), "-shared", "-fPIC", *flags, str(source), "-o", str(Path(folder, "probe.so"))]
        try:
            return subprocess.run(command, capture_output=True, check=False).returncode == 0
        except OSError:
            return False  # the build will say that there is no compiler


native_sources = sorted(
    str(path) for folder in ("ext", "iova", "region", "wire") for path in Path("native", folder).glob("*.c")
)
native_headers = sorted(str(path) for path in Path("native").rglob("*.h"))
optimize = ACROSS_FILES if _compiles(ACROSS_FILES) else ["-O2"]

setup(
    ext_modules=[
        Extension(
            "vfiopy._native",
            sources=native_sources,
            depends=native_headers,
            include_dirs=["native"],
            define_macros=[] if FREE_THREADED else [("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=[*WARNINGS, *optimize],
            extra_link_args=optimize,
            py_limited_api=not FREE_THREADED,
        )
    ],
    cffi_modules=["native/shim/build_shim.py:ffibuilder"],
)
