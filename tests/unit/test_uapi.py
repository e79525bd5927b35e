"""The generated declarations against real kernel headers: every size, offset, constant and ioctl number.

The proof does not go through the generator: a C program is made from what vfiopy.uapi says, and the
compiler that sees the kernel's headers answers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vfiopy import uapi
from vfiopy.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
HEADER = ROOT / "native/uapi/vfiopy_uapi.h"
KERNEL_HEADERS = ("vfio.h", "iommufd.h", "dma-buf.h", "dma-heap.h", "udmabuf.h", "sync_file.h")
SYSTEM = Path("/usr/include")

LAYOUTS = {name: value for name, value in vars(uapi).items() if isinstance(value, Layout)}
CONSTANTS = {
    name: value for name, value in vars(uapi).items() if isinstance(value, int) and name.isidentifier()
}

# C gives these two a negative int; restated as the 32-bit pattern that a __u32 field holds.
NEGATIVE = {"VFIO_REGION_TYPE_PCI_VENDOR_TYPE", "VFIO_PCI_DEVID_NOT_OWNED"}
# The only real pointers; everything else is an address in a __u64.
POINTERS = {"vfio_bitmap.data", "vfio_iommu_type1_dirty_bitmap_get.bitmap_data"}
# One past the last of an enumeration: smaller in an older kernel.
COUNTS = {"VFIO_PCI_NUM_IRQS", "VFIO_DEVICE_STATE_NR"}

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")


def lab_headers() -> Path:
    """Find the headers of the lab's kernel, or skip."""
    if named := os.environ.get("VFIOPY_LAB_HEADERS"):
        return Path(named)
    lab = ROOT / "tools/lab"
    if lab.exists():
        # Only if the kernel is built: a unit test is not the place to start a build of minutes.
        command = [str(lab), "headers", "--cached"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode == 0 and run.stdout.strip():
            return Path(run.stdout.strip().splitlines()[-1])
    pytest.skip("no headers of the lab's kernel: set VFIOPY_LAB_HEADERS, or let tools/lab build the kernel")


def c_path(field: str) -> str:
    """Return the C designator of a field: a structure inside a structure is flattened with an underscore."""
    return re.sub(r"^(header|bitmap)_", r"\1.", field)


def statements() -> dict[str, str]:
    """Return a C statement for every fact, by ``name`` or ``struct.field``, that prints it."""
    made: dict[str, str] = {}
    for name in CONSTANTS:
        made[name] = f'printf("{name} %lld\\n", (long long)({name}));'
    for name, layout in LAYOUTS.items():
        made[name] = f'printf("{name} %zu\\n", sizeof(struct {name}));'
        for field in layout:
            path = c_path(field)
            member = f"((struct {name} *)0)->{path}"
            key = f"{name}.{field}"
            where = f"offsetof(struct {name}, {path})"
            if not layout.code(field):
                made[key] = f'printf("{key} %zu\\n", {where});'
            elif len(layout.code(field)) == 1 and key not in POINTERS:
                signed = f"(__typeof__({member}))-1 < 1"
                made[key] = f'printf("{key} %zu %zu %d\\n", {where}, sizeof({member}), {signed});'
            else:
                made[key] = f'printf("{key} %zu %zu\\n", {where}, sizeof({member}));'
    return made


def ask(tmp_path: Path, include: Path, *, drop_unknown: bool) -> dict[str, list[int]]:
    """Compile and run the statements; with ``drop_unknown``, without those the headers know nothing about."""
    wanted = statements()
    source, program = tmp_path / "probe.c", tmp_path / "probe"
    present = [header for header in KERNEL_HEADERS if (include / "linux" / header).exists()]
    for _ in range(4):
        lines = ["#define _GNU_SOURCE", "#include <fcntl.h>", "#include <stddef.h>", "#include <stdio.h>"]
        lines += [f"#include <linux/{header}>" for header in present]
        lines += ["int main(void) {"]
        for key, statement in wanted.items():
            lines += [f'#line 1 "{key}"', statement]
        source.write_text("\n".join([*lines, "return 0; }", ""]))
        command = ["cc", "-w", "-fmax-errors=0", f"-I{include}", "-o", str(program), str(source)]
        # The C locale: the answer is searched for the word "error".
        spoken = {**os.environ, "LC_ALL": "C"}
        built = subprocess.run(command, capture_output=True, text=True, check=False, env=spoken)
        if built.returncode == 0:
            break
        unknown = set(re.findall(r"^([\w.]+):1:\d+: error", built.stderr, re.MULTILINE))
        assert drop_unknown, f"the headers do not know {sorted(unknown)}:\n{built.stderr[:2000]}"
        assert unknown & wanted.keys(), built.stderr[:2000]
        wanted = {key: value for key, value in wanted.items() if key not in unknown}
    else:
        pytest.fail(built.stderr[:2000])
    run = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    answers = (line.split() for line in run.stdout.splitlines())
    return {key: [int(word) for word in words] for key, *words in answers}


def expected_field(layout: Layout, field: str) -> list[int]:
    """Return offset, width and signedness as the C program prints them."""
    code = layout.code(field)
    facts = [layout.offset(field)]
    if code:
        facts.append(layout.width(field))
    if len(code) == 1 and f"{layout.name}.{field}" not in POINTERS:
        facts.append(int(code.islower()))
    return facts


def kernel_of(include: Path) -> tuple[int, int]:
    """Return the version of the kernel that the headers come from."""
    code = re.search(r"LINUX_VERSION_CODE (\d+)", (include / "linux/version.h").read_text())
    assert code
    return int(code[1]) >> 16, int(code[1]) >> 8 & 0xFF


def contradictions(answers: dict[str, list[int]], kernel: tuple[int, int]) -> list[str]:
    """Compare the answers with vfiopy.uapi: all equal for its own kernel; others may be shorter or longer."""
    growth = (kernel > uapi.KERNEL_VERSION) - (kernel < uapi.KERNEL_VERSION)
    wrong: list[str] = []
    for name, value in CONSTANTS.items():
        if name in answers:
            answer = answers[name][0] & ((1 << (32 if name in NEGATIVE else 64)) - 1)
            grown = (answer > value) - (answer < value)
            if grown and not (name in COUNTS and grown == growth):
                wrong.append(f"{name} is {answer:#x}, not {value:#x}")
    for name, layout in LAYOUTS.items():
        size = answers.get(name, [layout.size])[0]
        if (size > layout.size) - (size < layout.size) not in (0, growth):
            wrong.append(f"{name} has {size} bytes, not {layout.size}")
        for field in layout:
            answer_of_field = answers.get(f"{name}.{field}", expected_field(layout, field))
            if answer_of_field != expected_field(layout, field):
                wrong.append(f"{name}.{field} is {answer_of_field}, not {expected_field(layout, field)}")
    return wrong


def test_every_fact_holds_for_the_labs_kernel(tmp_path: Path) -> None:
    include = lab_headers()
    kernel = kernel_of(include)
    # A kernel older than the one generated from may lack names; any other must know them all.
    answers = ask(tmp_path, include, drop_unknown=kernel < uapi.KERNEL_VERSION)
    assert contradictions(answers, kernel) == []
    if kernel >= uapi.KERNEL_VERSION:
        assert answers.keys() == statements().keys()
        assert len(CONSTANTS) > 250
        assert len(LAYOUTS) > 80


def test_the_systems_headers_do_not_contradict(tmp_path: Path) -> None:
    """What exists on both sides is the same, and structures only grow from older to newer."""
    if not (SYSTEM / "linux/vfio.h").exists():
        pytest.skip("no kernel headers in /usr/include")
    answers = ask(tmp_path, SYSTEM, drop_unknown=True)
    assert contradictions(answers, kernel_of(SYSTEM)) == []
    # Interfaces that every supported distribution's headers have: the test must not have dropped them.
    for name in OLD_STRUCTS:
        assert name in answers
    assert sum(name in answers for name in CONSTANTS) > 100


OLD_STRUCTS = (
    "vfio_device_info",
    "vfio_region_info",
    "vfio_irq_info",
    "vfio_irq_set",
    "vfio_pci_hot_reset_info",
    "vfio_iommu_type1_info",
    "vfio_iommu_type1_dma_map",
    "vfio_iommu_type1_dma_unmap",
    "vfio_device_feature",
    "dma_buf_sync",
    "dma_heap_allocation_data",
    "udmabuf_create",
    "sync_file_info",
)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("VFIO_GET_API_VERSION", 0x3B64),
        ("VFIO_DEVICE_SET_IRQS", 0x3B6E),
        ("VFIO_DEVICE_PCI_HOT_RESET", 0x3B71),
        ("VFIO_IOMMU_MAP_DMA", 0x3B71),
        ("VFIO_IOMMU_UNMAP_DMA", 0x3B72),
        ("VFIO_DEVICE_FEATURE", 0x3B75),
        ("VFIO_DEVICE_BIND_IOMMUFD", 0x3B76),
        ("IOMMU_DESTROY", 0x3B80),
        ("IOMMU_IOAS_MAP", 0x3B85),
        ("IOMMU_IOAS_MAP_FILE", 0x3B8F),
        ("DMA_BUF_IOCTL_SYNC", 0x40086200),
        ("DMA_HEAP_IOCTL_ALLOC", 0xC0184800),
        ("UDMABUF_CREATE", 0x40187542),
        ("SYNC_IOC_MERGE", 0xC0303E03),
    ],
)
def test_ioctl_numbers_of_the_documentation(name: str, number: int) -> None:
    assert CONSTANTS[name] == number


