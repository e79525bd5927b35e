"""Extension modules; everything declarative is in pyproject.toml."""

import sysconfig
from pathlib import Path

from setuptools import Extension, setup

# A free-threaded interpreter has no limited API before 3.15: it gets a build of its own.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-fvisibility=hidden"]

native_sources = sorted(
    str(path) for folder in ("ext", "iova", "region") for path in Path("native", folder).glob("*.c")
)
native_headers = sorted(str(path) for path in Path("native").rglob("*.h"))

setup(
    ext_modules=[
        Extension(
            "vfiopy._native",
            sources=native_sources,
            depends=native_headers,
            include_dirs=["native"],
            define_macros=[] if FREE_THREADED else [("Py_LIMITED_API", "0x030b0000")],
            extra_compile_args=[*WARNINGS, "-O2"],
            py_limited_api=not FREE_THREADED,
        )
    ],
    cffi_modules=["native/shim/build_shim.py:ffibuilder"],
)
