"""A small kernel header for the tests of tools/uapi, and that tool's modules."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("pycparser", reason="tools/uapi needs pycparser, which cffi brings")
if shutil.which("cc") is None or not Path("/usr/include/linux/types.h").exists():
    pytest.skip("tools/uapi needs a C compiler and linux/types.h", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from _uapi import choices, compare, judge, main, model, read, render, second

__all__ = [
    "SAMPLE",
    "choices",
    "compare",
    "facts_of",
    "judge",
    "main",
    "make_headers",
    "model",
    "read",
    "render",
    "second",
    "with_more",
]

SAMPLE = """
#ifndef SAMPLE_H
#define SAMPLE_H
#include <linux/types.h>
#include <linux/ioctl.h>
#define VFIO_KIND (';')
#define VFIO_FLAG_ONE (1 << 0)
#define VFIO_FLAG_FIVE (1 << 5)
#define VFIO_WIDE 0xfedcba9876543210ULL
#define VFIO_CALL(x) (x)
#define VFIO_DO_IT _IO(VFIO_KIND, 100 + 13)
#define VFIO_DO_MORE _IOWR('b', 3, struct vfio_outer)
enum { VFIO_FIRST, VFIO_SECOND = 17, VFIO_THIRD, };
enum vfio_named { VFIO_NAMED = 3 };
struct vfio_inner { __u16 id; __u16 version; __u32 next; };
struct vfio_outer {
    struct vfio_inner header;
    union { __u32 group_id; __s32 devid; };
    __u8 bus;
    __u64 size __attribute__((aligned(8)));
    __u32 idr[6];
    char name[5];
    __u64 *data;
};
struct vfio_tail { __u32 argsz; __u32 count; struct vfio_inner list[]; };
struct vfio_bytes { __u32 argsz; __u8 data[]; };
#endif
"""


def with_more(declaration: str, text: str = SAMPLE) -> str:
    """Return the sample with one more declaration."""
    return text.replace("#endif", f"{declaration}\n#endif")


def make_headers(folder: Path, text: str = SAMPLE, version: tuple[int, int] = (7, 3)) -> Path:
    """Make a folder of kernel headers with the given text as linux/vfio.h."""
    include = folder / f"include-{version[0]}.{version[1]}"
    (include / "linux").mkdir(parents=True, exist_ok=True)
    (include / "linux/vfio.h").write_text(text)
    code = version[0] << 16 | version[1] << 8 | 4
    (include / "linux/version.h").write_text(f"#define LINUX_VERSION_CODE {code}\n")
    return include


def facts_of(include: Path) -> model.Facts:
    """Return what the first reader and the compiler make of the sample."""
    names = read.read_names("cc", include, "vfio.h")
    return judge.judge("cc", include, read.kernel_version("cc", include), [names])