@pytest.mark.parametrize(
    ("number", "layout"),
    [
        (uapi.DMA_BUF_IOCTL_SYNC, uapi.dma_buf_sync),
        (uapi.DMA_BUF_IOCTL_EXPORT_SYNC_FILE, uapi.dma_buf_export_sync_file),
        (uapi.DMA_BUF_IOCTL_IMPORT_SYNC_FILE, uapi.dma_buf_import_sync_file),
        (uapi.DMA_HEAP_IOCTL_ALLOC, uapi.dma_heap_allocation_data),
        (uapi.UDMABUF_CREATE, uapi.udmabuf_create),
        (uapi.UDMABUF_CREATE_LIST, uapi.udmabuf_create_list),
        (uapi.SYNC_IOC_MERGE, uapi.sync_merge_data),
        (uapi.SYNC_IOC_FILE_INFO, uapi.sync_file_info),
        (uapi.SYNC_IOC_SET_DEADLINE, uapi.sync_set_deadline),
    ],
)
def test_encoded_numbers_carry_the_size_of_their_structure(number: int, layout: Layout) -> None:
    assert number >> 16 & 0x3FFF == layout.size


def test_all_is_complete_and_layouts_know_their_names() -> None:
    assert set(uapi.__all__) == {*CONSTANTS, *LAYOUTS, "KERNEL_VERSION"}
    assert [name for name, layout in LAYOUTS.items() if layout.name != name] == []
    assert uapi.KERNEL_VERSION >= (6, 19)


