"""Build description of vfiopy._shim (cffi API mode); setup.py names it in cffi_modules."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(Path("native/shim/shim.cdef.h").read_text(encoding="utf-8"))
ffibuilder.set_source(
    "vfiopy._shim",
    '#include "shim/shim.h"\n',
    sources=["native/shim/shim.c"],
    depends=[str(path) for folder in ("region", "shim") for path in sorted(Path("native", folder).iterdir())],
    include_dirs=["native"],
    extra_compile_args=["-std=gnu11", "-Wall", "-Wextra", "-fvisibility=hidden", "-O2"],
)