def test_the_module_says_it_is_generated() -> None:
    assert "Generated by ``tools/uapi``: do not edit" in (uapi.__doc__ or "")
    assert "Generated by tools/uapi: do not edit" in HEADER.read_text()


def test_nothing_of_the_kernels_text_is_in_the_header() -> None:
    """Each line is a number, a member of fixed width, an assertion or their frame: no macro, no comment."""
    allowed = (
        r"#define VFIOPY_\w+ (0x[0-9A-F]+u|0x[0-9A-F]+ull|\d+)",
        r"(    )+(u?int(8|16|32|64)_t|char|struct vfiopy_\w+) \w+(\[\d*\])?;",
        r"(struct vfiopy_\w+|(    )+(union|struct)) \{|(    )*\}( \w+)?;",
        r'_Static_assert\(sizeof\((void \*|struct vfiopy_\w+)\) == \d+, "[\w .-]+"\);',
        r'_Static_assert\(offsetof\(struct vfiopy_\w+, [\w.]+\) == \d+, "[\w.]+"\);',
        r"/\* linux/[\w-]+\.h \*/|#include <std(def|int)\.h>|#(ifndef|define) VFIOPY_UAPI_H|#endif|",
    )
    head, mark, body = HEADER.read_text().partition(" */\n")
    assert mark
    assert head.count("\n") < 6
    strange = [line for line in body.splitlines() if not any(re.fullmatch(form, line) for form in allowed)]
    assert strange == []


def compilers() -> list[str]:
    """Return the compilers at hand for the two supported machines."""
    return [name for name in ("gcc", "cc", "clang", "aarch64-linux-gnu-gcc") if shutil.which(name)]


def compile_c(compiler: str, source: str, *options: str) -> None:
    """Compile to nothing; every warning is an error."""
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{ROOT / 'native'}"]
    command += [*options, "-x", "c", "-c", "-o", "/dev/null", "-"]
    run = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[:3000]


def agreement() -> str:
    """Return C that states every fact of vfiopy.uapi about the names of the header."""
    lines = ['#include "uapi/vfiopy_uapi.h"']
    for name, value in CONSTANTS.items():
        lines.append(f'_Static_assert(VFIOPY_{name} == {value:#x}ull, "{name}");')
    for name, layout in LAYOUTS.items():
        tag = f"struct vfiopy_{name}"
        lines.append(f'_Static_assert(sizeof({tag}) == {layout.size}, "{name}");')
        for field in layout:
            where, path = layout.offset(field), c_path(field)
            lines.append(f'_Static_assert(offsetof({tag}, {path}) == {where}, "{name}.{path}");')
            if layout.code(field):
                width = f"sizeof((({tag} *)0)->{path})"
                lines.append(f'_Static_assert({width} == {layout.width(field)}, "{name}.{path}");')
    return "\n".join([*lines, "extern int vfiopy_nothing;", ""])


@pytest.mark.parametrize("compiler", compilers())
def test_header_and_module_agree_on_every_machine(compiler: str) -> None:
    compile_c(compiler, agreement())


def test_the_header_needs_no_kernel_header() -> None:
    command = ["cc", "-std=c11", "-M", str(HEADER)]
    needed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "stdint.h" in needed
    assert [header for header in KERNEL_HEADERS if f"linux/{header}" in needed] == []


def test_the_header_stands_beside_the_kernels() -> None:
    if not (SYSTEM / "linux/vfio.h").exists():
        pytest.skip("no kernel headers in /usr/include")
    present = [header for header in KERNEL_HEADERS if (SYSTEM / "linux" / header).exists()]
    lines = [f"#include <linux/{header}>" for header in present]
    compile_c("cc", "\n".join([*lines, agreement()]), "-Wno-pedantic")


def test_the_committed_files_are_what_the_tool_makes() -> None:
    pytest.importorskip("ctypesgen", reason="tools/uapi needs ctypesgen, of the dev extra")
    command = [sys.executable, str(ROOT / "tools/uapi"), "--check", "--headers", str(lab_headers())]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
